# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The flat layout: one `config.json` and one safetensors file under the published names, at the root of a repository.

vLLM, SGLang and llama.cpp's converter read it for both families, EAGLE's own code for EAGLE-3, z-lab's for DFlash. A
training checkpoint has the same names in float32 and no embedding. Here weights are bfloat16, and EAGLE-3 carries the
target's embedding, because some readers leave a missing one uninitialised.
"""

from typing import Any

import torch

from ..drafters.base import Drafter
from .publication import Publication
from .source import TargetOfExport


def flat_config(drafter: Drafter, publication: Publication) -> dict[str, Any]:
    """Return the content of `config.json`; the other layouts' is made from it. No local path of the target gets in."""
    dtype = str(publication.dtype).removeprefix("torch.")
    own = {"dtype": dtype, "torch_dtype": dtype, "target_model_name_or_path": publication.target.hub_id}
    return drafter.config.to_diff_dict() | own


def flat_tensors(drafter: Drafter, publication: Publication) -> dict[str, torch.Tensor]:
    """
    Return what `model.safetensors` holds, on the CPU: the drafter's tensors under their published names, `d2t` in
    int64 and `t2d` in bool, and for EAGLE-3 the target's embedding as it is.

    Raises:
        ValueError: If a weight is not finite, or becomes infinite in the publication's precision.
    """
    tensors = {}
    for name, tensor in drafter.state_dict().items():
        stored = tensor.detach().to("cpu")
        if stored.is_floating_point():
            stored = stored.to(publication.dtype)
            if not torch.isfinite(stored).all():
                raise ValueError(
                    f"{name!r} holds values that are not finite in {publication.dtype}. The drafter is damaged, or "
                    "its weights are too large for that precision; nothing was written."
                )
        tensors[name] = stored.contiguous().clone()
    if publication.family == "eagle3":
        tensors["embed_tokens.weight"] = publication.target.embedding.detach().to("cpu").contiguous().clone()
    return tensors


def find_refusal(drafter: Drafter, target: TargetOfExport) -> str | None:
    """Return why a drafter cannot be written for engines, in this layout or the speculators one, or `None`."""
    if target.embedding_scale is not None:
        return (
            f"the target scales its embeddings ({target.embedding_scale}), and the drafter was trained on scaled "
            "ones, but engines hand it the bare rows"
        )
    if drafter.config.family == "eagle3" and target.embedding is None:
        return (
            "an EAGLE-3 drafter is published with a copy of its target's embedding, because some engines leave a "
            "missing one uninitialised. Give the target (`--target`, in Python `target=read_target(...)`)"
        )
    return None
