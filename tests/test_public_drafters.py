# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Today's public drafters, in the small: read as what they are, decoding the target's own text, adapted, and refused with
the reason that is true of them.
"""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from test_adapters import make_trainer
from test_published_checkpoints import assert_same, write
from test_rollout_replay import assert_same_blocks, roll_out, text_of

from helpers.oracle import greedy_text
from helpers.public_layouts import PUBLIC
from helpers.rollouts import Options, replay
from helpers.tiny import EOS, MASK, make_prompts, make_target
from trl_draft_opd import AutoDrafter
from trl_draft_opd.drafters.published.configs import parse_drafter_config
from trl_draft_opd.export import TargetOfExport, export_drafter
from trl_draft_opd.export.rules import check_folder


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    """Prompts with the target's greedy responses, without ids that no text may hold."""
    pairs = [(prompt, greedy_text(target, prompt, 12)[len(prompt) :]) for prompt in make_prompts(8, seed=2)]
    pairs = [(prompt, response) for prompt, response in pairs if not {EOS, MASK} & {*prompt, *response}][:2]
    prompts, responses = zip(*pairs, strict=True)
    return Dataset.from_dict({"prompt_ids": list(prompts), "completion_ids": list(responses)})


@pytest.mark.parametrize("layout", PUBLIC)
def test_a_public_drafter_is_read_as_what_it_is(tmp_path, layout):
    drafter, (config, tensors) = PUBLIC[layout]()
    loaded = AutoDrafter.from_pretrained(write(tmp_path, config, tensors))
    assert type(loaded) is type(drafter)
    assert_same(loaded, drafter)


@pytest.mark.parametrize("layout", PUBLIC)
def test_with_a_public_drafter_live_and_replay_give_the_targets_own_text(tmp_path, target, layout):
    drafter = AutoDrafter.from_pretrained(write(tmp_path, *PUBLIC[layout]()[1]))
    prompts = make_prompts(3)
    rollout = roll_out(target, drafter, prompts)
    assert rollout.responses() == [greedy_text(target, prompt, 20)[len(prompt) :] for prompt in prompts]
    replayed = replay(target, drafter, text_of(rollout), Options(keep_branch_hidden=True, segment_length=3))
    assert_same_blocks(rollout, replayed)


# One of each family, and the head that is a part of the target's; the others are seconds each.
ADAPTED_FIRST = {"redhat_dflash_part", "redhat_dspark", "zlab_dflash2", "flat_eagle3_four"}


@pytest.mark.parametrize(
    "layout", [name if name in ADAPTED_FIRST else pytest.param(name, marks=pytest.mark.slow) for name in PUBLIC]
)
def test_a_public_drafter_is_adapted(tmp_path, target, rows, layout):
    folder = write(tmp_path / "public", *PUBLIC[layout]()[1])
    trainer = make_trainer("opd", tmp_path / "run", folder, target, rows, peft_config=LoraConfig(r=2), max_steps=1)
    trainer.train()
    trainer.save_model()
    adapted, public = AutoDrafter.from_pretrained(tmp_path / "run"), AutoDrafter.from_pretrained(folder)
    own, base = adapted.state_dict(), public.state_dict()
    changed = {name for name in own if not torch.equal(own[name], base[name])}
    # The layers, and neither head nor norms nor maps.
    assert changed and all(name.endswith(("projection.weight", "proj.weight", "fc.weight")) for name in changed)
    assert adapted.config.to_diff_dict() == public.config.to_diff_dict() | {
        "target_model_name_or_path": adapted.config.target_model_name_or_path
    }


@pytest.mark.parametrize("layout", PUBLIC)
def test_a_public_drafter_is_exported_tensor_by_tensor(tmp_path, target, layout):
    _, (config, tensors) = PUBLIC[layout]()
    public = AutoDrafter.from_pretrained(write(tmp_path / "public", config, tensors))
    model = target.causal_lm
    whole = TargetOfExport("org/target", model.config, model.get_input_embeddings().weight)
    result = export_drafter(public, tmp_path / "out", target=whole)
    assert "flat" in result.layouts
    for folder in result.layouts.values():
        again = AutoDrafter.from_pretrained(folder)
        # The speculators format leaves the ends of texts to the target.
        again.config.eos_token_id = public.config.eos_token_id
        assert_same(again, public)
        assert check_folder(folder, whole) == []
    # Its publisher's own names, where the flat layout has them too.
    written = load_file(tmp_path / "out" / "model.safetensors")
    shared = (written.keys() & tensors.keys()) - {"embed_tokens.weight"}
    assert shared and all(torch.equal(written[name], tensors[name].to(written[name].dtype)) for name in shared)
    if config["architectures"] == json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]:
        assert written.keys() - tensors.keys() <= {"embed_tokens.weight"}


