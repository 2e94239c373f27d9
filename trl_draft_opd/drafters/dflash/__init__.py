# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""DFlash: a parallel drafter that fills a block of masks from injected target features."""

from .configuration_dflash import DFlashDraftConfig
from .modeling_dflash import DFlashDraftModel


__all__ = ["DFlashDraftConfig", "DFlashDraftModel"]
