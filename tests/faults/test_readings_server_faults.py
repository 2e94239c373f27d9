# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Servers of readings in trouble: each is one sentence, nothing is lost, no text is left out, and no file is left behind.
"""

import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.extraction_server import ExtractionServer, Trouble, serving
from helpers.tiny import make_target
from trl_draft_opd import FrozenTarget
from trl_draft_opd.readings import server as server_module
from trl_draft_opd.readings.server import ReadingServers
from trl_draft_opd.readings.shared_folder import SharedFolder
from trl_draft_opd.responses import ServerError


LAYERS = (1, 4, 6)
TEXTS = [[7 + (3 * i + k) % 50 for i in range(5 + k)] for k in range(6)]
# Requests of the probe at each server.
PROBE = 2


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    return make_target()


@pytest.fixture(scope="module")
def expected(target: FrozenTarget) -> list[Any]:
    found = []
    for text in TEXTS:
        ids = torch.tensor([text])
        found.append(target.read_text(ids, torch.ones_like(ids), LAYERS))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "states"
    made.mkdir()
    return made


def connect(target: FrozenTarget, urls: Any, folder: Path, **settings: Any) -> ReadingServers:
    settings = {"timeout": 5.0, "max_retries": 2, "retry_wait": 0.01, "check_layers": False} | settings
    return ReadingServers.connect(target, urls, LAYERS, shared_folder=folder, **settings)


def after_probe(trouble: Trouble, until: int | None = None) -> Callable[[int, dict], Trouble | None]:
    """Trouble with every request behind the probe's, before number `until`."""
    return lambda number, body: trouble if number >= PROBE and (until is None or number < until) else None


def assert_right(readings: ReadingServers, expected: list[Any], texts: list[list[int]] = TEXTS) -> None:
    for text in texts:
        assert torch.equal(readings.fetch(text, LAYERS).features, expected[TEXTS.index(text)].features)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".alive"))


# ---- what passes ----------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


PASSING = {
    "late lock": Trouble(write_after=0.2),
    "busy": Trouble(status=503),
    "too many requests": Trouble(status=429),
    "hung up": Trouble(is_silent=True),
    "no file": Trouble(has_file=False),
    "late reply": Trouble(reply_after=0.8),
    "late file": Trouble(write_after=0.8),
    "no lock": Trouble(has_lock=False),
    "half a file": Trouble(place=_cut),
}


@pytest.mark.parametrize("case", PASSING)
def test_passing_trouble_is_tried_again_under_a_new_number_and_its_file_is_swept(
    target: FrozenTarget, expected: list[Any], folder: Path, case: str
):
    with serving(target, LAYERS, folder, trouble=after_probe(PASSING[case], PROBE + 1)) as server:
        readings = connect(target, server.url, folder, timeout=0.5)
        assert_right(readings, expected)
        time.sleep(0.5)
        readings.close()
        assert list(folder.iterdir()) == []
    numbers = [body["request_id"] for body in server.seen]
    # What was out of reach is proven again, by one text more.
    num_more = {"late lock": 0, "busy": 2, "too many requests": 2, "hung up": 2, "late reply": 2}.get(case, 1)
    assert len(set(numbers)) == len(numbers) == PROBE + len(TEXTS) + num_more


def test_a_server_that_dies_midway_and_comes_back_is_waited_for(
    target: FrozenTarget, expected: list[Any], folder: Path
):
    first = ExtractionServer(target, LAYERS, folder).start()
    readings = connect(target, first.url, folder, max_retries=8, retry_wait=0.1, concurrency=2)
    assert_right(readings, expected, TEXTS[:2])
    first.stop()
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(readings.fetch, text, LAYERS) for text in TEXTS]
        time.sleep(0.4)
        assert not any(future.done() for future in found)
        second = ExtractionServer(target, LAYERS, folder, port=first.server_port).start()
        states = [future.result() for future in found]
    assert all(torch.equal(ours.features, its.features) for ours, its in zip(states, expected, strict=True))
    readings.close()
    second.stop()
    assert list(folder.iterdir()) == []


# ---- what does not --------------------------------------------------------------------------------------------------

