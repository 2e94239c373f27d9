# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The layout of the speculators library, which `vllm serve REPOSITORY` reads without further arguments.

Its `config.json` names no `model_type` (else vLLM parses it as that model) and no code; it counts layers that have run
(boundaries) for both families.
"""

import re
from typing import Any

import torch

from ..drafters.base import Drafter
from . import flat
from .publication import Publication
from .source import TargetOfExport


# The version of the format that is written, and checked against the library of that version.
SPECULATORS_VERSION = "0.9.0"
_LAYER_KEYS = (
    "attention_bias attention_dropout head_dim hidden_act hidden_size initializer_range intermediate_size "
    "max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters "
    "rope_scaling rope_theta vocab_size"
).split()


def speculators_config(flat_config: dict[str, Any], publication: Publication) -> dict[str, Any]:
    """Return the content of `config.json`, from that of the flat layout."""
    family, target = publication.family, publication.target
    boundaries = [i + 1 for i in publication.config.target_layer_ids]
    layer = {key: flat_config[key] for key in _LAYER_KEYS}
    if family == "eagle3":
        own = _eagle3_keys(flat_config, boundaries)
        layer |= {"model_type": "llama"}
    else:
        own = _dflash_keys(flat_config, boundaries)
        layer |= {
            name: flat_config[name] for name in ("is_causal", "layer_types", "max_window_layers", "sliding_window")
        }
        layer |= {"model_type": "qwen3", "use_sliding_window": False}
    return own | {
        "speculators_model_type": family,
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": family,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": publication.num_drafts,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": target.hub_id, "architectures": target.architectures},
        },
        "transformer_layer_config": layer,
        "dtype": flat_config["dtype"],
        "tie_word_embeddings": False,
        "transformers_version": flat_config["transformers_version"],
    }


def _eagle3_keys(flat_config: dict[str, Any], boundaries: list[int]) -> dict[str, Any]:
    flags = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
    return {name: flat_config[name] for name in ("draft_vocab_size", *flags)} | {
        "architectures": ["Eagle3DraftModel"],
        "eagle_aux_hidden_state_layer_ids": boundaries,
        "embed_requires_grad": False,
        # Not needed by the library, and kept so that the drafter comes back as it was.
        "num_target_layers": flat_config["num_target_layers"],
        "ttt_steps": flat_config["ttt_steps"],
    }


def _dflash_keys(flat_config: dict[str, Any], boundaries: list[int]) -> dict[str, Any]:
    return {
        "architectures": ["DFlashDraftModel"],
        "aux_hidden_state_layer_ids": boundaries,
        "block_size": flat_config["block_size"],
        "draft_vocab_size": flat_config["vocab_size"],
        "mask_token_id": flat_config["mask_token_id"],
        "num_target_layers": flat_config["num_target_layers"],
        "sample_from_anchor": False,
        # vLLM turns `false`, the library's own default, into causal attention in every layer.
        "sliding_window_non_causal": True,
    }


def speculators_tensors(flat_tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return what `model.safetensors` holds: the flat layout's tensors, with EAGLE-3's layer under the library's name.
    """
    return {re.sub(r"^midlayer\.", "layers.0.", name): tensor for name, tensor in flat_tensors.items()}


def find_refusal(drafter: Drafter, target: TargetOfExport) -> str | None:
    """Return why a drafter cannot be written in this layout, or `None`."""
    if (reason := flat.find_refusal(drafter, target)) is not None:
        return reason
    if target.hub_id is None:
        return (
            "the speculators format names the target, and only a Hub id says where others find it. The target is "
            "known by a local path or not at all: pass its id (`--target-id ORG/NAME`, in a trainer `hub_target_id`)"
        )
    width, hidden = drafter.config.target_hidden_size, drafter.config.hidden_size
    if width != hidden:
        return f"its `fc` reads features of the drafter's own width {hidden}, but the target's are {width} wide"
    return None
