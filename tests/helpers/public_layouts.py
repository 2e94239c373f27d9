# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Public drafters in the small: what those who publish them write into `config.json` and name their tensors, for drafters
of the tiny target. Where each layout is known from stands in docs/do/adapting.md.
"""

from collections.abc import Callable
from typing import Any

import torch

from trl_draft_opd.drafters.auto import DRAFTER_CLASSES
from trl_draft_opd.drafters.base import Drafter

from .tiny import EOS, MASK, VOCAB


Published = tuple[dict[str, Any], dict[str, torch.Tensor]]

H, IDS, BOUNDARIES, PART = 32, [1, 3, 5], [2, 4, 6], 24
AUX = "eagle_aux_hidden_state_layer_ids"
# The tiny target's shape, as all copy it into their configs.
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "eos_token_id": EOS,
}
ROPE = {"rope_type": "default", "rope_theta": 50000.0}
FULL, SLIDING = "full_attention", "sliding_attention"
BLOCK = {"block_size": 5, "mask_token_id": MASK}


def build(family: str, **own: Any) -> Drafter:
    """Return a drafter of the tiny target with values of its own in every tensor, exact in bfloat16."""
    drafter_class = DRAFTER_CLASSES[family]
    shared = SHAPE | {"rope_parameters": dict(ROPE), "num_target_layers": 8, "target_layer_ids": IDS}
    blocks = {} if family == "eagle3" else BLOCK | {"num_hidden_layers": 2}
    torch.manual_seed(3)
    drafter = drafter_class(drafter_class.config_class(**shared | blocks | own)).eval()
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            parameter.copy_((parameter.normal_(std=0.3) + ("norm" in name)).bfloat16())
        if drafter.config.has_reduced_vocabulary:
            token_ids = torch.randperm(VOCAB)[:PART].sort().values
            drafter.d2t.copy_(token_ids - torch.arange(PART))
            drafter.t2d.copy_(torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, token_ids, True))
    return drafter


def tensors_of(drafter: Drafter, *renames: tuple[str, str], extra: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Return a drafter's tensors, beginnings of names replaced, with copies of the target's beside them."""
    out = {}
    for name, tensor in drafter.state_dict().items():
        for old, new in renames:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        out[name] = tensor.clone()
    return out | {name: torch.zeros(VOCAB, H) for name in extra}


def flat(architecture: str, **own: Any) -> dict[str, Any]:
    """Return a flat config as transformers saves one of Qwen3's."""
    return SHAPE | {
        "architectures": [architecture],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "max_window_layers": 2,
        "num_hidden_layers": 2,
        "num_target_layers": 8,
        "rope_parameters": ROPE,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "5.10.2",
        "use_cache": True,
        "use_sliding_window": False,
        **own,
    }


