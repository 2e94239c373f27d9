# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The two trainers and their configs."""
