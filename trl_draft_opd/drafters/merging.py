# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Reads a LoRA adapter of a drafter, merged into the drafter that it was trained on."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from .base import Drafter
from .published.adapter import merge_adapter, read_adapter
from .published.checkpoint import CONFIG_FILE, CheckpointSource


# What training writes into a drafter's config about the target; an adapter's folder has it of the target it was
# trained for.
_ABOUT_THE_TARGET = ("target_model_name_or_path", "target_model_revision", "num_target_layers")


def merge_chain(drafter: Drafter, adapters: Sequence[CheckpointSource], *, dtype: torch.dtype) -> Drafter:
    """
    Merge adapters into the drafter they were trained on, the last of them first.

    The drafter is in float32, in which the sum is taken, and is used up; `dtype` is that of the result.
    """
    merged: Any = drafter
    for source in reversed(adapters):
        merged = merge_adapter(merged, read_adapter(source))
        own = source.read_json(CONFIG_FILE) if source.find(CONFIG_FILE) is not None else {}
        for name in filter(own.__contains__, _ABOUT_THE_TARGET):
            setattr(merged.config, name, own[name])
        merged.config.name_or_path = source.name_or_path
    merged.config.dtype = dtype
    merged.train_all()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    return merged.eval()


def merge(adapted: Any) -> Drafter:
    """Return the drafter inside a [`~peft.PeftModel`] with its adapter merged in; the model given stays as it is."""
    return copy.deepcopy(adapted).merge_and_unload()
