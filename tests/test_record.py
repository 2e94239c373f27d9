# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Training records: they come back as they were written, and hold nothing but numbers, choices by name and Hub ids."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest

from trl_draft_opd import DraftOPDConfig, DraftSFTConfig
from trl_draft_opd.export.record import (
    RECORD_FILE,
    DatasetFacts,
    Measurement,
    StageRecord,
    TargetFacts,
    TrainingRecord,
    describe_target,
    describe_versions,
    prompts_digest,
    read_record,
    recorded_curve,
    recorded_settings,
    recorded_template_arguments,
    write_record,
)


# What must never be published: a path, a token, a prompt, and a word that looks like a choice.
CANARIES = ("/home/canary/runs", "hf_CanaryCanaryCanaryCanaryCanaryCa", "Tell me of the canary.", "canary")


def make_record(**changes) -> TrainingRecord:
    target = TargetFacts(
        name="org/target",
        revision="main",
        num_layers=8,
        vocab_size=64,
        hidden_size=32,
        max_position_embeddings=256,
        num_parameters=70_000,
        dtype="float32",
        chat_template_sha256="a" * 64,
        chat_template_kwargs={"enable_thinking": False},
    )
    stage = StageRecord(
        "opd",
        20,
        {"learning_rate": 3e-4, "rejected_loss": "reverse_kl", "bf16": False},
        DatasetFacts("org/data", "mit", 100, "target"),
        [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.0, "eval_tau": 2.5}],
    )
    measurement = Measurement(
        prompt_set="org/prompts:test",
        prompts_sha256="b" * 64,
        num_prompts=50,
        temperature=0.0,
        draft_sampling="greedy",
        num_drafts=4,
        max_completion_length=64,
        batch_size=1,
        ignore_eos=False,
        tau=2.5,
        tau_low=2.4,
        tau_high=2.6,
        acceptance_per_slot=[0.7, 0.5, 0.2, 0.1],
        num_blocks=500,
        num_different=0,
        target_dtype="float32",
        after_steps=20,
    )
    return replace(TrainingRecord(target, "eagle3", [stage], [measurement], {"torch": "2.13.0+cpu"}), **changes)


def changed(path: str, value) -> dict:
    """Return the JSON of a record with one value put elsewhere, e.g. at `stages.0.settings.optim`."""
    content = make_record().to_dict()
    place, *_, last = [content, *path.split(".")]
    for part in path.split(".")[:-1]:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    return content


# ---- reading and writing --------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = make_record()
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record
    assert json.loads((tmp_path / RECORD_FILE).read_text("utf-8"))["format_version"] == 1
    assert read_record(tmp_path / "elsewhere") is None


def test_a_record_without_stages_or_measurements_is_one(tmp_path):
    record = make_record(stages=[], measurements=[])
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record


