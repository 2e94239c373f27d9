# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What is published of EAGLE-3 drafters: SafeAILab, SpecForge, AngelSlim, and the speculators format."""

from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig

from ..published.family import PublishedFamily
from ..published.sections import Sections, agreed, integer, layer_ids, refusal
from ..published.vocabulary_maps import complete_vocabulary_maps
from ..target_shape import middle_layer_ids


_IDS = "eagle_aux_hidden_state_layer_ids"
_NORM_FLAGS = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")
_PEAGLE = "P-EAGLE (all drafts in one pass from a learned hidden state)"
_EAGLE1 = "EAGLE-1/2 (features of the last layer only)"
_QK_NORM = "EAGLE-3 with query and key norms (the Qwen3 layer)"


class PublishedEagle3(PublishedFamily):
    """EAGLE-3 as it is published."""

    family = "eagle3"
    architectures = {
        "LlamaForCausalLMEagle3": "flat",
        "Eagle3LlamaForCausalLM": "flat",
        "LlamaForCausalLM": "flat",
    }
    speculators_architectures = frozenset({"Eagle3DraftModel", "Eagle3Speculator"})
    section = "eagle_config"
    keys = frozenset((_IDS, "num_aux_hidden_states", "ttt_steps", "attention_bias", *_NORM_FLAGS))
    refused = {
        "mlp_bias": ((None, False), "biases in the MLP, which vLLM's class of EAGLE-3 alone has"),
        "use_aux_hidden_state": ((None, True), "features of the last layer alone, as in EAGLE-1/2"),
        "parallel_drafting": ((None, False), _PEAGLE),
        "pard_token": ((None,), _PEAGLE),
        "embed_requires_grad": ((None, False), "a trained embedding of its own (drafters here read the target's)"),
    }
    unread = {
        "PEagleDraftModel": _PEAGLE,
        "PeagleLlamaForCausalLM": _PEAGLE,
        "PeagleQwen3ForCausalLM": _PEAGLE,
        "EagleLlamaForCausalLM": _EAGLE1,
        "LlamaForCausalLMEagle": _EAGLE1,
        "Eagle3Qwen3ForCausalLM": _QK_NORM,
        "Qwen3Eagle3Model": _QK_NORM,
        "Gemma4Eagle3Model": "EAGLE-3 with the layer of Gemma 4",
        # As `speculators_model_type`.
        "peagle": _PEAGLE,
        "eagle": _EAGLE1,
    }
    renamed = {
        "layers.0.": "midlayer.",
        "aux_norm_low.": "fc_norm.0.",
        "aux_norm_mid.": "fc_norm.1.",
        "aux_norm_high.": "fc_norm.2.",
    }

    def defaults(self, layout: str, shape: dict[str, Any]) -> type[PreTrainedConfig]:
        if layout == "speculators" and shape.get("model_type") == "qwen3":
            raise refusal("transformer_layer_config.model_type", "qwen3", _QK_NORM)
        return LlamaConfig

    def arguments(self, sections: Sections, shared: dict[str, Any]) -> dict[str, Any]:
        raw, shape = sections.raw, sections.shape
        if shared["num_hidden_layers"] != 1:
            meaning = "an EAGLE-3 drafter with more than one layer, which engines read differently"
            raise refusal("num_hidden_layers", shared["num_hidden_layers"], meaning)
        if shape.get("use_sliding_window") or "sliding_attention" in (shape.get("layer_types") or []):
            raise refusal("use_sliding_window", True, "sliding-window attention in EAGLE-3")
        ids = _read_layer_ids(sections, shared["num_target_layers"])
        counts = {key: raw[key] for key in ("draft_vocab_size", "ttt_steps") if raw.get(key) is not None}
        # The speculators format's readers take this one for true when it is not written.
        defaults = dict.fromkeys(_NORM_FLAGS, False) | {"norm_before_residual": sections.layout == "speculators"}
        return {
            "target_layer_ids": ids,
            **{key: integer(key, value, 1) for key, value in counts.items()},
            "attention_bias": sections.flag("attention_bias") or False,
            **defaults,
            **{flag: stated for flag in _NORM_FLAGS if (stated := sections.flag(flag)) is not None},
        }

    def completed(self, tensors: dict[str, torch.Tensor], arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        return complete_vocabulary_maps(tensors, arguments)


def _read_layer_ids(sections: Sections, num_layers: int | None) -> list[int]:
    raw, nested = sections.raw, sections.nested
    stated = {
        # vLLM counts how many layers have run; SGLang and SpecForge name the layer, in the nested section.
        f"{_IDS}={raw.get(_IDS)} (layers that have run)": layer_ids(raw.get(_IDS), _IDS, 1),
        f"eagle_config.{_IDS}={nested.get(_IDS)} (0-based)": layer_ids(nested.get(_IDS), f"eagle_config.{_IDS}", 0),
    }
    ids = agreed("layer ids (shown as 0-based ids)", stated)
    if ids is None and num_layers is None:
        raise ValueError(
            "config.json names no layer ids, so they follow from the number N of the target's layers. Pass "
            "`num_target_layers=N`."
        )
    if ids is None:
        assert num_layers is not None
        ids = middle_layer_ids(num_layers)
    count = raw.get("num_aux_hidden_states")
    if count not in (None, len(ids)):
        raise ValueError(f"config.json has num_aux_hidden_states={count}, but the layer ids are {ids}.")
    return ids
