# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How sure a table may be: tau and gains of the laboratory's arms with intervals over prompts and over seeds.

Knows counts, not how they came about: no file, no model, no name of an arm. The convention is that of
`trl_draft_opd.evaluation`: tau is pooled, `(sum accepted + sum rounds) / sum rounds`; a gain is `tau_after /
tau_before - 1`; an interval runs from the 2.5th to the 97.5th percentile of resamples that pick the same prompts for
both arms.

Shape letters:  S = seeds, P = prompts, R = resamples
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch


NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """
    A number with its 95 % interval.

    Attributes:
        value (`float`): What the data say as they are.
        low (`float`), high (`float`): Ends of the interval.
    """

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether a value lies in the interval, its ends included."""
        return self.low <= value <= self.high

    def overlaps(self, other: "Estimate") -> bool:
        """Whether two intervals share a value."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class ArmCounts:
    """
    Counts of one arm under one condition, seed by seed and prompt by prompt.

    Attributes:
        seeds (`tuple[int, ...]` or `None`):
            Seeds of the rows, ascending. `None` for the point all seeds start from: one row, which is paired with
            every seed.
        rounds_SP (`np.ndarray` of shape `(S, P)`): Counted verification rounds.
        accepted_SP (`np.ndarray` of shape `(S, P)`): Drafts accepted in them.
    """

    seeds: tuple[int, ...] | None
    rounds_SP: np.ndarray
    accepted_SP: np.ndarray

    @property
    def num_seeds(self) -> int:
        """Runs behind the counts."""
        return len(self.rounds_SP)

    @property
    def num_prompts(self) -> int:
        """Prompts each run was evaluated on."""
        return self.rounds_SP.shape[1]

    @property
    def tau(self) -> float:
        """Accepted length, the bonus counted, pooled over prompts and seeds."""
        return float((self.accepted_SP.sum() + self.rounds_SP.sum()) / self.rounds_SP.sum())


def tau(rounds: Sequence[int], accepted: Sequence[int]) -> float:
    """
    Return tau of one run.

    Args:
        rounds (`Sequence[int]`): Counted verification rounds per prompt.
        accepted (`Sequence[int]`): Accepted drafts per prompt, the bonus not counted.

    Returns:
        `float`: `(sum accepted + sum rounds) / sum rounds`, at least 1.

    Raises:
        ValueError: As [`arm_counts`].
    """
    return arm_counts({0: {"rounds": rounds, "accepted": accepted}}).tau


def arm_counts(evals: Mapping[int, Mapping[str, Any]], *, is_shared_start: bool = False) -> ArmCounts:
    """
    Gather what the runs of one arm counted on one prompt set.

    Args:
        evals (`Mapping[int, Mapping]`): By seed, what holds `rounds` and `accepted`, both per prompt in one order.
        is_shared_start (`bool`, *optional*, defaults to `False`):
            Whether this is the one point that all arms and seeds continue from.

    Raises:
        ValueError: If there is no run, a shared start has several, runs cover different numbers of prompts, or no
            block was counted.
    """
    if not evals:
        raise ValueError("An arm without a single run has no tau. Run it, or leave it out.")
    if is_shared_start and len(evals) > 1:
        raise ValueError(f"The start that all seeds share was evaluated for seeds {sorted(evals)}; keep one of them.")
    lengths = {seed: (len(row["rounds"]), len(row["accepted"])) for seed, row in evals.items()}
    if len({length for pair in lengths.values() for length in pair}) > 1:
        raise ValueError(f"Runs of one arm cover different numbers of prompts, (rounds, accepted) by seed: {lengths}.")
    seeds = tuple(sorted(evals))
    rounds_SP, accepted_SP = (
        np.array([evals[seed][name] for seed in seeds], dtype=np.float64) for name in ("rounds", "accepted")
    )
    if not rounds_SP.sum(axis=1).all():
        raise ValueError(
            f"No verification round was counted in a run of seeds {seeds}, so it has no tau. Evaluate on longer "
            "responses or more prompts."
        )
    return ArmCounts(None if is_shared_start else seeds, rounds_SP, accepted_SP)


