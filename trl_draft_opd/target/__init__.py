# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The frozen target: read text, decode with a cache, score branches. Refuses to know drafters, losses and trainers."""