def speculators(kind: str, architecture: str, drafts: int, *, layer: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Return a config as the speculators library saves one."""
    method = {"proposal_type": "greedy", "speculative_tokens": drafts, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": [architecture],
        "auto_map": {"": "config.SpeculatorConfig"},
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": "org/target", "architectures": ["Qwen3ForCausalLM"]},
        },
        "transformer_layer_config": SHAPE | {"model_type": "qwen3", "rope_parameters": ROPE} | layer,
        "target_hidden_size": None,
        "num_target_layers": 8,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **own,
    }


# ---- DFlash ---------------------------------------------------------------------------------------------------------


def zlab_sliding() -> tuple[Drafter, Published]:
    """Causal in the sliding layers alone, which nothing but their kind says."""
    drafter = build("dflash", layer_types=[SLIDING, FULL], sliding_window=7, is_causal=None)
    config = flat(
        "DFlashDraftModel",
        auto_map={"AutoModel": "dflash.DFlashDraftModel"},
        block_size=5,
        dflash_config={"mask_token_id": MASK, "target_layer_ids": IDS},
        layer_types=[SLIDING, FULL],
        sliding_window=7,
        use_sliding_window=True,
    )
    return drafter, (config, tensors_of(drafter))


def zlab_anchor() -> tuple[Drafter, Published]:
    drafter = build("dflash", sample_from_anchor=True)
    config = flat(
        "DFlashDraftModel",
        block_size=5,
        layer_types=[FULL] * 2,
        dflash_config={"mask_token_id": MASK, "target_layer_ids": IDS, "sample_from_anchor": True},
    )
    return drafter, (config, tensors_of(drafter))


def modelopt_dflash() -> tuple[Drafter, Published]:
    """A window in every layer by `use_swa`, whatever `layer_types` says."""
    drafter = build("dflash", layer_types=[SLIDING] * 2, sliding_window=6, is_causal=False)
    nested = {"mask_token_id": MASK, "target_layer_ids": IDS, "use_swa": True, "swa_window_size": 6, "causal": False}
    config = flat("DFlashDraftModel", block_size=5, layer_types=[FULL] * 2, sliding_window=6, dflash_config=nested)
    return drafter, (config, tensors_of(drafter))


def modelopt_causal() -> tuple[Drafter, Published]:
    drafter = build("dflash", is_causal=True, attention_sinks=True)
    nested = {"mask_token_id": MASK, "target_layer_ids": IDS, "causal": True, "attention_sink_bias": True}
    config = flat(
        "DFlashDraftModel", block_size=5, layer_types=[FULL] * 2, dflash_config=nested, attention_sink_bias=True
    )
    return drafter, (config, tensors_of(drafter))


def mimo() -> tuple[Drafter, Published]:
    """MiMo's options but for the rotation of a part of each head, which is refused."""
    drafter = build(
        "dflash",
        layer_types=[SLIDING] * 2,
        sliding_window=6,
        is_causal=False,
        attention_sinks=True,
        attention_value_scale=0.612,
    )
    own = {
        "block_size": 5,
        "mask_token_id": MASK,
        "num_anchors": 4096,
        "target_layer_ids": IDS,
        "use_swa": True,
        "swa_window_size": 6,
        "attention_value_scale": 0.612,
        "attention_sink_bias": True,
    }
    config = flat("DFlashDraftModel", block_size=5, sliding_window=6, dflash_config=own)
    return drafter, (config, tensors_of(drafter))


def redhat_dflash_part() -> tuple[Drafter, Published]:
    """Over a part of the vocabulary, with a head of its own."""
    drafter = build("dflash", draft_vocab_size=PART)
    own = BLOCK | {AUX.removeprefix("eagle_"): BOUNDARIES, "draft_vocab_size": PART, "sample_from_anchor": False}
    layer = {"num_hidden_layers": 2, "layer_types": [FULL] * 2, "sliding_window": None}
    config = speculators(
        "dflash", "DFlashDraftModel", 4, layer=layer, sliding_window_non_causal=False, max_anchors=256, **own
    )
    return drafter, (config, tensors_of(drafter, extra=("embed_tokens.weight",)))


def redhat_dflash_sliding() -> tuple[Drafter, Published]:
    drafter = build("dflash", layer_types=[SLIDING] * 2, sliding_window=8, is_causal=None)
    own = BLOCK | {AUX.removeprefix("eagle_"): BOUNDARIES, "draft_vocab_size": VOCAB, "sample_from_anchor": False}
    layer = {
        "num_hidden_layers": 2,
        "layer_types": [SLIDING] * 2,
        "sliding_window": 8,
        "use_sliding_window": True,
    }
    config = speculators("dflash", "DFlashDraftModel", 4, layer=layer, sliding_window_non_causal=False, **own)
    tensors = tensors_of(drafter, extra=("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight"))
    return drafter, (config, tensors)


def native_sliding() -> tuple[Drafter, Published]:
    """transformers' own class, whose sliding layers are not causal and whose window leaves the query out."""
    drafter = build("dflash", layer_types=[SLIDING] * 2, sliding_window=10, is_causal=False)
    names = "attention_dropout dtype rope_parameters tie_word_embeddings transformers_version".split()
    config = {name: value for name, value in flat("").items() if name in {*SHAPE, *names}} | {
        "architectures": ["MuseGlimmerAssistantModel"],
        "model_type": "muse_glimmer_assistant",
        "num_hidden_layers": 2,
        "num_target_layers": 8,
        "layer_types": [SLIDING] * 2,
        "sliding_window": 9,
        "target_layer_ids": IDS,
        **BLOCK,
    }
    return drafter, (config, tensors_of(drafter, ("fc.", "encoder.fc."), ("hidden_norm.", "encoder.output_norm_enc.")))


def biased_dflash() -> tuple[Drafter, Published]:
    """Biases of all four projections, as of targets that have them."""
    drafter = build("dflash", attention_bias=True)
    config = flat("DFlashDraftModel", attention_bias=True, layer_types=[FULL] * 2, **BLOCK, target_layer_ids=IDS)
    return drafter, (config, tensors_of(drafter))


# ---- DSpark ---------------------------------------------------------------------------------------------------------


_DEEPSPEC = BLOCK | {"layer_types": [FULL] * 2, "num_anchors": 512, "target_layer_ids": IDS}
_OF_TARGET = ("embed_tokens.weight", "lm_head.weight")


def deepspec_dspark() -> tuple[Drafter, Published]:
    """Nothing says that the anchor's slot drafts: the architecture does."""
    drafter = build("dspark", markov_rank=6)
    own = {"markov_rank": 6, "markov_head_type": "vanilla"}
    heads = {"enable_confidence_head": True, "confidence_head_with_markov": True}
    return drafter, (flat("Qwen3DSparkModel", **_DEEPSPEC, **own, **heads), tensors_of(drafter, extra=_OF_TARGET))


def deepspec_dflash() -> tuple[Drafter, Published]:
    """DeepSpec's DFlash is its DSpark without the heads."""
    drafter = build("dspark", markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False)
    config = flat("Qwen3DSparkModel", **_DEEPSPEC, markov_rank=0, enable_confidence_head=False)
    return drafter, (config, tensors_of(drafter, extra=_OF_TARGET))


def _specforge_dspark(drafter: Drafter, **own: Any) -> Published:
    nested = {
        "mask_token_id": MASK,
        "target_layer_ids": IDS,
        "projector_type": "dspark",
        "attention_mode": "gqa",
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "confidence_head_alpha": 1.0,
        "enable_confidence_head": drafter.config.has_confidence_head,
        "confidence_head_with_markov": drafter.config.has_confidence_head,
    }
    config = flat("DSparkDraftModel", block_size=5, layer_types=[FULL] * 2, dflash_config=nested, **own)
    return config, tensors_of(drafter)


def specforge_dspark_part() -> tuple[Drafter, Published]:
    drafter = build("dspark", markov_rank=6, draft_vocab_size=PART)
    return drafter, _specforge_dspark(drafter, draft_vocab_size=PART)


def specforge_dspark_causal() -> tuple[Drafter, Published]:
    heads = {"enable_confidence_head": False, "confidence_head_with_markov": False}
    drafter = build("dspark", markov_rank=6, is_causal=True, **heads)
    return drafter, _specforge_dspark(drafter, is_causal=True)


def nvidia_dspark() -> tuple[Drafter, Published]:
    """ModelOpt's: slots draft at their own position, causal, with windows and sinks."""
    drafter = build(
        "dspark",
        markov_rank=6,
        sample_from_anchor=False,
        enable_confidence_head=False,
        confidence_head_with_markov=False,
        layer_types=[SLIDING] * 2,
        sliding_window=7,
        is_causal=True,
        attention_sinks=True,
    )
    nested = {
        "attention_sink_bias": True,
        "causal": True,
        "mask_token_id": MASK,
        "swa_window_size": 7,
        "target_layer_ids": IDS,
        "use_swa": True,
        "sample_from_anchor": False,
    }
    config = flat("Qwen3DSparkModel", **BLOCK, dflash_config=nested, target_layer_ids=IDS, **{AUX: BOUNDARIES})
    del config["use_sliding_window"], config["max_window_layers"]
    config |= {
        "attention_sink_bias": True,
        "dflash_query_causal": True,
        "draft_vocab_size": None,
        "dspark_bonus_anchor": True,
        "dspark_fixup_head_type": "markov",
        "dspark_markov_rank": 6,
        "has_embed_tokens": True,
        "has_lm_head": False,
        "layer_types": [SLIDING] * 2,
        "markov_head_type": "vanilla",
        "markov_rank": 6,
        "num_aux_layers": 3,
        "pard_token": MASK,
        "sample_from_anchor": False,
        "sliding_window": 7,
        "train_embed_tokens": False,
        "rope_parameters": None,
        "rope_theta": 50000.0,
    }
    return drafter, (config, tensors_of(drafter, extra=("embed_tokens.weight",)))


def _redhat_dspark(drafter: Drafter, drafts: int, **own: Any) -> Published:
    own |= BLOCK | {AUX.removeprefix("eagle_"): BOUNDARIES, "draft_vocab_size": VOCAB, "markov_head_type": "vanilla"}
    own |= {"markov_rank": 6, "enable_confidence_head": True, "confidence_head_with_markov": True}
    layer = {"num_hidden_layers": 2, "layer_types": [FULL] * 2, "sliding_window": None}
    config = speculators("dspark", "DSparkDraftModel", drafts, layer=layer, sliding_window_non_causal=False, **own)
    return config, tensors_of(drafter, extra=(*_OF_TARGET, "verifier_lm_head.weight"))


def redhat_dspark() -> tuple[Drafter, Published]:
    drafter = build("dspark", markov_rank=6)
    return drafter, _redhat_dspark(drafter, 5, sample_from_anchor=True)


def redhat_dspark_old() -> tuple[Drafter, Published]:
    """Older versions do not write `sample_from_anchor`: four drafts in blocks of five say that it is false."""
    drafter = build("dspark", markov_rank=6, sample_from_anchor=False)
    return drafter, _redhat_dspark(drafter, 4)


# ---- DFlash 2 -------------------------------------------------------------------------------------------------------


_CONVOLVED = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 6, "selector_top_k": 4}


