# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How fast a server wrote with a drafter, as it is published: in the record, and as the table of the card."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from ..served_speed.comparison import Comparison, LevelComparison
from ..served_speed.report import SpeedReport
from .record_forms import DIGEST, MACHINE, PROMPT_SET, VERSION, matches, one_of, text_form


_HEAD = (
    "requests at a time",
    "tokens/s",
    "plain tokens/s",
    "speed-up",
    "tau",
    "first token",
    "between tokens",
    "equal texts",
)


@dataclass(frozen=True)
class ServedLevel:
    """
    One number of requests at a time.

    Attributes:
        concurrency (`int`): Requests under way at a time.
        tokens_per_second (`float`), plain_tokens_per_second (`float` or `None`):
            Of all requests together, with the drafter and without; `None` where plain decoding was not measured.
        speedup (`float` or `None`), speedup_low (`float` or `None`), speedup_high (`float` or `None`):
            See [`LevelComparison`].
        tau (`float` or `None`): Accepted length as the engine counted it.
        first_token (`float`), between_tokens (`float`): Medians in seconds; see [`Run`].
        num_equal (`int` or `None`), num_compared (`int` or `None`): See [`LevelComparison`].
    """

    concurrency: int
    tokens_per_second: float
    plain_tokens_per_second: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    tau: float | None
    first_token: float
    between_tokens: float
    num_equal: int | None
    num_compared: int | None


@dataclass(frozen=True)
class ServedSpeed:
    """
    The speed of one server on one machine.

    Attributes:
        prompt_set (`str`), prompts_sha256 (`str`), num_prompts (`int`): See [`Measurement`].
        machine (`str`): What it ran on, in plain words.
        engine (`str`), engine_version (`str` or `None`): What served.
        max_completion_length (`int`), temperature (`float`), ignore_eos (`bool`), repeats (`int`): How it was asked.
        levels (`list[ServedLevel]`): Ascending by load.
    """

    prompt_set: Annotated[str, PROMPT_SET]
    prompts_sha256: Annotated[str, DIGEST]
    num_prompts: int
    machine: Annotated[str, MACHINE]
    engine: Annotated[str, one_of(("vllm", "sglang", "other"))]
    engine_version: Annotated[str | None, text_form(VERSION, "a version or null")]
    max_completion_length: int
    temperature: float
    ignore_eos: bool
    repeats: int
    levels: list[ServedLevel]

    @property
    def comparison(self) -> Comparison | None:
        """What the levels say against plain decoding, or `None`."""
        levels = [
            LevelComparison(
                level.concurrency,
                self.repeats,
                level.speedup,
                level.speedup_low,
                level.speedup_high,
                level.num_equal,
                level.num_compared,
            )
            for level in self.levels
            if level.speedup is not None
        ]
        return Comparison(levels) if levels else None


def check_machine(machine: str) -> None:
    """Raise `ValueError` unless a machine can be called that in a record."""
    if not MACHINE.fits(machine):
        raise ValueError(f"A machine can be recorded as {MACHINE.wanted}, got {machine!r}.")


def served_speed_of(
    report: SpeedReport, baseline: SpeedReport | None, comparison: Comparison | None, *, prompt_set: str, machine: str
) -> ServedSpeed:
    """Return what was measured as it is recorded."""
    plain = {
        level.concurrency: level.tokens_per_second for level in (baseline.levels() if baseline is not None else ())
    }
    against = {level.concurrency: level for level in (comparison.levels if comparison is not None else ())}
    levels = []
    for level in report.levels():
        other = against.get(level.concurrency)
        levels.append(
            ServedLevel(
                level.concurrency,
                level.tokens_per_second,
                plain.get(level.concurrency),
                *((None, None, None) if other is None else (other.speedup, other.low, other.high)),
                level.tau,
                level.first_token.get("p50", 0.0),
                level.between_tokens.get("p50", 0.0),
                *((None, None) if other is None else (other.num_equal, other.num_compared)),
            )
        )
    return ServedSpeed(
        prompt_set=prompt_set,
        prompts_sha256=report.prompts_sha256,
        num_prompts=report.num_prompts,
        machine=machine,
        engine=report.engine or "other",
        engine_version=report.engine_version if matches(VERSION, report.engine_version) else None,
        max_completion_length=report.settings.max_completion_length,
        temperature=report.settings.temperature,
        ignore_eos=report.settings.ignore_eos,
        repeats=report.settings.repeats,
        levels=levels,
    )


def served_rows(served: ServedSpeed) -> tuple[Sequence[str], list[list[str]]]:
    """Return head and rows of the card's table; columns that nothing is known of stay out."""
    rows = [_row(level) for level in served.levels]
    kept = [column for column in range(len(_HEAD)) if any(row[column] for row in rows)]
    return [_HEAD[column] for column in kept], [[row[column] or "-" for column in kept] for row in rows]


def _row(level: ServedLevel) -> list[str]:
    speedup, plain, tau, equal = "", "", "", ""
    if level.speedup is not None:
        between = "" if level.speedup_low is None else f" [{level.speedup_low:.2f}, {level.speedup_high:.2f}]"
        speedup = f"{level.speedup:.2f}x{between}"
    if level.plain_tokens_per_second is not None:
        plain = f"{level.plain_tokens_per_second:.1f}"
    if level.tau is not None:
        tau = f"{level.tau:.3f}"
    if level.num_compared is not None:
        equal = f"{level.num_equal} of {level.num_compared}"
    times = [f"{level.first_token * 1000:.0f} ms", f"{level.between_tokens * 1000:.1f} ms"]
    return [str(level.concurrency), f"{level.tokens_per_second:.1f}", plain, speedup, tau, *times, equal]


def describe_served(served: ServedSpeed, plain_text: Any) -> dict[str, Any]:
    """
    Return what the card says beside the table: under which conditions it was measured, and what load makes of it.

    Args:
        plain_text (`Callable`): Escapes Markdown.
    """
    engines = {"vllm": "vLLM", "sglang": "SGLang", "other": "a server that names no engine"}
    version = f" {plain_text(served.engine_version)}" if served.engine_version else ""
    comparison = served.comparison
    return {
        "where": f"{engines[served.engine]}{version} on {plain_text(served.machine)}",
        "conditions": (
            f"{served.num_prompts} prompts of {plain_text(served.prompt_set)}, "
            f"{'exactly' if served.ignore_eos else 'at most'} {served.max_completion_length} tokens, temperature "
            f"{served.temperature:g}, {served.repeats} repeat{'' if served.repeats == 1 else 's'}"
        ),
        "verdict": None if comparison is None else comparison.sentence(),
        "fades": comparison is not None and any(level.verdict != "faster" for level in comparison.levels),
    }
