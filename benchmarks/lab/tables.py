# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The laboratory's results as Markdown tables, and whether a fresh run agrees with the committed one.

Reads results of one pair (a target and a drafter family) as `benchmarks/lab/results/<pair>.json` holds them; runs
nothing.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .statistics import NUM_RESAMPLES, ArmCounts, Estimate, arm_counts, paired_gain, tau_interval


START, CONTINUED = "sft_start", "sft_continued"
# Arms in the order a reader wants them; the rest follow as they were run.
FIRST_ARMS = (START, CONTINUED, "opd", "opd_first", "accept_until_fail", "d_pace_sft", "d_pace_replay")
HEADER = (
    "| arm | updates | TFLOP | tau | over SFT continued | over SFT start | acceptance per slot | seeds |\n"
    "|---|---|---|---|---|---|---|---|"
)
NOTHING = "–"


@dataclass(frozen=True, order=True)
class Condition:
    """
    What the arms of one table share.

    Attributes:
        tier (`int`): Budget and number of seeds.
        prompts (`str`): Name of the prompt set.
        temperature (`float`): Of the target.
        draft_sampling (`str`): How drafts are chosen: `"greedy"` or `"sample"`.
    """

    tier: int
    prompts: str
    temperature: float
    draft_sampling: str

    def __str__(self) -> str:
        return f"tier {self.tier}, {self.prompts}, temperature {self.temperature:g}, drafts {self.draft_sampling}"

    def holds(self, name: str, evaluation: dict[str, Any]) -> bool:
        """Whether an evaluation, by the name of its prompt set, was made under this condition's distribution."""
        distribution = (name, evaluation["temperature"], evaluation["draft_sampling"])
        return distribution == (self.prompts, self.temperature, self.draft_sampling)


@dataclass(frozen=True)
class ArmRow:
    """
    One arm under one condition.

    Attributes:
        arm (`str`): Its name.
        updates (`float`), tflop (`float`): Mean over seeds.
        tau ([`Estimate`]): Pooled over prompts and seeds.
        over_continued ([`Estimate`] or `None`), over_start ([`Estimate`] or `None`):
            Paired gains, `None` where there is no such arm under this condition, or where it would be this arm over
            itself.
        slot_acceptance (`tuple[float, ...]`):
            Share of counted blocks that keep at least `k` drafts, weighted by rounds.
        seeds (`tuple[int, ...]`): Seeds it was run with.
        target_entropy (`float` or `None`): Nats, mean over seeds.
        counts ([`ArmCounts`]): What all this was computed from.
    """

    arm: str
    updates: float
    tflop: float
    tau: Estimate
    over_continued: Estimate | None
    over_start: Estimate | None
    slot_acceptance: tuple[float, ...]
    seeds: tuple[int, ...]
    target_entropy: float | None
    counts: ArmCounts


def is_start(arm: str) -> bool:
    """Whether an arm is the point all others continue from, measured under one distribution or another."""
    return arm.startswith(START)


def load_results(path: Path) -> dict[str, Any]:
    """
    Read the results of a pair.

    Raises:
        ValueError: If the file does not hold a pair's results.
    """
    results = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in ("pair", "family", "runs") if key not in results]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: it does not hold the laboratory's results of a pair.")
    return results


def conditions(results: dict[str, Any]) -> list[Condition]:
    """Return the conditions of all tables of a pair, sorted; the shared start alone makes none."""
    found = {
        Condition(run["tier"], name, evaluation["temperature"], evaluation["draft_sampling"])
        for run in results["runs"]
        if not is_start(run["arm"])
        for name, evaluation in run["evals"].items()
    }
    return sorted(found)