def edited(layout, changes):
    """Return what is published of a layout, keys of its config changed: dotted paths to values, `...` to remove."""
    _, (config, tensors) = PUBLIC[layout]()
    for path, value in changes.items():
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section[name]
        if value is ...:
            del section[key]
        else:
            section[key] = value
    return config, tensors


ALL_SLIDING = {"transformer_layer_config.layer_types": ["sliding_attention"] * 2}
WINDOW = {"transformer_layer_config.sliding_window": 8, "transformer_layer_config.use_sliding_window": True}
MEANINGS = [
    # Causality: what is written first, then the kind of the layers, and in the speculators format its own key.
    ("zlab_sliding", {"is_causal": False}, {"is_causal": False}),
    ("zlab_sliding", {"dflash_config.causal": True}, {"is_causal": True}),
    (
        "zlab_sliding",
        {"layer_types": ["full_attention"] * 2, "use_sliding_window": False},
        {"is_causal": False, "sliding_window": None},
    ),
    (
        "zlab_sliding",
        {"layer_types": ..., "max_window_layers": 1},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    ("zlab_sliding", {"layer_types": ..., "max_window_layers": ...}, {"layer_types": ["full_attention"] * 2}),
    ("redhat_dflash_sliding", {"sliding_window_non_causal": True}, {"is_causal": False}),
    ("redhat_dflash_sliding", {"transformer_layer_config.is_causal": True}, {"is_causal": True}),
    ("redhat_dflash2", ALL_SLIDING | WINDOW | {"sliding_window_non_causal": ...}, {"is_causal": False}),
    ("redhat_dspark", ALL_SLIDING | WINDOW | {"sliding_window_non_causal": ...}, {"is_causal": None}),
    # Windows: the key of ModelOpt and MiMo before transformers' own, which counts without the query.
    ("modelopt_dflash", {"sliding_window": None}, {"sliding_window": 6}),
    ("modelopt_dflash", {"layer_types": ...}, {"layer_types": ["sliding_attention"] * 2, "is_causal": False}),
    ("modelopt_dflash", {"use_sliding_window": True}, {"layer_types": ["sliding_attention"] * 2, "sliding_window": 6}),
    ("native_sliding", {"layer_types": ...}, {"sliding_window": 10, "is_causal": False}),
    ("native_sliding", {"sliding_window": ...}, {"sliding_window": 2049}),
    (
        "mimo",
        {"dflash_config.attention_sink_bias": ..., "add_swa_attention_sink_bias": True},
        {"attention_sinks": True},
    ),
    # The anchor's slot: written, or told by the architecture, or in the speculators format by the number of drafts.
    ("deepspec_dspark", {}, {"sample_from_anchor": True}),
    ("deepspec_dflash", {}, {"sample_from_anchor": True, "markov_rank": 0}),
    ("deepspec_dspark", {"sample_from_anchor": False}, {"sample_from_anchor": False}),
    ("deepspec_dspark", {"dspark_bonus_anchor": True}, {"sample_from_anchor": False}),
    ("deepspec_dspark", {"dspark_bonus_anchor": False}, {"sample_from_anchor": True}),
    ("redhat_dspark_old", {}, {"sample_from_anchor": False}),
    (
        "redhat_dspark",
        {"sample_from_anchor": ..., "enable_confidence_head": ..., "confidence_head_with_markov": ...},
        {"sample_from_anchor": True, "enable_confidence_head": True, "confidence_head_with_markov": True},
    ),
    ("deepspec_dspark", {"enable_confidence_head": ...}, {"enable_confidence_head": False}),
    (
        "redhat_dspark",
        {"speculators_config.proposal_methods": [{"speculative_tokens": 2}]},
        {"sample_from_anchor": True, "block_size": 5},
    ),
    ("redhat_dflash2", {"selector_rank": ..., "conv_group_size": ...}, {"selector_rank": 256, "conv_group_size": 16}),
]


@pytest.mark.parametrize(("layout", "changes", "expected"), MEANINGS)
def test_what_a_public_config_says_in_several_ways_is_read_in_each(layout, changes, expected):
    arguments = parse_drafter_config(edited(layout, changes)[0], num_target_layers=None).arguments
    assert {key: arguments[key] for key in expected} == expected


REFUSED = [
    # MiMo, Nemotron's quantised drafters, Muse Glimmer's DFlash 2, Kimi K3.
    ("mimo", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: RoPE on a part of each head"),
    ("mimo", {"dflash_config.target_layer_ids": [0, 3, 7]}, "`target_layer_ids` must lie in 0..6 for a target of 8"),
    ("nvidia_dspark", {"quantization_config": {"quant_algo": "W4A16_NVFP4"}}, "quantised weights"),
    ("zlab_dflash2", {"dflash_config.final_logit_softcapping": 20.0}, "final_logit_softcapping=20.0: capped logits"),
    ("zlab_dflash2", {"dflash_config.output_multiplier": 0.2}, "output_multiplier=0.2: scaled hidden states"),
    ("zlab_dflash2", {"draft_vocab_size": 24}, "a part of the vocabulary, which a DFlash 2 drafter cannot have"),
    ("zlab_dflash2", {"dflash_config.selector_top_k": ...}, "does not say ['selector_top_k']"),
    ("deepspec_dspark", {"architectures": ["K3DSparkModel"]}, "DSpark with latent attention (Kimi K3)"),
    ("deepspec_dspark", {"markov_rank": ...}, "does not say `markov_rank`"),
    (
        "deepspec_dspark",
        {"markov_head_type": "gated"},
        "markov_head_type='gated': a Markov head that reads",
    ),
    ("deepspec_dspark", {"markov_head_type": "vanila"}, "markov_head_type='vanila'; it must be 'vanilla'"),
    ("deepspec_dspark", {"target_layer_ids": [-1, 3, 5]}, "`target_layer_ids` must lie in 0..6"),
    (
        "deepspec_dspark",
        {"sample_from_anchor": True, "dspark_bonus_anchor": True},
        "Contradiction: sample_from_anchor",
    ),
    ("specforge_dspark_causal", {"dflash_config.attention_mode": "mla"}, "another attention than grouped queries"),
    ("specforge_dspark_causal", {"dflash_config.projector_type": "domino"}, "'domino' is not supported: Domino"),
    (
        "redhat_dspark_old",
        {"speculators_config.proposal_methods": [{"speculative_tokens": 3}]},
        "no `sample_from_anchor`, and its 3 speculative_tokens in blocks of 5 do not tell",
    ),
    # Fewer drafts than a block holds may be served, more are none of it.
    (
        "redhat_dspark",
        {"sample_from_anchor": False},
        "speculative_tokens=5, but a block with block_size=5 and sample_",
    ),
    ("redhat_dspark", {"block_size": 4}, "block_size=4 and sample_from_anchor=True holds 4 drafts"),
    ("redhat_dflash2", {"speculators_config.proposal_methods": [{"speculative_tokens": 99}]}, "False holds 4 drafts"),
    ("redhat_dflash_sliding", {"sliding_window_non_causal": ...}, "no `sliding_window_non_causal`, which the spec"),
    (
        "redhat_dflash_sliding",
        {"transformer_layer_config.is_causal": False},
        "Contradiction about causality: is_causal=False, sliding_window_non_causal=False",
    ),
    ("redhat_dflash_sliding", {"transformer_layer_config.use_sliding_window": ...}, "engines drop the window"),
    ("modelopt_dflash", {"sliding_window": 9}, "Contradiction about the sliding window"),
    (
        "zlab_sliding",
        {"layer_types": ["full_attention"] * 2},
        "Contradiction: use_sliding_window=True, sliding_window=7",
    ),
    ("zlab_sliding", {"use_sliding_window": "yes"}, "use_sliding_window='yes'; it must be true or false"),
    ("zlab_sliding", {"layer_types": ["sliding"] * 2}, "each must be 'full_attention' or 'sliding_attention'"),
    ("zlab_sliding", {"sliding_window": 5}, "`sliding_window` must exceed `block_size` (5)"),
    ("zlab_sliding", {"target_hidden_size": 64}, "target_hidden_size=64 and hidden_size=32"),
    ("redhat_eagle3_four", {"fc_norm": True}, "`fc_norm` and `norm_before_fc` norm the same features"),
    ("flat_eagle3_four", {"num_aux_hidden_states": 3}, "num_aux_hidden_states=3, but the layer ids are [0, 2, 4, 6]"),
]


@pytest.mark.parametrize(("layout", "changes", "reason"), REFUSED)
def test_what_stays_out_is_refused_with_the_reason_that_is_true_of_it(tmp_path, layout, changes, reason):
    with pytest.raises(ValueError) as error:
        AutoDrafter.from_pretrained(write(tmp_path, *edited(layout, changes)))
    assert reason in str(error.value), str(error.value)


def test_tensors_that_the_config_does_not_announce_are_named(tmp_path):
    config, tensors = edited("redhat_dflash_part", {"draft_vocab_size": 64})
    with pytest.raises(
        ValueError, match="'lm_head.weight' has shape .* A drafter with an embedding or head of its own"
    ):
        AutoDrafter.from_pretrained(write(tmp_path / "whole", config, tensors))
    for stated in (False, ...):
        config, tensors = edited("deepspec_dspark", {"enable_confidence_head": stated})
        with pytest.raises(
            ValueError, match="hold 'confidence_head.proj.bias', but `enable_confidence_head` .* is false or not"
        ):
            AutoDrafter.from_pretrained(write(tmp_path / "confidence", config, tensors))
    config, tensors = edited("mimo", {"dflash_config.attention_sink_bias": False})
    with pytest.raises(ValueError, match="'layers.0.self_attn.attention_sink_bias' is unexpected"):
        AutoDrafter.from_pretrained(write(tmp_path / "sinks", config, tensors))
