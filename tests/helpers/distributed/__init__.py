# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What one process and two processes both run. Holds no test."""