def arm_rows(results: dict[str, Any], condition: Condition, *, num_resamples: int = NUM_RESAMPLES) -> list[ArmRow]:
    """
    Return the arms of one table, the shared start and continued SFT first.

    Args:
        results (`dict`): Results of a pair.
        condition ([`Condition`]): Which table.
        num_resamples (`int`, *optional*, defaults to 10,000): Resamples of the intervals.

    Raises:
        ValueError: If runs of one arm and seed occur twice, or arms were evaluated on different numbers of prompts.
    """
    runs = _runs_by_arm(results, condition)
    counts = {
        arm: arm_counts(
            {seed: _evaluation(run, condition) for seed, run in by_seed.items()}, is_shared_start=is_start(arm)
        )
        for arm, by_seed in runs.items()
    }
    baselines = {name: _baseline(name, counts) for name in (START, CONTINUED)}

    def gain(arm: str, name: str) -> Estimate | None:
        baseline = baselines[name]
        # The start cannot gain on what came of it.
        if baseline is None or arm == baseline or is_start(arm):
            return None
        return paired_gain(counts[baseline], counts[arm], num_resamples=num_resamples)

    rows = []
    for arm, by_seed in runs.items():
        evaluations = [_evaluation(run, condition) for run in by_seed.values()]
        entropies = [e["target_entropy"] for e in evaluations if e.get("target_entropy") is not None]
        rows.append(
            ArmRow(
                arm=arm,
                updates=_mean(run["updates"] for run in by_seed.values()),
                tflop=_mean(run["tflop"] for run in by_seed.values()),
                tau=tau_interval(counts[arm], num_resamples=num_resamples),
                over_continued=gain(arm, CONTINUED),
                over_start=gain(arm, START),
                slot_acceptance=_pooled_slots(evaluations),
                seeds=tuple(sorted(by_seed)),
                target_entropy=_mean(entropies) if entropies else None,
                counts=counts[arm],
            )
        )
    return rows


def render(results: dict[str, Any], *, num_resamples: int = NUM_RESAMPLES) -> str:
    """Return all tables of a pair as Markdown, one per condition."""
    parts = [_heading(results)]
    for condition in conditions(results):
        rows = arm_rows(results, condition, num_resamples=num_resamples)
        num_prompts = rows[0].counts.num_prompts
        parts.append(f"### {results['pair']}: {condition}\n\n{num_prompts} prompts. {_NOTE}\n\n{render_rows(rows)}")
    return "\n\n".join(parts) + "\n"


_NOTE = "tau and gains with 95 % intervals over prompts and seeds, gains paired."


