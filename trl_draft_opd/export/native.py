# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The layout of transformers' own DFlash class: `target.generate(..., assistant_model=drafter,
speculation_type="dflash")` without remote code. The class is named after the first model that shipped it; the network
is DFlash's.
"""

from typing import Any

import torch

from ..drafters.base import Drafter
from .publication import Publication
from .source import TargetOfExport


_RENAMED = {"fc.": "encoder.fc.", "hidden_norm.": "encoder.output_norm_enc."}
_COPIED = (
    "attention_dropout block_size bos_token_id dtype head_dim hidden_act hidden_size intermediate_size layer_types "
    "mask_token_id max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads "
    "num_target_layers pad_token_id rms_norm_eps rope_parameters target_layer_ids target_model_name_or_path "
    "target_model_revision tie_word_embeddings transformers_version vocab_size"
).split()


def native_config(flat: dict[str, Any], publication: Publication) -> dict[str, Any]:
    """Return the content of `config.json`, from that of the flat layout."""
    eos = flat["eos_token_id"]
    return {name: flat[name] for name in _COPIED} | {
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        # The class takes one id, and reads none: the target ends the text.
        "eos_token_id": eos[0] if isinstance(eos, list) else eos,
        # The class wants a number here; no layer is of the sliding kind.
        "sliding_window": flat["max_position_embeddings"],
    }


def native_tensors(flat_tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what `model.safetensors` holds: the flat layout's tensors under the class's names."""
    return {_native_name(name): tensor for name, tensor in flat_tensors.items()}


def _native_name(name: str) -> str:
    for ours, theirs in _RENAMED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def find_refusal(drafter: Drafter, target: TargetOfExport) -> str | None:
    """Return why a drafter cannot be written in this layout, or `None`."""
    if drafter.config.family == "eagle3":
        return (
            "transformers has no class for EAGLE-3 drafters. The flat layout carries `custom_generate/`, with which "
            "`target.generate(..., custom_generate=REPOSITORY, trust_remote_code=True)` decodes with one"
        )
    return None
