# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Read public checkpoints of drafters, whatever layout they came in. Refuses to guess: what does not fit is an error.
"""
