# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The curves of a training record, one measure to a panel: the losses of two stages weigh other slots, and may be other
divergences, so each stage has a panel of its own; tau means the same in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .record import StageRecord


STAGE_NAMES = {"sft": "SFT", "opd": "Draft-OPD"}


@dataclass(frozen=True)
class Line:
    """
    One line of a panel.

    Attributes:
        name (`str`): What it is called.
        points (`list[tuple[int, float]]`): Optimiser step, counted over all stages, and value.
        intervals (`list[tuple[float, float]]` or `None`): 95 % interval of each point, where all have one.
        is_sparse (`bool`): Points apart from each other, each to be marked.
    """

    name: str
    points: list[tuple[int, float]]
    intervals: list[tuple[float, float]] | None = None
    is_sparse: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel: what is measured (`str`), and its `list[Line]`."""

    measure: str
    lines: list[Line]


def stage_names(stages: Sequence[StageRecord]) -> list[str]:
    """Return what stages are called: their method, and a number where a method was run more than once."""
    names = [STAGE_NAMES[stage.method] for stage in stages]
    return [
        f"{name} (stage {number})" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)
    ]


def curve_panels(stages: Sequence[StageRecord]) -> list[Panel]:
    """Return the panels that have two points or more: the loss of each stage, then tau of all stages."""
    panels, taus, start = [], [], 0
    for name, stage in zip(stage_names(stages), stages, strict=True):
        losses = [
            Line("training", _points(stage.curve, "loss", start)),
            Line("evaluation", _points(stage.curve, "eval_loss", start), is_sparse=True),
        ]
        evaluated = [point for point in stage.curve if "eval_tau" in point]
        has_intervals = all("eval_tau_low" in point and "eval_tau_high" in point for point in evaluated)
        intervals = [(point["eval_tau_low"], point["eval_tau_high"]) for point in evaluated] if has_intervals else None
        panels.append(Panel(f"loss of {name}", losses))
        taus += [
            Line(f"{name}, evaluation", _points(stage.curve, "eval_tau", start), intervals, is_sparse=True),
            # Of the rows trained on, as the drafter was when it met them.
            Line(f"{name}, training rows", _points(stage.curve, "tau", start)),
        ]
        start += stage.steps
    drawn = [Panel(panel.measure, [line for line in panel.lines if line.points]) for panel in panels]
    drawn.append(Panel("tau", [line for line in taus if line.points]))
    return [panel for panel in drawn if sum(len(line.points) for line in panel.lines) > 1]


def _points(curve: Sequence[dict[str, Any]], key: str, start: int) -> list[tuple[int, float]]:
    return [(start + point["step"], point[key]) for point in curve if key in point]


def curve_table(panels: Sequence[Panel], max_rows: int = 12) -> tuple[list[str], list[list[str]]]:
    """Return head and about `max_rows` rows of the curves as a table, one column to a line."""
    columns = [(f"{panel.measure}: {line.name}", dict(line.points)) for panel in panels for line in panel.lines]
    steps = sorted({step for _, points in columns for step in points})
    stride = max(1, len(steps) // max_rows)
    kept = [step for index, step in enumerate(steps) if index % stride == 0 or step == steps[-1]]
    rows = [[str(step), *(f"{points[step]:.3f}" if step in points else "" for _, points in columns)] for step in kept]
    return ["step", *(name for name, _ in columns)], rows


def draw_panel(axes: Any, panel: Panel, colours: Sequence[str]) -> None:
    """Draw a panel; lines differ by colour, dashes and marks."""
    for index, line in enumerate(panel.lines):
        steps, values = zip(*line.points, strict=True)
        style = {
            "color": colours[index % len(colours)],
            "linestyle": ("-", "--", "-.", ":")[index % 4],
            "marker": "os^D"[index % 4] if line.is_sparse else None,
            "markersize": 4,
            "label": line.name,
        }
        if line.intervals is None:
            axes.plot(steps, values, **style)
            continue
        bounds = list(zip(line.intervals, values, strict=True))
        reach = [[value - low for (low, _), value in bounds], [high - value for (_, high), value in bounds]]
        axes.errorbar(steps, values, yerr=reach, capsize=3, **style)
    axes.set_xlabel("optimiser step, all stages")
    axes.set_ylabel(panel.measure)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if len(panel.lines) > 1:
        draw_legend(axes)


def draw_legend(axes: Any) -> None:
    """Draw the legend above the axes, where it hides nothing."""
    axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=2)
