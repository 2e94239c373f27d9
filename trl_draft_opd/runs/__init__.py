# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What makes a training run last: checkpoints, state, the guard, stops, launches. Knows no method of training."""
