# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The method as one would first write it: short, slow, without any fast path. What the fast paths are checked against.
"""
