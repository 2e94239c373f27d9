# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How a launch treats the drafter: what it refuses, how it shards and gathers weights and states. Knows no method."""
