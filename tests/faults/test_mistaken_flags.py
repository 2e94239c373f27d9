# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What a beginner types: folders in each other's place, values that mean nothing. Each is answered in one sentence."""

import json
import re

import pytest
import torch
from datasets import Dataset

from helpers.tiny import TINY_RUN, make_causal_lm, make_drafter, make_target, make_tokenizer
from trl_draft_opd import AutoDrafter, DraftOPDConfig, DraftSFTConfig, DraftSFTTrainer, FrozenTarget
from trl_draft_opd.cli import main
from trl_draft_opd.cli.arguments import parse
from trl_draft_opd.cli.publishing import PushArguments
from trl_draft_opd.cli.training import OPDArguments, _have_prompts
from trl_draft_opd.export.hub import push_folder, validate_repo_id
from trl_draft_opd.responses.audit import check_responses
from trl_draft_opd.rollout.acceptance import SamplingSettings


ROWS = Dataset.from_list([{"prompt_ids": [7, 8], "completion_ids": list(range(10, 24))}])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target, and a drafter of each family for it, in folders."""
    place = tmp_path_factory.mktemp("pair")
    target = make_target()
    make_causal_lm().save_pretrained(place / "target")
    make_tokenizer().save_pretrained(place / "target")
    for family in ("eagle3", "dflash"):
        drafter = make_drafter(family, target)
        drafter.config.num_target_layers = target.num_layers
        drafter.save_pretrained(place / family)
    return place


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "w8 w9"}\n', "utf-8")
    return str(path)


def said(words, capsys):
    """Run a command that cannot work and return the line that it ends with."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


# ---- folders in each other's place --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["eagle3", "dflash"])
@pytest.mark.parametrize("command", ["sft", "opd", "evaluate", "generate", "verify"])
def test_a_drafter_in_the_targets_place_is_named(folders, rows_file, tmp_path, capsys, command, family):
    words = [command, "--target", str(folders / family), "--dataset", rows_file]
    words += [] if command == "generate" else ["--drafter", str(folders / "target")]
    words += {"generate": ["--output", str(tmp_path / "o")], "evaluate": [], "verify": []}.get(
        command, ["--output-dir", str(tmp_path / "o"), "--use-cpu"]
    )
    assert re.search(f"/{family}' is a drafter, not a target; swap `--target` and `--drafter`", said(words, capsys))


@pytest.mark.parametrize("command", ["sft", "opd", "evaluate"])
def test_a_target_in_the_drafters_place_is_named(folders, rows_file, tmp_path, capsys, command):
    words = [command, "--target", str(folders / "target"), "--drafter", str(folders / "target")]
    words += ["--dataset", rows_file]
    words += [] if command == "evaluate" else ["--output-dir", str(tmp_path / "o"), "--use-cpu"]
    assert "Qwen3ForCausalLM is a language model, not a drafter: a target, perhaps" in said(words, capsys)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["OtherForCausalLM"]}, "is of architecture 'OtherForCausalLM', which transformers .* does"),
        ({"architectures": None}, "names no `architectures` in its config.json"),
        ({"architectures": []}, "names no `architectures` in its config.json"),
    ],
)
def test_a_target_of_an_unknown_architecture_is_a_sentence(tmp_path, changes, match):
    make_causal_lm().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ValueError, match=match):
        FrozenTarget.load(tmp_path)


@pytest.mark.parametrize("family", ["eagle3", "dflash"])
def test_a_drafter_of_a_target_with_other_layers_says_both_numbers(folders, family):
    with pytest.raises(ValueError, match=f"{family}' was trained for a target with 8 layers; this one has 30"):
        AutoDrafter.from_pretrained(folders / family, num_target_layers=30)


# ---- values that mean nothing -------------------------------------------------------------------------------------


def test_a_switch_needs_no_value():
    words = ["--target", "t", "--dataset", "d", "--drafter", "m", "--use-cpu", "--output-dir", "o"]
    for given, expected in ((["--bf16"], True), (["--bf16", "false"], False), (["--bf16", "--seed", "3"], True)):
        _, config = parse("opd", [OPDArguments, DraftOPDConfig], [*words, *given])
        assert config.bf16 is expected
    (push,) = parse("push", [PushArguments], ["--drafter", "d", "--repo-id", "a/b", "--private"])
    assert push.private is True


def test_a_learning_rate_of_0_is_refused(rows_file, tmp_path, capsys):
    words = ["sft", "--family", "eagle3", "--target", "t", "--dataset", rows_file, "--learning-rate", "0"]
    assert "trains nothing" in said([*words, "--use-cpu", "--output-dir", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_train_epochs": 0}, "got 0. At 0 nothing would be trained; to measure"),
        ({"logging_steps": 0}, "got 0. Leave it out, or set `logging_strategy='no'`"),
    ],
)
def test_a_0_comes_with_a_fix_of_its_own(changes, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        DraftSFTConfig(str(tmp_path), **TINY_RUN | changes)


def test_an_evaluation_without_rows_is_named_as_it_is_written(tmp_path):
    config = DraftSFTConfig(str(tmp_path), **TINY_RUN, eval_strategy="epoch")
    with pytest.raises(ValueError, match="`eval_strategy='epoch'` or"):
        DraftSFTTrainer("m", "t", config, ROWS)


def test_a_mistyped_key_is_named_where_a_flag_is_missing_too(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("traget: t\ndataset: d\n")
    for words in (["--config", str(config)], ["--traget", "t", "--dataset", "d"], ["--traget=t", "--dataset", "d"]):
        assert "--traget (did you mean --target?)" in said(["sft", *words], capsys)


def test_a_config_file_that_is_not_there_is_a_sentence(tmp_path, capsys):
    line = said(["sft", "--config", str(tmp_path / "none.yaml")], capsys)
    assert "`--config` names no file" in line and "Errno" not in line


# ---- names of repositories and folders ----------------------------------------------------------------------------


def test_a_push_of_no_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder '.*none'"):
        push_folder(tmp_path / "none", "you/Tiny-EAGLE3")


def test_a_name_that_an_export_writes_needs_an_owner(folders, tmp_path, capsys):
    words = ["export", "--drafter", str(folders / "eagle3"), "--output", str(tmp_path / "e"), "--target-id", "nope"]
    assert "must be the target's Hub id, ORG/NAME, got 'nope'" in said(words, capsys)
    assert "must name the owner too, ORG/NAME, got 'name'" in said([*words[:-2], "--repo-id", "name"], capsys)


def test_a_warning_about_a_name_shows_no_code_of_a_rule(caplog):
    validate_repo_id("you/x", "eagle3")
    assert "'you/x' does not contain 'eagle3'" in caplog.text and "C10" not in caplog.text


# ---- what is said after the work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "has"),
    [(["text"], False), (["prompt"], True), (["question", "answer"], True), (["input_ids", "completion_mask"], False)],
)
def test_opd_comes_next_only_for_rows_with_prompts(columns, has):
    assert _have_prompts(columns) is has


@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", "In bfloat16 that is harmless"), ("float32", "another pre")])
def test_responses_that_fit_roughly_are_harmless_in_half_precision(dtype, said):
    target = make_target()
    target.causal_lm.to(getattr(torch, dtype))
    texts, sampling = [([7, 8, 9], [10, 11, 12])], SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
    with pytest.warns(UserWarning, match=said):
        check_responses(target, texts, sampling, warn_above=0.0, refuse_above=1.0)
