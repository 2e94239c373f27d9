# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The target's readings of texts from a store or from servers, in place of its body. Refuses to know drafters."""
