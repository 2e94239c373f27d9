# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Served speed: what replies and /metrics pages say, and what runs of two servers say together."""

import json
import math
from dataclasses import replace

import pytest

from trl_draft_opd.responses.protocols import WrongReply
from trl_draft_opd.served_speed.comparison import Comparison, LevelComparison, compare
from trl_draft_opd.served_speed.counters import DraftCounts, EngineCounts, read_counts
from trl_draft_opd.served_speed.load import Run
from trl_draft_opd.served_speed.report import LoadSettings, SpeedReport, mean_interval, percentiles, read_reports
from trl_draft_opd.served_speed.requests import build_body, read_reply


def event(**content) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def piece(text: str, ids=None, reason=None, **further) -> bytes:
    own = {} if ids is None else {"token_ids": ids}
    return event(choices=[{"text": text, "finish_reason": reason} | own], **further)


def usage(count: int) -> bytes:
    return event(choices=[], usage={"completion_tokens": count})


DONE = b"data: [DONE]\n\n"


def read(*pieces: tuple[float, bytes], is_cut: bool = False):
    return read_reply(pieces, is_cut=is_cut)


# ---- replies --------------------------------------------------------------------------------------------------------


def test_tokens_arrive_when_their_line_is_whole_however_it_is_cut():
    whole = piece(" a b", [1, 2]) + piece(" c", [3], "length") + DONE
    middle = len(piece(" a b", [1, 2])) + 5
    reply = read((1.0, whole[:10]), (2.0, whole[10:middle]), (3.0, whole[middle:]))
    assert reply.arrivals == ((2.0, 2), (3.0, 1)) and reply.is_whole and reply.num_tokens == 3
    assert reply.digest == read((0.0, piece(" a b c", [1, 2, 3], "length") + DONE)).digest
    assert reply.digest != read((0.0, piece(" a b d", [1, 2, 3], "length") + DONE)).digest


def test_a_running_count_says_how_many_tokens_a_piece_has_where_there_are_no_ids():
    first = piece("a", usage={"completion_tokens": 3})
    last = piece("b", reason="stop", usage={"completion_tokens": 4})
    assert read((1.0, first), (2.0, last + DONE)).arrivals == ((1.0, 3), (2.0, 1))
    # A reply that was cut off counts as far as it came.
    assert read((1.0, first), is_cut=True).arrivals == ((1.0, 3),)


def test_the_total_is_spread_over_pieces_where_it_is_all_that_is_known():
    pieces = [(float(i), piece("x", reason="stop" if i == 2 else None)) for i in range(3)]
    assert read(*pieces, (3.0, usage(8) + DONE)).arrivals == ((0.0, 2), (1.0, 3), (2.0, 3))
    assert read(*pieces[:2], is_cut=True).arrivals == ()


def test_a_chat_counts_its_reasoning_and_its_role_counts_for_nothing():
    role = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
    thought = event(choices=[{"delta": {"reasoning_content": "hm"}, "token_ids": [5]}])
    said = event(choices=[{"delta": {"content": "so"}, "token_ids": [6], "finish_reason": "stop"}])
    reply = read((1.0, role), (2.0, thought), (3.0, said + DONE))
    assert reply.arrivals == ((2.0, 1), (3.0, 1))
    assert reply.digest == read((0.0, piece("hmso", [5, 6], "stop") + DONE)).digest


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (piece("a", [1]) + DONE, "ended before its end, after 1 pieces"),
        (piece("a", [1], "stop"), "ended before its end"),
        (piece("a", [1], "abort") + DONE, "for the reason 'abort'"),
        (event(object="error", message="no"), "broke the response off"),
        (b"data: [1]\n", "is no response sent as it is written"),
        (b"data: " + b"[" * 100_000 + b"\n", "is no response sent as it is written"),
        (b"<html>\n", "ended before its end, after 0 pieces"),
        (piece("a", reason="stop") + DONE, "tells neither token ids nor how many tokens"),
    ],
)
def test_a_reply_that_is_no_whole_response_is_refused(content, reason):
    with pytest.raises(WrongReply, match=reason):
        read((0.0, content))


def test_a_line_without_end_is_refused():
    with pytest.raises(WrongReply, match="a line of more than"):
        read(*((float(i), b"x" * 2**22) for i in range(5)))


def test_an_error_is_quoted_without_the_key_even_where_the_quote_is_cut():
    long = event(error="x" * 285 + "canary-0123456789")
    with pytest.raises(WrongReply) as refusal:
        read_reply([(0.0, long)], is_cut=False, clean=lambda text: text.replace("canary-0123456789", "***"))
    assert "canary" not in str(refusal.value)