LASTING = {
    r"the file of states cmpl-draft-readings-.* is damaged \(": Trouble(place=_cut),
    r"the file of states cmpl-draft-readings-.* is damaged \(.*": Trouble(place=lambda path: path.write_bytes(b"")),
    "status 503 from http://127.0.0.1": Trouble(status=503),
    "RemoteDisconnected": Trouble(is_silent=True),
    "let go of the lock of cmpl-draft-readings-.* without having written it; its log tells why": Trouble(
        has_file=False
    ),
    r"did not finish writing cmpl-.* within 0.3 seconds": Trouble(write_after=1.0),
    "has no lock of that name here. Is it the server's `shared_storage_path`": Trouble(has_lock=False),
}


@pytest.mark.parametrize("reason", LASTING)
def test_lasting_trouble_is_named_after_the_retries_and_says_how_to_go_on(
    target: FrozenTarget, folder: Path, reason: str
):
    with serving(target, LAYERS, folder, trouble=after_probe(LASTING[reason])) as server:
        readings = connect(target, server.url, folder, timeout=0.3)
        with pytest.raises(
            ServerError, match=rf"of 5 tokens did not come from {server.url}, sent 3 times: .*{reason}"
        ):
            readings.fetch(TEXTS[0], LAYERS)
        assert len(server.seen) == PROBE + 3
        readings.close()


def _edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Trouble:
    return Trouble(tensors=lambda tensors: tensors | {name: change(tensors[name]).contiguous()})


def _repeat(states: torch.Tensor) -> torch.Tensor:
    states[:, 2] = states[:, 0]
    return states


def _spoil(states: torch.Tensor) -> torch.Tensor:
    states[3, 1, 5] = float("nan")
    return states


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _link_lock(path: Path) -> None:
    lock_path = path.with_name(f"{path.name}.lock")
    lock_path.unlink()
    lock_path.symlink_to("/etc/passwd")


