# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""DSpark: DFlash whose slots also read the token before them, through a low-rank head."""

from .configuration_dspark import DSparkDraftConfig
from .modeling_dspark import DSparkDraftModel


__all__ = ["DSparkDraftConfig", "DSparkDraftModel"]
