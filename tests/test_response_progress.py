# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whoever waits for responses sees that they come, without a terminal too; what has come is kept when the wait is cut.
"""

import multiprocessing
import os
import re
import signal
import threading
from multiprocessing.pool import IMapUnorderedIterator

import pytest

from helpers.doomed import in_child
from helpers.response_rows import make_origin, make_rows
from helpers.tiny import make_prompts, make_target
from trl_draft_opd import Origin, ResponseStore, SamplingSettings
from trl_draft_opd.responses import generate, generate_missing, progress, server, store
from trl_draft_opd.responses.progress import showing_progress


LINE = re.compile(r"Target responses: (\d+) of 6, ([\d,]+) tokens/s(, about \d:\d\d:\d\d left)?")


@pytest.fixture
def at_once(monkeypatch):
    """Lines as often as there is something to say."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)


def open_store(path, target=None):
    target = target or make_target()
    sampling = SamplingSettings(temperature=0.7, top_k=0, top_p=1.0)
    return ResponseStore.open(path, Origin.of(target, sampling=sampling, max_completion_length=8)), target


def write(responses, target, is_shown=True, shard_size=100):
    options = {"batch_size": 2, "seed": 1, "shard_size": shard_size, "show_progress": is_shown}
    return generate_missing(responses, target, make_prompts(6), **options)


def test_lines_without_a_terminal_count_responses_tokens_and_time(tmp_path, capfd, at_once):
    assert write(*open_store(tmp_path)) == 6
    out, err = capfd.readouterr()
    lines = [LINE.search(line) for line in err.splitlines() if "Target responses" in line]
    assert all(lines) and out == ""
    assert sorted({int(line[1]) for line in lines}) == [0, 2, 4, 6]
    # The first batch is heard of before it is finished, and what it has written counts.
    assert len([line for line in lines if line[1] == "0"]) > 3
    assert int(lines[3][2].replace(",", "")) > 0 and lines[3][3] is None
    assert lines[-2][3] is not None


def test_who_was_told_of_some_responses_is_told_of_the_last_ones(capfd, monkeypatch):
    with showing_progress(6, is_shown=True) as shown:
        shown.add(6, 60)
    assert capfd.readouterr().err == "", "done before a first line was due"
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with showing_progress(6, is_shown=True) as shown:
        shown.tick()
        monkeypatch.setattr(progress, "LINE_EVERY", 30.0)
        shown.add(6, 60)
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("Target responses: 0 of 6,")
    assert last.startswith("Target responses: 6 of 6,") and "left" not in last


def test_lines_come_every_half_minute_and_never_where_they_are_not_asked_for(tmp_path, capfd, monkeypatch):
    assert progress.LINE_EVERY == 30
    write(*open_store(tmp_path / "a"))
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    write(*open_store(tmp_path / "b"), is_shown=False)
    assert "Target" not in "".join(capfd.readouterr())


def test_watching_changes_no_response(tmp_path, at_once, monkeypatch):
    watched, target = open_store(tmp_path / "a")
    write(watched, target)
    monkeypatch.setattr(generate._Tick, "__call__", lambda self, input_ids, scores: scores)
    unwatched, _ = open_store(tmp_path / "b", target)
    write(unwatched, target)
    assert watched.to_dataset().to_dict() == unwatched.to_dataset().to_dict()


def test_what_has_come_in_is_written_every_minute(tmp_path, monkeypatch):
    assert store._WRITE_EVERY == 60
    waiting, _ = open_store(tmp_path / "waiting")
    write(waiting, make_target(), is_shown=False)
    assert len(list(waiting.path.glob("shard-*"))) == 1
    monkeypatch.setattr(store, "_WRITE_EVERY", 0.0)
    impatient, _ = open_store(tmp_path / "impatient")
    write(impatient, make_target(), is_shown=False)
    assert len(list(impatient.path.glob("shard-*"))) == 6


def test_time_that_passes_without_a_response_writes_what_waits(tmp_path, monkeypatch):
    responses = ResponseStore.open(tmp_path, make_origin())
    first, second = make_rows(2)
    held = []

    def rows():
        yield first
        monkeypatch.setattr(store, "_WRITE_EVERY", 0.0)
        yield None
        held.append(len(responses))
        yield second

    responses.add_in_shards(rows(), shard_size=100)
    assert held == [1] and len(responses) == 2


def test_a_server_that_is_silent_is_a_sign_of_time_and_no_response(monkeypatch):
    # The first look times out; a reply is late, not lost.
    real, looks = IMapUnorderedIterator.next, []

    def late(self, timeout=None):
        looks.append(timeout)
        if len(looks) == 1:
            raise multiprocessing.TimeoutError
        return real(self, timeout)

    monkeypatch.setattr(IMapUnorderedIterator, "next", late)
    found = list(server.ask_all(len, [[1, 2], [3]], 1, threading.Event()))
    assert found == [None, (0, 2), (1, 1)] and set(looks) == {10.0}


@pytest.mark.parametrize("signal_number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_process_that_is_told_to_stop_keeps_every_finished_response(tmp_path, monkeypatch, signal_number, code):
    responses, target = open_store(tmp_path / "store")
    decode, calls = generate._decode_batch, []

    def stopped_in_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal_number)
        return decode(*arguments)

    monkeypatch.setattr(generate, "_decode_batch", stopped_in_the_third)
    log = tmp_path / "log"
    assert in_child(lambda: write(responses, target), log) == code
    assert f"Stopped: 4 of 6 missing responses are stored in {responses.path}" in log.read_text()
    assert responses.refresh() == 4 and len(list(responses.path.glob("shard-*"))) == 1
    monkeypatch.undo()
    assert write(responses, target) == 2
    whole, _ = open_store(tmp_path / "whole", target)
    write(whole, target)
    assert all(responses.find(prompt) == whole.find(prompt) for prompt in make_prompts(6))


def test_a_signal_in_the_middle_of_a_shard_loses_none_of_its_responses(tmp_path, monkeypatch):
    responses = ResponseStore.open(tmp_path, make_origin())
    add, calls = ResponseStore.add, []

    def interrupted(self, rows, provenance=None):
        calls.append(len(rows))
        if len(calls) == 1:
            raise SystemExit(143)
        return add(self, rows, provenance)

    monkeypatch.setattr(ResponseStore, "add", interrupted)
    with pytest.raises(SystemExit):
        responses.add_in_shards(make_rows(3), shard_size=2)
    assert calls == [2, 2] and len(responses) == 2


def test_sigterm_that_is_handled_already_stays_so(tmp_path, monkeypatch):
    came = []
    monkeypatch.setattr(generate, "_decode_batch", _after(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    earlier = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        assert write(*open_store(tmp_path)) == 6
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert came == [True] * 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch, at_once):
    class Terminal(progress.Console):
        def __init__(self, **options):
            super().__init__(**options, force_terminal=True, width=120)

    monkeypatch.setattr(progress, "Console", Terminal)
    with showing_progress(3, is_shown=True) as shown:
        shown.console.file = open(os.devnull, "w")
        with shown.console.capture() as captured:
            shown.add(2, 10)
            shown.bar.refresh()
    assert "2/3" in captured.get() and "tokens/s" in captured.get() and " of 3" not in captured.get()


def _after(what):
    decode = generate._decode_batch

    def decoded(*arguments):
        what()
        return decode(*arguments)

    return decoded