def _long(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def _named(path: str) -> Trouble:
    return Trouble(reply=lambda reply: reply | {"kv_transfer_params": {"hidden_states_path": path}})


WRONG = {
    r"shape \(4, 4, 32\) in place of \(5, 4, 32\)": _edit("hidden_states", lambda states: states[:4]),
    r"shape \(5, 3, 32\) in place of \(5, 4, 32\)": _edit("hidden_states", lambda states: states[:, :3]),
    r"shape \(5, 4, 31\) in place of": _edit("hidden_states", lambda states: states[..., :31]),
    "the states 0 and 2 of every token are equal: vLLM repeats": _edit("hidden_states", _repeat),
    "is of another text: 5 ids in place of 5, or others": _edit("token_ids", lambda ids: ids.flip(0)),
    "is of another text: 4 ids in place of 5": _edit("token_ids", lambda ids: ids[:4]),
    "are torch.bfloat16, and the target computes in torch.float32. .*`--dtype float32`": _edit(
        "hidden_states", lambda states: states.bfloat16()
    ),
    "are not finite from token 3, state 1": _edit("hidden_states", _spoil),
    r"lacks \['hidden_states'\], it holds \['states', 'token_ids'\]": Trouble(
        tensors=lambda tensors: {"states": tensors["hidden_states"], "token_ids": tensors["token_ids"]}
    ),
    "has 1099511627776 bytes, and the states of this text .* for more layers": Trouble(place=_long),
    "safetensors is a link, and only plain files": Trouble(place=_link),
    "lock is a link, and only plain files": Trouble(place=_link_lock),
    "is no plain file": Trouble(place=lambda path: os.mkfifo(path)),
    "is no plain file ?": Trouble(place=lambda path: path.mkdir()),
    "names the file '/etc/passwd', which is not that of our request": _named("/etc/passwd"),
    r"names the file '../../secret.safetensors', which is not": _named("../../secret.safetensors"),
    r"names the file 'cmpl-draft-readings-0-0.safetensors', which is not": _named(
        "cmpl-draft-readings-0-0.safetensors"
    ),
    r"names the file .\['a'\]., which is not": Trouble(
        reply=lambda reply: reply | {"kv_transfer_params": {"hidden_states_path": ["a"]}}
    ),
    "read another text, of 2 ids in place of 5": Trouble(
        reply=lambda reply: reply | {"choices": [{"prompt_token_ids": [1, 2]}]}
    ),
    "has not the form of a vLLM server's": Trouble(reply=lambda reply: {"choices": []}),
    "names no file of hidden states .*is started by:\nvllm serve": Trouble(
        reply=lambda reply: reply | {"kv_transfer_params": None}
    ),
    "refused the request with status 400": Trouble(status=400),
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_no_reading_of_the_text_is_refused_at_once_and_nothing_is_left(
    target: FrozenTarget, expected: list[Any], folder: Path, reason: str
):
    with serving(target, LAYERS, folder, trouble=after_probe(WRONG[reason], PROBE + 1)) as server:
        readings = connect(target, server.url, folder)
        with pytest.raises(ValueError, match=f"(?s){server.url} does not deliver the target's readings: .*{reason}"):
            readings.fetch(TEXTS[0], LAYERS)
        assert len(server.seen) == PROBE + 1
        # The next text is not touched by it.
        assert_right(readings, expected, TEXTS[1:2])
        time.sleep(0.05)
        readings.close()
    for path in folder.iterdir():
        assert path.is_dir(), "only what no server of ours makes is left"


def test_files_of_others_are_neither_read_nor_deleted(target: FrozenTarget, folder: Path):
    foreign = [folder / name for name in ("model.safetensors", "cmpl-other-0-a.safetensors", "notes.alive")]
    for path in foreign:
        path.write_bytes(b"theirs")
    with serving(target, LAYERS, folder, trouble=after_probe(_named(str(foreign[0])))) as server:
        readings = connect(target, server.url, folder)
        with pytest.raises(ValueError, match="is not that of our request"):
            readings.fetch(TEXTS[0], LAYERS)
        time.sleep(0.05)
        readings.close()
    assert sorted(folder.iterdir()) == sorted(foreign)
    assert all(path.read_bytes() == b"theirs" for path in foreign)


# ---- orphans --------------------------------------------------------------------------------------------------------


def test_what_a_dead_process_left_is_swept_at_the_next_start_and_what_a_living_one_waits_for_is_not(
    target: FrozenTarget, folder: Path
):
    ended = SharedFolder(folder)
    dead = ended.new_request_id()
    # As the kernel does when a process ends.
    os.close(ended._alive)
    living = SharedFolder(folder)
    owners = [dead, living.new_request_id(), "draft-readings-0123456789abcdef-00000001"]
    for owner in owners:
        (folder / f"cmpl-{owner}-0-a.safetensors").touch()
        (folder / f"cmpl-{owner}-0-a.safetensors.lock").touch()
    assert len(list(folder.iterdir())) == 8
    with serving(target, LAYERS, folder) as server:
        readings = connect(target, server.url, folder)
        assert [name for name in left_in(folder) if owners[1] not in name] == []
        assert len(left_in(folder)) == 2
        readings.close()
    living.close()
    assert list(folder.iterdir()) == []


def test_a_file_that_is_still_being_written_is_left_to_the_next_sweep(target: FrozenTarget, folder: Path):
    slow = Trouble(is_silent=True, write_after=0.6)
    with serving(target, LAYERS, folder, trouble=after_probe(slow)) as server:
        readings = connect(target, server.url, folder, max_retries=0)
        with pytest.raises(ServerError):
            readings.fetch(TEXTS[0], LAYERS)
        readings.close()
        assert [name[-5:] for name in left_in(folder)] == [".lock"]
        time.sleep(1.0)
        assert len(left_in(folder)) == 2
        server.trouble = None
        connect(target, server.url, folder).close()
    assert list(folder.iterdir()) == []


def test_a_file_that_comes_late_is_swept_while_the_run_goes_on(target: FrozenTarget, folder: Path):
    with serving(target, LAYERS, folder, trouble=after_probe(Trouble(is_silent=True, write_after=0.1))) as server:
        readings = connect(target, server.url, folder, max_retries=0)
        for number in range(2):
            with pytest.raises(ServerError):
                readings.fetch(TEXTS[0], LAYERS)
            time.sleep(0.4)
            # The second request that is given up takes the first one's file away.
            assert len(left_in(folder)) == 2, number
        readings.close()
    assert list(folder.iterdir()) == []


def test_closing_ends_waiting_at_once(target: FrozenTarget, folder: Path):
    with serving(target, LAYERS, folder, trouble=after_probe(Trouble(write_after=3.0))) as server:
        readings = connect(target, server.url, folder, timeout=60.0, concurrency=1)
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(readings.fetch, text, LAYERS) for text in TEXTS[:2]]
            time.sleep(0.3)
            start = time.monotonic()
            readings.close()
            for future in waiting:
                with pytest.raises(ServerError, match="The readings were closed"):
                    future.result()
            assert time.monotonic() - start < 1.0
        readings.close()


# ---- several servers ------------------------------------------------------------------------------------------------


def test_one_of_two_servers_that_fails_is_left_out_with_a_warning_and_no_text_is_lost(
    target: FrozenTarget, expected: list[Any], folder: Path
):
    with (
        serving(target, LAYERS, folder, trouble=after_probe(Trouble(status=500), None)) as failing,
        serving(target, LAYERS, folder) as healthy,
    ):
        readings = connect(target, [failing.url, healthy.url], folder, concurrency=2)
        with pytest.warns(UserWarning, match=f"{failing.url} is left out for 60 seconds; .* status 500"):
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda text: readings.fetch(text, LAYERS), TEXTS))
        assert all(torch.equal(ours.features, its.features) for ours, its in zip(found, expected, strict=True))
        num_seen = len(failing.seen)
        assert_right(readings, expected)
        assert len(failing.seen) == num_seen
        readings.close()


