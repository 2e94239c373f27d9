# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The prepared run on a GPU does all of its items, at tiny sizes on a CPU and on a device that is none; it goes on where
it was cut off, and an item that fails leaves the others alone.
"""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_jobs
from benchmarks.gpu_rows import Clock, Item, OutOfTime, Rows, run_items, time_runs
from helpers.pretend_accelerator import DEVICE, pretend_accelerator
from trl_draft_opd.costs.jobs import JOBS
from trl_draft_opd.rollout.counts import Counts


pytestmark = pytest.mark.lab


STAGES = {"read", "draft", "loss", "backward", "update", "step"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of a rehearsal of all items."""
    return gpu.run(tmp_path_factory.mktemp("gpu") / "rows.jsonl", None, is_rehearsal=True, shared=None, seconds=500)


def statuses(rows):
    return {row["job"]: (row["status"], row.get("error", "")) for row in rows.rows if row["stage"] == "item"}


def test_every_item_of_a_rehearsal_comes_to_its_end(rows):
    assert statuses(rows) == {item.name: ("done", "") for item in gpu.ITEMS}


def test_each_job_has_a_row_for_every_stage_and_its_rates(rows):
    for job in JOBS:
        found = {row["stage"]: row for row in rows.rows if row["job"] == job.name and not row["note"]}
        assert STAGES | ({"walk"} if job.tau else set()) <= found.keys()
        whole = found["step"]
        assert whole["tokens_per_s"] == pytest.approx(2 * 64 / whole["seconds"])
        assert whole["mfu_nominal"] == pytest.approx(whole["flops"] / whole["seconds"] / 989.4e12)
        parts = sum(row["seconds"] for stage, row in found.items() if stage not in ("step", "profile"))
        assert parts < whole["seconds"]


def test_a_bfloat16_step_stays_within_its_rounding_and_the_bound_is_no_formality(rows):
    found = [row for row in rows.rows if row["stage"] == "against cpu, bfloat16"]
    assert len(found) == 4
    for row in found:
        assert row["loss_error"] < row["gradient_error"] < row["bound"] == row["roundings"] ** 0.5 * 2**-9
        # An error of eight units more, as a wrong kernel makes, would show.
        assert 2**-9 < row["gradient_error"] and row["bound"] < 0.15


def test_what_is_done_is_not_done_again_and_half_a_line_is_no_row(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows.path.read_text() + '{"job": "card", "sta')
    again = gpu.run(path, 1, is_rehearsal=True, shared=None, seconds=500)
    assert len(again.rows) == len(rows.rows)
    again.add("more", "step")
    assert [json.loads(line)["job"] for line in path.read_text().splitlines()[-1:]] == ["more"]


def test_an_item_that_fails_or_takes_too_long_leaves_the_others_alone(tmp_path):
    def fails(_bench):
        raise RuntimeError("no kernel image")

    def hangs(_bench):
        try:
            time.sleep(20)
        except Exception:
            pytest.fail("an item's own handlers must not see its end")

    def works(bench):
        bench.rows.add("works", "step", seconds=1.0)

    rows = Rows(tmp_path / "rows.jsonl", {"gpu": "none"})
    bench = SimpleNamespace(rows=rows, clear=lambda: None)
    items = [Item("fails", 1, 5, fails), Item("hangs", 1, 0.2, hangs), Item("works", 1, 5, works)]
    run_items(items, bench, rows, seconds=60)
    found = statuses(rows)
    assert {name: status for name, (status, _) in found.items()} == {
        "fails": "failed",
        "hangs": "stopped",
        "works": "done",
    }
    assert "no kernel image" in found["fails"][1] and found["hangs"][1] == ""
    assert not issubclass(OutOfTime, Exception)
    run_items(items[2:], bench, rows, seconds=60)
    assert len([row for row in rows.rows if row["job"] == "works"]) == 2
    run_items([Item("late", 1, 5, works)], bench, rows, seconds=1)
    assert statuses(rows)["late"][0] == "no time left"


def test_rows_of_another_device_are_not_taken_for_those_of_this_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    Rows(path, {"gpu": "cpu, rehearsal"}).add("probes", "item")
    assert Rows(path, {"gpu": "cpu, rehearsal"}).find("probes", "item") is not None
    assert Rows(path, {"gpu": "NVIDIA H100"}).find("probes", "item") is None


@pytest.mark.parametrize(("name", "tau"), [("eagle3-opd", 3.0), ("dflash-opd", 4.0)])
def test_a_forced_walk_keeps_as_many_drafts_as_it_is_told(tmp_path, name, tau):
    rows = Rows(tmp_path / "rows.jsonl", {"gpu": "none"})
    bench = gpu.Bench(torch.device("cpu"), rows, True, None)
    job = gpu_jobs.replace(bench.job(name), rows=2, length=600)
    training = bench.training(job)
    _, rollout = training.blocks(training.read(), Clock(bench.device))
    assert rollout is not None
    assert Counts.of_rollout(rollout).tau == pytest.approx(tau, rel=0.1)
    again = training.blocks(training.read(), Clock(bench.device))[1]
    assert again is not None and torch.equal(again.anchors, rollout.anchors)


def test_stages_are_timed_apart_and_medians_are_taken():
    clock = Clock(torch.device("cpu"))
    with clock.stage("slow"):
        time.sleep(0.02)
    with clock.stage("fast"):
        pass
    seconds = clock.seconds()
    assert seconds["slow"] > 0.02 > seconds["fast"] and clock.spans == []
    calls = []
    found = time_runs(lambda _clock: calls.append(1), torch.device("cpu"), repeats=3, warmups=2)
    assert len(calls) == 5 and found.keys() == {"step", "peak_bytes"}


def rehearse_on_pretend_device(path: str) -> dict[str, tuple[str, str]]:
    with pretend_accelerator():
        rows = gpu.run(Path(path), None, is_rehearsal=True, shared=None, seconds=500, device=DEVICE)
    return statuses(rows)


@pytest.mark.slow
def test_no_item_mixes_devices(tmp_path, call):
    found = call(rehearse_on_pretend_device, str(tmp_path / "rows.jsonl"))
    assert {name: entry for name, entry in found.items() if entry[0] != "done"} == {}
