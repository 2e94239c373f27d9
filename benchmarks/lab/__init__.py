# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The laboratory: does Draft-OPD help, by how much, and which parts earn their keep."""
