# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Gains and intervals of the laboratory are right: by hand where they can be worked out, by simulation where they cannot.
"""

import time

import numpy as np
import pytest

from benchmarks.lab import statistics
from benchmarks.lab.statistics import Estimate, arm_counts, paired_gain, resampled_taus, tau, tau_interval
from trl_draft_opd.rollout import counts as package


pytestmark = pytest.mark.lab


def counts(*rows: tuple[list[int], list[int]], **options):
    """Return an arm with one row of (rounds, accepted) per seed."""
    return arm_counts({s: {"rounds": rounds, "accepted": kept} for s, (rounds, kept) in enumerate(rows)}, **options)


def random_arm(generator: np.random.Generator, num_seeds: int, num_prompts: int):
    rounds = generator.integers(5, 40, (num_seeds, num_prompts))
    return counts(*((r.tolist(), generator.integers(0, 4 * r).tolist()) for r in rounds))


def test_tau_counts_the_bonus_and_pools_prompts():
    assert tau([2, 6], [4, 4]) == (8 + 8) / 8
    # Pooled, so not the mean of 3 and 1 + 4 / 6.
    assert tau([2, 6], [4, 4]) != pytest.approx((3 + 1 + 4 / 6) / 2)
    assert tau([10], [0]) == 1


def test_seeds_are_pooled_before_dividing():
    arm = counts(([10, 10], [10, 30]), ([20, 0], [0, 0]))
    assert arm.tau == (40 + 40) / 40
    assert (arm.num_seeds, arm.num_prompts) == (2, 2)


def test_identical_arms_gain_exactly_nothing():
    arm = random_arm(np.random.default_rng(0), num_seeds=3, num_prompts=20)
    assert paired_gain(arm, arm, num_resamples=500) == Estimate(0.0, 0.0, 0.0)


def test_twice_the_tau_on_every_prompt_is_a_gain_of_one():
    rounds = [4, 8, 5]
    before = counts((rounds, [4, 24, 0]))
    # tokens = accepted + rounds, doubled in the same rounds
    after = counts((rounds, [12, 56, 5]))
    assert paired_gain(before, after, num_resamples=500) == Estimate(1.0, 1.0, 1.0)
    # Each arm alone is uncertain all the same.
    assert tau_interval(before).low < before.tau < tau_interval(before).high


def test_one_seed_gives_the_interval_of_the_package():
    generator = np.random.default_rng(1)
    before, after = (random_arm(generator, num_seeds=1, num_prompts=30) for _ in range(2))

    def sums(arm):
        return (arm.accepted_SP + arm.rounds_SP)[0].tolist(), arm.rounds_SP[0].tolist()

    taus = [package.resampled_taus(*sums(arm), 2000, 5) for arm in (before, after)]
    low, high = package.interval(taus[1] / taus[0] - 1)
    ours = paired_gain(before, after, num_resamples=2000, seed=5)
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=1e-12)
    assert ours.value == pytest.approx(after.tau / before.tau - 1, abs=1e-12)
    interval = tau_interval(before, num_resamples=2000, seed=5)
    expected = package.interval(package.resampled_taus(*sums(before), 2000, 5))
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)


def test_the_same_seed_gives_the_same_interval_again():
    generator = np.random.default_rng(2)
    before, after = (random_arm(generator, num_seeds=3, num_prompts=15) for _ in range(2))
    first = paired_gain(before, after, num_resamples=300, seed=1)
    assert paired_gain(before, after, num_resamples=300, seed=1) == first
    assert paired_gain(before, after, num_resamples=300, seed=2) != first


def test_seeds_that_differ_widen_the_interval():
    # Every prompt is alike, so nothing is left to prompts; the seeds are at tau 2, 3 and 4.
    rounds = [10] * 30
    before = counts(*[(rounds, [10] * 30)] * 3)
    after = counts((rounds, [10] * 30), (rounds, [20] * 30), (rounds, [30] * 30))
    gain = paired_gain(before, after)
    assert gain == Estimate(0.5, 0.0, 1.0)
    # Two seeds of three are drawn: the variance of their mean is that of a mean of three, 1 / 3 for a variance of 1.
    (taus_R,) = resampled_taus([after], num_resamples=40_000, seed=0)
    assert taus_R.var() == pytest.approx(1 / 3, rel=0.03)


def test_pairs_of_seeds_share_their_luck():
    # Seed by seed the gain is a tenth, whatever the seed does to both arms.
    rounds = [100] * 10
    before = counts((rounds, [100] * 10), (rounds, [200] * 10), (rounds, [400] * 10))
    after = counts((rounds, [120] * 10), (rounds, [230] * 10), (rounds, [450] * 10))
    gain = paired_gain(before, after)
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))


def test_a_shared_start_is_paired_with_every_seed():
    start = counts(([10, 10], [10, 10]), is_shared_start=True)
    after = counts(([10, 10], [10, 10]), ([10, 10], [30, 30]))
    assert paired_gain(start, after).value == pytest.approx(3 / 2 - 1)
    assert paired_gain(start, start).value == 0


def test_arms_are_compared_on_the_seeds_both_have():
    before = counts(([10, 10], [10, 10]), ([10, 10], [90, 90]))
    after = counts(([10, 10], [20, 20]))
    assert paired_gain(before, after).value == pytest.approx(3 / 2 - 1)
    other = arm_counts({7: {"rounds": [10, 10], "accepted": [20, 20]}})
    with pytest.raises(ValueError, match="a seed that both have"):
        paired_gain(before, other)


def test_a_prompt_without_blocks_is_kept_and_counts_nothing():
    assert tau([0, 4], [0, 4]) == 2
    gain = paired_gain(counts(([0, 4], [0, 4])), counts(([0, 4], [0, 12])))
    assert gain == Estimate(1.0, 1.0, 1.0)


@pytest.mark.parametrize("num_seeds", [1, 4])
def test_intervals_cover_a_known_gain_about_95_times_of_100(num_seeds):
    generator = np.random.default_rng(3)
    true_gain, num_prompts, num_trials, covered = 2.2 / 2.0 - 1, 40, 300, 0
    for _ in range(num_trials):
        # Prompts are easy or hard for both arms alike, and a seed may be a lucky one.
        ease_P = generator.normal(1, 0.2, num_prompts).clip(0.3)
        arms = []
        for mean_accepted in (1.0, 1.2):
            luck_S = generator.normal(0, 0.06 if num_seeds > 1 else 0, num_seeds)
            rounds = generator.integers(20, 60, num_prompts)
            rates_SP = (mean_accepted * ease_P + luck_S[:, None]).clip(0)
            kept_SP = generator.poisson(rounds * rates_SP)
            arms.append(counts(*((rounds.tolist(), row.tolist()) for row in kept_SP)))
        covered += paired_gain(*arms, num_resamples=400).covers(true_gain)
    # Four seeds make a percentile interval somewhat short; one level alone would cover far less (see the next test).
    assert (0.91 if num_seeds == 1 else 0.84) <= covered / num_trials <= 0.99


def test_ignoring_seeds_would_cover_too_little():
    generator = np.random.default_rng(4)
    num_trials, both_levels, prompts_only = 100, 0, 0
    for _ in range(num_trials):
        luck = generator.normal(0, 0.1, 4)
        kept = [generator.poisson(100 * (1 + bias), 40).tolist() for bias in luck]
        arm = counts(*(([100] * 40, row) for row in kept))
        pooled = counts(([400] * 40, np.sum(kept, axis=0).tolist()))
        both_levels += tau_interval(arm, num_resamples=400).covers(2.0)
        prompts_only += tau_interval(pooled, num_resamples=400).covers(2.0)
    assert both_levels >= 80 and prompts_only <= 45


def test_two_thousand_draws_take_a_fraction_of_a_second():
    generator = np.random.default_rng(5)
    before, after = (random_arm(generator, num_seeds=3, num_prompts=200) for _ in range(2))
    statistics._picks.cache_clear()
    begun = time.process_time()
    paired_gain(before, after, num_resamples=2000)
    assert time.process_time() - begun < 0.2


def test_arms_on_other_prompts_are_refused():
    with pytest.raises(ValueError, match="2 and 3 prompts"):
        paired_gain(counts(([1, 1], [1, 1])), counts(([1, 1, 1], [1, 1, 1])))
    with pytest.raises(ValueError, match="different numbers of prompts"):
        counts(([1, 1], [1, 1]), ([1], [1]))
    with pytest.raises(ValueError, match="different numbers of prompts"):
        tau([1, 1], [1])


def test_arms_that_counted_nothing_are_refused():
    with pytest.raises(ValueError, match="No verification round"):
        counts(([0, 0], [0, 0]))
    with pytest.raises(ValueError, match="without a single run"):
        arm_counts({})
    with pytest.raises(ValueError, match="keep one"):
        counts(([1], [1]), ([1], [1]), is_shared_start=True)
