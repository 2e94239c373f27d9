# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whenever a run is stopped, and by whatever, it resumes from its newest whole checkpoint and ends with the same bytes.

A few points of the matrix run by default; the rest with `make crash`:

- a kill at every file operation of SFT with DFlash, and of Draft-OPD with EAGLE-3, whose target writes its responses
  into the same folder; at every fourth of the two other pairs of a method and a family;
- every rename that a loss of power can undo, of all four;
- a full disk at every operation of Draft-OPD with EAGLE-3, and at every third of SFT with DFlash;
- twelve kills at random times.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from helpers.doomed import STEPS, Events, Progress, in_child, train, wait_for
from helpers.oracle import greedy_rows
from helpers.tiny import make_drafter, make_target
from trl_draft_opd.runs.checkpoints import DamagedCheckpoint, list_checkpoints, read_checkpoint


COMPARED = ("model.safetensors", "optimizer.safetensors", "state.json", "trainer_state.json")
RUNS = [("sft", "dflash"), ("opd", "eagle3"), ("sft", "eagle3"), ("opd", "dflash")]
# Where every operation has its turn: for each of so many shares of them.
KILLS = [(run, share) for run in RUNS for share in range(4) if run in RUNS[:2] or share == 0]
FULL_DISKS = [(run, share) for run in RUNS[:2] for share in range(3) if run == RUNS[1] or share == 0]
RANDOM = [(RUNS[number % 4], number) for number in range(12)]


def names(value):
    """Name a case by its run, or its number."""
    return "-".join(value) if isinstance(value, tuple) else str(value)


class Scene:
    """A pair, its data, and the run that nothing happens to."""

    def __init__(self, folder: Path, kind: str, family: str):
        self.folder, self.kind, self.family, self.target = folder, kind, family, make_target()
        self.rows = greedy_rows(self.target, 4, 10)
        began = time.time()
        # All of its checkpoints are kept: the survivors are compared with them.
        assert self.run(folder / "whole", save_total_limit=None) == 0, (folder / "whole.log").read_text()
        self.seconds = time.time() - began
        self.whole = folder / "whole"

    def run(
        self,
        output_dir,
        resume=None,
        at=None,
        end="kill",
        wait=True,
        sigterm_after=None,
        signals=(signal.SIGTERM,),
        **changes,
    ):
        """Train in a child, to its end or to the chosen event; return how it ended."""
        events = output_dir.with_suffix(".events")

        def work():
            torch.manual_seed(0)
            if resume is None:
                Events(output_dir, at, end, events)
            drafter = make_drafter(self.family, self.target, seed=1 if resume is None else 9)
            progress = Progress(output_dir.with_suffix(".progress"), sigterm_after, signals)
            train(self.kind, output_dir, drafter, self.target, self.rows, progress, resume, **changes)

        return in_child(work, output_dir.with_suffix(".log"), wait)

    def num_events(self):
        return int(self.whole.with_suffix(".events").read_text().split()[0])

    def renames_to_lose(self):
        """Numbers of the events before which a loss of power can undo a rename."""
        return [int(number) for number in self.whole.with_suffix(".events").read_text().split()[1:]]

    def check_survival(self, output_dir):
        """Check what is left against the undisturbed run, resume from it, and check the end too."""
        done = Progress(output_dir.with_suffix(".progress")).steps("end")
        for _, folder in list_checkpoints(output_dir):
            if is_whole(folder):
                self.check_same(folder)
        output_dir.with_suffix(".progress").unlink(missing_ok=True)
        has_any = any(is_whole(folder) for _, folder in list_checkpoints(output_dir))
        if not has_any and list_checkpoints(output_dir):
            raise AssertionError("a checkpoint stands under its name but is not whole, and no other is")
        if has_any:
            assert self.run(output_dir, resume=True) == 0, output_dir.with_suffix(".log").read_text()
            began = Progress(output_dir.with_suffix(".progress")).steps("begin")[0]
        else:
            began = 0
            assert self.run(output_dir) == 0, output_dir.with_suffix(".log").read_text()
        assert began >= max(done, default=0) - 1, "more than one save interval is lost"
        self.check_same(output_dir / f"checkpoint-{STEPS}")
        assert list_checkpoints(output_dir)[-1][0] == STEPS, "the run went on beyond its end"
        assert [path.name for path in output_dir.iterdir() if path.name.startswith(".")] == []

    def check_same(self, folder):
        for name in COMPARED:
            assert (folder / name).read_bytes() == (self.whole / folder.name / name).read_bytes(), (folder, name)


