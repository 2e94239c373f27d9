# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How a launch treats the drafter: what is refused, how weights and states are sharded and gathered. Knows no method."""
