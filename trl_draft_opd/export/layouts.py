# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The layouts a drafter is published in: what `config.json` and `model.safetensors` hold in each.

`flat`: the published names at the root of a repository. vLLM, SGLang and llama.cpp's converter read it for both
families, EAGLE's own code for EAGLE-3, z-lab's for DFlash. A training checkpoint has the same names in float32 and no
embedding; here EAGLE-3 carries the target's, because some readers leave a missing one uninitialised.

`speculators`: what `vllm serve REPOSITORY` reads without further arguments. Its config names no `model_type`, else
vLLM parses it as that model, and counts layers that have run (boundaries) for both families.

`transformers`: transformers' own DFlash class, `target.generate(..., assistant_model=drafter,
speculation_type="dflash")` without remote code. The class is named after the first model that shipped it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..drafters.base import Drafter
from .publication import Publication
from .source import TargetOfExport


# The version of the speculators format that is written, and checked against the library of that version.
SPECULATORS_VERSION = "0.9.0"
_SPECULATORS_LAYER = (
    "attention_bias attention_dropout head_dim hidden_act hidden_size initializer_range intermediate_size "
    "max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters "
    "rope_scaling rope_theta vocab_size"
).split()
_NATIVE = (
    "attention_dropout block_size bos_token_id dtype head_dim hidden_act hidden_size intermediate_size layer_types "
    "mask_token_id max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads "
    "num_target_layers pad_token_id rms_norm_eps rope_parameters target_layer_ids target_model_name_or_path "
    "target_model_revision tie_word_embeddings transformers_version vocab_size"
).split()


@dataclass(frozen=True)
class Layout:
    """
    How a layout is made out of the flat one.

    Attributes:
        find_refusal (`Callable`): Given drafter and target, returns why the layout cannot hold the drafter, or `None`.
        config (`Callable`): Given the flat config and the publication, returns the content of `config.json`.
        names (`tuple[tuple[str, str], ...]`): Pattern of a flat tensor's name, and what replaces it.
    """

    find_refusal: Callable[[Drafter, TargetOfExport], str | None]
    config: Callable[[dict[str, Any], Publication], dict[str, Any]]
    names: tuple[tuple[str, str], ...] = ()

    def tensors(self, flat: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the flat layout's tensors under the names of this one."""
        return {self._renamed(name): tensor for name, tensor in flat.items()}

    def _renamed(self, name: str) -> str:
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement, name)
        return name


# ---- flat -----------------------------------------------------------------------------------------------------------


def flat_config(drafter: Drafter, publication: Publication) -> dict[str, Any]:
    """Return the content of `config.json`; the other layouts' is made from it. No local path of the target gets in."""
    dtype = str(publication.dtype).removeprefix("torch.")
    own = {"dtype": dtype, "torch_dtype": dtype, "target_model_name_or_path": publication.target.hub_id}
    return drafter.config.to_diff_dict() | own


def flat_tensors(drafter: Drafter, publication: Publication) -> dict[str, torch.Tensor]:
    """
    Return what `model.safetensors` holds, on the CPU: the drafter's tensors under their published names, `d2t` in
    int64 and `t2d` in bool, and for EAGLE-3 the target's embedding as it is.
    """
    tensors = {}
    for name, tensor in drafter.state_dict().items():
        stored = tensor.detach().to("cpu")
        if stored.is_floating_point():
            stored = stored.to(publication.dtype)
            if not torch.isfinite(stored).all():
                raise ValueError(
                    f"{name!r} holds values that are not finite in {publication.dtype}: the drafter is damaged, or "
                    "its weights are too large for that precision. Nothing was written."
                )
        tensors[name] = stored.contiguous().clone()
    if publication.config.exported.carries_embedding:
        assert publication.target.embedding is not None, "_refuse_flat"
        tensors["embed_tokens.weight"] = publication.target.embedding.detach().to("cpu").contiguous().clone()
    return tensors


def _refuse_flat(drafter: Drafter, target: TargetOfExport) -> str | None:
    if target.embedding_scale is not None:
        return (
            f"the target scales its embeddings ({target.embedding_scale}), and the drafter was trained on scaled "
            "ones, but engines hand it the bare rows"
        )
    if drafter.config.exported.carries_embedding and target.embedding is None:
        return (
            f"an {drafter.config.title} drafter is published with a copy of its target's embedding. Give the target "
            "(`--target`, in Python `target=read_target(...)`)"
        )
    return drafter.config.exported.find_refusal(drafter.config, "flat")


# ---- speculators ----------------------------------------------------------------------------------------------------


def _speculators_config(flat: dict[str, Any], publication: Publication) -> dict[str, Any]:
    family, target = publication.family, publication.target
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": publication.num_drafts,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    exported = publication.config.exported
    own, layers = exported.speculators_sections(flat, publication.boundaries)
    return own | {
        "architectures": [exported.speculators_architecture],
        # Not needed by the library, and kept so that the drafter comes back as it was.
        "num_target_layers": flat["num_target_layers"],
        "speculators_model_type": family,
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": family,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": target.hub_id, "architectures": target.architectures},
        },
        "transformer_layer_config": {name: flat[name] for name in _SPECULATORS_LAYER}
        | layers
        | {"model_type": exported.layer_type},
        "dtype": flat["dtype"],
        "tie_word_embeddings": False,
        "transformers_version": flat["transformers_version"],
    }


def _refuse_speculators(drafter: Drafter, target: TargetOfExport) -> str | None:
    if (reason := _refuse_flat(drafter, target)) is not None:
        return reason
    if target.hub_id is None:
        return (
            "the speculators format names the target, and only a Hub id says where others find it. Pass the target's "
            "(`--target-id ORG/NAME`, in a trainer `hub_target_id`)"
        )
    width, hidden = drafter.config.target_hidden_size, drafter.config.hidden_size
    if width != hidden:
        return f"its `fc` reads features of the drafter's own width {hidden}, but the target's are {width} wide"
    return drafter.config.exported.find_refusal(drafter.config, "speculators")


# ---- transformers ---------------------------------------------------------------------------------------------------


def _native_config(flat: dict[str, Any], publication: Publication) -> dict[str, Any]:
    eos = flat["eos_token_id"]
    return {name: flat[name] for name in _NATIVE} | {
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        # The class takes one id, and reads none: the target ends the text.
        "eos_token_id": eos[0] if isinstance(eos, list) else eos,
        # The class wants a number here; no layer is of the sliding kind.
        "sliding_window": flat["max_position_embeddings"],
    }


def _refuse_native(drafter: Drafter, target: TargetOfExport) -> str | None:
    return drafter.config.exported.find_refusal(drafter.config, "transformers")


LAYOUT_OF = {
    "flat": Layout(_refuse_flat, lambda flat, publication: flat),
    "speculators": Layout(_refuse_speculators, _speculators_config, ((r"^midlayer\.", "layers.0."),)),
    "transformers": Layout(
        _refuse_native, _native_config, ((r"^fc\.", "encoder.fc."), (r"^hidden_norm\.", "encoder.output_norm_enc."))
    ),
}
