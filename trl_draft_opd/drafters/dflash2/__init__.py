# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""DFlash 2: a DFlash with short convolutions in its blocks, and a selector among the likeliest tokens of each slot."""

from .configuration_dflash2 import DFlash2DraftConfig
from .modeling_dflash2 import DFlash2DraftModel


__all__ = ["DFlash2DraftConfig", "DFlash2DraftModel"]
