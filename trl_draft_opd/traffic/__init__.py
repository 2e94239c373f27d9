# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What serving leaves behind, as responses to train on: text that a lossless server committed is the target's own.

The logs are private. Nothing of their content is in an error, a warning, a report or the metadata of a store: what
cannot be used is counted by reason.
"""

from .importing import TrafficReport, import_traffic
from .served import ServedComparison, compare_served


__all__ = ["ServedComparison", "TrafficReport", "compare_served", "import_traffic"]
