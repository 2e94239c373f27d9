# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The layout of the speculators library, which `vllm serve REPOSITORY` reads without further arguments.

Its `config.json` names no `model_type` (else vLLM parses it as that model) and no code; it counts layers that have run
(boundaries) for both families.
"""

from typing import Any

import torch

from ..drafters.base import Drafter


# The version of the format that is written, and checked against the library of that version.
SPECULATORS_VERSION = "0.9.0"
_LAYER_KEYS = (
    "attention_bias attention_dropout head_dim hidden_act hidden_size initializer_range intermediate_size "
    "max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters "
    "rope_scaling rope_theta vocab_size"
).split()


def speculators_config(
    flat: dict[str, Any], *, family: str, target_id: str, target_architectures: list[str], num_drafts: int
) -> dict[str, Any]:
    """
    Return the content of `config.json`, from that of the flat layout.

    Args:
        flat (`dict`): See [`flat_config`].
        family (`str`): `"eagle3"` or `"dflash"`.
        target_id (`str`): Hub id of the target.
        target_architectures (`list[str]`): Its `architectures`.
        num_drafts (`int`): Drafts per block when served.
    """
    layer = {key: flat[key] for key in _LAYER_KEYS}
    boundaries = [i + 1 for i in flat.get("target_layer_ids", flat.get("eagle_config", {}).get(_EAGLE_IDS, []))]
    own = _eagle3_keys(flat, boundaries) if family == "eagle3" else _dflash_keys(flat, boundaries)
    if family == "eagle3":
        layer |= {"model_type": "llama"}
    else:
        layer |= {name: flat[name] for name in ("is_causal", "layer_types", "max_window_layers", "sliding_window")}
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
                    "speculative_tokens": num_drafts,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": target_id, "architectures": target_architectures},
        },
        "transformer_layer_config": layer,
        "dtype": flat["dtype"],
        "tie_word_embeddings": False,
        "transformers_version": flat["transformers_version"],
    }


_EAGLE_IDS = "eagle_aux_hidden_state_layer_ids"


def _eagle3_keys(flat: dict[str, Any], boundaries: list[int]) -> dict[str, Any]:
    flags = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
    return {name: flat[name] for name in ("draft_vocab_size", *flags)} | {
        "architectures": ["Eagle3DraftModel"],
        _EAGLE_IDS: boundaries,
        "embed_requires_grad": False,
        # Not needed by the library, and kept so that the drafter comes back as it was.
        "num_target_layers": flat["num_target_layers"],
        "ttt_steps": flat["ttt_steps"],
    }


def _dflash_keys(flat: dict[str, Any], boundaries: list[int]) -> dict[str, Any]:
    return {
        "architectures": ["DFlashDraftModel"],
        "aux_hidden_state_layer_ids": boundaries,
        "block_size": flat["block_size"],
        "draft_vocab_size": flat["vocab_size"],
        "mask_token_id": flat["mask_token_id"],
        "num_target_layers": flat["num_target_layers"],
        "sample_from_anchor": False,
        # vLLM turns `false`, the library's own default, into causal attention in every layer.
        "sliding_window_non_causal": True,
    }


def speculators_tensors(flat_tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what `model.safetensors` holds: the flat layout's tensors, with EAGLE-3's layer under the library's name."""
    return {_speculators_name(name): tensor for name, tensor in flat_tensors.items()}


def _speculators_name(name: str) -> str:
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name


def check_drafter(drafter: Drafter, target_id: str | None) -> str | None:
    """Return why a drafter cannot be written in this layout, or `None`."""
    if target_id is None:
        return (
            "the speculators format names the target, and only a Hub id says where others find it. The target is known by a "
            "local path or not at all: pass its id (`--target-id ORG/NAME`, in a trainer `hub_target_id`)"
        )
    if drafter.config.target_hidden_size != drafter.config.hidden_size:
        return f"its `fc` reads features of the drafter's own width alone, but the target's are {drafter.config.target_hidden_size} wide"
    return None
