# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What is published of DFlash drafters: z-lab, SpecForge, the speculators format, and transformers' own class."""

from typing import Any

from transformers import MuseGlimmerAssistantConfig, PreTrainedConfig, Qwen3Config

from ..published.family import PublishedFamily
from ..published.sections import Sections, agreed, integer, layer_ids, refusal


_AUX, _BOUNDARIES = "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"
_DFLASH2 = "DFlash2 (convolutions and a candidate selector)"
_DSPARK = "DSpark (a Markov head, and slots that propose the next token)"
_DOMINO = "Domino (a recurrent head over the drafted prefix)"


class PublishedDFlash(PublishedFamily):
    """DFlash as it is published."""

    family = "dflash"
    architectures = {"DFlashDraftModel": "flat", "MuseGlimmerAssistantModel": "transformers"}
    speculators_architectures = frozenset({"DFlashDraftModel"})
    projector = "dflash"
    section = "dflash_config"
    keys = frozenset(
        f"block_size mask_token_id target_layer_ids {_AUX} {_BOUNDARIES} projector_type is_causal causal".split()
    )
    refused = {
        "attention_bias": ((None, False), "biases in the attention projections"),
        "mlp_bias": ((None, False), "biases in the MLP"),
        "use_swa": ((None, False), "sliding-window attention"),
        "attention_sink_bias": ((None, False), "attention sinks"),
        "attention_value_scale": ((None, 1.0), "scaled values"),
        "final_logit_softcapping": ((None,), "capped logits"),
        "output_multiplier": ((None, 1.0), "scaled hidden states"),
        "input_embedding_scale": ((None, 1.0), "scaled embeddings"),
        "sample_from_anchor": ((None, False), "an anchor slot that proposes a token"),
    }
    unread = {
        "DFlash2DraftModel": _DFLASH2,
        "Qwen3DSparkModel": _DSPARK,
        "DSparkDraftModel": _DSPARK,
        "DominoDraftModel": _DOMINO,
        # As `speculators_model_type` and as `dflash_config.projector_type`.
        "dflash2": _DFLASH2,
        "dspark": _DSPARK,
        "domino": _DOMINO,
    }
    renamed = {"encoder.fc.": "fc.", "encoder.output_norm_enc.": "hidden_norm."}
    unread_files = {"mask_embedding.pt": "an embedding of the mask of its own; engines embed masks with it"}

    def defaults(self, sections: Sections) -> type[PreTrainedConfig]:
        return MuseGlimmerAssistantConfig if sections.layout == "transformers" else Qwen3Config

    def of_the_target(self, arguments: dict[str, Any]) -> set[str]:
        return {"embed_tokens.weight", "lm_head.weight"}

    def arguments(self, sections: Sections, shared: dict[str, Any]) -> dict[str, Any]:
        raw, shape = sections.raw, sections.shape
        layer_types = shape.get("layer_types")
        if layer_types is None and (sections.layout == "transformers" or shape.get("use_sliding_window")):
            raise refusal("layer_types", None, "sliding-window attention by default")
        if layer_types is not None and set(layer_types) != {"full_attention"}:
            raise refusal("layer_types", layer_types, "layers that do not see the whole context")
        if layer_types is not None and len(layer_types) != shared["num_hidden_layers"]:
            raise ValueError(
                f"config.json has {len(layer_types)} layer_types for {shared['num_hidden_layers']} layers."
            )
        # `sliding_window_non_causal` speaks of sliding layers only; full attention is not causal in the speculators
        # format.
        causal = {"is_causal": raw.get("is_causal"), "dflash_config.causal": sections.nested.get("causal")}
        if agreed("causality", causal | {"transformer_layer_config.is_causal": shape.get("is_causal")}):
            raise refusal("is_causal", True, "blocks whose slots see only earlier slots")
        if raw.get("draft_vocab_size") not in (None, shared["vocab_size"]):
            raise refusal("draft_vocab_size", raw["draft_vocab_size"], "DFlash over a part of the target's vocabulary")
        return read_block(sections)


def read_block(sections: Sections) -> dict[str, Any]:
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
