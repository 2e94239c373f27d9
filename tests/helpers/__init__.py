# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What tests share: tiny models, oracles, readers of exports, stand-ins. Holds no test."""