def zlab_dflash2() -> tuple[Drafter, Published]:
    """z-lab's and SpecForge's, with all settings in the nested section."""
    drafter = build("dflash2", **_CONVOLVED, layer_types=[SLIDING] * 2, sliding_window=7, is_causal=False)
    nested = BLOCK | _CONVOLVED | {"target_layer_ids": IDS}
    own = {"is_causal": False, "layer_types": [SLIDING] * 2, "sliding_window": 7, "use_sliding_window": True}
    return drafter, (flat("DFlash2DraftModel", **own, dflash_config=nested), tensors_of(drafter))


def redhat_dflash2() -> tuple[Drafter, Published]:
    drafter = build("dflash2", **_CONVOLVED)
    own = BLOCK | _CONVOLVED | {AUX.removeprefix("eagle_"): BOUNDARIES, "draft_vocab_size": VOCAB}
    layer = {"num_hidden_layers": 2, "layer_types": [FULL] * 2, "sliding_window": None}
    config = speculators(
        "dflash2",
        "DFlash2DraftModel",
        4,
        layer=layer,
        sliding_window_non_causal=True,
        sample_from_anchor=False,
        **own,
    )
    return drafter, (config, tensors_of(drafter, extra=_OF_TARGET))


# ---- EAGLE-3 --------------------------------------------------------------------------------------------------------


