# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What is published of DFlash drafters: z-lab, SpecForge, ModelOpt, the speculators format, transformers' class."""

from typing import Any

import torch
from transformers import MuseGlimmerAssistantConfig, PreTrainedConfig, Qwen3Config

from ..published.family import PublishedFamily
from ..published.sections import Sections, agreed, integer, layer_ids, mapping, number, refusal
from ..published.vocabulary_maps import complete_vocabulary_maps


_AUX, _BOUNDARIES = "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"
_FULL, _SLIDING = "full_attention", "sliding_attention"


class PublishedDFlash(PublishedFamily):
    """DFlash as it is published; other drafters of whole blocks are read likewise."""

    family = "dflash"
    architectures = {"DFlashDraftModel": "flat", "MuseGlimmerAssistantModel": "transformers"}
    speculators_architectures = frozenset({"DFlashDraftModel", "DFlashSpeculator"})
    projector = "dflash"
    section = "dflash_config"
    # EAGLE-3's readers agree on 10000.
    needs_rope_theta = True
    keys = frozenset(
        f"block_size mask_token_id target_layer_ids {_AUX} {_BOUNDARIES} projector_type is_causal causal "
        "sliding_window sliding_window_non_causal max_window_layers use_swa swa_window_size attention_sink_bias "
        "add_swa_attention_sink_bias attention_value_scale sample_from_anchor attention_bias".split()
    )
    refused = {
        "mlp_bias": ((None, False), "biases in the MLP, which no engine's class of this family has"),
        "use_aux_hidden_state": ((None, True), "no features of the target's layers"),
        "is_neox_style": ((None, True), "rotary positions on neighbouring channels, not on halves of a head"),
        "attention_mode": ((None, "gqa"), "another attention than grouped queries"),
        "final_logit_softcapping": ((None,), "capped logits"),
        "output_multiplier": ((None, 1.0), "scaled hidden states"),
        "input_embedding_scale": ((None, 1.0), "scaled embeddings"),
    }
    unread = {
        "DominoDraftModel": "Domino (a recurrent head over the drafted prefix)",
        # As `dflash_config.projector_type`.
        "domino": "Domino (a recurrent head over the drafted prefix)",
    }
    renamed = {"encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."}
    unread_files = {
        "mask_embedding.pt": "an embedding of its own for the mask; drafters here embed masks with the target's"
    }
    #: What a speculators config without `sliding_window_non_causal` means by sliding layers; `None` where the format's
    #: readers differ.
    default_non_causal: bool | None = None

    def defaults(self, layout: str, shape: dict[str, Any]) -> type[PreTrainedConfig]:
        return MuseGlimmerAssistantConfig if layout == "transformers" else Qwen3Config

    def of_the_target(self, arguments: dict[str, Any]) -> set[str]:
        is_reduced = arguments.get("draft_vocab_size", arguments["vocab_size"]) != arguments["vocab_size"]
        return {"embed_tokens.weight"} if is_reduced else {"embed_tokens.weight", "lm_head.weight"}

    def completed(self, tensors: dict[str, torch.Tensor], arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        return complete_vocabulary_maps(tensors, arguments)

    def arguments(self, sections: Sections, shared: dict[str, Any]) -> dict[str, Any]:
        size = sections.raw.get("draft_vocab_size")
        block, from_anchor = _read_block(sections), self.samples_from_anchor(sections)
        _check_drafts(sections, block["block_size"], from_anchor)
        return {
            **block,
            **self._read_attention(sections, shared["num_hidden_layers"]),
            "sample_from_anchor": from_anchor,
            "attention_bias": sections.flag("attention_bias") or False,
            "draft_vocab_size": shared["vocab_size"] if size is None else integer("draft_vocab_size", size, 1),
        }

    def samples_from_anchor(self, sections: Sections) -> bool:
        """Whether every position of a block drafts the token behind it, the anchor's too."""
        return sections.flag("sample_from_anchor") or False

    def _read_attention(self, sections: Sections, num_layers: int) -> dict[str, Any]:
        layer_types = _read_layer_types(sections, num_layers)
        is_causal = self._read_causality(sections, layer_types)
        if sections.flag("use_swa") and _SLIDING not in layer_types:
            # As vLLM reads it: every layer slides, and none is causal by it.
            layer_types = [_SLIDING] * num_layers
        scale = agreed("the scale of values", sections.stated("attention_value_scale"))
        return {
            "layer_types": layer_types,
            "sliding_window": _read_window(sections) if _SLIDING in layer_types else None,
            "is_causal": is_causal,
            "attention_sinks": sections.flag("attention_sink_bias", "add_swa_attention_sink_bias") or False,
            "attention_value_scale": 1.0 if scale is None else number("attention_value_scale", scale),
        }

    def _read_causality(self, sections: Sections, layer_types: list[str]) -> bool | None:
        """Return whether a slot sees no slot behind it: in all layers, in none, or, `None`, in sliding ones alone."""
        stated, is_sliding = sections.flag("is_causal", "causal"), _SLIDING in layer_types
        if sections.layout == "transformers" and stated:
            raise refusal("is_causal", True, "causal blocks, which transformers' class does not have")
        if sections.layout != "speculators" or not is_sliding:
            if stated is not None or not is_sliding:
                return stated or False
            return False if sections.layout == "transformers" else None
        # The format's own key, about sliding layers alone: full attention is not causal there.
        non_causal = sections.flag("sliding_window_non_causal")
        non_causal = self.default_non_causal if non_causal is None and stated is None else non_causal
        if non_causal is None and stated is None:
            raise ValueError(
                "config.json has sliding layers and no `sliding_window_non_causal`, which the speculators library "
                "takes for false and vLLM for true. Write what the drafter was trained with."
            )
        if stated is None:
            return False if non_causal else None
        if stated is non_causal:
            raise ValueError(
                f"Contradiction about causality: is_causal={stated}, sliding_window_non_causal={non_causal}. Remove "
                "the wrong one."
            )
        return stated


def _read_layer_types(sections: Sections, num_layers: int) -> list[str]:
    shape, uses_window = sections.shape, bool(sections.flag("use_sliding_window"))
    layer_types = shape.get("layer_types")
    if layer_types is None and sections.layout == "transformers":
        return [_SLIDING] * num_layers
    if layer_types is None:
        # As Qwen3's config class fills it in.
        first = integer("max_window_layers", shape.get("max_window_layers", Qwen3Config.max_window_layers), 0)
        is_sliding = uses_window and shape.get("sliding_window", 0) is not None
        return [_SLIDING if is_sliding and i >= first else _FULL for i in range(num_layers)]
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {_FULL, _SLIDING}:
        raise ValueError(f"config.json has layer_types={layer_types!r}; each must be {_FULL!r} or {_SLIDING!r}.")
    if len(layer_types) != num_layers:
        raise ValueError(f"config.json has {len(layer_types)} layer_types for {num_layers} layers.")
    is_contradiction = uses_window and shape.get("sliding_window") is not None and _SLIDING not in layer_types
    if is_contradiction and not sections.flag("use_swa"):
        raise ValueError(
            f"Contradiction: use_sliding_window=True, sliding_window={shape['sliding_window']}, but every one of "
            f"layer_types is {_FULL!r}, and engines go by these. Set `use_sliding_window` to false if the drafter was "
            f"trained without a window, or name the layers with {_SLIDING!r}."
        )
    return layer_types


def _read_window(sections: Sections) -> int:
    """Return the window of sliding layers."""
    shape, stated = sections.shape, sections.stated("swa_window_size")
    if all(value is None for value in stated.values()):
        own = shape.get("sliding_window", getattr(sections.defaults, "sliding_window", None))
        if hasattr(sections.defaults, "use_sliding_window") and not shape.get("use_sliding_window"):
            raise ValueError(
                f"config.json has sliding layers and use_sliding_window={shape.get('use_sliding_window')}, with which "
                "engines drop the window. Set `use_sliding_window` to true if the drafter was trained with a window, "
                "or `layer_types` to full_attention."
            )
    else:
        own = agreed("the sliding window", stated | {"sliding_window": shape.get("sliding_window")})
    # transformers' class shows keys at a distance of up to its window; others count the query in.
    return integer("sliding_window", own, 1) + (1 if sections.layout == "transformers" else 0)


def stated_drafts(sections: Sections) -> Any:
    """Return the drafts per block that a speculators config has its drafter served with, `None` if it does not say."""
    methods = mapping(sections.raw, "speculators_config").get("proposal_methods")
    # Engines read the first one alone.
    first = methods[0] if isinstance(methods, list) and methods and isinstance(methods[0], dict) else {}
    return first.get("speculative_tokens")


def _check_drafts(sections: Sections, block_size: int, from_anchor: bool) -> None:
    """Refuse more drafts than a block holds: the slots would be read one place off. Fewer may be served."""
    drafts, most = stated_drafts(sections), block_size - (0 if from_anchor else 1)
    if drafts is not None and integer("speculative_tokens", drafts, 0) > most:
        raise ValueError(
            f"Contradiction: speculative_tokens={drafts}, but a block with block_size={block_size} and "
            f"sample_from_anchor={from_anchor} holds {most} drafts. Write `sample_from_anchor` and `block_size` as "
            "the drafter was trained, and at most as many `speculative_tokens` as that holds."
        )


def _read_block(sections: Sections) -> dict[str, Any]:
    """Return layer ids, block size and mask token, which every drafter of whole blocks must state."""
    raw = sections.raw
    stated = {where: layer_ids(ids, where, 0) for where, ids in sections.stated("target_layer_ids").items()}
    # vLLM reads the EAGLE-3 key even here, and before the others.
    for key in (_AUX, _BOUNDARIES):
        stated[f"{key}={raw.get(key)} (layers that have run)"] = layer_ids(raw.get(key), key, 1)
    found = {
        "target_layer_ids": agreed("layer ids (shown as 0-based ids)", stated),
        "block_size": agreed("block_size", sections.stated("block_size")),
        "mask_token_id": agreed("mask_token_id", sections.stated("mask_token_id")),
    }
    missing = [key for key, value in found.items() if value is None]
    if missing:
        raise ValueError(
            f"config.json does not say {missing}, which the weights were trained with. Add them to its dflash_config."
        )
    integer("block_size", found["block_size"], 2)
    integer("mask_token_id", found["mask_token_id"], 0)
    return found
