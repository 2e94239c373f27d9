# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The demo: the whole method in minutes on a CPU, without the Hub; or the same script on a real target."""
