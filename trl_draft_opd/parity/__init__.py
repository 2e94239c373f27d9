# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The parity gate: a published drafter held to its training, and every consumer at hand held to our reference loop."""

from .engines import EngineFailure, EngineSettings
from .gate import CONSUMERS, verify_drafter
from .report import Row, VerificationReport


__all__ = ["CONSUMERS", "EngineFailure", "EngineSettings", "Row", "VerificationReport", "verify_drafter"]
