# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Figures of a report, as SVG inside the page: their text is text, and their colours are the page's, light or dark.
Lines differ by dashes and marks too, and every figure stands above a table of its numbers.
"""

import html
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from ..export.curves import Panel, draw_legend, draw_panel


# Stand-ins, each replaced by a variable of the page's style sheet.
_INK = "#010203"
LINES = ("#0072b2", "#d55e00", "#009e73", "#010203")
_VARIABLES = {_INK: "var(--ink)"} | {colour: f"var(--line{number})" for number, colour in enumerate(LINES[:3], 1)}
_RULES: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trl-draft-opd",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
}
# Narrow, so that a phone shows the text at its size.
_WIDTH_INCHES = 4.6


def check_drawing() -> None:
    """Raise `ValueError` where no figure could be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "A report needs matplotlib: `pip install matplotlib`, or leave it out: `--json` keeps the numbers."
        ) from None


def svg(title: str, draw: Callable[[Any], None], *, name: str, height: float = 2.8) -> str:
    """
    Draw a figure.

    Args:
        title (`str`): What it shows, for a reader who does not see it.
        draw (`Callable[[Any], None]`): Draws into matplotlib's axes.
        name (`str`): Of letters and digits, unique in the page.
        height (`float`, *optional*, defaults to 2.8): Inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RULES):
        figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Every figure numbers its parts from 1.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    label = html.escape(title)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg role="img" aria-label="@@" viewBox="\1">', text, count=1
    )
    return text.replace("@@", label, 1)


def _wrapped(name: str) -> str:
    """Return a label in lines that leave a phone's width to the figure."""
    return "\n".join(textwrap.wrap(name, 16))


def curve(panel: Panel, name: str) -> str:
    """Draw one panel of the training curves."""
    return svg(f"{panel.measure} over optimiser steps", lambda axes: draw_panel(axes, panel, LINES), name=name)


def taus(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Draw tau of several measurements with their intervals, rows `(name, tau, low, high)` from top to bottom."""

    def draw(axes: Any) -> None:
        for place, (_, tau, low, high) in enumerate(rows):
            axes.errorbar(
                tau,
                -place,
                xerr=[[max(0.0, tau - low)], [max(0.0, high - tau)]],
                fmt="os^D"[place % 4],
                color=LINES[place % 4],
                capsize=4,
            )
        axes.set_yticks([-place for place in range(len(rows))], [_wrapped(name) for name, *_ in rows])
        axes.set_ylim(-len(rows) + 0.4, 0.6)
        axes.set_xlabel("tau, tokens per verification")
        axes.grid(alpha=0.3, axis="x")

    return svg("tau with its 95 % intervals", draw, name="tau", height=0.9 + 0.45 * len(rows))


def slots(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Draw acceptance per slot, one line to a measurement."""

    def draw(axes: Any) -> None:
        for index, (name, rates) in enumerate(rows):
            style = {"linestyle": ("-", "--", "-.", ":")[index % 4], "marker": "os^D"[index % 4]}
            axes.plot(range(1, len(rates) + 1), rates, color=LINES[index % 4], label=name, markersize=4, **style)
        axes.set(xlabel="slot in the block", ylabel="share of blocks that keep it", ylim=(0, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if len(rows) > 1:
            draw_legend(axes)

    return svg("acceptance per slot", draw, name="slots")


def shares(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]], name: str) -> str:
    """Draw rejected shares as bars, a group to a name and a bar to a measurement."""

    def draw(axes: Any) -> None:
        height = 0.8 / len(rows)
        for index, (label, values) in enumerate(rows):
            places = [-place - (index - (len(rows) - 1) / 2) * height for place in range(len(names))]
            axes.barh(
                places,
                [value or 0.0 for value in values],
                height=height * 0.9,
                facecolor=LINES[index % 4],
                edgecolor=_INK,
                hatch=("", "///", "...", "xx")[index % 4],
                label=label,
            )
        axes.set_yticks([-place for place in range(len(names))], [_wrapped(each) for each in names])
        axes.set(xlabel="share of decided drafts that were rejected", xlim=(0, 1))
        axes.grid(alpha=0.3, axis="x")
        if len(rows) > 1:
            draw_legend(axes)

    return svg(title, draw, name=name, height=0.9 + 0.38 * len(names) * max(1, 0.6 * len(rows)))


def speedups(levels: Sequence[tuple[int, float, float | None, float | None]], name: str) -> str:
    """Draw the served speed-up over plain decoding, rows `(requests at a time, speed-up, low, high)`."""

    def draw(axes: Any) -> None:
        reach = [
            [value - (value if low is None else low) for _, value, low, _ in levels],
            [(value if high is None else high) - value for _, value, _, high in levels],
        ]
        places = [place for place, *_ in levels]
        axes.errorbar(places, [value for _, value, *_ in levels], yerr=reach, marker="o", capsize=3, color=LINES[0])
        axes.axhline(1, color=_INK, linewidth=0.8, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.set(xlabel="requests at a time", ylabel="speed-up over plain decoding")
        axes.grid(alpha=0.3)

    return svg("served speed-up over requests at a time; 1 is break-even", draw, name=name)