def test_a_server_that_was_left_out_is_asked_again_after_its_rest(
    target: FrozenTarget, expected: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server_module, "_REST_SECONDS", 0.3)
    with (
        serving(target, LAYERS, folder, trouble=after_probe(Trouble(status=500))) as failing,
        serving(target, LAYERS, folder, trouble=lambda number, body: Trouble(reply_after=0.05)) as healthy,
    ):
        readings = connect(target, [failing.url, healthy.url], folder, concurrency=1)
        with pytest.warns(UserWarning, match="is left out for"):
            assert_right(readings, expected, TEXTS[:2])
        failing.trouble, num_seen = None, len(failing.seen)
        time.sleep(0.4)
        assert_right(readings, expected)
        assert len(failing.seen) > num_seen
        readings.close()


@pytest.mark.parametrize("is_the_same", [True, False])
def test_what_answers_where_a_server_was_out_of_reach_is_proven_again(
    target: FrozenTarget, expected: list[Any], folder: Path, is_the_same: bool
):
    with serving(target, LAYERS, folder) as first:
        readings = connect(target, first.url, folder, max_retries=0)
        port = first.server_port
    with pytest.raises(ServerError):
        readings.fetch(TEXTS[0], LAYERS)
    other = target if is_the_same else make_target(seed=5)
    with serving(other, LAYERS, folder, port=port):
        if is_the_same:
            assert_right(readings, expected)
        else:
            with pytest.raises(ValueError, match="another server answers there now"):
                readings.fetch(TEXTS[0], LAYERS)
    readings.close()
    assert list(folder.iterdir()) == []


def test_the_last_server_is_never_left_out(target: FrozenTarget, expected: list[Any], folder: Path):
    with (
        serving(target, LAYERS, folder, trouble=after_probe(Trouble(status=500))) as one,
        serving(target, LAYERS, folder, trouble=after_probe(Trouble(status=500))) as other,
    ):
        readings = connect(target, [one.url, other.url], folder)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for text in TEXTS[:2]:
                with pytest.raises(ServerError, match="status 500"):
                    readings.fetch(text, LAYERS)
        assert len([each for each in said if "left out" in str(each.message)]) == 1
        one.trouble = other.trouble = None
        assert_right(readings, expected)
        readings.close()


