# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What every room may use: files that exist whole or not at all, loading, TRL's private names. Knows no method."""