def render_rows(rows: Sequence[ArmRow]) -> str:
    """Return one Markdown table."""
    lines = [HEADER]
    for row in rows:
        cells = (
            row.arm,
            f"{row.updates:.0f}",
            f"{row.tflop:.3g}",
            f"{row.tau.value:.3f} [{row.tau.low:.3f}, {row.tau.high:.3f}]",
            percent(row.over_continued),
            percent(row.over_start),
            " ".join(f"{rate:.2f}" for rate in row.slot_acceptance),
            str(len(row.seeds)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(gain: Estimate | None) -> str:
    """Return a gain as `+2.5 % [+1.0, +4.0]`, or a dash."""
    if gain is None:
        return NOTHING
    return f"{_signed(gain.value)} % [{_signed(gain.low)}, {_signed(gain.high)}]"


def check(fresh: dict[str, Any], committed: dict[str, Any], *, num_resamples: int = NUM_RESAMPLES) -> list[str]:
    """
    Hold a fresh run against the committed results of the same pair.

    Every table of the fresh run is compared, arm by arm: either tau must lie in the other's interval, and the
    intervals of the paired gains must overlap. Tables that only the committed results have are left alone: a fresh run
    may be of one tier.

    Args:
        fresh (`dict`), committed (`dict`): Results of one pair.
        num_resamples (`int`, *optional*, defaults to 10,000): Resamples of the intervals.

    Returns:
        `list[str]`: what disagrees, a line each; empty if nothing does.

    Raises:
        ValueError: If the results are of different pairs, or have no table in common.
    """
    if fresh["pair"] != committed["pair"]:
        raise ValueError(f"Fresh results are of {fresh['pair']!r}, the committed ones of {committed['pair']!r}.")
    known = conditions(committed)
    asked = conditions(fresh)
    if not set(asked) & set(known):
        raise ValueError(
            f"No table in common, so nothing can be checked: fresh has {[str(c) for c in asked]}, committed "
            f"{[str(c) for c in known]}."
        )
    found = []
    for condition in asked:
        if condition not in known:
            found.append(f"{condition}: there is no such table in the committed results")
            continue
        ours = {row.arm: row for row in arm_rows(fresh, condition, num_resamples=num_resamples)}
        theirs = {row.arm: row for row in arm_rows(committed, condition, num_resamples=num_resamples)}
        for arm in dict.fromkeys([*theirs, *ours]):
            if arm not in ours or arm not in theirs:
                found.append(f"{condition}: {arm} is only in the {'fresh' if arm in ours else 'committed'} results")
            else:
                found += [f"{condition}: {arm}: {line}" for line in _disagreements(ours[arm], theirs[arm])]
    return found


def _disagreements(fresh: ArmRow, committed: ArmRow) -> list[str]:
    lines = []
    for name, inner, outer in (
        ("fresh tau {:.3f} is outside the committed [{:.3f}, {:.3f}]", fresh.tau, committed.tau),
        ("committed tau {:.3f} is outside the fresh [{:.3f}, {:.3f}]", committed.tau, fresh.tau),
    ):
        if not outer.covers(inner.value):
            lines.append(name.format(inner.value, outer.low, outer.high))
    for name, ours, theirs in (
        ("SFT continued", fresh.over_continued, committed.over_continued),
        ("SFT start", fresh.over_start, committed.over_start),
    ):
        if (ours is None) != (theirs is None):
            lines.append(
                f"gain over {name} is known in one of the two only: fresh {percent(ours)}, committed {percent(theirs)}"
            )
        elif ours is not None and not ours.overlaps(theirs):
            lines.append(f"gain over {name} is {percent(ours)} fresh and {percent(theirs)} committed")
    return lines


def _runs_by_arm(results: dict[str, Any], condition: Condition) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the runs of a condition by arm and seed, in the order of the table."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in results["runs"]:
        # The start is made once, and every tier continues from it.
        is_of_tier = run["tier"] == condition.tier or is_start(run["arm"])
        if not is_of_tier or not any(condition.holds(name, e) for name, e in run["evals"].items()):
            continue
        by_seed = found.setdefault(run["arm"], {})
        if run["seed"] in by_seed:
            raise ValueError(
                f"{results['pair']}: arm {run['arm']!r} has two runs of seed {run['seed']} in {condition}. Drop one."
            )
        by_seed[run["seed"]] = run
    first = [arm for arm in FIRST_ARMS if arm in found]
    return {arm: found[arm] for arm in (*first, *(arm for arm in found if arm not in first))}


def _evaluation(run: dict[str, Any], condition: Condition) -> dict[str, Any]:
    return run["evals"][condition.prompts]


def _baseline(name: str, arms: Iterable[str]) -> str | None:
    """
    Return the arm of this name, or the only one whose name begins so (a baseline trained under another distribution).
    """
    candidates = [arm for arm in arms if arm.startswith(name)]
    if name in candidates or not candidates:
        return name if candidates else None
    return candidates[0] if len(candidates) == 1 else None


def _pooled_slots(evaluations: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    weights = [sum(evaluation["rounds"]) for evaluation in evaluations]
    columns = zip(*(evaluation["slot_acceptance"] for evaluation in evaluations), strict=True)
    return tuple(sum(w * rate for w, rate in zip(weights, column, strict=True)) / sum(weights) for column in columns)


def _heading(results: dict[str, Any]) -> str:
    lines = [f"## {results['pair']}: {results['family']} for {results.get('target', 'an unnamed target')}"]
    if "responses" in results:
        text = results["responses"]
        lines.append(
            f"Responses of the target, written once: {text['num_prompts']:,} prompts, {text['tokens']:,} tokens, "
            f"{text['tflop']:.3g} TFLOP, not counted below."
        )
    return "\n\n".join(lines)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _signed(share: float) -> str:
    # Adding 0 turns a rounded -0.0 into 0.0.
    return f"{round(100 * share, 1) + 0.0:+.1f}"
