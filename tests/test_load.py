# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The closed loop: always so many under way, never more, bounded in count and time, and what goes wrong is named."""

import time
import traceback

import pytest

from helpers.streaming_server import StreamingServer, streaming
from trl_draft_opd import ServerSettings
from trl_draft_opd.responses.client import ServerClient, ServerError
from trl_draft_opd.responses.protocols import WrongReply
from trl_draft_opd.served_speed.load import Run, run_load
from trl_draft_opd.served_speed.measure import measure_servers
from trl_draft_opd.served_speed.report import LoadSettings, SpeedReport
from trl_draft_opd.served_speed.requests import build_body


PROMPTS = [[7, 8 + i % 5, 9] for i in range(24)]
LENGTH = 12


def settings_of(server: StreamingServer, **changes) -> ServerSettings:
    return ServerSettings(**{"base_url": server.url, "timeout": 5.0, "max_retries": 0} | changes)


def load(
    server: StreamingServer, *, concurrency: int = 2, num_prompts: int = 8, max_seconds: float = 30.0, **changes
) -> Run:
    options = {"model": "tiny", "max_completion_length": LENGTH, "temperature": 0.0, "ignore_eos": False}
    bodies = [build_body(prompt, "ids", eos_token_ids=[2], **options) for prompt in PROMPTS[:num_prompts]]
    return run_load(
        ServerClient(settings_of(server, **changes)), bodies, concurrency=concurrency, max_seconds=max_seconds
    )


def measure(
    servers: list[StreamingServer], keep=lambda reports: None, num_prompts: int = 4, **changes
) -> list[SpeedReport]:
    wanted = {"concurrency": (1, 2), "repeats": 2, "warmup": 0, "max_completion_length": LENGTH} | changes
    options = {"prompts_sha256": "a" * 64, "eos_token_ids": [2], "keep": keep}
    return measure_servers([settings_of(s) for s in servers], PROMPTS[:num_prompts], LoadSettings(**wanted), **options)


# ---- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 4, 7])
def test_so_many_requests_are_under_way_until_the_prompts_run_out_and_never_more(concurrency):
    with streaming(wants_full=concurrency, total=len(PROMPTS)) as server:
        run = load(server, concurrency=concurrency, num_prompts=len(PROMPTS))
    assert (server.most, server.was_short, len(server.bodies)) == (concurrency, False, len(PROMPTS))
    assert len(run.latency) == len(PROMPTS) and None not in run.digests


def test_a_server_that_waits_for_more_requests_than_there_are_is_told_apart():
    with streaming(wants_full=3, total=6, patience=0.5) as server:
        load(server, concurrency=2, num_prompts=6, timeout=20.0)
    assert server.was_short and server.most == 2


def test_every_prompt_is_asked_once_by_its_ids_and_all_its_tokens_counted():
    with streaming(per_round=3, kept=2) as server:
        run = load(server, concurrency=2)
    assert sorted(body["prompt"] for _, body in server.bodies) == sorted(PROMPTS[:8])
    assert {body["stream"] and path for path, body in server.bodies} == {"/v1/completions"}
    assert run.num_cut == 0 and 6 * LENGTH <= run.num_tokens <= 8 * LENGTH
    # Four pieces of three tokens: the first is the prompt's, three are rounds.
    assert (run.drafts.rounds, run.drafts.accepted, run.drafts.tau) == (8 * 3, 8 * 3 * 2, 3.0)
    assert run.drafts.kept_at_slot == (24, 24, 0)
    assert run.num_foreign == 0


def test_times_are_those_of_the_server():
    with streaming(first_delay=0.1, delay=0.04, per_round=4) as server:
        run = load(server, concurrency=1, num_prompts=2)
    assert min(run.first_token) >= 0.1
    # Two gaps of 0.04 s over the eight tokens behind the first piece.
    assert min(run.between_tokens) >= 0.0095
    assert min(run.latency) >= 0.18 and run.seconds >= 0.36
    assert run.tokens_per_second <= 2 * LENGTH / 0.36


def test_speed_counts_while_all_are_under_way():
    # Of two requests at a time, the second is slower: what it writes alone counts for nothing.
    with streaming(delay=0.02) as server:
        server.fault = lambda number: time.sleep(0.5 * number)
        run = load(server, concurrency=2, num_prompts=2)
    assert run.seconds < max(run.latency) - 0.2
    assert LENGTH <= run.num_tokens < 2 * LENGTH


def test_time_bounds_a_run_and_what_is_under_way_is_cut_off():
    with streaming(delay=0.2) as server:
        begun = time.monotonic()
        run = load(server, concurrency=4, num_prompts=24, max_seconds=0.9)
        assert time.monotonic() - begun < 4
    assert run.num_cut == 4 and run.seconds == pytest.approx(0.9)
    assert len(server.bodies) == 4 and run.latency == []
    # Tokens that came before the end count.
    assert 4 <= run.num_tokens <= 4 * 6
    assert run.digests == [None] * 24 and run.num_foreign is None