def is_whole(folder):
    try:
        return read_checkpoint(folder).is_resumable
    except DamagedCheckpoint:
        return False


@pytest.fixture(scope="module")
def scene(request, tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("scene"), *request.param)


@pytest.fixture(scope="module")
def one_scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("one"), "sft", "dflash")


def spread(count, points):
    return sorted({1 + point * (count - 1) // (points - 1) for point in range(points)})


def test_a_run_killed_at_a_file_operation_goes_on_from_the_last_whole_checkpoint(one_scene, tmp_path):
    for at in spread(one_scene.num_events(), 5)[1:]:
        output_dir = tmp_path / str(at)
        assert one_scene.run(output_dir, at=at) == 128 + signal.SIGKILL
        one_scene.check_survival(output_dir)


def test_a_disk_that_is_full_is_a_clear_error_and_takes_nothing(one_scene, tmp_path):
    for at in spread(one_scene.num_events(), 4)[2:]:
        output_dir = tmp_path / str(at)
        code = one_scene.run(output_dir, at=at, end="full")
        check_full(one_scene, output_dir, code)


def check_full(scene, output_dir, code):
    log = output_dir.with_suffix(".log").read_text()
    if code == 0:
        # Making a folder that is there may fail without harm: the run has ended, and as the undisturbed one did.
        scene.check_same(output_dir / f"checkpoint-{STEPS}")
    else:
        assert code == 1 and "No space left on device" in log, log[-2000:]
    # Where tidying up is what failed, the next start does it.
    if "'os.rmdir " not in log and "'os.remove " not in log:
        assert [path.name for path in output_dir.glob(".making*")] == []
    scene.check_survival(output_dir)


def test_sigterm_saves_the_step_at_hand_and_leaves_with_143(one_scene, tmp_path):
    output_dir = tmp_path / "out"
    code = one_scene.run(output_dir, sigterm_after=1, save_steps=100)
    log = output_dir.with_suffix(".log").read_text()
    assert code == 143 and "Traceback" not in log and "SIGTERM came: saved after step 2, leaving." in log, log
    assert Progress(output_dir.with_suffix(".progress")).steps("end") == [1, 2]
    assert [step for step, folder in list_checkpoints(output_dir) if is_whole(folder)] == [2]
    assert one_scene.run(output_dir, resume=True) == 0, output_dir.with_suffix(".log").read_text()
    for name in ("model.safetensors", "optimizer.safetensors"):
        final = output_dir / f"checkpoint-{STEPS}" / name
        assert final.read_bytes() == (one_scene.whole / f"checkpoint-{STEPS}" / name).read_bytes()


def test_ctrl_c_saves_the_step_at_hand_and_a_second_one_ends_at_once(one_scene, tmp_path):
    output_dir = tmp_path / "out"
    assert one_scene.run(output_dir, sigterm_after=1, signals=(signal.SIGINT,), save_steps=100) == 1
    log = output_dir.with_suffix(".log").read_text()
    assert "this step is finished and saved first" in log and "Ctrl-C came: saved after step 2, leaving." in log, log
    assert log.rstrip().endswith("KeyboardInterrupt")
    assert [step for step, folder in list_checkpoints(output_dir) if is_whole(folder)] == [2]
    assert one_scene.run(output_dir, resume=True) == 0, output_dir.with_suffix(".log").read_text()
    name = f"checkpoint-{STEPS}/model.safetensors"
    assert (output_dir / name).read_bytes() == (one_scene.whole / name).read_bytes()
    # Twice; and with processes that load data, which a terminal interrupts too.
    for times, workers in ((2, 0), (1, 1)):
        other = tmp_path / f"out-{times}"
        options = {"save_steps": 100, "dataloader_num_workers": workers}
        assert one_scene.run(other, sigterm_after=1, signals=(signal.SIGINT,) * times, **options) == 1
        assert "leaving" not in other.with_suffix(".log").read_text() and not list_checkpoints(other)


def test_ctrl_c_in_the_middle_of_a_save_leaves_no_trace_of_it(one_scene, tmp_path):
    output_dir = tmp_path / "out"
    assert one_scene.run(output_dir, at=one_scene.num_events() * 2 // 3, end="interrupt") == 1
    assert "KeyboardInterrupt" in output_dir.with_suffix(".log").read_text()
    one_scene.check_survival(output_dir)


def test_a_write_without_sync_would_be_caught(monkeypatch, one_scene, tmp_path):
    """The matrix itself: without the protocol's syncs, a kill right after the rename leaves a torn checkpoint."""
    from trl_draft_opd.utils import atomic_files as durable

    monkeypatch.setattr(durable, "sync_entry", lambda path: None)
    torn = 0
    for at in range(2, 30, 3):
        output_dir = tmp_path / str(at)
        if one_scene.run(output_dir, at=at) == 0:
            break
        torn += any(not is_whole(folder) for _, folder in list_checkpoints(output_dir))
    assert torn > 0


def test_a_rename_that_the_disk_did_not_keep_costs_nothing_that_was_saved(one_scene, tmp_path):
    for at in one_scene.renames_to_lose()[-3:]:
        output_dir = tmp_path / str(at)
        assert one_scene.run(output_dir, at=at, end="lost") == 128 + signal.SIGKILL
        one_scene.check_survival(output_dir)


# ---- all of it ------------------------------------------------------------------------------------------------------


@pytest.mark.crash
@pytest.mark.parametrize(("scene", "share"), KILLS, ids=names, indirect=["scene"])
def test_a_kill_at_every_single_file_operation_is_survived(scene, tmp_path, share):
    for at in range(1 + share, scene.num_events() + 1, 4):
        output_dir = tmp_path / str(at)
        assert scene.run(output_dir, at=at) == 128 + signal.SIGKILL
        scene.check_survival(output_dir)
        shutil.rmtree(output_dir)


@pytest.mark.crash
@pytest.mark.parametrize("scene", RUNS, ids=names, indirect=True)
def test_every_rename_that_can_be_lost_costs_nothing_that_was_saved(scene, tmp_path):
    assert len(scene.renames_to_lose()) >= STEPS
    for at in scene.renames_to_lose():
        output_dir = tmp_path / str(at)
        assert scene.run(output_dir, at=at, end="lost") == 128 + signal.SIGKILL
        scene.check_survival(output_dir)
        shutil.rmtree(output_dir)


@pytest.mark.crash
@pytest.mark.parametrize(("scene", "share"), FULL_DISKS, ids=names, indirect=["scene"])
def test_a_full_disk_at_every_single_file_operation_is_survived(scene, tmp_path, share):
    for at in range(1 + share, scene.num_events() + 1, 3):
        output_dir = tmp_path / str(at)
        code = scene.run(output_dir, at=at, end="full")
        check_full(scene, output_dir, code)
        shutil.rmtree(output_dir)


@pytest.mark.crash
@pytest.mark.parametrize(("scene", "number"), RANDOM, ids=names, indirect=["scene"])
def test_twelve_kills_at_random_times_are_survived(scene, tmp_path, number):
    output_dir = tmp_path / "out"
    child = scene.run(output_dir, wait=False)
    time.sleep(random.Random(number).uniform(0.05, scene.seconds))
    os.kill(child, signal.SIGKILL)
    wait_for(child)
    scene.check_survival(output_dir)
