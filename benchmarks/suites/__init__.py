# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Suites of `benchmarks/run.py`: each has `run(args, report)`, proves its arms equal, then measures them."""
