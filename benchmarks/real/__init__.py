# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""A real public model from start to finish: fetched, answered by, read, drafted for, measured and published."""