def test_a_wrong_reading_of_one_of_two_servers_stops_the_run(target: FrozenTarget, folder: Path):
    spoilt = _edit("hidden_states", _spoil)
    with (
        serving(target, LAYERS, folder, trouble=after_probe(spoilt)) as wrong,
        serving(target, LAYERS, folder) as right,
    ):
        readings = connect(target, [wrong.url, right.url], folder)
        with pytest.raises(ValueError, match=f"{wrong.url} does not deliver"):
            for text in TEXTS:
                readings.fetch(text, LAYERS)
        readings.close()


# ---- no server of readings ------------------------------------------------------------------------------------------

LINE = ".*is started by:\nvllm serve TARGET .*--speculative-config .*2, 5, 7, 8.*ExampleHiddenStatesConnector"


@pytest.mark.parametrize(
    ("case", "trouble"),
    [
        ("names no file of hidden states", Trouble(reply=lambda reply: {"choices": reply["choices"]})),
        ("refused the request with status 404", Trouble(status=404)),
        ("has no log-probabilities", Trouble(reply=lambda reply: reply | {"choices": [{}]})),
        ("status 500", Trouble(status=500)),
        ("without having written it", Trouble(has_file=False)),
    ],
)
def test_a_server_that_does_not_extract_is_told_with_the_line_that_starts_one(
    target: FrozenTarget, folder: Path, case: str, trouble: Trouble
):
    with serving(target, LAYERS, folder, trouble=lambda number, body: trouble) as server:
        with pytest.raises((ValueError, ServerError), match=f"(?s){case}{LINE}"):
            connect(target, server.url, folder)
    # The server may write its file only now; the next start takes it away.
    time.sleep(0.2)
    shared = SharedFolder(folder)
    shared.sweep()
    shared.close()
    assert list(folder.iterdir()) == []


def test_no_server_at_all_is_told_with_the_line_that_starts_one(target: FrozenTarget, folder: Path):
    server = ExtractionServer(target, LAYERS, folder)
    server.server_close()
    with pytest.raises(ServerError, match=r"(?s)no server answers at .* \(is it running\?\)" + LINE):
        connect(target, server.url, folder)


def test_a_server_of_another_model_is_refused(target: FrozenTarget, folder: Path):
    with serving(target, LAYERS, folder) as server:
        with pytest.raises(ValueError, match=r"serves \['tiny'\], and not 'large'"):
            connect(target, server.url, folder, model="large")
        server.models = {"data": [{"id": "a"}, {"id": "b"}]}
        with pytest.raises(ValueError, match=r"serves \['a', 'b'\]. Name the one"):
            connect(target, server.url, folder)


def test_a_key_that_the_server_echoes_is_in_no_message(target: FrozenTarget, folder: Path):
    echo = Trouble(reply=lambda reply: reply | {"kv_transfer_params": {"hidden_states_path": "canary-1"}})
    with serving(target, LAYERS, folder, trouble=after_probe(echo)) as server:
        readings = connect(target, server.url, folder, api_key="canary-1")
        with pytest.raises(ValueError, match=r"names the file '\*\*\*'") as refusal:
            readings.fetch(TEXTS[0], LAYERS)
        assert "canary" not in repr(refusal.value) + repr(refusal.value.__cause__)
        readings.close()


def test_settings_that_cannot_be_are_refused_before_anything_is_sent(target: FrozenTarget, folder: Path):
    url = "http://127.0.0.1:9"
    file = folder / "file"
    file.touch()
    for reason, changes in {
        "is no folder on this machine. It must be the one of their `shared_storage_path`": {"shared_folder": file},
        "need one or several different servers, got": {"urls": [url, url + "/v1"]},
        r"need one or several different servers, got \[\]": {"urls": []},
        "must be an address like": {"urls": "127.0.0.1:9"},
        "`concurrency` must be at least 1": {"concurrency": 0},
        "`max_retries` not below": {"max_retries": -1},
        r"layers are 0 to 7, and \[8\] are not": {"layer_ids": (1, 8)},
    }.items():
        settings: dict[str, Any] = {"urls": url, "layer_ids": LAYERS, "shared_folder": folder} | changes
        with pytest.raises(ValueError, match=reason):
            ReadingServers.connect(target, settings.pop("urls"), settings.pop("layer_ids"), **settings)
