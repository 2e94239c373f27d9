# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Reads a LoRA adapter, and merges it into the drafter that it was trained on."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .base import Drafter
from .published.checkpoint import CONFIG_FILE, INDEX_FILE, SAFETENSORS_FILE, CheckpointSource


ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
# What training writes into a drafter's config about the target; an adapter's folder has it of the target it was
# trained for.
_ABOUT_THE_TARGET = ("target_model_name_or_path", "target_model_revision", "num_target_layers")


def require_peft(need: str) -> ModuleType:
    """Return the module `peft`, or raise an `ImportError` that begins with what needs it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{need} needs PEFT: `pip install trl-draft-opd[peft]`.") from error
    return peft


def is_adapter(source: CheckpointSource) -> bool:
    """Whether a checkpoint is a PEFT adapter and no drafter; one that is both is refused."""
    if source.find(ADAPTER_CONFIG_FILE) is None:
        return False
    both = [name for name in (SAFETENSORS_FILE, INDEX_FILE) if source.find(name) is not None]
    if both:
        raise ValueError(
            f"{str(source)!r} holds an adapter ({ADAPTER_CONFIG_FILE}) and a whole drafter ({both[0]}). Move one away."
        )
    return True


def read_adapted(
    source: CheckpointSource, load_base: Callable[[str], Drafter], *, base: str | Path | None, dtype: torch.dtype
) -> Drafter:
    """
    Load the drafter under an adapter, `base` or the one it names, and merge the adapter into it.

    `load_base` loads it in float32, in which the sum is taken; `dtype` is that of the result.
    """
    base = base or source.read_json(ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{ADAPTER_CONFIG_FILE} of {str(source)!r} names no `base_model_name_or_path`. Give its drafter as `base`."
        )
    peft = require_peft(f"Merging the adapter {str(source)!r}")
    weights = source.find(ADAPTER_WEIGHTS_FILE)
    if weights is None:
        raise FileNotFoundError(
            f"{str(source)!r} has no {ADAPTER_WEIGHTS_FILE}. Adapters are read from safetensors alone, because "
            "pickled ones can carry code: save it again with `save_pretrained`."
        )
    try:
        drafter = load_base(str(base))
    except OSError as error:
        raise FileNotFoundError(
            f"The adapter {str(source)!r} was trained on the drafter {str(base)!r}, which cannot be loaded: {error} "
            "Give it as `base`."
        ) from error
    # Of a repository, these are the files in the cache, which lie together.
    drafter = peft.PeftModel.from_pretrained(drafter, str(weights.parent)).merge_and_unload()
    if source.find(CONFIG_FILE) is not None:
        own = source.read_json(CONFIG_FILE)
        for name in filter(own.__contains__, _ABOUT_THE_TARGET):
            setattr(drafter.config, name, own[name])
    drafter.config.name_or_path = source.name_or_path
    drafter.config.dtype = dtype
    for parameter in drafter.parameters():
        parameter.requires_grad_(True).data = parameter.data.to(dtype)
    return drafter.eval()


def merge(adapted: Any) -> Drafter:
    """Return the drafter inside a [`~peft.PeftModel`] with its adapter merged in; the model given stays as it is."""
    return copy.deepcopy(adapted).merge_and_unload()
