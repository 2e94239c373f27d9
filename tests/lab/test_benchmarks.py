# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The instruments of `benchmarks/` are right: counters give values that can be worked out by hand, arms run in turns and
are held to each other, ratios are paired, time is charged to the right stage. And the suites run on tiny sizes.
"""

import argparse
import json
import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks import arms, counters, stages, texts
from benchmarks.suites import dflash, loss, rollout, step, ttt
from helpers.tiny import make_drafter, make_prompts, make_target


pytestmark = pytest.mark.lab


def settings(**options) -> argparse.Namespace:
    defaults = {"pairs": 1, "device": "cpu", "dtype": "float32", "quick": True, "only": [], "seed": 0, "shared": None}
    defaults |= {"drafter_eagle3": None, "drafter_dflash": None, "prompts": 4, "max_completion_length": 8}
    return argparse.Namespace(**defaults | options)


# ---- counters -------------------------------------------------------------------------------------------------------


def test_peak_bytes_are_those_of_the_buffers_alive_together():
    x = torch.zeros(1000)

    def three_buffers_two_at_a_time():
        first = x + 1
        second = first * 2
        del first
        return second.exp()

    assert counters.peak_bytes(three_buffers_two_at_a_time) == 2 * 4000
    assert counters.peak_bytes(lambda: x.view(10, 100).transpose(0, 1)[2:]) == 0
    assert counters.peak_bytes(lambda: x.add_(1)) == 0


def test_peak_bytes_follow_what_autograd_keeps_and_repeat_exactly():
    x = torch.zeros(1000, requires_grad=True)

    def step_of_training():
        loss = (x.exp() * 2).sum()
        return torch.autograd.grad(loss, x)

    first = counters.peak_bytes(step_of_training)
    # The saved exponential, its double and the sum; then the exponential, its gradient and the input's.
    assert 3 * 4000 <= first <= 3 * 4000 + 16
    assert [counters.peak_bytes(step_of_training) for _ in range(3)] == [first] * 3


def test_flops_count_products_and_fused_attention():
    left, right = torch.zeros(3, 5), torch.zeros(5, 7)
    assert counters.flops(lambda: left @ right) == 2 * 3 * 5 * 7
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    pairs = 2 * 3 * 16 * 16
    assert counters.flops(lambda: F.scaled_dot_product_attention(query, query, query)) == 4 * 8 * pairs
    causal_pairs = 2 * 3 * 16 * 17 // 2
    causal = lambda: F.scaled_dot_product_attention(query, query, query, is_causal=True)  # noqa: E731
    assert counters.flops(causal) == 4 * 8 * causal_pairs
    assert counters.flops(lambda: causal().sum().backward()) == (4 + 10) * 8 * causal_pairs


def test_head_rows_are_counted_by_head_and_direction():
    drafter_head, target_head = torch.randn(11, 4), torch.randn(11, 4)
    hidden = torch.randn(6, 4, requires_grad=True)
    with counters.HeadRows({"drafter": drafter_head, "target": target_head}) as rows:
        F.linear(hidden, drafter_head).sum().backward()
        F.linear(hidden[:2].detach(), target_head)
        F.linear(hidden[2:].detach(), target_head)
        F.embedding(torch.tensor([1, 2, 3]), target_head)
    assert rows.forward == {"drafter": 6, "target": 6}
    assert rows.backward == {"drafter": 6}
    assert rows.chunks == {"drafter": [6], "target": [2, 4]}


def test_forwards_of_the_target_are_counted_with_their_tokens():
    target = make_target()
    with counters.count_forwards(target.backbone) as count:
        target.causal_lm(input_ids=torch.ones(2, 5, dtype=torch.long))
        target.backbone(torch.ones(1, 3, dtype=torch.long))
    target.causal_lm(input_ids=torch.ones(1, 1, dtype=torch.long))
    assert (count.calls, count.tokens) == (2, [10, 3])


# ---- arms -----------------------------------------------------------------------------------------------------------


def test_arms_run_in_turns_and_the_first_turn_is_not_timed():
    calls = []
    both = [arms.Arm(name, lambda name=name: calls.append(name) or {}) for name in "AB"]
    seconds = arms.time_in_turns(both, pairs=2)
    assert calls == ["A", "B"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"A": 2, "B": 2}


def test_ratios_are_paired_before_the_median_is_taken():
    # The medians of the arms alone would say 8 / 5.
    ratio = arms.paired_ratio({"slow": [2.0, 30.0, 8.0], "fast": [1.0, 10.0, 5.0]}, "slow", "fast")
    assert (ratio.median, ratio.pairs) == (2.0, 3)
    assert ratio.p10 == pytest.approx(1.68) and ratio.p90 == pytest.approx(2.8)
    assert not ratio.is_noisy
    spread = arms.paired_ratio({"slow": [1.0, 2.0, 9.0], "fast": [1.0, 1.0, 1.0]}, "slow", "fast")
    assert spread.median == 2.0 and spread.is_noisy


def test_an_arm_with_another_result_is_no_arm():
    ours = arms.Arm("ours", lambda: {"loss": torch.tensor(1.0)})
    arms.assert_equal([ours, arms.Arm("same", lambda: {"loss": torch.tensor(1.0)})], rtol=0, atol=0)
    with pytest.raises(AssertionError, match="loss of other differs from ours"):
        arms.assert_equal([ours, arms.Arm("other", lambda: {"loss": torch.tensor(1.1)})], rtol=1e-3, atol=0)
    with pytest.raises(AssertionError, match="less returns"):
        arms.assert_equal([ours, arms.Arm("less", lambda: {})], rtol=0, atol=0)


def test_a_fitted_exponent_is_that_of_a_power_distribution():
    sizes = [1.0, 2.0, 4.0, 8.0]
    assert arms.fitted_exponent(sizes, [3 * x**1.5 for x in sizes]) == pytest.approx(1.5)
    assert arms.fitted_exponent(sizes, [7.0] * 4) == pytest.approx(0.0)


def test_a_figure_is_reached_on_its_own_side_of_the_bound():
    assert arms.Figure("peak", 0.05, 0.06).is_reached
    assert not arms.Figure("peak", 0.07, 0.06).is_reached
    assert arms.Figure("speed", 3.1, 3.0, is_upper=False).is_reached
    assert not arms.Figure("speed", 2.9, 3.0, is_upper=False).is_reached
    assert arms.Figure("only reported", 1.0, None).is_reached is None


# ---- stages ---------------------------------------------------------------------------------------------------------


def test_time_is_charged_to_the_innermost_stage():
    class Owner:
        def inner(self):
            time.sleep(0.03)

        def outer(self):
            time.sleep(0.01)
            self.inner()

    owner, clock = Owner(), stages.StageClock()
    with clock.watch((owner, "inner", "inner"), (owner, "outer", "outer")):
        owner.inner()  # before the start: not counted
        clock.start()
        owner.outer()
        time.sleep(0.01)
        clock.stop()
    assert "inner" not in vars(owner) and "outer" not in vars(owner)
    shares = clock.shares()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["inner"] > shares["outer"] > 0 and shares["other"] > 0
    assert clock.seconds["inner"] < 0.055


# ---- suites ---------------------------------------------------------------------------------------------------------


def test_suites_on_tensors_run_and_report(tmp_path, capsys):
    reports = []
    for suite in (ttt, dflash, loss):
        reports.append(arms.Report(suite.__name__.split(".")[-1], vars(settings())))
        suite.run(settings(), reports[-1])
    arms.save_json(tmp_path / "out.json", reports)
    arms.save_plot(tmp_path / "out.png", reports)
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [report["suite"] for report in saved] == ["ttt", "dflash", "loss"]
    assert all(report["figures"] and report["curves"] and report["ratios"] for report in saved)
    assert (tmp_path / "out.png").stat().st_size > 1000
    rows = {figure["name"]: figure for figure in saved[2]["figures"]}
    assert rows["drafter head rows / supervised rows"]["measured"] == 1.0
    assert rows["target head rows / distinct target states, TTT-7"]["measured"] == 1.0
    assert "speculators" in capsys.readouterr().out


@pytest.mark.parametrize("family", texts.FAMILIES)
def test_a_supervised_step_is_compared_with_the_plain_one(family):
    target = make_target()
    rows = [torch.randint(7, 60, (length,)) for length in (19, 14)]
    marks = [torch.arange(len(row)) >= 6 for row in rows]
    drafter = make_drafter(family, target)
    problem = step.SftProblem(target, drafter, rows, marks, num_anchors=4, trains_head=True, seed=0)
    arms.assert_equal(problem.plain(0.9), rtol=1e-3, atol=1e-5)
    changed = problem.plain(0.9)[0], problem.plain(0.5)[1]
    with pytest.raises(AssertionError, match="plain reference differs"):
        # Both read the streams set last: break one alone.
        problem.streams = step.streams("forward_kl", 0.9)
        arms.assert_equal(changed, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", texts.FAMILIES)
def test_rollouts_of_every_kind_agree_on_a_tiny_pair(family, monkeypatch):
    monkeypatch.setattr(rollout, "BATCH_SIZE", 2)
    monkeypatch.setattr(rollout, "REACH_STEP", {1: None, 2: None})
    report = arms.Report("rollout", {})
    pair = rollout.Pair(settings(), report, family, make_target())
    pair.max_completion_length = 6
    for part in (rollout.equality, rollout.batches, rollout.opd_steps):
        part(settings(), report, pair, make_prompts(2))
    measured = {figure.name.split(",")[0]: figure.measured for figure in report.figures}
    assert measured["prompts on which replay differs from live"] == 0
    assert measured["prompts on which live differs from plain code"] == 0
    assert measured["target forwards per round"] == 1.0
