# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Read public checkpoints of drafters, whatever their layout; what does not fit is an error."""
