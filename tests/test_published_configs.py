# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What published `config.json` files mean: families, layouts, layer ids, flags, RoPE, and what is refused. No file but
our own is read.
"""

import copy
import json
import logging

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config, Qwen3ForCausalLM

from trl_draft_opd.drafters.dflash import DFlashDraftConfig, DFlashDraftModel
from trl_draft_opd.drafters.draft_vocabulary import build_draft_vocabulary
from trl_draft_opd.drafters.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from trl_draft_opd.drafters.published.configs import parse_drafter_config
from trl_draft_opd.drafters.target_shape import spread_layer_ids


SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
}
ROPE = {"rope_theta": 1000000, "rope_scaling": None}
IDS = "eagle_aux_hidden_state_layer_ids"
FLAGS = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")

EAGLE3 = SHAPE | ROPE | {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "draft_vocab_size": 24,
    "eagle_config": {IDS: [1, 3, 4], "use_aux_hidden_state": True},
    "num_target_layers": 8,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}  # fmt: skip
DFLASH_IDS = [1, 3, 5]
DFLASH = SHAPE | ROPE | {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "block_size": 4,
    "dflash_config": {"mask_token_id": 63, "target_layer_ids": DFLASH_IDS},
    "num_target_layers": 8,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}  # fmt: skip
SPECULATORS = {
    "speculators_version": "0.9.0",
    "speculators_config": {
        "proposal_methods": [{"speculative_tokens": 3}],
        "verifier": {"name_or_path": "org/target"},
    },
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "num_target_layers": 8,
}
SPECULATORS_EAGLE3 = SPECULATORS | {
    "architectures": ["Eagle3DraftModel"],
    "speculators_model_type": "eagle3",
    "draft_vocab_size": 24,
    "norm_before_residual": False,
    IDS: [2, 4, 5],
    "transformer_layer_config": SHAPE
    | {"model_type": "llama", "num_hidden_layers": 1, "rope_theta": 1000000, "eos_token_id": 2},
}
SPECULATORS_DFLASH = SPECULATORS | {
    "architectures": ["DFlashDraftModel"],
    "speculators_model_type": "dflash",
    "draft_vocab_size": 64,
    "block_size": 4,
    "mask_token_id": 63,
    "aux_hidden_state_layer_ids": [2, 4, 6],
    "sliding_window_non_causal": False,
    "sample_from_anchor": False,
    "transformer_layer_config": SHAPE
    | {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "rope_theta": 1000000,
        "layer_types": ["full_attention"] * 2,
        "eos_token_id": 2,
    },
}
NATIVE = SHAPE | {
    "architectures": ["MuseGlimmerAssistantModel"],
    "model_type": "muse_glimmer_assistant",
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    "block_size": 4,
    "mask_token_id": 63,
    "target_layer_ids": DFLASH_IDS,
    "num_target_layers": 8,
    "sliding_window": 2048,
    "dtype": "bfloat16",
    "eos_token_id": 2,
}


def changed(base, path, value):
    """A copy of a config with the key at a dotted path set, or removed where the value is `...`."""
    config = copy.deepcopy(base)
    *sections, key = path.split(".")
    section = config
    for name in sections:
        section = section.setdefault(name, {})
    if value is ...:
        section.pop(key)
    else:
        section[key] = value
    return config


def kwargs_of(raw, num_target_layers=None):
    return parse_drafter_config(raw, num_target_layers=num_target_layers).arguments


@pytest.mark.parametrize(
    ("raw", "family", "layout"),
    [
        (EAGLE3, "eagle3", "flat"),
        (EAGLE3 | {"architectures": ["Eagle3LlamaForCausalLM"]}, "eagle3", "flat"),
        (EAGLE3 | {"architectures": ["LlamaForCausalLM"]}, "eagle3", "flat"),
        (SPECULATORS_EAGLE3, "eagle3", "speculators"),
        (SPECULATORS_EAGLE3 | {"architectures": ["Eagle3Speculator"]}, "eagle3", "speculators"),
        (SPECULATORS_EAGLE3 | {"architectures": ["Eagle3LlamaForCausalLM"]}, "eagle3", "speculators"),
        (changed(SPECULATORS_EAGLE3, "speculators_model_type", ...), "eagle3", "speculators"),
        (DFLASH, "dflash", "flat"),
        (SPECULATORS_DFLASH, "dflash", "speculators"),
        (NATIVE, "dflash", "transformers"),
    ],
)
def test_architectures_decide_family_and_layout(raw, family, layout):
    imported = parse_drafter_config(raw, num_target_layers=None)
    assert (imported.family, imported.layout, imported.architectures) == (family, layout, raw["architectures"])
    # What published folders say there must not matter.
    relabelled = parse_drafter_config(raw | {"model_type": "anything"}, num_target_layers=None)
    assert relabelled.arguments == imported.arguments


def test_every_layout_says_the_same_of_one_drafter():
    def without_target(kwargs):
        return {key: value for key, value in kwargs.items() if key != "target_model_name_or_path"}

    eagle3, dflash = kwargs_of(EAGLE3), kwargs_of(DFLASH)
    assert without_target(kwargs_of(SPECULATORS_EAGLE3)) == eagle3
    assert without_target(kwargs_of(SPECULATORS_DFLASH)) == dflash
    assert kwargs_of(NATIVE) == dflash
    assert eagle3["rope_parameters"] == {"rope_type": "default", "rope_theta": 1000000}
    assert eagle3["dtype"] == dflash["dtype"] == "bfloat16"
    assert {key: eagle3[key] for key in SHAPE} == {key: dflash[key] for key in SHAPE} == SHAPE
    assert kwargs_of(SPECULATORS_EAGLE3)["target_model_name_or_path"] == "org/target"


@pytest.mark.parametrize("N", [8, 24, 28, 32, 36, 48])
def test_one_capture_set_is_read_alike_from_every_convention(N):
    boundaries = [2, N // 2, N - 3]
    zero_based = [b - 1 for b in boundaries]
    bare = changed(changed(EAGLE3, "eagle_config", ...), "num_target_layers", ...)
    spellings = [
        bare | {"num_target_layers": N},
        bare | {IDS: boundaries},
        bare | {"eagle_config": {IDS: zero_based}},
        bare | {IDS: boundaries, "eagle_config": {IDS: zero_based}},
        SPECULATORS_EAGLE3 | {IDS: boundaries, "num_target_layers": N},
        SPECULATORS_EAGLE3 | {IDS: None, "num_target_layers": N},
    ]
    assert [kwargs_of(raw)["target_layer_ids"] for raw in spellings] == [zero_based] * len(spellings)
    assert kwargs_of(bare, num_target_layers=N)["target_layer_ids"] == zero_based
    ids = spread_layer_ids(N)
    for raw in (
        changed(changed(DFLASH, "dflash_config.target_layer_ids", ids), "num_target_layers", N),
        SPECULATORS_DFLASH | {"aux_hidden_state_layer_ids": [i + 1 for i in ids], "num_target_layers": N},
        NATIVE | {"target_layer_ids": ids, "num_target_layers": N},
    ):
        assert kwargs_of(raw)["target_layer_ids"] == ids


def test_the_reference_convention_is_what_fresh_drafters_use():
    config = Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=11, num_attention_heads=2, vocab_size=32, head_dim=8
    )
    fresh = Eagle3DraftModel.from_target(Qwen3ForCausalLM(config)).config
    bare = changed(changed(EAGLE3, "eagle_config", ...), "num_target_layers", ...)
    assert kwargs_of(bare, num_target_layers=11)["target_layer_ids"] == fresh.target_layer_ids


@pytest.mark.parametrize("raw", [EAGLE3, SPECULATORS_EAGLE3])
def test_ids_that_are_not_written_need_the_number_of_layers(raw):
    bare = changed(changed(raw, "num_target_layers", ...), "eagle_config", {}) | {IDS: None}
    with pytest.raises(ValueError, match="`num_target_layers=N`"):
        kwargs_of(bare)
    with pytest.raises(ValueError, match="has 6 layers"):
        kwargs_of(bare, num_target_layers=6)


@pytest.mark.parametrize(
    ("raw", "num_target_layers", "words"),
    [
        (EAGLE3 | {IDS: [1, 3, 4]}, None, ["layer ids", "[1, 3, 4]", "[0, 2, 3]"]),
        (EAGLE3, 9, ["a target with 8 layers; this one has 9"]),
        (EAGLE3 | {"num_aux_hidden_states": 4}, None, ["num_aux_hidden_states=4", "[1, 3, 4]"]),
        (changed(EAGLE3 | {"norm_output": True}, "eagle_config.norm_output", False), None, ["norm_output"]),
        (DFLASH | {"target_layer_ids": [1, 3, 4]}, None, ["layer ids", "[1, 3, 4]", "[1, 3, 5]"]),
        (DFLASH | {IDS: [1, 3, 5]}, None, ["layer ids", "[0, 2, 4]", "[1, 3, 5]"]),
        (DFLASH | {"mask_token_id": 62}, None, ["mask_token_id", "62", "63"]),
        (changed(DFLASH, "dflash_config.block_size", 8), None, ["block_size", "8", "4"]),
        (EAGLE3 | {"rope_parameters": {"rope_theta": 5.0}}, None, ["rope_theta", "5.0", "1000000"]),
        (
            EAGLE3 | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "dynamic"}},
            None,
            ["RoPE scaling", "linear", "dynamic"],
        ),
    ],
)
def test_contradictions_are_refused_with_both_values(raw, num_target_layers, words):
    with pytest.raises(ValueError) as error:
        kwargs_of(raw, num_target_layers)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_keys_written_twice_alike_are_no_contradiction():
    twice = DFLASH | {"target_layer_ids": DFLASH_IDS, "mask_token_id": 63, IDS: [2, 4, 6]}
    assert kwargs_of(changed(twice, "dflash_config.block_size", 4)) == kwargs_of(DFLASH)
    assert kwargs_of(EAGLE3 | {IDS: [2, 4, 5], "num_aux_hidden_states": 3}, 8) == kwargs_of(EAGLE3)


def test_norm_flags_have_the_defaults_of_their_layout():
    flat = kwargs_of(EAGLE3)
    assert [flat[flag] for flag in FLAGS] == [False] * 4
    published = kwargs_of(changed(SPECULATORS_EAGLE3, "norm_before_residual", ...))
    assert [published[flag] for flag in FLAGS] == [False, False, False, True]
    assert kwargs_of(SPECULATORS_EAGLE3)["norm_before_residual"] is False


@pytest.mark.parametrize("flag", FLAGS)
def test_a_norm_flag_is_read_as_written(flag):
    for raw in (
        EAGLE3 | {flag: True},
        changed(EAGLE3, f"eagle_config.{flag}", True),
        SPECULATORS_EAGLE3 | {flag: True},
    ):
        kwargs = kwargs_of(raw)
        assert [name for name in FLAGS if kwargs[name]] == [flag]
    with pytest.raises(ValueError, match=f"{flag}='yes'"):
        kwargs_of(EAGLE3 | {flag: "yes"})


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (EAGLE3, "attention_bias"),
        (SPECULATORS_EAGLE3, "transformer_layer_config.attention_bias"),
        (DFLASH, "attention_bias"),
    ],
)
def test_biases_of_attention_are_read_in_every_layout(raw, path):
    assert kwargs_of(changed(raw, path, True))["attention_bias"] is True
    assert not kwargs_of(changed(raw, path, False)).get("attention_bias")


def test_a_draft_vocabulary_of_null_is_the_full_one():
    for raw in (EAGLE3 | {"draft_vocab_size": None}, changed(EAGLE3, "draft_vocab_size", ...)):
        config = Eagle3DraftConfig.from_dict(raw)
        assert config.draft_vocab_size == 64 and not config.has_reduced_vocabulary
    assert Eagle3DraftConfig.from_dict(EAGLE3).draft_vocab_size == 24


def test_legacy_rope_becomes_rope_parameters():
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    expected = {"rope_type": "llama3", "rope_theta": 1000000, **llama3}
    assert kwargs_of(EAGLE3 | {"rope_scaling": {"rope_type": "llama3", **llama3}})["rope_parameters"] == expected
    assert kwargs_of(EAGLE3 | {"rope_scaling": {"type": "llama3", **llama3}})["rope_parameters"] == expected
    assert kwargs_of(EAGLE3 | {"rope_parameters": expected})["rope_parameters"] == expected
    default = {"rope_type": "default", "rope_theta": 1000000}
    sections = {"mrope_section": [1, 1, 2], "type": "mrope"}
    assert kwargs_of(EAGLE3 | {"rope_scaling": sections})["rope_parameters"] == default
    nested = {"full_attention": {"rope_theta": 1000000}, "sliding_attention": {"rope_theta": 5.0}}
    assert kwargs_of(EAGLE3 | {"rope_parameters": nested})["rope_parameters"] == default
    silent = changed(EAGLE3, "rope_theta", ...)
    assert kwargs_of(silent)["rope_parameters"]["rope_theta"] == LlamaConfig.default_theta == 10000.0
    # What the speculators library leaves out is its class's default.
    silent = changed(SPECULATORS_DFLASH, "transformer_layer_config.rope_theta", ...)
    assert kwargs_of(silent)["rope_parameters"]["rope_theta"] == Qwen3Config.default_theta == 10000.0
    assert kwargs_of(changed(NATIVE, "rope_parameters", ...))["rope_parameters"]["rope_theta"] == 500000.0


def test_sizes_that_are_not_written_are_those_of_the_transformers_class():
    eagle3 = Eagle3DraftConfig.from_dict(
        {key: value for key, value in EAGLE3.items() if key not in ("head_dim", "num_key_value_heads")}
    )
    assert (eagle3.head_dim, eagle3.num_key_value_heads) == (4, 4)
    raw = changed(changed(SPECULATORS_DFLASH, "transformer_layer_config.head_dim", ...), "draft_vocab_size", 151936)
    kwargs = kwargs_of(changed(raw, "transformer_layer_config.vocab_size", ...))
    assert (kwargs["head_dim"], kwargs["vocab_size"]) == (128, 151936)
    with pytest.raises(ValueError, match=r"does not say \['vocab_size'\]"):
        kwargs_of(changed(NATIVE, "vocab_size", ...))


REFUSALS = [
    (EAGLE3, "num_hidden_layers", 2, "num_hidden_layers=2: an EAGLE-3 drafter with more than one layer"),
    (EAGLE3, "mlp_bias", True, "mlp_bias=True: biases"),
    (EAGLE3, "target_hidden_size", 32, "target_hidden_size=32 and hidden_size=16"),
    (EAGLE3, "quantization_config", {"quant_method": "fp8"}, "quantised weights"),
    (EAGLE3, "partial_rotary_factor", 0.25, "partial_rotary_factor=0.25: RoPE on a part"),
    (EAGLE3, "rope_parameters", {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor=0.5"),
    (EAGLE3, "use_sliding_window", True, "sliding-window attention in EAGLE-3"),
    (EAGLE3, "eagle_config.use_aux_hidden_state", False, "features of the last layer alone"),
    (EAGLE3, "parallel_drafting", True, "P-EAGLE"),
    (EAGLE3, "eagle_config." + IDS, "1,3,4", "must be a list of integers"),
    (EAGLE3, IDS, [0, 4, 5], "0 means the embeddings"),
    (EAGLE3, "draft_vocab_size", "24", "draft_vocab_size='24'; it must be an integer"),
    (EAGLE3, "hidden_size", 0, "hidden_size=0; it must be an integer of at least 1"),
    (EAGLE3, "hidden_size", ..., r"does not say ['hidden_size']"),
    (EAGLE3, "eagle_config", [1, 3, 4], "eagle_config=[1, 3, 4]; it must be an object"),
    (EAGLE3, "architectures", ["Eagle3Qwen3ForCausalLM"], "query and key norms"),
    (EAGLE3, "architectures", ["Qwen3Eagle3Model"], "'Qwen3Eagle3Model' is not supported: EAGLE-3 with query and key"),
    (EAGLE3, "architectures", ["LlamaForCausalLMEagle"], "EAGLE-1/2"),
    (EAGLE3, "architectures", ["PEagleDraftModel"], "P-EAGLE"),
    (EAGLE3, "architectures", ["Qwen3ForCausalLM"], "Qwen3ForCausalLM is a language model, not a drafter"),
    (EAGLE3, "architectures", ["OtherDrafter"], "Unknown drafter architecture 'OtherDrafter'. Drafters that"),
    (EAGLE3, "architectures", [], "Unknown drafter architecture None"),
    (EAGLE3, "architectures", ..., "'LlamaForCausalLMEagle3', 'MuseGlimmerAssistantModel'"),
    (SPECULATORS_EAGLE3, "transformer_layer_config.model_type", "qwen3", "query and key norms"),
    (SPECULATORS_EAGLE3, "transformer_layer_config.model_type", "gpt_oss", "neither llama nor qwen3"),
    (SPECULATORS_EAGLE3, "transformer_layer_config.num_hidden_layers", 3, "num_hidden_layers=3"),
    (SPECULATORS_EAGLE3, "embed_requires_grad", True, "a trained embedding of its own"),
    (SPECULATORS_EAGLE3, "speculators_model_type", "peagle", "'peagle' is not supported: P-EAGLE"),
    (SPECULATORS_EAGLE3, "speculators_model_type", "mtp", "speculators format: 'mtp'"),
    (DFLASH, "layer_types", ["full_attention", "chunked_attention"], "layer_types=['full_attention', 'chunked_"),
    (
        DFLASH,
        "layer_types",
        ["full_attention", "sliding_attention"],
        "use_sliding_window=False, with which engines drop",
    ),
    (DFLASH, "layer_types", ["full_attention"], "1 layer_types for 2 layers"),
    (DFLASH, "is_causal", "yes", "is_causal='yes'; it must be true or false"),
    (DFLASH, "draft_vocab_size", 0, "draft_vocab_size=0; it must be an integer of at least 1"),
    (DFLASH, "dflash_config.use_swa", True, "use_sliding_window=False, with which engines drop"),
    (DFLASH, "dflash_config.attention_value_scale", 0, "attention_value_scale=0; it must be a number above 0"),
    (DFLASH, "dflash_config.output_multiplier", 0.2, "output_multiplier=0.2: scaled hidden states"),
    (DFLASH, "dflash_config.final_logit_softcapping", 20.0, "final_logit_softcapping=20.0: capped logits"),
    (DFLASH, "dflash_config.use_aux_hidden_state", False, "no features of the target's layers"),
    (DFLASH, "is_neox_style", False, "is_neox_style=False: rotary positions on neighbouring channels"),
    (DFLASH, "partial_rotary_factor", 0.5, "partial_rotary_factor=0.5: RoPE on a part"),
    (DFLASH, "quantization_config", {"quant_algo": "NVFP4"}, "quantised weights"),
    (DFLASH, "rope_theta", ..., "does not say `rope_theta`, and readers fill in different ones"),
    (DFLASH, "mlp_bias", True, "mlp_bias=True: biases"),
    (DFLASH, "dflash_config.projector_type", "domino", "'domino' is not supported: Domino"),
    (DFLASH, "dflash_config.projector_type", "new", "projector_type='new' is unknown"),
    (DFLASH, "dflash_config.target_layer_ids", ..., "does not say ['target_layer_ids']"),
    (DFLASH, "dflash_config.mask_token_id", ..., "does not say ['mask_token_id']"),
    (DFLASH, "block_size", 1, "block_size=1; it must be an integer of at least 2"),
    (DFLASH, "architectures", ["DFlash2DraftModel"], "does not say ['conv_kernel_size', 'conv_group_size', 'sel"),
    (DFLASH, "architectures", ["Qwen3DSparkModel"], "does not say `markov_rank`"),
    (
        DFLASH,
        "architectures",
        ["Gemma4DSparkModel"],
        "'Gemma4DSparkModel' is not supported: DSpark with the layers of",
    ),
    (DFLASH, "architectures", ["DominoDraftModel"], "Domino"),
    (DFLASH, "dflash_config.projector_type", "dspark", "projector_type='dspark' is unknown and not supported"),
    (SPECULATORS_DFLASH, "transformer_layer_config.layer_types", ["sliding_attention"] * 2, "engines drop the window"),
    (NATIVE, "is_causal", True, "causal blocks, which transformers' class does not have"),
]


@pytest.mark.parametrize(("base", "path", "value", "message"), REFUSALS)
def test_what_would_compute_something_else_is_refused(base, path, value, message):
    parse_drafter_config(base, num_target_layers=None)
    with pytest.raises(ValueError) as error:
        parse_drafter_config(changed(base, path, value), num_target_layers=None)
    assert message in str(error.value), str(error.value)


def test_a_language_model_is_not_taken_for_a_drafter():
    raw = changed(EAGLE3 | {"architectures": ["LlamaForCausalLM"]}, "draft_vocab_size", ...)
    with pytest.raises(ValueError, match="is a language model, not a drafter"):
        parse_drafter_config(raw, num_target_layers=None)


def test_full_attention_is_accepted_whatever_is_said_of_sliding_layers():
    for value in (True, False):
        assert kwargs_of(SPECULATORS_DFLASH | {"sliding_window_non_causal": value}) == kwargs_of(SPECULATORS_DFLASH)


def test_a_config_of_the_other_family_is_refused():
    with pytest.raises(ValueError, match="describes a dflash drafter .* Eagle3DraftConfig reads eagle3"):
        Eagle3DraftConfig.from_dict(DFLASH)
    with pytest.raises(ValueError, match="describes a eagle3 drafter .* DFlashDraftConfig reads dflash"):
        DFlashDraftConfig.from_dict(SPECULATORS_EAGLE3)


def test_from_dict_keeps_the_contract_of_transformers():
    config, unused = Eagle3DraftConfig.from_dict(EAGLE3, return_unused_kwargs=True, ttt_steps=3, nonsense=1)
    assert (config.ttt_steps, unused) == (3, {"nonsense": 1})
    bare = changed(changed(EAGLE3, "eagle_config", ...), "num_target_layers", ...)
    assert Eagle3DraftConfig.from_dict(bare, num_target_layers=24).target_layer_ids == [1, 11, 20]
    for config in (Eagle3DraftConfig.from_dict(EAGLE3), DFlashDraftConfig.from_dict(DFLASH)):
        assert config.dtype == torch.bfloat16
        again = type(config).from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        assert type(config).from_dict(config.to_diff_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("raw", [EAGLE3, DFLASH])
def test_a_saved_config_is_read_back_without_a_warning(tmp_path, caplog, monkeypatch, raw):
    # transformers keeps its records to itself.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    cls = Eagle3DraftConfig if raw is EAGLE3 else DFlashDraftConfig
    config = cls.from_dict(raw)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in ("llama", "qwen3")
    again = cls.from_pretrained(tmp_path)
    config.name_or_path = again.name_or_path
    assert again.to_dict() == config.to_dict()
    assert caplog.records == []
    (Qwen3Config if raw is EAGLE3 else LlamaConfig).from_pretrained(tmp_path)
    assert caplog.records, "a warning would not have been seen"


# ---- what we save is what engines read ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    config = Qwen3Config(
        **SHAPE | {"head_dim": 16, "max_position_embeddings": 777},
        num_hidden_layers=8,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0, "partial_rotary_factor": 1.0},
    )
    return Qwen3ForCausalLM(config)


def saved_config(drafter, folder):
    drafter.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def check_rules_of_both_families(saved, target):
    for key in ("head_dim", "num_key_value_heads", "vocab_size", "max_position_embeddings", "hidden_size"):
        assert saved[key] == getattr(target.config, key)
    assert saved["tie_word_embeddings"] is False and saved["attention_bias"] is False
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == 12345.0
    assert saved["rope_scaling"] is None
    leftovers = {
        "partial_rotary_factor",
        "mrope_section",
        "rope_dim",
        "quantization_config",
        "num_experts",
        "auto_map",
    }
    assert not leftovers & (set(saved) | set(saved["rope_parameters"]))


def test_a_saved_eagle3_config_keeps_the_rules_of_the_engines(tmp_path, target):
    vocabulary = build_draft_vocabulary(torch.arange(64), 24)
    drafter = Eagle3DraftModel.from_target(target, draft_vocabulary=vocabulary)
    saved = saved_config(drafter, tmp_path)
    check_rules_of_both_families(saved, target)
    assert saved["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (saved["num_hidden_layers"], saved["draft_vocab_size"]) == (1, 24)
    assert [saved[flag] for flag in FLAGS] == [False] * 4
    assert saved[IDS] == [2, 4, 5] and saved["eagle_config"][IDS] == [1, 3, 4]
    assert saved["dtype"] == "float32"
    read = LlamaConfig.from_pretrained(tmp_path)
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": 12345.0}
    assert saved_config(drafter.to(torch.bfloat16), tmp_path)["dtype"] == "bfloat16"


def test_a_saved_dflash_config_keeps_the_rules_of_the_engines(tmp_path, target):
    drafter = DFlashDraftModel.from_target(
        target, mask_token_id=63, num_hidden_layers=2, block_size=4, target_layer_ids=DFLASH_IDS
    )
    saved = saved_config(drafter, tmp_path)
    check_rules_of_both_families(saved, target)
    assert saved["architectures"] == ["DFlashDraftModel"]
    keys = {"block_size": 4, "mask_token_id": 63, "sample_from_anchor": False, "target_layer_ids": DFLASH_IDS}
    assert saved["dflash_config"] == keys == {key: saved[key] for key in keys}
    assert IDS not in saved
    assert saved["is_causal"] is False and saved["use_sliding_window"] is False
    assert saved["layer_types"] == ["full_attention"] * 2
    assert Qwen3Config.from_pretrained(tmp_path).layer_types == ["full_attention"] * 2
