# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Every private name of TRL that this package uses, and nothing else: when TRL moves one, this file changes."""

from trl.models.utils import _ForwardRedirection, prepare_deepspeed  # noqa: TID251
from trl.trainer.base_config import _BaseConfig  # noqa: TID251
from trl.trainer.base_trainer import _BaseTrainer  # noqa: TID251
from trl.trainer.utils import create_model_from_path  # noqa: TID251


__all__ = ["_BaseConfig", "_BaseTrainer", "_ForwardRedirection", "create_model_from_path", "prepare_deepspeed"]
