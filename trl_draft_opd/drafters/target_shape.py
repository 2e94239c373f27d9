# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a drafter must know of its target's shape: sizes, RoPE, and which layers to tap. Reads configs, never weights.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig


def text_config(target_config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a target, or raise `ValueError` if it is no text-only decoder."""
    if target_config.get_text_config() is not target_config:
        raise ValueError(
            f"Target of type {target_config.model_type!r} is a multimodal model. Load its language model alone, e.g. "
            "with the family's `...ForCausalLM` class and `config.get_text_config()`."
        )
    if target_config.is_encoder_decoder:
        raise ValueError(
            f"Target of type {target_config.model_type!r} is an encoder-decoder model; drafters need a decoder-only "
            "target."
        )
    return target_config


def shape_from_target(target_config: PreTrainedConfig) -> dict[str, Any]:
    """
    Return the config keys a drafter shares with its target.

    Head size and key/value heads are the target's because engines keep both models' caches in one layout; vocabulary
    and positions are the target's because engines refuse or cut otherwise.
    """
    config = text_config(target_config)
    needed = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
    missing = [name for name in needed if getattr(config, name, None) is None]
    if missing:
        raise ValueError(
            f"Target of type {config.model_type!r} has no {missing} in its config. Build the drafter's config by hand "
            "and pass it to the drafter's class."
        )
    rope = dict(config.rope_parameters or {})
    # Some families keep one set of parameters per layer type, some keys only the target understands.
    rope = rope.get("full_attention", rope)
    only_of_the_target = ("partial_rotary_factor", "mrope_section", "mrope_interleaved", "rope_dim")
    rope = {key: value for key, value in rope.items() if key not in only_of_the_target}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": config.max_position_embeddings,
        "num_target_layers": config.num_hidden_layers,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "target_model_name_or_path": config.name_or_path or None,
    }


def scales_logits(target_config: PreTrainedConfig) -> bool:
    """Whether a target scales or caps what its head returns."""
    names = ("logits_scaling", "logit_scale", "final_logit_softcapping")
    return any(getattr(target_config, name, None) for name in names)


def middle_layer_ids(num_target_layers: int) -> list[int]:
    """Return the ids that EAGLE-3 and every engine default to: a low, a middle and a high layer."""
    _require_layers(num_target_layers)
    return [1, num_target_layers // 2 - 1, num_target_layers - 4]


def spread_layer_ids(num_target_layers: int) -> list[int]:
    """Return up to five ids spread evenly from layer 1 to layer `num_target_layers - 3`, DFlash's published rule."""
    _require_layers(num_target_layers)
    first, last = 1, num_target_layers - 3
    num_ids = min(5, last - first + 1)
    return [round(first + (last - first) * i / (num_ids - 1)) for i in range(num_ids)]


def _require_layers(num_target_layers: int) -> None:
    if num_target_layers < 7:
        raise ValueError(
            f"The target has {num_target_layers} layers; the default layer ids need at least 7. Pass "
            f"`target_layer_ids=[...]` with ascending ids in 0..{num_target_layers - 2}."
        )


def check_layer_ids(target_layer_ids: list[int], num_target_layers: int) -> None:
    """Raise `ValueError` if layer ids cannot be tapped or not be expressed by every engine."""
    if not target_layer_ids or sorted(set(target_layer_ids)) != list(target_layer_ids):
        raise ValueError(
            f"`target_layer_ids` must be strictly ascending and not empty, got {target_layer_ids}: engines sort and "
            "deduplicate them."
        )
    if target_layer_ids[0] < 0 or target_layer_ids[-1] > num_target_layers - 2:
        raise ValueError(
            f"`target_layer_ids` must lie in 0..{num_target_layers - 2} for a target of {num_target_layers} layers, "
            f"got {target_layer_ids}. Engines disagree on whether the last layer is read before the final norm."
        )


def refuse_misspelt(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse names that are not read and a letter or two away from a known one: a default would be used instead."""
    known = list(known)
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.87)
        if near:
            raise ValueError(
                f"{where} has {name!r}, which is not read. Did you mean {near[0]!r}? Rename or remove it."
            )