def redhat_eagle3_four() -> tuple[Drafter, Published]:
    """Four tapped layers, and the norms that the library now switches on."""
    norms = {"norm_before_fc": True, "norm_output": True}
    drafter = build("eagle3", target_layer_ids=[0, 2, 4, 6], draft_vocab_size=PART, **norms)
    config = speculators(
        "eagle3",
        "Eagle3DraftModel",
        3,
        layer={"model_type": "llama", "num_hidden_layers": 1},
        draft_vocab_size=PART,
        norm_before_residual=False,
        fc_norm=False,
        embed_requires_grad=False,
        **norms,
        **{AUX: [1, 3, 5, 7]},
    )
    return drafter, (config, tensors_of(drafter, ("midlayer.", "layers.0."), extra=("embed_tokens.weight",)))


def flat_eagle3_four() -> tuple[Drafter, Published]:
    """EAGLE-3.1 with a norm for each of four layers."""
    drafter = build("eagle3", target_layer_ids=[0, 2, 4, 6], fc_norm=True, norm_output=True)
    config = flat("LlamaForCausalLMEagle3", model_type="llama", fc_norm=True, norm_output=True)
    config |= {"num_hidden_layers": 1, "num_aux_hidden_states": 4, "draft_vocab_size": VOCAB}
    config["eagle_config"] = {AUX: [0, 2, 4, 6], "use_aux_hidden_state": True}
    return drafter, (config, tensors_of(drafter, extra=("embed_tokens.weight",)))


def biased_eagle3() -> tuple[Drafter, Published]:
    drafter = build("eagle3", attention_bias=True, draft_vocab_size=PART)
    config = flat("LlamaForCausalLMEagle3", model_type="llama", attention_bias=True, draft_vocab_size=PART)
    return drafter, (config | {"num_hidden_layers": 1, AUX: BOUNDARIES}, tensors_of(drafter))


#: Name -> a function that returns a drafter, and what is published of it.
PUBLIC: dict[str, Callable[[], tuple[Drafter, Published]]] = {
    each.__name__: each
    for each in (
        zlab_sliding,
        zlab_anchor,
        modelopt_dflash,
        modelopt_causal,
        mimo,
        redhat_dflash_part,
        redhat_dflash_sliding,
        native_sliding,
        biased_dflash,
        deepspec_dspark,
        deepspec_dflash,
        specforge_dspark_part,
        specforge_dspark_causal,
        nvidia_dspark,
        redhat_dspark,
        redhat_dspark_old,
        zlab_dflash2,
        redhat_dflash2,
        redhat_eagle3_four,
        flat_eagle3_four,
        biased_eagle3,
    )
}
