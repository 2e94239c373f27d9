# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a drafter must know of its target's shape: sizes, RoPE, and which layers to tap. Reads configs, never weights.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig


def text_config(target_config: PreTrainedConfig) -> PreTrainedConfig:
    """
    Return the config of a text-only decoder target.

    Raises:
        ValueError: If the target takes images, audio or video (out of scope), or is no decoder.
    """
    if target_config.get_text_config() is not target_config:
        raise ValueError(
            f"Target of type {target_config.model_type!r} is a multimodal model. Only text-only decoder targets are "
            "supported: load its language model alone, e.g. with the family's `...ForCausalLM` class and "
            "`config.get_text_config()`."
        )
    if target_config.is_encoder_decoder:
        raise ValueError(
            f"Target of type {target_config.model_type!r} is an encoder-decoder model; speculative drafters need a "
            "decoder-only target."
        )
    return target_config


def rope_parameters(target_config: PreTrainedConfig) -> dict[str, Any]:
    """Return the RoPE parameters of the target's full-attention layers, without keys only the target understands."""
    parameters = dict(target_config.rope_parameters or {})
    # Some families keep one set of parameters per layer type.
    parameters = dict(parameters.get("full_attention", parameters))
    dropped = {"partial_rotary_factor", "mrope_section", "mrope_interleaved", "rope_dim"}
    kept = {key: value for key, value in parameters.items() if key not in dropped}
    return kept or {"rope_type": "default", "rope_theta": 10000.0}


def shape_from_target(target_config: PreTrainedConfig) -> dict[str, Any]:
    """
    Return the config keys a drafter shares with its target.

    Head size and key/value heads are the target's because engines keep both models' caches in one layout; vocabulary
    and positions are the target's because engines refuse or cut otherwise.

    Raises:
        ValueError: If the target has no attention heads or feed-forward layers to take the shape of.
    """
    config = text_config(target_config)
    needed = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
    missing = [name for name in needed if getattr(config, name, None) is None]
    if missing:
        raise ValueError(
            f"Target of type {config.model_type!r} has no {missing} in its config, so a drafter cannot take its shape "
            "from it. Build the drafter's config by hand and pass it to the drafter's class."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "rope_parameters": rope_parameters(config),
        "max_position_embeddings": config.max_position_embeddings,
        "num_target_layers": config.num_hidden_layers,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "target_model_name_or_path": config.name_or_path or None,
    }


def spread_layer_ids(num_target_layers: int, num_ids: int) -> list[int]:
    """
    Spread layer ids evenly from layer 1 to layer `num_target_layers - 3`, DFlash's published rule.

    Args:
        num_target_layers (`int`): Layers of the target, at least 7.
        num_ids (`int`): How many ids to return; fewer if the range holds fewer.

    Returns:
        `list[int]`: ascending 0-based ids of the layers whose output is read.
    """
    first, last = 1, num_target_layers - 3
    num_ids = min(num_ids, last - first + 1)
    if num_ids == 1:
        return [num_target_layers // 2]
    return [round(first + (last - first) * i / (num_ids - 1)) for i in range(num_ids)]


def check_layer_ids(target_layer_ids: list[int], num_target_layers: int) -> None:
    """
    Check that layer ids can be tapped and are expressible by every engine.

    Raises:
        ValueError: If ids are empty, not strictly ascending, negative, or reach the last layer (whose output engines
            read after the final norm, some before it).
    """
    if not target_layer_ids or sorted(set(target_layer_ids)) != list(target_layer_ids):
        raise ValueError(
            f"`target_layer_ids` must be strictly ascending and not empty, got {target_layer_ids}. Engines sort and "
            "deduplicate them, and the columns of `fc` follow that order."
        )
    if target_layer_ids[0] < 0 or target_layer_ids[-1] > num_target_layers - 2:
        raise ValueError(
            f"`target_layer_ids` must lie in 0..{num_target_layers - 2} for a target of {num_target_layers} layers, "
            f"got {target_layer_ids}. The last layer is excluded: engines disagree on whether it is read before the "
            "final norm."
        )


def require_layer_ids(target_layer_ids: list[int] | None, num_target_layers: int) -> None:
    """Raise `ValueError` if default layer ids are needed and the target has fewer than 7 layers."""
    if target_layer_ids is None and num_target_layers < 7:
        raise ValueError(
            f"The target has {num_target_layers} layers; the default layer ids need at least 7. Pass "
            f"`target_layer_ids=[...]` with ascending ids in 0..{num_target_layers - 2}."
        )


def refuse_misspelt(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """
    Refuse names a letter or two away from a known one: they would be ignored and a default used.

    Args:
        names (`Iterable[str]`): Names that are not read.
        known (`Iterable[str]`): Names that are read.
        where (`str`): What to call their place.

    Raises:
        ValueError: Naming the first such name and the one it resembles.
    """
    known = list(known)
    for name in names:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.87)
        if near:
            raise ValueError(
                f"{where} has {name!r}, which is not read. Did you mean {near[0]!r}? Rename or remove it."
            )