def test_another_format_version_is_refused_by_its_number():
    with pytest.raises(ValueError, match="format_version 2, this version of trl-draft-opd reads 1"):
        TrainingRecord.from_dict(changed("format_version", 2))
    with pytest.raises(ValueError, match="format_version None"):
        TrainingRecord.from_dict({})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("target.num_layers", "eight", r"target\.num_layers is 'eight', which is no int"),
        ("target.num_layers", True, r"target\.num_layers is True"),
        ("target", [], "target must be an object"),
        ("stages.0.steps", 1.5, r"stages\[0\]\.steps is 1\.5"),
        ("stages.0.dataset", None, r"stages\[0\]\.dataset must be an object"),
        ("measurements.0.tau", None, r"measurements\[0\]\.tau is None, which is no float"),
        ("measurements.0.surprise", 1, r"unknown \['measurements\[0\]\.surprise'\]"),
        ("stages.0.curve", [{"step": 1, "prompt": 3}], r"stages\[0\]\.curve must be"),
        ("stages.0.curve", [{"loss": 3.0}], r"stages\[0\]\.curve must be"),
        ("measurements.0.acceptance_per_slot", [1.5], r"acceptance_per_slot must be numbers in \[0, 1\]"),
        ("stages.0.method", "rl", r"stages\[0\]\.method must be one of"),
        ("measurements.0.tau", float("nan"), r"measurements\.?\[0\]\.tau is nan"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(path, value, message):
    with pytest.raises(ValueError, match=message):
        TrainingRecord.from_dict(changed(path, value))


def test_a_missing_key_and_damaged_json_are_named(tmp_path):
    content = make_record().to_dict()
    del content["measurements"][0]["tau"]
    with pytest.raises(ValueError, match=r"\['measurements\[0\]\.tau'\] missing"):
        TrainingRecord.from_dict(content)
    (tmp_path / RECORD_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_record(tmp_path)


def test_a_whole_number_may_stand_where_a_fraction_does():
    assert TrainingRecord.from_dict(changed("measurements.0.tau", 2)).measurements[0].tau == 2


# ---- what must not get in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("canary", CANARIES[:3])
@pytest.mark.parametrize(
    "path",
    [
        "family",
        "target.name",
        "target.revision",
        "target.dtype",
        "target.chat_template_sha256",
        "target.chat_template_kwargs.enable_thinking",
        "stages.0.settings.optim",
        "stages.0.method",
        "stages.0.dataset.name",
        "stages.0.dataset.licence",
        "stages.0.dataset.completions",
        "measurements.0.prompt_set",
        "measurements.0.prompts_sha256",
        "measurements.0.draft_sampling",
        "measurements.0.target_dtype",
        "versions.torch",
    ],
)
def test_no_text_of_a_record_can_hold_a_canary(tmp_path, path, canary):
    content = changed(path, canary)
    with pytest.raises(ValueError) as caught:
        TrainingRecord.from_dict(content)
    assert canary not in str(caught.value)


def test_a_record_that_must_not_be_published_is_not_written(tmp_path):
    record = make_record()
    leaking = replace(record, target=replace(record.target, name="/home/canary/target"))
    with pytest.raises(ValueError, match=r"target\.name must be a Hub id or null"):
        write_record(leaking, tmp_path)
    assert list(tmp_path.iterdir()) == []
    not_finite = replace(record, stages=[replace(record.stages[0], settings={"learning_rate": float("inf")})])
    with pytest.raises(ValueError, match="learning_rate is inf"):
        write_record(not_finite, tmp_path)


def test_a_file_of_prompts_is_no_prompt_set():
    assert TrainingRecord.from_dict(changed("measurements.0.prompt_set", "gsm8k"))
    for name in ("data/prompts.jsonl", "prompts.json", "C:\\prompts", "a/b/c"):
        with pytest.raises(ValueError, match="prompt_set"):
            TrainingRecord.from_dict(changed("measurements.0.prompt_set", name))


@pytest.mark.parametrize("config_class", [DraftSFTConfig, DraftOPDConfig])
def test_no_setting_of_a_trainer_carries_a_canary_into_the_record(tmp_path, config_class):
    honest = config_class(output_dir=str(tmp_path), report_to="none")
    names = [field.name for field in fields(config_class)]
    for canary in CANARIES:
        # Every field, whatever its type: what a user can put anywhere.
        filled = SimpleNamespace(**dict.fromkeys(names, canary))
        assert recorded_settings(filled) == {}
        held = {name: getattr(honest, name) for name in names}
        texts = {name: canary for name, value in held.items() if isinstance(value, str | type(None))}
        assert canary not in json.dumps(recorded_settings(SimpleNamespace(**held | texts)))


@pytest.mark.parametrize("config_class", [DraftSFTConfig, DraftOPDConfig])
def test_settings_that_say_how_it_was_trained_are_recorded(tmp_path, config_class):
    args = config_class(
        output_dir=str(tmp_path), report_to="none", learning_rate=1e-4, accepted_loss="lk_hybrid", temperature=0.5
    )
    found = recorded_settings(args)
    wanted = {"learning_rate": 1e-4, "accepted_loss": "lk_hybrid", "temperature": 0.5, "lr_scheduler_type": "cosine"}
    assert found.items() >= wanted.items()
    assert {"optim", "seed", "per_device_train_batch_size", "slot_weighting", "draft_sampling", "bf16"} <= found.keys()
    record = make_record(stages=[replace(make_record().stages[0], settings=found)])
    assert TrainingRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_every_choice_a_config_allows_can_be_recorded(tmp_path):
    choices = {
        "rollout": ("live", "replay"),
        "rejected_scope": ("first", "suffix"),
        "supervised_anchors": ("random", "error"),
        "draft_sampling": ("greedy", "sample"),
    }
    for name, values in choices.items():
        for value in values:
            args = DraftOPDConfig(output_dir=str(tmp_path), report_to="none", **{name: value})
            assert recorded_settings(args)[name] == value
    for name, values in {"slot_scope": ("block", "until_fail"), "slot_weighting": ("decay", "d_pace")}.items():
        for value in values:
            args = DraftSFTConfig(output_dir=str(tmp_path), report_to="none", **{name: value})
            assert recorded_settings(args)[name] == value


def test_chat_template_arguments_are_recorded_only_where_they_switch_thinking():
    given = {"enable_thinking": False, "reasoning_effort": "low", "system_prompt": "canary", "thinking": "canary"}
    assert recorded_template_arguments(given) == {"enable_thinking": False, "reasoning_effort": "low"}
    assert recorded_template_arguments(None) == {}


# ---- making one -----------------------------------------------------------------------------------------------------


def test_a_target_known_by_a_local_path_has_no_name(tmp_path):
    config = SimpleNamespace(num_hidden_layers=8, vocab_size=64, hidden_size=32, max_position_embeddings=256)
    facts = describe_target(config, name=str(tmp_path), revision=None, dtype="torch.bfloat16", chat_template="canary")
    assert facts.name is None and facts.dtype == "bfloat16" and len(facts.chat_template_sha256) == 64
    assert describe_target(config, name="org/target", revision="main").name == "org/target"


def test_the_curve_keeps_losses_and_taus_and_nothing_else():
    log = [
        {"step": 1, "loss": 3.0, "learning_rate": 1e-4, "note": "canary"},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": 2.0},
        {"step": 3, "eval_tau": 1.5, "eval_runtime": 3.0},
        {"step": 3, "train_runtime": 9.0},
    ]
    assert recorded_curve(log) == [{"step": 1, "loss": 3.0}, {"step": 3, "loss": 2.0, "eval_tau": 1.5}]
    assert recorded_curve([]) == []


def test_a_long_curve_is_thinned_without_losing_evaluations():
    log = [{"step": i, "loss": 1.0} for i in range(1, 1001)] + [{"step": 777, "eval_tau": 2.0}]
    curve = recorded_curve(log, max_points=100)
    assert len(curve) <= 102
    assert curve[0]["step"] == 1 and curve[-1]["step"] == 1000
    assert {"step": 777, "loss": 1.0, "eval_tau": 2.0} in curve


def test_the_digest_tells_prompts_and_their_order_apart():
    digests = {prompts_digest(prompts) for prompts in ([[1, 2], [3]], [[3], [1, 2]], [[1], [2, 3]], [[1, 2, 3]], [])}
    assert len(digests) == 5
    assert prompts_digest([(1, 2), (3,)]) == prompts_digest([[1, 2], [3]])


def test_versions_name_the_packages_training_rests_on():
    assert {"torch", "transformers", "trl", "accelerate", "datasets"} <= describe_versions().keys()
