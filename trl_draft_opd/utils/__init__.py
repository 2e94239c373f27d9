# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What every package may use: atomic file writes, loading, TRL's private names. Knows no method."""
