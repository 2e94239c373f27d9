# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The two trainers and the step they share. Knows every room below; refuses to decode, export or store by itself."""
