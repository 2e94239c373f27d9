# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The demo: the whole method in minutes on a CPU, with a tiny target of its own or with a real one."""
