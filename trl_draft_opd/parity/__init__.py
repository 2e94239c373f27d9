# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whether what was trained is what was published and what every consumer at hand decodes with (the command is `verify`).

Refuses to know trainers: it starts from the published files, and compares with a checkpoint as one more drafter.
"""

from .consumers import CONSUMERS
from .engines import EngineFailure
from .gate import verify_drafter
from .report import Row, VerificationReport
from .scene import EngineSettings


__all__ = ["CONSUMERS", "EngineFailure", "EngineSettings", "Row", "VerificationReport", "verify_drafter"]
