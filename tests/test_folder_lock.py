# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One process at a time trains into an output folder, and one that was killed stands in nobody's way.
"""

import errno
import fcntl
import os
import signal
import time

import pytest

from helpers.doomed import in_child, wait_for
from helpers.oracle import greedy_rows
from helpers.tiny import TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.runs.folder_lock import LOCK_FILE, locked


def hold(folder, ready, seconds=60):
    """Hold a folder in a child that has said so; return its id."""

    def work():
        with locked(folder):
            ready.write_text("held")
            time.sleep(seconds)

    child = in_child(work, ready.with_suffix(".log"), wait=False)
    end = time.monotonic() + 20
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert ready.exists()
    return child


def sft(folder, target, rows=None, **changes):
    settings = TINY_RUN | {"max_steps": 1, "save_strategy": "steps", "max_completion_length": 10} | changes
    rows = rows or greedy_rows(target, 4, 10)
    return DraftSFTTrainer(make_drafter("dflash", target), target, DraftSFTConfig(str(folder), **settings), rows)


def test_a_second_process_is_refused_and_a_killed_one_is_forgotten(tmp_path):
    target, folder = make_target(), tmp_path / "out"
    trainer = sft(folder, target)
    child = hold(folder, tmp_path / "ready")
    # What a running save looks like; a start tidies such folders up.
    (folder / ".making-checkpoint-1-0123456789ab").mkdir()
    with pytest.raises(ValueError, match=rf"is in use by process {child} on .*Wait for its end, stop it"):
        trainer.train()
    assert sorted(path.name for path in folder.iterdir()) == [LOCK_FILE, ".making-checkpoint-1-0123456789ab"]
    os.kill(child, signal.SIGKILL)
    assert wait_for(child) == 128 + signal.SIGKILL
    trainer.train()
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]


def test_a_target_that_responds_to_all_prompts_first_holds_the_folder_too(tmp_path):
    target = make_target()
    rows = greedy_rows(target, 4, 10).select_columns(["prompt_ids"])
    child = hold(tmp_path / "out", tmp_path / "ready")
    with pytest.raises(ValueError, match=rf"is in use by process {child}"):
        sft(tmp_path / "out", target, rows, regenerate=True)
    os.kill(child, signal.SIGKILL)
    wait_for(child)
    sft(tmp_path / "out", target, rows, regenerate=True).train()


def test_a_worker_that_outlives_a_killed_process_does_not_hold_its_folder(tmp_path):
    worker = tmp_path / "worker"

    def work():
        with locked(tmp_path / "out"):
            if (child := os.fork()) == 0:
                time.sleep(60)
                os._exit(0)
            worker.write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work, tmp_path / "log") == 128 + signal.SIGKILL
    try:
        with locked(tmp_path / "out"):
            os.kill(int(worker.read_text()), 0)
    finally:
        os.kill(int(worker.read_text()), signal.SIGKILL)


def test_a_run_that_fails_gives_its_folder_back(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path), pytest.raises(ValueError, match="in use by process"), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_holder_removed_while_another_process_opened_it_holds_nobody(tmp_path, monkeypatch):
    flock, has_left = fcntl.flock, []

    def flock_after_the_holder_left(descriptor, how):
        if not has_left:
            has_left.append(os.unlink(tmp_path / LOCK_FILE))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock_after_the_holder_left)
    with locked(tmp_path):
        # Of the two files of that name, the one that others see is the one that is held.
        with pytest.raises(ValueError, match="in use by"), locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_said_and_trains(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert "on a file system without locks (No locks available): see to it that no second process" in caplog.text
