# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Serving settings: commands that parse, the right numbers for both families, a break-even table checked by hand."""

import argparse
import ast
import contextlib
import io
import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_export import VARIANTS, make_variant
from test_record import make_record

from helpers.tiny import make_causal_lm, make_drafter, make_target, make_tokenizer
from trl_draft_opd import DFlash2DraftConfig, DFlashDraftConfig, DSparkDraftConfig, Eagle3DraftConfig
from trl_draft_opd.export import Publication, TargetOfExport, costs, export_drafter
from trl_draft_opd.export.costs import BATCH_SIZES, break_even, drafter_parameters, drafter_reads
from trl_draft_opd.export.serving import readers, serving_settings


METHODS = {
    "eagle3": ("eagle3", "EAGLE3"),
    "dflash": ("dflash", "DFLASH"),
    "dspark": ("dspark", "DSPARK"),
    # vLLM and SGLang know it by its class.
    "dflash2": ("dflash", "DFLASH"),
}
FAMILIES = tuple(METHODS)
# Families small enough to count by hand; the first two read 156 or 160 parameters per block of two drafts.
SHAPE = {"hidden_size": 2, "target_hidden_size": 2, "intermediate_size": 4, "head_dim": 2, "num_attention_heads": 1}
SHAPE |= {"num_key_value_heads": 1, "max_position_embeddings": 256}
BLOCK = {"block_size": 3, "num_hidden_layers": 1, "vocab_size": 56, "target_layer_ids": [1, 3]}
BY_HAND = {
    "eagle3": Eagle3DraftConfig(**SHAPE, ttt_steps=2, vocab_size=56, draft_vocab_size=10, target_layer_ids=[1, 3, 4]),
    "dflash": DFlashDraftConfig(**SHAPE, **BLOCK),
    "dspark": DSparkDraftConfig(**SHAPE, **BLOCK, sample_from_anchor=False, markov_rank=3),
    "dflash2": DFlash2DraftConfig(**SHAPE, **BLOCK, conv_group_size=1, selector_rank=3),
}


@pytest.fixture(scope="module")
def target():
    return make_target()


def publication_of(family, frozen, architectures=(), changes=None, **facts):
    drafter = make_drafter(family, frozen)
    for name, value in (changes or {}).items():
        setattr(drafter.config, name, value)
    described = TargetOfExport("org/target", SimpleNamespace(architectures=architectures))
    return Publication.of(drafter, **{"target": described, "repo_id": f"org/tiny-{family}"} | facts)


def settings_of(family, frozen, **facts):
    return serving_settings(publication_of(family, frozen, **facts))