def tau_interval(arm: ArmCounts, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Estimate:
    """
    Return tau with an interval over prompts and, where there are several, over seeds. See [`resampled_taus`].

    Args:
        arm ([`ArmCounts`]): Counts of the arm.
        num_resamples (`int`, *optional*, defaults to 10,000): Resamples.
        seed (`int`, *optional*, defaults to 0): Of the resamples: the same seed gives the same interval.
    """
    (taus_R,) = resampled_taus([arm], num_resamples=num_resamples, seed=seed)
    return Estimate(arm.tau, *interval(taus_R))


def paired_gain(before: ArmCounts, after: ArmCounts, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Estimate:
    """
    Return the relative gain in tau of one arm over another, resampling prompts and pairs of seeds.

    With one seed per arm this is [`trl_draft_opd.evaluation.paired_gain`]. Arms are compared on the seeds both have; a
    shared start is compared with every seed.

    Args:
        before ([`ArmCounts`]), after ([`ArmCounts`]): The arms, evaluated on the same prompts in the same order.
        num_resamples (`int`, *optional*, defaults to 10,000): Resamples.
        seed (`int`, *optional*, defaults to 0): Of the resamples.

    Returns:
        [`Estimate`]: `tau_after / tau_before - 1`, so 0.08 for 8 %.

    Raises:
        ValueError: If the arms cover different numbers of prompts, or share no seed.
    """
    before, after = pair_seeds(before, after)
    taus_before_R, taus_after_R = resampled_taus([before, after], num_resamples=num_resamples, seed=seed)
    return Estimate(after.tau / before.tau - 1, *interval(taus_after_R / taus_before_R - 1))


def resampled_taus(arms: Sequence[ArmCounts], *, num_resamples: int, seed: int) -> list[np.ndarray]:
    """
    Return tau of every arm in every resample; all arms see the same picks.

    Two levels, crossed: prompts with replacement, `P` of `P`, the same for all seeds, and seeds with replacement, `S -
    1` of `S`, for which the variance of a mean over few seeds comes out unbiased instead of `(S - 1) / S` too small.
    Crossed resampling errs to the wide side. Three seeds still make a rough interval: their variance itself is
    estimated from three numbers.

    Source: Owen, [The pigeonhole bootstrap](https://arxiv.org/abs/0712.1111), for crossed levels; Rao and Wu,
    Resampling inference with complex survey data (1988), for `S - 1`.

    Args:
        arms (`Sequence[ArmCounts]`): Arms with the same prompts; their rows of seeds belong together, row by row.
        num_resamples (`int`): Resamples.
        seed (`int`): Of the picks.

    Returns:
        `list[np.ndarray]` of shape `(R,)` each; NaN where a resample holds no block.

    Raises:
        ValueError: If the arms cover different numbers of prompts or of seeds.
    """
    shapes = {arm.rounds_SP.shape for arm in arms}
    if len(shapes) != 1:
        raise ValueError(
            f"Arms have (seeds, prompts) {sorted(shapes)}; a comparison needs the same prompts, in the same order, "
            "and pairs of seeds."
        )
    (num_seeds, num_prompts) = shapes.pop()
    prompt_counts_RP, seed_counts_RS = _picks(num_prompts, num_seeds, num_resamples, seed)
    taus = []
    for arm in arms:
        accepted_R, rounds_R = (
            (prompt_counts_RP @ counts_SP.T * seed_counts_RS).sum(axis=1)
            for counts_SP in (arm.accepted_SP, arm.rounds_SP)
        )
        with np.errstate(invalid="ignore"):
            taus.append((accepted_R + rounds_R) / rounds_R)
    return taus


@lru_cache(maxsize=8)  # A table asks for the same picks at every arm.
def _picks(num_prompts: int, num_seeds: int, num_resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each prompt and each seed is picked in each resample, `(R, P)` and `(R, S)`."""
    generator = torch.Generator().manual_seed(seed)
    # First the prompts, as the package's own paired gain draws them, so that one seed gives its very interval.
    prompt_counts_RP = _pick_counts(num_prompts, num_prompts, num_resamples, generator)
    seed_counts_RS = np.ones((num_resamples, 1))
    if num_seeds > 1:
        seed_counts_RS = _pick_counts(num_seeds, num_seeds - 1, num_resamples, generator)
    for counts in (prompt_counts_RP, seed_counts_RS):
        counts.setflags(write=False)
    return prompt_counts_RP, seed_counts_RS


def _pick_counts(size: int, num_picks: int, num_resamples: int, generator: torch.Generator) -> np.ndarray:
    """Return how often each of `size` things is picked in each resample, `(R, size)`."""
    picks_R = torch.randint(size, (num_resamples, num_picks), generator=generator).numpy()
    offsets_R = np.arange(num_resamples)[:, None] * size
    counts = np.bincount((picks_R + offsets_R).ravel(), minlength=num_resamples * size)
    return counts.reshape(num_resamples, size).astype(np.float64)


def pair_seeds(before: ArmCounts, after: ArmCounts) -> tuple[ArmCounts, ArmCounts]:
    """Return both arms on the seeds they share, row by row."""
    if before.num_prompts != after.num_prompts:
        raise ValueError(
            f"Arms were evaluated on {before.num_prompts} and {after.num_prompts} prompts; a paired gain needs the "
            "same prompts in the same order."
        )
    if before.seeds is None and after.seeds is None:
        return before, after
    known = [set(arm.seeds) for arm in (before, after) if arm.seeds is not None]
    seeds = tuple(sorted(set.intersection(*known)))
    if not seeds:
        raise ValueError(
            f"Arms were run with seeds {before.seeds} and {after.seeds}; a paired gain needs a seed that both have. "
            "Run one."
        )
    return rows_of(before, seeds), rows_of(after, seeds)


def rows_of(arm: ArmCounts, seeds: tuple[int, ...]) -> ArmCounts:
    """Return an arm on some of its seeds; a shared start stands for each."""
    rows = [0] * len(seeds) if arm.seeds is None else [arm.seeds.index(seed) for seed in seeds]
    return ArmCounts(seeds, arm.rounds_SP[rows], arm.accepted_SP[rows])


def interval(values_R: np.ndarray) -> tuple[float, float]:
    """Return the ends of the 95 % interval of resampled values."""
    # A resample may miss every prompt that has a block: it says nothing.
    low, high = np.quantile(values_R[np.isfinite(values_R)], [0.025, 0.975]).tolist()
    return low, high
