# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Publishing a drafter: layouts for every engine, settings to serve it with, a card of what was measured, one push.

Refuses to know trainers and rollouts: it starts from a drafter, its target and a training record.
"""

from .publication import LAYOUTS, Publication
from .source import TargetOfExport, hub_id_of, read_target
from .write import PUBLISHED_NAMES, ExportResult, export_drafter


__all__ = [
    "LAYOUTS",
    "PUBLISHED_NAMES",
    "ExportResult",
    "Publication",
    "TargetOfExport",
    "export_drafter",
    "hub_id_of",
    "read_target",
]
