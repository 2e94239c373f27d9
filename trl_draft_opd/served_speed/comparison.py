# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Two servers at equal load: how much faster one is, up to which load, and whether both wrote the same."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from .load import Run
from .report import SpeedReport, mean_interval


# What must be equal for two speeds to be comparable.
_CONDITIONS = ("max_completion_length", "temperature", "ignore_eos", "form")


@dataclass(frozen=True)
class LevelComparison:
    """
    Two servers at one number of requests at a time.

    Attributes:
        concurrency (`int`), repeats (`int`): The load, and the pairs of runs.
        speedup (`float`): Tokens per second over the baseline's, geometric mean over the pairs.
        low (`float` or `None`), high (`float` or `None`):
            Its 95 % interval by the t distribution over the logarithms of the pairs; `None` with one pair.
        num_equal (`int` or `None`), num_compared (`int` or `None`):
            Prompts whose responses were equal in every pair of runs, of those that both servers finished; `None` above
            temperature 0, where they need not be.
    """

    concurrency: int
    repeats: int
    speedup: float
    low: float | None
    high: float | None
    num_equal: int | None
    num_compared: int | None

    @property
    def verdict(self) -> str:
        """`"faster"` or `"slower"` where the interval is clear of 1, else `"not told apart"`."""
        if self.low is not None and self.low > 1:
            return "faster"
        return "slower" if self.high is not None and self.high < 1 else "not told apart"


@dataclass(frozen=True)
class Comparison:
    """
    A server against its baseline, level by level.

    Attributes:
        levels (`list[LevelComparison]`): Ascending by load.
    """

    levels: list[LevelComparison]

    @property
    def faster_up_to(self) -> int | None:
        """The most requests at a time up to which every level is faster; `None` if the first is not."""
        return next((after[-1] for verdict, after in self._stretches()[:1] if verdict == "faster"), None)

    @property
    def slower_from(self) -> int | None:
        """The fewest requests at a time from which on every level is slower; `None` if the last is not."""
        return next((after[0] for verdict, after in self._stretches()[-1:] if verdict == "slower"), None)

    def _stretches(self) -> list[tuple[str, list[int]]]:
        """Return verdicts and the levels in a row that share them."""
        groups = groupby(self.levels, key=lambda level: level.verdict)
        return [(verdict, [level.concurrency for level in levels]) for verdict, levels in groups]

    def sentence(self) -> str:
        """Say where the server is faster and where slower, as "faster up to 4 requests at a time, slower from 8"."""
        stretches = self._stretches()
        if len(stretches) == 1:
            verdict, levels = stretches[0]
            what = "faster" if verdict == "faster" else "slower" if verdict == "slower" else "not told apart from it"
            where = "at every load measured" if len(levels) > 1 else f"at {_requests(levels[0])}"
            return f"{what} {where}"
        parts = []
        for index, (verdict, levels) in enumerate(stretches):
            if index == 0:
                where = f"up to {_requests(levels[-1])}" if len(levels) > 1 else f"at {_requests(levels[0])}"
            elif index == len(stretches) - 1:
                where = f"from {levels[0]}" if len(levels) > 1 else f"at {levels[0]}"
            else:
                where = f"at {levels[0]} to {levels[-1]}" if len(levels) > 1 else f"at {levels[0]}"
            parts.append(f"{verdict} {where}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        levels = [asdict(level) | {"verdict": level.verdict} for level in self.levels]
        return {
            "levels": levels,
            "faster_up_to": self.faster_up_to,
            "slower_from": self.slower_from,
            "sentence": self.sentence(),
        }


def _requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'} at a time"


def compare(served: SpeedReport, baseline: SpeedReport) -> Comparison:
    """
    Compare a server with its baseline, run by run, at the levels that both have.

    Raises:
        ValueError: If they were asked different things, or have no level in common.
    """
    names = [name for name in _CONDITIONS if getattr(served.settings, name) != getattr(baseline.settings, name)]
    names += ["prompts"] if served.prompts_sha256 != baseline.prompts_sha256 else []
    if names:
        raise ValueError(
            f"The two measurements differ in {names}, so their speeds cannot be compared. Measure both alike."
        )
    levels = []
    for concurrency in served.settings.concurrency:
        pairs = list(zip(served.runs_at(concurrency), baseline.runs_at(concurrency), strict=False))
        if pairs:
            levels.append(_compare_level(concurrency, pairs, is_greedy=served.settings.temperature == 0))
    if not levels:
        raise ValueError("The two measurements have no level in common: measure both at the same `--concurrency`.")
    return Comparison(levels)


def _compare_level(concurrency: int, pairs: Sequence[tuple[Run, Run]], *, is_greedy: bool) -> LevelComparison:
    rates = [(own.tokens_per_second, other.tokens_per_second) for own, other in pairs]
    if not all(min(pair) > 0 for pair in rates):
        raise ValueError(
            f"At {_requests(concurrency)}, a run ended before any token came. Give runs more time (`--max-seconds`)."
        )
    mean, low, high = mean_interval([math.log(own / other) for own, other in rates])
    texts = [
        [own == other for own, other in both if own is not None and other is not None]
        for both in zip(*(zip(own.digests, other.digests, strict=True) for own, other in pairs), strict=True)
    ]
    compared = [all(equal) for equal in texts if equal]
    return LevelComparison(
        concurrency=concurrency,
        repeats=len(pairs),
        speedup=math.exp(mean),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
        num_equal=sum(compared) if is_greedy else None,
        num_compared=len(compared) if is_greedy else None,
    )
