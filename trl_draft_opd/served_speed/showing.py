# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What a person sees of a measurement: tables, and the curve over the load."""

from pathlib import Path
from typing import Any

from rich.table import Table

from .comparison import Comparison
from .report import Level, SpeedReport


# Told apart by colour-blind readers (Okabe and Ito).
_COLOURS = {"with the drafter": "#0072B2", "plain": "#D55E00"}
_WIDTH_INCHES, _HEIGHT_INCHES, _DPI = 7.0, 3.0, 110


def level_table(report: SpeedReport, title: str) -> Table:
    """Return the levels of one server as a table to print with `rich`."""
    heads = ("at a time", "tokens/s", "per request", "first token (s)", "between tokens (ms)", "latency (s)", "tau")
    table = Table(*heads, title=title, caption="times: 50th / 99th percentile of responses")
    for level in report.levels():
        table.add_row(
            str(level.concurrency),
            _with_interval(level.tokens_per_second, level.tokens_per_second_low, level.tokens_per_second_high, ".1f"),
            f"{level.tokens_per_second_per_request:.1f}",
            _two(level.first_token, 1, ".3f"),
            _two(level.between_tokens, 1000, ".1f"),
            _two(level.latency, 1, ".2f"),
            "-" if level.tau is None else f"{level.tau:.3f}",
        )
    return table


def comparison_table(comparison: Comparison, title: str) -> Table:
    """Return a comparison as a table to print with `rich`."""
    table = Table("requests at a time", "speed-up [95 %]", "verdict", "equal texts", title=title)
    for level in comparison.levels:
        equal = "-" if level.num_compared is None else f"{level.num_equal} of {level.num_compared}"
        speedup = _with_interval(level.speedup, level.low, level.high, ".2f")
        table.add_row(str(level.concurrency), speedup, level.verdict, equal)
    return table


def notes(report: SpeedReport, name: str) -> list[str]:
    """Return what must be known of a measurement beside its numbers."""
    levels, said = report.levels(), []
    cut = [f"{level.num_cut} of {level.concurrency}" for level in levels if level.num_cut]
    if cut:
        said.append(
            f"{name}: the time ran out before the prompts did; cut off: {', '.join(cut)} at a time. "
            "Speed and tau are of a part of the prompts there. Raise `--max-seconds`, or lower `--num-prompts`."
        )
    foreign = [str(level.concurrency) for level in levels if level.num_foreign > 0]
    if foreign:
        said.append(
            f"{name}: the engine wrote more tokens than it was asked for here with {', '.join(foreign)} at a time. "
            "Somebody else uses the server, and both speed and tau are of that mixture."
        )
    if levels and report.engine is None:
        said.append(f"{name}: no /metrics page of vLLM or SGLang, so no tau.")
    elif levels and all(level.tau is None for level in levels):
        said.append(f"{name}: the engine counts no drafts: it decodes plainly.")
    return said


def _with_interval(value: float, low: float | None, high: float | None, form: str) -> str:
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _two(times: dict[str, float], factor: float, form: str) -> str:
    return f"{times['p50'] * factor:{form}} / {times['p99'] * factor:{form}}" if times else "-"


def check_drawing() -> None:
    """Raise `ValueError` where no figure could be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "`--figure` needs matplotlib: `pip install matplotlib`, or leave it out: `--json` keeps the numbers."
        ) from None


def draw_curve(
    path: str | Path, served: SpeedReport, baseline: SpeedReport | None, comparison: Comparison | None
) -> None:
    """Draw tokens per second over requests at a time, and beside it the speed-up over the baseline if there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
    panels = figure.subplots(1, 1 if comparison is None else 2, squeeze=False)[0]
    curves = {"with the drafter": served} if baseline is None else {"with the drafter": served, "plain": baseline}
    for name, report in curves.items():
        levels: list[Level] = report.levels()
        shown = [
            _bar(each.tokens_per_second, each.tokens_per_second_low, each.tokens_per_second_high) for each in levels
        ]
        _draw(panels[0], [each.concurrency for each in levels], shown, _COLOURS[name], name)
    panels[0].set_ylabel("tokens per second, all requests")
    panels[0].set_ylim(bottom=0)
    if baseline is not None:
        panels[0].legend(frameon=False)
    if comparison is not None:
        shown = [_bar(each.speedup, each.low, each.high) for each in comparison.levels]
        _draw(panels[1], [each.concurrency for each in comparison.levels], shown, _COLOURS["with the drafter"], None)
        panels[1].axhline(1, color="black", linewidth=0.8, linestyle="--")
        panels[1].set_ylabel("speed-up over plain decoding")
        panels[1].set_title(comparison.sentence(), fontsize=9)
    figure.savefig(path, dpi=_DPI)


def _bar(value: float, low: float | None, high: float | None) -> tuple[float, float, float]:
    """Return a value and how far its interval reaches below and above it."""
    return value, 0.0 if low is None else value - low, 0.0 if high is None else high - value


def _draw(
    axes: Any, concurrency: list[int], bars: list[tuple[float, float, float]], colour: str, name: str | None
) -> None:
    values, below, above = ([bar[index] for bar in bars] for index in range(3))
    axes.errorbar(concurrency, values, yerr=[below, above], marker="o", capsize=3, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(concurrency, [str(each) for each in concurrency])
    axes.minorticks_off()
    axes.set_xlabel("requests at a time")
    axes.grid(alpha=0.3)
