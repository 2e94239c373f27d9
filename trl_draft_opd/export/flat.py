# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The flat layout: one `config.json` and one safetensors file under the published names, at the root of a repository.

vLLM, SGLang and llama.cpp's converter read it for both families, EAGLE's own code for EAGLE-3, z-lab's for DFlash. A
training checkpoint has the same names in float32 and no embedding; here weights are bfloat16, and EAGLE-3 carries the
target's embedding, because some readers leave a missing one uninitialised.
"""

from typing import Any

import torch

from ..drafters.base import Drafter


def stored_weights(drafter: Drafter, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """
    Return the drafter's tensors under their published names, on the CPU.

    Args:
        drafter ([`Drafter`]): The drafter.
        dtype (`torch.dtype`): Precision of the weights; `d2t` stays int64 and `t2d` bool.

    Raises:
        ValueError: If a weight is not finite, or becomes infinite in `dtype`.
    """
    tensors = {}
    for name, tensor in drafter.state_dict().items():
        stored = tensor.detach().to("cpu")
        if stored.is_floating_point():
            stored = stored.to(dtype)
            if not torch.isfinite(stored).all():
                raise ValueError(
                    f"{name!r} holds values that are not finite in {dtype}. The drafter is damaged, or its weights are too large for "
                    "that precision; nothing was written."
                )
        tensors[name] = stored.contiguous().clone()
    return tensors


def flat_config(drafter: Drafter, *, target_id: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """
    Return the content of `config.json`.

    Args:
        drafter ([`Drafter`]): The drafter.
        target_id (`str` or `None`): Hub id of the target; a local path must not get here.
        dtype (`torch.dtype`): Precision of the stored weights.
    """
    name = str(dtype).removeprefix("torch.")
    return drafter.config.to_diff_dict() | {"dtype": name, "torch_dtype": name, "target_model_name_or_path": target_id}


def flat_tensors(drafter: Drafter, embedding: torch.Tensor | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """
    Return what `model.safetensors` holds.

    Args:
        drafter ([`Drafter`]): The drafter.
        embedding (`torch.Tensor` of shape `(V, H)` or `None`): The target's embedding, copied as it is; EAGLE-3 only.
        dtype (`torch.dtype`): Precision of the drafter's own weights.
    """
    tensors = stored_weights(drafter, dtype)
    if drafter.config.family == "eagle3":
        tensors["embed_tokens.weight"] = embedding.detach().to("cpu").contiguous().clone()
    return tensors