def test_the_end_of_sequence_ends_a_response_unless_it_is_ignored():
    options = {"model": "m", "max_completion_length": 9, "temperature": 0.0, "eos_token_ids": [2, 3]}
    path, body = build_body([7], "ids", ignore_eos=False, **options)
    assert path == "/v1/completions" and body["stop_token_ids"] == [2, 3] and not body["ignore_eos"]
    assert {
        "prompt": [7],
        "max_tokens": 9,
        "top_p": 1.0,
        "top_k": -1,
        "repetition_penalty": 1.0,
    }.items() <= body.items()
    _, body = build_body([7], "ids", ignore_eos=True, **options)
    assert body["stop_token_ids"] == [] and body["ignore_eos"]
    # Text has its special tokens already, and a chat is rendered by the server.
    assert build_body("a", "text", ignore_eos=True, **options)[1]["add_special_tokens"] is False
    path, body = build_body([{"role": "user", "content": "a"}], "chat", ignore_eos=True, **options)
    assert path == "/v1/chat/completions" and "prompt" not in body and body["messages"][0]["content"] == "a"


# ---- what engines count ---------------------------------------------------------------------------------------------


def test_two_readings_of_vllm_tell_tau_and_acceptance_per_slot():
    def page(written: int, rounds: int, accepted: int, kept: list[int]) -> str:
        lines = [
            f'vllm:generation_tokens_total{{engine="0"}} {written}',
            "# HELP x",
            "vllm:spec_decode_num_drafts_created 1",
        ]
        lines += [f'vllm:spec_decode_num_drafts_total{{engine="0",model_name="a b"}} {float(rounds)}']
        lines += [f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {accepted:e}']
        name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
        return "\n".join(lines + [f'{name}{{engine="0",position="{k}"}} {count}' for k, count in enumerate(kept)])

    before, after = read_counts(page(100, 10, 15, [9, 6])), read_counts(page(180, 30, 75, [27, 12]))
    counted = after.since(before)
    assert counted == EngineCounts("vllm", 80, DraftCounts(20, 60, (18, 6)))
    assert counted.drafts.tau == 4.0
    assert (counted.drafts + DraftCounts(1, 2, (1, 1, 1))) == DraftCounts(21, 62, (19, 7, 1))


def test_sglang_counts_rounds_and_tokens_of_ended_requests():
    page = 'sglang:generation_tokens_total{model_name="m"} %d\nsglang:num_requests_total{model_name="m"} %d\n%s'
    # Nothing is there before the first request has ended.
    before = read_counts(page % (0, 0, ""))
    after = read_counts(page % (60, 4, 'sglang:spec_verify_calls_total{model_name="m"} 28.0'))
    # 56 tokens of 28 rounds, one of each request from its prompt's pass.
    assert after.since(before) == EngineCounts("sglang", 60, DraftCounts(28, 28))
    assert after.since(before).drafts.tau == 2.0


@pytest.mark.parametrize("page", [None, "", "<html>no</html>", "up 1\n", "vllm:generation_tokens_total nonsense"])
def test_a_page_of_no_known_engine_counts_nothing(page):
    assert read_counts(page) is None


def test_an_engine_that_drafts_nothing_has_no_tau():
    assert read_counts("vllm:generation_tokens_total 5.0").drafts is None
    assert DraftCounts(0, 0).tau is None


# ---- runs together --------------------------------------------------------------------------------------------------


def make_run(rate: float, concurrency: int = 1, digests=("a", "b"), **changes) -> Run:
    return Run(concurrency=concurrency, seconds=2.0, num_tokens=round(rate * 2), digests=list(digests), **changes)


def make_report(rates: dict[int, list[float]], digests=("a", "b"), **changes) -> SpeedReport:
    settings = LoadSettings(concurrency=tuple(rates), repeats=max(map(len, rates.values())), **changes)
    runs = [make_run(rate, concurrency, digests) for concurrency, own in rates.items() for rate in own]
    return SpeedReport(settings, "a" * 64, 2, "vllm", "0.1", runs)


def test_an_interval_is_by_the_t_distribution_over_the_runs():
    # By hand: mean 2, standard error 1 / sqrt(3), t 4.303.
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert mean_interval([5.0]) == (5.0, None, None)


def test_percentiles_are_values_that_were_measured():
    assert percentiles([0.1 * i for i in range(100, 0, -1)]) == pytest.approx({"p50": 5.0, "p90": 9.0, "p99": 9.9})
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0} and percentiles([]) == {}


