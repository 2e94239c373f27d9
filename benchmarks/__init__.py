# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Speed, memory and the laboratory. A package with a file of its own, so that no other `benchmarks` hides it."""