def test_tokens_for_somebody_else_are_noticed():
    with streaming(foreign=1) as server:
        assert load(server, num_prompts=4).num_foreign == 4 * LENGTH


def test_a_server_without_a_drafter_or_without_metrics_has_no_tau():
    with streaming() as server:
        run = load(server)
        assert run.drafts is None and run.num_foreign == 0
        server.has_metrics = False
        run = load(server)
        assert run.drafts is None and run.num_foreign is None


def test_tokens_are_counted_by_the_total_where_a_server_sends_no_ids():
    with streaming(per_round=3, kept=2) as server:
        with_ids = load(server, concurrency=1)
        server.sends_ids = False
        without = load(server, concurrency=1)
    assert without.digests == with_ids.digests
    assert without.num_tokens == with_ids.num_tokens == 8 * LENGTH


# ---- what goes wrong ------------------------------------------------------------------------------------------------

KEY = "canary-0123"
REASONS = {
    "status": (ServerError, "prompt 5: status 503 .*busy"),
    "hang up": (ServerError, "prompt 5: .*RemoteDisconnected"),
    "half": (WrongReply, "prompt 5: the response ended before its end, after 6 pieces"),
    "silence": (ServerError, "prompt 5: .*timed out"),
    "error": (WrongReply, "prompt 5: the server broke the response off: .*out of memory"),
    "no JSON": (WrongReply, "prompt 5: the reply is no response sent as it is written; it holds"),
    "no counts": (WrongReply, "prompt 5: the server tells neither token ids nor how many"),
}


@pytest.mark.parametrize("fault", REASONS)
def test_a_fault_is_named_with_its_prompt_and_without_the_key(fault):
    kind, reason = REASONS[fault]
    with (
        streaming(fault=lambda number: fault if number == 5 else None) as server,
        pytest.raises(kind, match=reason) as failure,
    ):
        load(server, concurrency=1, timeout=1.0, api_key=KEY)
    assert "canary" not in "".join(traceback.format_exception(failure.value))
    # Nothing is asked again, and nothing after a failure.
    assert len(server.bodies) == (8 if fault == "no counts" else 6)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_what_was_measured_before_a_fault_is_kept():
    kept: list[int] = []
    # Two levels of two runs of four prompts; the second run of the second level fails.
    with streaming(fault=lambda number: "status" if number >= 13 else None) as server:
        with pytest.raises(ServerError, match=rf"^{server.url}, 2 at a time, repeat 2, prompt \d: status 503"):
            measure([server], keep=lambda reports: kept.append(len(reports[0].runs)))
    assert kept == [1, 2, 3]


def test_a_server_that_is_not_there_is_named():
    with streaming() as server:
        pass
    with pytest.raises(ServerError, match="no server answers at http://127"):
        measure([server])


# ---- servers in turns -----------------------------------------------------------------------------------------------


def test_two_servers_are_measured_in_turns_and_warm_ups_are_not_counted():
    order: list[str] = []
    with streaming(fault=lambda n: order.append("a")) as one, streaming(fault=lambda n: order.append("b")) as two:
        reports = measure([one, two], concurrency=(2,), repeats=3, warmup=2)
    # Four prompts per run; the warm-up has two of two.
    assert "".join(order[::4]) == "abbaabba" and len(order) == 32
    assert [len(report.runs) for report in reports] == [3, 3]
    assert [(report.engine, report.engine_version) for report in reports] == [("vllm", "0.1")] * 2


def test_fewer_prompts_than_requests_at_a_time_are_refused_before_a_server_is_asked():
    with (
        streaming() as server,
        pytest.raises(ValueError, match="8 requests at a time need at least as many prompts.*are 4"),
    ):
        measure([server], concurrency=(1, 8))
    assert server.bodies == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"concurrency": ()}, "`concurrency` must be ascending"),
        ({"concurrency": (2, 1)}, "`concurrency` must be ascending"),
        ({"concurrency": (0, 1)}, "`concurrency` must be ascending"),
        ({"repeats": 0}, "`repeats` must be in 1..20"),
        ({"repeats": 21}, "`repeats` must be in 1..20"),
        ({"warmup": -1}, "`warmup` and"),
        ({"max_seconds": 0.0}, "`max_seconds` must be above 0"),
        ({"max_seconds": float("inf")}, "`max_seconds` must be a finite number"),
        ({"max_completion_length": 1}, "at least 2"),
        ({"form": "json"}, "`form` must be one of"),
    ],
)
def test_settings_of_a_load_out_of_range_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        LoadSettings(**changes)
