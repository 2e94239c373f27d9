# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Drafter families beside each other: pairs of one target and one set of test prompts, each with a start of the same
counted FLOPs, and whether what an arm adds to one family differs from what it adds to another.
"""

from collections.abc import Sequence
from typing import Any

from trl_draft_opd.drafters.auto import DRAFTER_CLASSES

from .statistics import ArmCounts, Estimate, interval, pair_seeds, paired_gain, resampled_taus, rows_of
from .tables import CONTINUED, NOTHING, START, ArmRow, Condition, arm_rows, percent


STARTS = (
    "| family | weights, M | updates | TFLOP | tau of the start | over {first} | acceptance per slot |\n"
    "|---|---|---|---|---|---|---|"
)
GAINS = "| family | arm | over SFT continued | more than {first}'s, points | seeds |\n|---|---|---|---|---|"


def render_families(found: Sequence[dict[str, Any]], prompts: str, *, num_resamples: int) -> str:
    """
    Return two tables: the starts, and what the arms add to each.

    Args:
        found (`Sequence[dict]`): Results of the pairs; the others are held against the first.
        prompts (`str`): Name of the prompt set.
        num_resamples (`int`): Resamples of the intervals.

    Raises:
        ValueError: If pairs have different targets, or were evaluated on different numbers of prompts.
    """
    targets = {results["target"] for results in found}
    if len(targets) > 1:
        raise ValueError(f"Families are compared on one target; these pairs have {sorted(targets)}.")
    condition = Condition(1, prompts, 0.0, "greedy")
    rows = [{row.arm: row for row in arm_rows(results, condition, num_resamples=num_resamples)} for results in found]
    titles = [DRAFTER_CLASSES[results["family"]].config_class.title for results in found]
    starts, gains = [STARTS.format(first=titles[0])], [GAINS.format(first=titles[0])]
    for title, results, own in zip(titles, found, rows, strict=True):
        is_first = own is rows[0]
        over = None if is_first else paired_gain(rows[0][START].counts, own[START].counts, num_resamples=num_resamples)
        starts.append(_start_line(title, results["sft"], own[START], over))
        for arm in (arm for arm in own if arm not in (START, CONTINUED)):
            more = NOTHING
            if not is_first and arm in rows[0]:
                pairs = [(each[CONTINUED].counts, each[arm].counts) for each in (rows[0], own)]
                more = percent(difference_of_gains(*pairs, num_resamples=num_resamples)).replace(" %", "")
            cells = (title, arm, percent(own[arm].over_continued), more, str(len(own[arm].seeds)))
            gains.append(f"| {' | '.join(cells)} |")
    return "\n".join(starts) + "\n\n" + "\n".join(gains) + "\n"


def _start_line(title: str, sft: dict[str, Any], row: ArmRow, over: Estimate | None) -> str:
    updates = sft["updates"] + sft["cooldown_updates"]
    cells = (
        title,
        f"{sft['parameters'] / 1e6:.2f}",
        str(updates),
        f"{updates * sft['flops_per_update'] / 1e12:.1f}",
        f"{row.tau.value:.3f} [{row.tau.low:.3f}, {row.tau.high:.3f}]",
        percent(over),
        " ".join(f"{rate:.2f}" for rate in row.slot_acceptance),
    )
    return f"| {' | '.join(cells)} |"


def difference_of_gains(
    first: tuple[ArmCounts, ArmCounts], second: tuple[ArmCounts, ArmCounts], *, num_resamples: int
) -> Estimate:
    """
    Return how much more an arm gains in the second family than in the first: one gain minus the other, with the same
    prompts and seeds resampled for all four, on the seeds that all have.

    Args:
        first, second (`tuple[ArmCounts, ArmCounts]`): The arm that is compared with, and the arm.
        num_resamples (`int`): Resamples.

    Raises:
        ValueError: If the arms cover different numbers of prompts, or share no seed.
    """
    found = [*pair_seeds(*first), *pair_seeds(*second)]
    seeds = tuple(sorted(set.intersection(*(set(arm.seeds or ()) for arm in found))))
    arms = [rows_of(arm, seeds) for arm in found]
    before, after, other_before, other_after = resampled_taus(arms, num_resamples=num_resamples, seed=0)
    taus = [arm.tau for arm in arms]
    value = taus[3] / taus[2] - taus[1] / taus[0]
    return Estimate(value, *interval(other_after / other_before - after / before))
