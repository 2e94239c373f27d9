# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What a training step costs, in bytes, FLOPs and seconds: arithmetic on shapes and settings, without any model."""