def test_a_level_pools_what_its_runs_counted():
    counts = [DraftCounts(10, 20, (10, 10)), DraftCounts(30, 20, (15, 5))]
    report = make_report({2: [100.0, 200.0]})
    report.runs = [replace(run, drafts=own, num_cut=1) for run, own in zip(report.runs, counts, strict=True)]
    (level,) = report.levels()
    assert level.tau == 1 + 40 / 40 and level.acceptance_per_slot == [25 / 40, 15 / 40]
    assert (level.tokens_per_second, level.tokens_per_second_per_request, level.num_cut) == (150.0, 75.0, 2)


def test_a_report_comes_back_from_its_file_as_it_was(tmp_path):
    report = make_report({1: [50.0], 4: [90.0]})
    report.runs[0] = replace(report.runs[0], drafts=DraftCounts(3, 4, (3, 1)), first_token=[0.25], digests=["a", None])
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"format_version": 1, "served": report.to_dict(), "baseline": None}))
    assert read_reports(path) == (report, None)
    for content in ("{", "[]", '{"format_version": 2}', '{"format_version": 1, "baseline": null, "served": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="is no file that `trl-draft-opd bench --json` wrote"):
            read_reports(path)


def test_a_speed_up_is_paired_run_by_run():
    served, plain = make_report({1: [150.0, 300.0, 75.0]}), make_report({1: [100.0, 200.0, 50.0]})
    (level,) = compare(served, plain).levels
    # Runs vary fourfold, their ratio not at all.
    assert (level.speedup, level.low, level.high) == pytest.approx((1.5, 1.5, 1.5))
    assert level.verdict == "faster"
    (level,) = compare(make_report({1: [150.0]}), make_report({1: [100.0]})).levels
    assert (level.low, level.high, level.verdict) == (None, None, "not told apart")


def test_texts_are_equal_where_every_run_finished_them_alike():
    served, plain = make_report({1: [1.0, 1.0]}, ("a", "b", None)), make_report({1: [1.0, 1.0]}, ("a", "b", "c"))
    served.runs[1] = replace(served.runs[1], digests=["a", "x", None])
    (level,) = compare(served, plain).levels
    assert (level.num_equal, level.num_compared) == (1, 2)
    (level,) = compare(make_report({1: [1.0]}, temperature=0.7), make_report({1: [1.0]}, temperature=0.7)).levels
    assert (level.num_equal, level.num_compared) == (None, None)


@pytest.mark.parametrize("changes", [{"max_completion_length": 9}, {"temperature": 1.0}, {"ignore_eos": True}])
def test_what_was_asked_differently_is_not_compared(changes):
    with pytest.raises(ValueError, match=rf"differ in \['{next(iter(changes))}'\]"):
        compare(make_report({1: [1.0]}), make_report({1: [1.0]}, **changes))


def test_other_prompts_and_other_levels_are_not_compared():
    other = replace(make_report({1: [1.0]}), prompts_sha256="b" * 64)
    with pytest.raises(ValueError, match=r"differ in \['prompts'\]"):
        compare(make_report({1: [1.0]}), other)
    with pytest.raises(ValueError, match="no level in common"):
        compare(make_report({1: [1.0]}), make_report({2: [1.0]}))
    with pytest.raises(ValueError, match="ended before any token came"):
        compare(make_report({1: [0.0]}), make_report({1: [1.0]}))


def judge(*speedups: float) -> Comparison:
    levels = [LevelComparison(2**i, 3, s, s - 0.1, s + 0.1, 2, 2) for i, s in enumerate(speedups)]
    return Comparison(levels)


@pytest.mark.parametrize(
    ("speedups", "sentence", "bounds"),
    [
        ((1.5, 1.4, 1.2, 0.8, 0.7), "faster up to 4 requests at a time, slower from 8", (4, 8)),
        ((1.5, 1.2, 1.0, 0.8), "faster up to 2 requests at a time, not told apart at 4, slower at 8", (2, 8)),
        ((1.5, 1.0, 1.05), "faster at 1 request at a time, not told apart from 2", (1, None)),
        ((1.5, 1.3), "faster at every load measured", (2, None)),
        ((0.9, 0.7), "not told apart at 1 request at a time, slower at 2", (None, 2)),
        ((0.7,), "slower at 1 request at a time", (None, 1)),
        ((1.0, 1.0), "not told apart from it at every load measured", (None, None)),
    ],
)
def test_the_load_at_which_the_speed_up_ends_is_named(speedups, sentence, bounds):
    found = judge(*speedups)
    assert (found.sentence(), (found.faster_up_to, found.slower_from)) == (sentence, bounds)
