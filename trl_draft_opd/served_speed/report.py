# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What was measured of a server, as numbers: every run as it was, and what they say together, level by level."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..utils.settings import check_settings
from .counters import DraftCounts
from .load import Run
from .requests import FORMS


FORMAT_VERSION = 1
PERCENTILES = (50, 90, 99)
# The 97.5 % points of the t distribution, for 1 to 19 degrees of freedom.
_T_POINTS = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_POINTS += (2.120, 2.110, 2.101, 2.093)
MAX_REPEATS = len(_T_POINTS) + 1
_MAX_CONCURRENCY = 1024


@dataclass(frozen=True)
class LoadSettings:
    """
    What a server is asked, and how often.

    Args:
        concurrency (`tuple[int, ...]`, *optional*, defaults to `(1, 2, 4, 8, 16)`):
            Requests under way at a time, ascending: the levels.
        repeats (`int`, *optional*, defaults to `3`): Runs of each level.
        warmup (`int`, *optional*, defaults to `1`):
            Requests before a level that are not counted, times its concurrency.
        max_seconds (`float`, *optional*, defaults to `120.0`): Longest time of a run; what is under way then is cut.
        max_completion_length (`int`, *optional*, defaults to `128`): Tokens per response.
        temperature (`float`, *optional*, defaults to `0.0`): Of the target; 0 decodes greedily.
        ignore_eos (`bool`, *optional*, defaults to `False`):
            Have every response be `max_completion_length` tokens long, whatever the target writes.
        form (`str`, *optional*, defaults to `"ids"`):
            How prompts are sent: `"ids"` and `"text"` to `/v1/completions`, `"chat"` to `/v1/chat/completions`.

    Raises:
        ValueError: If a setting is outside its range.
    """

    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 3
    warmup: int = 1
    max_seconds: float = 120.0
    max_completion_length: int = 128
    temperature: float = 0.0
    ignore_eos: bool = False
    form: str = "ids"

    def __post_init__(self) -> None:
        check_settings(self)
        levels = list(self.concurrency)
        if not levels or levels != sorted(set(levels)) or levels[0] < 1 or levels[-1] > _MAX_CONCURRENCY:
            raise ValueError(f"`concurrency` must be ascending numbers in 1..{_MAX_CONCURRENCY}, got {levels}.")
        if not 1 <= self.repeats <= MAX_REPEATS:
            raise ValueError(f"`repeats` must be in 1..{MAX_REPEATS}, got {self.repeats}.")
        if self.warmup < 0 or self.max_completion_length < 2 or self.temperature < 0:
            raise ValueError(
                "`warmup` and `temperature` must be at least 0 and `max_completion_length` at least 2, got "
                f"{self.warmup}, {self.temperature} and {self.max_completion_length}."
            )
        if not 0 < self.max_seconds <= 86_400:
            raise ValueError(f"`max_seconds` must be above 0 and at most a day, got {self.max_seconds}.")
        if self.form not in FORMS:
            raise ValueError(f"`form` must be one of {FORMS}, got {self.form!r}.")


@dataclass(frozen=True)
class Level:
    """
    What the runs of one server at one number of requests at a time say together.

    Attributes:
        concurrency (`int`), repeats (`int`): The load, and how many runs there are.
        tokens_per_second (`float`): Of all requests together, mean over runs.
        tokens_per_second_low (`float` or `None`), tokens_per_second_high (`float` or `None`):
            Its 95 % interval by the t distribution over runs; `None` with one run.
        first_token (`dict`), between_tokens (`dict`), latency (`dict`): Percentiles in seconds, by name (`p50`).
        tau (`float` or `None`): Accepted length, the bonus counted, pooled over runs; `None` without drafts.
        acceptance_per_slot (`list[float]`): Share of rounds that kept at least `k` drafts; empty where it is unknown.
        num_cut (`int`), num_foreign (`int`): See [`Run`], summed over runs.
    """

    concurrency: int
    repeats: int
    tokens_per_second: float
    tokens_per_second_low: float | None
    tokens_per_second_high: float | None
    first_token: dict[str, float]
    between_tokens: dict[str, float]
    latency: dict[str, float]
    tau: float | None
    acceptance_per_slot: list[float]
    num_cut: int
    num_foreign: int

    @property
    def tokens_per_second_per_request(self) -> float:
        """What one of them sees."""
        return self.tokens_per_second / self.concurrency