def readers_of(family, frozen, **facts):
    return readers(publication_of(family, frozen, **facts))


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vllm_command_survives_a_shell_and_names_the_right_number(target, family):
    settings = settings_of(family, target)
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--speculative-config", type=json.loads)
    words = shlex.split(settings["vllm"]["command"])
    assert words[:2] == ["vllm", "serve"]
    options = parser.parse_args(words[2:])
    assert options.target == "org/target"
    assert options.speculative_config == settings["vllm"]["speculative_config"]
    # The drafters of `tiny` have four drafts: four steps, or a block of five.
    assert options.speculative_config == {
        "method": METHODS[family][0],
        "model": f"org/tiny-{family}",
        "num_speculative_tokens": 4,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sglang_command_counts_steps_and_drafts_as_sglang_does(target, family):
    parser = argparse.ArgumentParser()
    for name in ("model-path", "speculative-algorithm", "speculative-draft-model-path"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("speculative-num-steps", "speculative-eagle-topk", "speculative-num-draft-tokens"):
        parser.add_argument(f"--{name}", type=int)
    words = shlex.split(settings_of(family, target)["sglang"]["command"])
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    options = parser.parse_args(words[3:])
    assert (options.model_path, options.speculative_draft_model_path) == ("org/target", f"org/tiny-{family}")
    assert options.speculative_algorithm == METHODS[family][1]
    # DFlash counts the anchor into its block; EAGLE's chain of four steps makes five tokens to verify.
    assert options.speculative_num_draft_tokens == 5
    chain = (options.speculative_num_steps, options.speculative_eagle_topk)
    assert chain == ((4, 1) if family == "eagle3" else (None, None))


def test_unknown_names_are_placeholders_that_say_so(target):
    for family, word in (("eagle3", "EAGLE3"), ("dflash", "DFlash"), ("dspark", "DSpark"), ("dflash2", "DFlash2")):
        name = f"ORG/NAME-{word}"
        settings = settings_of(family, target, repo_id=None, target=TargetOfExport())
        assert settings["repository"] is None and settings["target"] is None
        assert settings["vllm"]["speculative_config"]["model"] == name
        assert shlex.split(settings["sglang"]["command"])[4] == "ORG/TARGET"


def test_a_path_is_never_put_into_a_command(target):
    for name in ("/home/canary/target", "./canary", "org/target; rm -rf", "a/b/c"):
        for facts in ({"target": TargetOfExport(name)}, {"repo_id": name}):
            with pytest.raises(ValueError):
                settings_of("eagle3", target, **facts)


def test_a_speculators_repository_is_served_by_one_argument(target):
    settings = settings_of("eagle3", target, layouts=("speculators",))
    assert shlex.split(settings["vllm"]["command"]) == ["vllm", "serve", "org/tiny-eagle3"]
    assert settings["transformers"] is None
    assert settings["readers"]["vLLM"] == "yes" and settings["readers"]["SGLang"].startswith("no: it reads the flat")


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_ids_stand_in_both_conventions(target, family):
    settings = settings_of(family, target)
    assert settings["target_boundaries"] == [i + 1 for i in settings["target_layer_ids"]]
    if family == "eagle3":
        assert settings["target_layer_ids"] == [1, 3, 4]
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings


# ---- transformers ---------------------------------------------------------------------------------------------------


def generate_keywords(snippet):
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    found = next(call for call in calls if ast.unparse(call.func) == "target.generate")
    return {keyword.arg: ast.unparse(keyword.value) for keyword in found.keywords}


def test_the_eagle3_snippet_asks_for_the_repositorys_function(target):
    keywords = generate_keywords(settings_of("eagle3", target)["transformers"])
    assert (keywords["custom_generate"], keywords["trust_remote_code"]) == ("'org/tiny-eagle3'", "True")


def test_the_snippet_carries_the_thinking_mode_of_training(target):
    assert "enable_thinking=False" in settings_of("eagle3", target, record=make_record())["transformers"]
    assert "enable_thinking" not in settings_of("eagle3", target)["transformers"]


def test_a_layout_that_is_absent_gives_no_snippet(target):
    assert settings_of("dflash", target, layouts=("speculators",))["transformers"] is None
    assert "custom_generate" in settings_of("dflash", target, layouts=("flat",))["transformers"]
    assert "custom_generate" in settings_of("eagle3", target, layouts=("flat",))["transformers"]
    root = settings_of("dflash", target, layouts=("transformers",))["transformers"]
    assert "subfolder" not in root and 'from_pretrained("org/tiny-dflash", dtype' in root


def test_the_dflash_snippet_runs_and_writes_the_targets_own_text(tmp_path):
    model, tokenizer = make_causal_lm(), make_tokenizer()
    model.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    drafter = make_drafter("dflash", make_target())
    described = TargetOfExport("org/target", model.config)
    export_drafter(drafter, tmp_path / "out", target=described, dtype=torch.float32)
    snippet = settings_of("dflash", make_target())["transformers"]
    for name, folder in (("org/target", tmp_path / "target"), ("org/tiny-dflash", tmp_path / "out")):
        assert name in snippet
        snippet = snippet.replace(name, str(folder))
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(snippet.replace("max_new_tokens=256", "max_new_tokens=12, do_sample=False"), names)
    own = model.generate(**names["inputs"], max_new_tokens=12, do_sample=False)
    assert names["output"].tolist() == own.tolist()
    assert printed.getvalue().strip() == tokenizer.decode(own[0], skip_special_tokens=True)


# ---- who can load it ------------------------------------------------------------------------------------------------


# Per family, who cannot read what its `from_target` makes.
NOT_READ = {
    "eagle3": set(),
    "dflash": set(),
    "dspark": {"SGLang", "DeepSpec's code", "transformers (assistant_model)"},
    "dflash2": {"llama.cpp's converter", "transformers (assistant_model)"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_reader_loads_a_plain_drafter(target, family):
    verdicts = readers_of(
        family, target, layouts=("flat", "speculators", "transformers")[: 3 - bool(NOT_READ[family])]
    )
    assert {name for name, verdict in verdicts.items() if verdict.startswith("no")} == NOT_READ[family], verdicts
    assert {"vLLM", "SGLang", "speculators", "transformers (custom_generate)"} <= set(verdicts)
    # What needs vLLM's V2 runner says so.
    assert ("on a GPU" in verdicts["vLLM"]) == (family in ("dspark", "dflash2"))


def verdicts_of_variant(variant, target, architectures=(), layouts=("flat", "speculators")):
    described = TargetOfExport("org/target", SimpleNamespace(architectures=architectures))
    drafter = make_variant(variant, target)
    return readers(Publication.of(drafter, target=described, repo_id="org/x", layouts=layouts))


@pytest.mark.parametrize(
    ("variant", "reader", "reason"),
    [
        # vllm/v1/worker/gpu/spec_decode/dflash/speculator.py refuses it; as DSpark without a Markov head it is served.
        ("dflash-anchor", "vLLM", "no draft from the anchor's slot"),
        ("dflash-anchor", "SGLang", "no draft from the anchor's slot"),
        ("dflash2-anchor", "vLLM", "no draft from the anchor's slot"),
        ("dflash2-anchor", "SGLang", "no draft from the anchor's slot"),
        ("dflash-reduced", "SGLang", "through the target's head alone"),
        ("dflash-sinks", "SGLang", "neither sinks nor a scale"),
        ("dflash-windows", "speculators", "from the anchor"),
        ("dflash-causal", "transformers (assistant_model)", "cannot express causal blocks"),
        ("dspark", "SGLang", "one place early"),
        ("dspark-bare", "SGLang", "without a Markov head"),
        ("dspark-bare", "llama.cpp's converter", "by its Markov head"),
        ("dspark-sliding", "llama.cpp's converter", "confidence head"),
        ("dspark-anchor", "transformers (assistant_model)", "cannot express what DSpark adds"),
        ("dflash2", "transformers (assistant_model)", "cannot express what DFlash 2 adds"),
    ],
)
def test_a_variant_is_not_offered_to_who_cannot_express_it(target, variant, reader, reason):
    verdict = verdicts_of_variant(variant, target)[reader]
    assert verdict.startswith("no: ") and reason in verdict


@pytest.mark.parametrize("variant", ["dspark-anchor", "dflash-mixed", "dflash2-sliding", "dspark-reduced"])
def test_vllm_serves_the_variants_it_has_a_class_for(target, variant):
    verdicts = verdicts_of_variant(variant, target)
    assert verdicts["vLLM"].startswith("yes") and "on a GPU: its V2 runner alone" in verdicts["vLLM"]
    assert variant != "dspark-anchor" or verdicts["SGLang"] == "yes"


@pytest.mark.parametrize("architecture", ["DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration"])
def test_layers_that_sglang_would_read_one_too_early_are_named(target, architecture):
    def verdict(ids, family="eagle3"):
        return readers_of(family, target, architectures=[architecture], changes={"target_layer_ids": ids})["SGLang"]

    assert verdict([1, 3, 4]) == "yes"
    assert verdict([2, 3, 4]).startswith(f"no: its class for {architecture} takes layer ids whose first is not 1")
    assert verdict([2, 3, 4], "dflash") == "yes"


def test_settings_say_how_drafts_are_sampled_where_it_was_trained_with_drawn_ones(target):
    def method(**settings):
        record = make_record()
        stage = replace(record.stages[0], settings=record.stages[0].settings | settings)
        found = settings_of("eagle3", target, record=replace(record, stages=[stage]))["vllm"]
        assert json.dumps(found["speculative_config"]) in found["command"]
        return found["speculative_config"].get("draft_sample_method", "greedy")

    assert method() == method(draft_sampling="greedy", temperature=1.0) == "greedy"
    # At temperature 0 nothing was drawn.
    assert method(draft_sampling="sample", temperature=0.0) == "greedy"
    assert method(draft_sampling="sample", temperature=1.0) == "probabilistic"
    # The root of a speculators repository has no place for it, so the command says it.
    stage = replace(make_record().stages[0], settings={"draft_sampling": "sample", "temperature": 1.0})
    record = replace(make_record(), stages=[stage])
    command = settings_of("eagle3", target, record=record, layouts=("speculators",))["vllm"]["command"]
    assert "probabilistic" in command and "org/target" in command


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (
            {"norm_before_residual": True},
            {"SGLang": "norm_before_residual", "EAGLE's code": "", "llama.cpp's converter": ""},
        ),
        ({"fc_norm": True}, {"EAGLE's code": "fc_norm", "llama.cpp's converter": "fc_norm"}),
        ({"target_layer_ids": [0, 3, 5]}, {"EAGLE's code": "[0, 3, 5]", "llama.cpp's converter": "[0, 3, 5]"}),
        ({"head_dim": 16}, {"EAGLE's code": "head size"}),
        ({"rope_parameters": {"rope_type": "llama3"}}, {"EAGLE's code": "RoPE"}),
    ],
)
def test_a_reader_that_cannot_express_a_drafter_says_why(target, changes, refused):
    verdicts = readers_of("eagle3", target, changes=changes)
    assert {name for name, verdict in verdicts.items() if verdict.startswith("no")} == set(refused)
    assert all(reason in verdicts[name] for name, reason in refused.items())


def test_engines_without_a_class_for_the_target_are_named(target):
    def verdict(family, reader, architecture):
        return readers_of(family, target, architectures=[architecture])[reader]

    assert verdict("dflash", "SGLang", "Qwen2ForCausalLM").startswith("no: its class for Qwen2ForCausalLM")
    assert verdict("dflash", "SGLang", "Qwen3ForCausalLM") == "yes"
    assert verdict("eagle3", "SGLang", "Qwen2ForCausalLM") == "yes"
    assert "--model-impl transformers" in verdict("dflash", "vLLM", "Gemma3ForCausalLM")


def test_an_absent_layout_is_not_offered_to_its_readers(target):
    verdicts = readers_of("dflash", target, layouts=("flat",))
    assert verdicts["speculators"] == "no: the repository does not hold the speculators layout"
    assert verdicts["transformers (assistant_model)"].startswith("no: the repository does not hold the transformers")
    assert verdicts["z-lab's code"] == "yes"


# ---- sizes and break-even -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_counted_from_the_config_are_those_that_the_drafter_trains(target, variant):
    # A head of rows of the target's is not trained.
    trained = [each for each in make_variant(variant, target).parameters() if each.requires_grad]
    assert drafter_parameters(make_variant(variant, target).config) == sum(each.numel() for each in trained)


def test_what_a_block_reads_is_counted_by_hand():
    # EAGLE-3: fc 3*2*2; a pass: q, k, v 4*(2+2+2), o 2*2, mlp 3*2*4, head 2*10; two passes.
    assert drafter_reads(BY_HAND["eagle3"], 2) == 12 + 2 * (24 + 4 + 24 + 20) == 156
    assert drafter_reads(BY_HAND["eagle3"], 1) == 12 + 72
    # DFlash: fc 2*2*2; one layer: q, k, v 2*6, o 4, mlp 24; the target's head 2*56.
    assert drafter_reads(BY_HAND["dflash"], 2) == 8 + (12 + 4 + 24) + 112 == 160
    # DSpark: the confidence head 2+3, and the second factor of its Markov head, 56*3, once per draft.
    assert drafter_reads(BY_HAND["dspark"], 2) == 160 + 5 + 2 * 168
    # DFlash 2: around both sublayers of the one layer, from width 2 the factors of two kernels of two taps for two
    # channels, 2*(2*2*2); the selector's projection 2*3. As with norms, the kernels themselves are left out.
    assert drafter_reads(BY_HAND["dflash2"], 2) == 160 + 2 * 16 + 6


@pytest.mark.parametrize(
    ("family", "num_target_parameters", "wanted"),
    # The drafter costs a tenth of a target pass; ten tokens are at the ridge. Batch 1: 1 + 0.1. Batch 8: three tokens
    # per row make 2.4 passes. Batch 32: both sides are past the ridge, so the cost per row no longer changes.
    [("eagle3", 1560, {1: 1.1, 8: 2.5, 32: 3.1, 256: 3.1}), ("dflash", 1600, {1: 1.1, 8: 2.64, 32: 3.3, 256: 3.3})],
)
def test_the_break_even_table_is_what_one_computes_by_hand(monkeypatch, family, num_target_parameters, wanted):
    monkeypatch.setattr(costs, "RIDGE_TOKENS", 10)
    found = break_even(BY_HAND[family], 2, num_target_parameters, taus=[2.2])
    assert found["draft_cost"] == 0.1 and found["ridge_tokens"] == 10
    rows = {row["batch"]: row for row in found["rows"]}
    assert tuple(rows) == BATCH_SIZES
    assert {batch: rows[batch]["break_even_tau"] for batch in wanted} == wanted
    assert rows[1]["speedup"] == {"2.20": 2.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_break_even_rises_with_the_batch_and_falls_with_the_target(family):
    small, large = (
        [row["break_even_tau"] for row in break_even(BY_HAND[family], 2, size)["rows"]] for size in (1600, 160_000)
    )
    assert small == sorted(small) and large == sorted(large)
    assert all(b < a for a, b in zip(small, large, strict=True))
    assert large[0] == pytest.approx(1, abs=0.01)


def test_a_higher_tau_gives_a_higher_speedup():
    for row in break_even(BY_HAND["eagle3"], 2, 1560, taus=[1.5, 2.0, 3.0])["rows"]:
        gains = [row["speedup"][tau] for tau in ("1.50", "2.00", "3.00")]
        assert gains == sorted(gains) and gains[0] < gains[-1]


def test_fewer_drafts_are_advised_where_the_last_one_is_hardly_kept():
    # One draft: 1.9 tokens for 1 + 84/1560; two: 1.95 tokens for 1.1.
    row = break_even(BY_HAND["eagle3"], 2, 1560, acceptance=[0.9, 0.05])["rows"][0]
    assert row["best_drafts"] == {"num_drafts": 1, "speedup": 1.8}
    assert break_even(BY_HAND["eagle3"], 2, 1560, acceptance=[0.9, 0.8])["rows"][0]["best_drafts"]["num_drafts"] == 2
    assert break_even(BY_HAND["eagle3"], 2, 1560)["rows"][0]["best_drafts"] is None
    assert break_even(BY_HAND["dflash"], 2, 1600, acceptance=[0.9, 0.05])["rows"][0]["best_drafts"] is None


def test_a_table_needs_the_targets_size(target):
    record = make_record()
    unknown = replace(record, target=replace(record.target, num_parameters=None))
    assert settings_of("eagle3", target)["break_even"] is None
    assert settings_of("eagle3", target, record=unknown)["break_even"] is None
    assert settings_of("eagle3", target, record=record)["break_even"]["rows"]


def test_only_measurements_with_the_served_number_of_drafts_count(target):
    record = make_record()
    wanted = break_even(make_drafter("eagle3", target).config, 4, 70_000, taus=[2.5], acceptance=[0.7, 0.5, 0.2, 0.1])
    assert settings_of("eagle3", target, record=record)["break_even"] == wanted
    fewer = replace(record, measurements=[replace(record.measurements[0], num_drafts=3)])
    row = settings_of("eagle3", target, record=fewer)["break_even"]["rows"][0]
    assert row["speedup"] == {} and row["best_drafts"] is None


def test_the_number_of_drafts_is_advised_by_the_lowest_temperature_that_was_measured(target):
    record = make_record()
    greedy = record.measurements[0]
    assert greedy.temperature == 0
    sampled = replace(greedy, temperature=1.0, tau=1.5, acceptance_per_slot=[0.4, 0.1, 0.0, 0.0])
    wanted = settings_of("eagle3", target, record=record)["break_even"]["rows"][0]["best_drafts"]
    for measurements in ([sampled, greedy], [greedy, sampled]):
        row = settings_of("eagle3", target, record=replace(record, measurements=measurements))["break_even"]["rows"][0]
        assert row["best_drafts"] == wanted and len(row["speedup"]) == 2


def test_a_target_known_from_training_is_named_in_the_commands(target):
    settings = settings_of("eagle3", target, record=make_record(), target=TargetOfExport())
    assert settings["target"] == "org/target" and "vllm serve org/target" in settings["vllm"]["command"]
