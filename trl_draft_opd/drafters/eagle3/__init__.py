# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""EAGLE-3: a recurrent one-layer drafter over fused target features."""

from .configuration_eagle3 import Eagle3DraftConfig
from .modeling_eagle3 import Eagle3DraftModel


__all__ = ["Eagle3DraftConfig", "Eagle3DraftModel"]