@dataclass
class SpeedReport:
    """
    All that was measured of one server.

    Attributes:
        settings ([`LoadSettings`]): What it was asked.
        prompts_sha256 (`str`), num_prompts (`int`): See [`prompts_digest`]; how many prompts a run has.
        engine (`str` or `None`), engine_version (`str` or `None`): As far as it says.
        runs (`list[Run]`): In the order in which they were made.
    """

    settings: LoadSettings
    prompts_sha256: str
    num_prompts: int
    engine: str | None = None
    engine_version: str | None = None
    runs: list[Run] = field(default_factory=list)

    def runs_at(self, concurrency: int) -> list[Run]:
        """Return the runs of one level."""
        return [run for run in self.runs if run.concurrency == concurrency]

    def levels(self) -> list[Level]:
        """Return what the runs say, for every level that has any."""
        return [_level(runs) for concurrency in self.settings.concurrency if (runs := self.runs_at(concurrency))]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: what was measured, and for readers what it says."""
        return asdict(self) | {"levels": [asdict(level) for level in self.levels()]}

    @classmethod
    def from_dict(cls, content: Any) -> "SpeedReport":
        """Read what [`to_dict`] returned; raises `ValueError` at anything else."""
        try:
            settings = LoadSettings(**content["settings"] | {"concurrency": tuple(content["settings"]["concurrency"])})
            runs = [_read_run(run) for run in content["runs"]]
            names = ("prompts_sha256", "num_prompts", "engine", "engine_version")
            return cls(settings, **{name: content[name] for name in names}, runs=runs)
        except (KeyError, TypeError) as error:
            raise ValueError(f"no report of a server ({type(error).__name__}: {error})") from error


def _read_run(content: Mapping[str, Any]) -> Run:
    known: dict[str, Any] = {each.name: content[each.name] for each in fields(Run)}
    if (drafts := known["drafts"]) is not None:
        known["drafts"] = DraftCounts(drafts["rounds"], drafts["accepted"], tuple(drafts["kept_at_slot"]))
    return Run(**known)


def _level(runs: Sequence[Run]) -> Level:
    rates = [run.tokens_per_second for run in runs]
    mean, low, high = mean_interval(rates)
    counts = [run.drafts for run in runs if run.drafts is not None]
    drafts = sum(counts[1:], counts[0]) if counts else None
    rounds = 0 if drafts is None else drafts.rounds
    times = {
        name: percentiles([seconds for run in runs for seconds in getattr(run, name)])
        for name in ("first_token", "between_tokens", "latency")
    }
    return Level(
        concurrency=runs[0].concurrency,
        repeats=len(runs),
        tokens_per_second=mean,
        tokens_per_second_low=low,
        tokens_per_second_high=high,
        **times,
        tau=None if drafts is None else drafts.tau,
        acceptance_per_slot=[kept / rounds for kept in drafts.kept_at_slot] if drafts is not None and rounds else [],
        num_cut=sum(run.num_cut for run in runs),
        num_foreign=sum(run.num_foreign or 0 for run in runs),
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the smallest value that so many per cent of the values do not exceed, by name; nothing of nothing."""
    ordered = sorted(values)
    return {f"p{each}": ordered[math.ceil(len(ordered) * each / 100) - 1] for each in PERCENTILES if ordered}


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the mean and its 95 % interval by the t distribution; no interval of a single value."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, None, None
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    reach = _T_POINTS[min(count - 1, len(_T_POINTS)) - 1] * error
    return mean, mean - reach, mean + reach


def read_reports(path: str | Path) -> tuple[SpeedReport, SpeedReport | None]:
    """
    Return what a file of `--json` holds: the report of the server, and of its baseline if there was one.

    Raises:
        ValueError: If it holds no such thing.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {content['format_version']!r} where {FORMAT_VERSION} is read")
        baseline = content["baseline"]
        return SpeedReport.from_dict(content["served"]), baseline and SpeedReport.from_dict(baseline)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no file that `trl-draft-opd bench --json` wrote: {error}. Measure again."
        ) from error
