# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The laboratory's adaptation of a drafter to a fine-tuned target: the target's script, a start that is another pair's
drafter, and arms that train an adapter, continue from another arm, or from nothing.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_lab import make_bench, make_pair, shared  # noqa: F401

from benchmarks.lab import tuned_target
from benchmarks.lab.arms import collect, run_arm
from benchmarks.lab.plan import Arm
from benchmarks.lab.start import make_start
from benchmarks.lab.tables import render
from benchmarks.lab.tuned_target import TunedTargetConfig, compare_answers, in_steps, styled_rows, tune_target
from helpers.tiny import make_causal_lm, make_drafter, make_target, make_tokenizer
from trl_draft_opd import AutoDrafter


pytestmark = pytest.mark.lab


ARM = Arm("adapted", (1,), "sft", settings={"learning_rate": 1e-2})
NO_SFT = {"settings": {}, "measure_every": 1, "min_updates": 0, "max_updates": 0, "cooldown_updates": 0}


@pytest.fixture(scope="module")
def bench(shared, tmp_path_factory):  # noqa: F811
    """A workbench whose start is a drafter that lies under its output folder."""
    folder = tmp_path_factory.mktemp("adapting")
    make_drafter("eagle3", make_target(), ttt_steps=3).save_pretrained(folder / "out" / "other" / "start")
    pair = make_pair(folder, drafter={"id": "other/start"}, sft=NO_SFT, seeds={1: 1}, budgets={1: 4e-5})
    return make_bench(pair, shared, folder / "out")


def arm(bench, **changes):
    made = dataclasses.replace(ARM, **changes)
    result = run_arm(bench, made, 1, 0)
    return result, AutoDrafter.from_pretrained(bench.folder / "tier1" / made.name / "seed0" / "drafter").state_dict()


def differ(first, second):
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_without_sft_the_pairs_drafter_is_the_start_as_it_is(bench):
    given = AutoDrafter.from_pretrained(bench.machine.out / "other" / "start").state_dict()
    assert differ(AutoDrafter.from_pretrained(make_start(bench)).state_dict(), given) == set()
    assert "no SFT" not in render(collect(bench))


def test_an_adapter_arm_moves_the_layers_it_names_and_costs_less(bench):
    start = AutoDrafter.from_pretrained(make_start(bench)).state_dict()
    whole, full = arm(bench, name="full")
    few, adapted = arm(bench, name="lora", lora={"r": 2, "target_modules": ["fc", "o_proj"]})
    assert differ(adapted, start) == {"fc.weight", "midlayer.self_attn.o_proj.weight"}
    assert differ(full, start) == set(start)
    assert few["flops_per_update"] < whole["flops_per_update"]
    assert few["settings"]["lora"] == {"r": 2, "target_modules": ["fc", "o_proj"]}


def test_an_arm_goes_on_from_another_arm_or_from_nothing(bench):
    _, first = arm(bench, name="first")
    stay = {"learning_rate": 0.0}
    result, again = arm(bench, name="again", begins="first", settings=stay)
    assert differ(again, first) == set() and result["settings"]["begins"] == "first"
    _, fresh = arm(bench, name="fresh", begins="fresh", settings=stay)
    untrained = make_drafter("eagle3", make_target(), seed=0, ttt_steps=3).state_dict()
    assert differ(fresh, untrained) == set() and len(differ(fresh, first)) > 5
    with pytest.raises(SystemExit, match="continues from 'missing', which has no run of seed 0 yet"):
        arm(bench, name="lost", begins="missing")


# ---- the fine-tuned target ------------------------------------------------------------------------------------------


def test_a_solution_becomes_numbered_steps_without_notes():
    answer = "She sold 48/2 = <<48/2=24>>24 clips.\nThat is 48+24 = <<48+24=72>>72.\n#### 72"
    assert in_steps(answer) == "Step 1: She sold 48/2 = 24 clips.\nStep 2: That is 48+24 = 72.\nSo the answer is 72."
    with pytest.raises(ValueError, match="must end in a line '#### NUMBER', got 'no end'"):
        in_steps("no end")


@pytest.fixture
def tuning(tmp_path):
    make_causal_lm().save_pretrained(tmp_path / "origin")
    make_tokenizer().save_pretrained(tmp_path / "origin")
    rows = [{"question": f"w{i} w9", "answer": f"w{i} w{i + 1} <<w8>>\n#### w{i}"} for i in range(10, 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return TunedTargetConfig(
        origin=str(tmp_path / "origin"),
        data=str(tmp_path / "rows.jsonl"),
        prompts=str(tmp_path / "rows.jsonl"),
        out=str(tmp_path / "out"),
        num_rows=30,
        num_compared=4,
        row_length=48,
        batch_size=2,
        steps=4,
        warmup_steps=1,
        learning_rate=1e-2,
        save_steps=2,
    )


def test_a_target_is_trained_further_once_and_its_new_answers_are_counted(tuning, monkeypatch):
    report = tune_target(tuning)
    assert report["share_of_answers_changed"] > 0.5 and report["final_loss"] < report["first_loss"]
    same = compare_answers(tuning.origin, tuning.origin, ["w10 w9", "w11 w9"], 8)
    assert same["share_of_answers_changed"] == 0.0 and same["origin_mean_length"] == same["tuned_mean_length"] <= 8
    assert not any("rows.jsonl" in str(value) for value in report.values())
    first, second = (load_file(f"{folder}/model.safetensors") for folder in (tuning.origin, tuning.out))
    assert first.keys() == second.keys() and differ(first, second) == set(first)
    monkeypatch.setattr(tuned_target, "Trainer", None)
    assert tune_target(tuning) == report


def test_an_adapter_is_merged_into_a_target_of_the_old_layout_and_precision_after_a_kill_too(tuning):
    make_causal_lm().to(torch.bfloat16).save_pretrained(tuning.origin)
    tuning = dataclasses.replace(tuning, lora_r=2, bf16=True)
    whole = tune_target(dataclasses.replace(tuning, out=f"{tuning.out}-whole"))
    tune_target(tuning)
    checkpoints = Path(tuning.out, "checkpoints")
    shutil.rmtree(checkpoints / "checkpoint-4")
    for name in ("training.json", "model.safetensors"):
        Path(tuning.out, name).unlink()
    report = tune_target(tuning)
    assert report == whole
    assert (
        differ(load_file(f"{tuning.out}/model.safetensors"), load_file(f"{tuning.out}-whole/model.safetensors"))
        == set()
    )
    first, second = (load_file(f"{folder}/model.safetensors") for folder in (tuning.origin, tuning.out))
    assert first.keys() == second.keys() and {tensor.dtype for tensor in second.values()} == {torch.bfloat16}
    layers = {name for name in first if "proj" in name}
    assert differ(first, second) == layers and report["final_loss"] < report["first_loss"]


def test_rows_to_tune_on_start_where_asked_and_never_come_short(tuning):
    assert [row["instruction"] for row in styled_rows(Path(tuning.data), 28, 2)] == ["w38 w9", "w39 w9"]
    with pytest.raises(ValueError, match="has 30 rows; 3 from row 28 on were asked for"):
        styled_rows(Path(tuning.data), 28, 3)
