# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Counts of blocks add up, and give tau and acceptance per slot, by hand. No model is needed."""

import math

import torch
from test_blocks import ROUNDS, make_rollout

from trl_draft_opd.rollout.counts import Counts, interval


def test_a_rollouts_counts_leave_out_blocks_that_may_reach_past_its_text():
    # The worked example: the block at the tenth token has no room for five drafts.
    counts = Counts.of_rollout(make_rollout(ROUNDS))
    assert counts == Counts((3,), ((2, 2, 1, 1, 1),))
    assert counts.accepted_sums == [(2 + 1) + (0 + 1) + (5 + 1)] and counts.tau == 10 / 3
    assert counts.acceptance_per_slot == [2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3]


def test_counts_add_prompt_by_prompt_and_divide_once():
    first, second = Counts.of_chains([[2, 0], []], 3), Counts.of_chains([[3]], 3)
    both = first + second
    assert both == Counts((2, 0, 1), ((1, 1, 0), (0, 0, 0), (1, 1, 1))) == sum([first, second], Counts())
    assert both.tau == (3 + 1 + 4) / 3 and both.kept_at_slot == (2, 2, 1) and both.num_blocks == 3
    assert both.row(2) == second and both.pooled() == Counts((3,), ((2, 2, 1),))
    assert both.pooled().tau == both.tau


def test_nothing_counted_has_no_tau():
    for counts in (Counts(), Counts.of_chains([[]], 4)):
        assert math.isnan(counts.tau) and counts.acceptance_per_slot == [] and counts.num_blocks == 0


def test_the_interval_resamples_prompts():
    assert Counts.of_chains([[2, 2], [2, 2]], 2).interval(num_resamples=50, seed=0) == (3.0, 3.0)
    low, high = Counts.of_chains([[0] * 4, [2] * 4] * 10, 2).interval(num_resamples=500, seed=0)
    assert 1 <= low < 2 < high <= 3


def test_the_interval_leaves_out_as_much_at_each_end_as_makes_95_percent():
    values = torch.arange(1001, dtype=torch.float64).flip(0)
    assert interval(values) == (25.0, 975.0)
