# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whenever what fills a response store is stopped, and by whatever, the store opens and lacks at most the last shard.
"""

import os
import shutil
import signal

import pytest

from helpers.doomed import Events, in_child
from helpers.response_rows import make_origin, make_rows
from trl_draft_opd import ResponseStore
from trl_draft_opd.utils import atomic_files


ROWS = make_rows(5)
INTERRUPT = pytest.param("interrupt", "all", marks=pytest.mark.crash)


def fill(path, at=None, end="kill"):
    """Fill a store in a child, two rows a shard, to the end or the chosen event; return how it ended."""

    def work():
        Events(path, at, end, path.with_suffix(".events"))
        store = ResponseStore.open(path, make_origin())
        for begin in range(0, len(ROWS), 2):
            store.add(ROWS[begin : begin + 2])
            path.with_suffix(".stored").write_text(str(len(store)))

    return in_child(work, path.with_suffix(".log"))


def points(path, column):
    """The events of a run that nothing happened to: all, or those before which a rename can be lost."""
    assert fill(path) == 0, path.with_suffix(".log").read_text()
    count, *losable = map(int, path.with_suffix(".events").read_text().split())
    return list(range(1, count + 1)) if column == "all" else losable


def check_survival(path):
    """Check that all that was said to be stored is there, and that the same call writes the rest."""
    said = path.with_suffix(".stored")
    num_said = int(said.read_text()) if said.exists() else 0
    store = ResponseStore.open(path, make_origin())
    assert num_said <= len(store) <= num_said + 2
    assert [row for row in ROWS[:num_said] if store.find(row.prompt_ids) != list(row.completion_ids)] == []
    assert len(store.missing([row.prompt_ids for row in ROWS])) == len(ROWS) - len(store)
    store.add(ROWS)
    assert len(ResponseStore.open(path, make_origin())) == len(ROWS)


@pytest.mark.parametrize("end, column", [("kill", "all"), ("full", "all"), ("lost", "losable"), INTERRUPT])
def test_a_store_that_is_stopped_at_any_file_operation_keeps_what_it_had(tmp_path, end, column):
    whole = points(tmp_path / "whole", column)
    assert len(whole) > (5 if column == "losable" else 15)
    for at in whole:
        path = tmp_path / str(at)
        code = fill(path, at, end)
        log = path.with_suffix(".log").read_text()
        if end == "full":
            # Making a folder that is there may fail without harm.
            assert code == 0 or (code == 1 and "No space left on device" in log), log
            assert code == 0 or not list(path.glob(".*")), "what could not be finished is removed"
        else:
            assert code == (1 if end == "interrupt" else 128 + signal.SIGKILL), log
        check_survival(path)
        shutil.rmtree(path)


@pytest.mark.parametrize("sync, end", [("fsync", "kill"), ("sync_entry", "lost")])
def test_a_store_without_its_syncs_would_be_caught(tmp_path, monkeypatch, sync, end):
    """The matrix itself: without a sync of what is in a shard, or of its name, what was said to be stored is not."""
    if sync == "sync_entry":
        monkeypatch.setattr(atomic_files, "sync_entry", lambda path: None)
    else:
        # Of folders alone, as `write_file` forces a file's content before it renames it.
        monkeypatch.setattr(atomic_files.os, "fsync", lambda descriptor: None)
        monkeypatch.setattr(Events, "_note_fsync", lambda self, descriptor: None)
    failed = 0
    for at in points(tmp_path / "whole", "all"):
        path = tmp_path / str(at)
        fill(path, at, end)
        try:
            check_survival(path)
        except (AssertionError, ValueError):
            failed += 1
    assert failed > 2


def test_a_torn_shard_is_named_and_its_responses_are_written_again(tmp_path):
    path = tmp_path / "store"
    fill(path)
    shards = sorted(path.glob("shard-*"))
    os.truncate(shards[1], shards[1].stat().st_size // 2)
    with pytest.raises(
        ValueError, match=rf"Shard {shards[1]} is not usable: .*Delete it; .*writes its responses again"
    ):
        ResponseStore.open(path, make_origin())
    shards[1].unlink()
    store = ResponseStore.open(path, make_origin())
    assert store.missing([row.prompt_ids for row in ROWS]) == [list(row.prompt_ids) for row in ROWS[2:4]]


def test_a_full_disk_says_what_is_kept_and_what_to_do(tmp_path, monkeypatch):
    store = ResponseStore.open(tmp_path, make_origin())
    store.add(ROWS[:2])

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="Make room and run the same again") as raised:
        store.add(ROWS[2:4])
    assert raised.value.errno == 28
