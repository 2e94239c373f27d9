# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Which blocks the drafter proposes and how far the target keeps them, live or replayed. Knows no losses."""
