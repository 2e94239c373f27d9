# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Draw the README's picture of the method: `method.svg` for light pages, `method.dark.svg` for dark ones.

    python docs/figures/draw_method.py [FOLDER]

The tokens and bars are made up to show the idea; nothing in the picture was measured.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib


matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle


# One unit is one inch.
WIDTH, HEIGHT = 10.0, 6.62
LEFT = 2.62  # of the first token
STEP, TOKEN_WIDTH, TOKEN_HEIGHT = 1.05, 0.93, 0.40
ROWS = {"draft": 5.92, "verify": 4.82, "text": 3.64, "train": 2.42}  # centres of tokens
BAR_LENGTH = 1.4  # of a probability of 1

TEXT = ("Air", "scatters")
DRAFTS = ("blue", "light", "more", "and", "we")
CHOICES = ("blue", "light", "more", "than", "")
NUM_KEPT = 3
# Token, target's bar, drafter's bar.
KEPT_BARS = (("light", 0.66, 0.46), ("rays", 0.30, 0.12), ("ink", 0.02, 0.25))
ERROR_BARS = (("than", 0.80, 0.27), ("and", 0.05, 0.53), ("in", 0.09, 0.14))


@dataclass(frozen=True)
class Theme:
    """Colours of one page background; each pair is the colour of lines and words, and of the area behind them."""

    ink: str
    quiet: str
    line: str
    plain: str
    anchor: tuple[str, str]
    kept: tuple[str, str]
    error: tuple[str, str]
    target_bar: str
    drafter_bar: str


THEMES = {
    "method.svg": Theme(
        ink="#1f2328",
        quiet="#59636e",
        line="#c5ccd4",
        plain="#f1f4f7",
        anchor=("#0860ca", "#ddf0ff"),
        kept=("#187a35", "#e0f7e6"),
        error=("#b3470a", "#fff0e1"),
        target_bar="#57606a",
        drafter_bar="#8250df",
    ),
    "method.dark.svg": Theme(
        ink="#f0f6fc",
        quiet="#a0a9b4",
        line="#4a525c",
        plain="#1c2129",
        anchor=("#66aeff", "#12263f"),
        kept=("#4ac364", "#12281b"),
        error=("#f39a52", "#33200f"),
        target_bar="#b6bec8",
        drafter_bar="#a371f7",
    ),
}


def column(index: int) -> float:
    """Return the x of a token's centre."""
    return LEFT + STEP * index + TOKEN_WIDTH / 2


def middle_of(upper: str, lower: str) -> float:
    """Return the y halfway between two rows."""
    return (ROWS[upper] + ROWS[lower]) / 2


def box(axes, x, y, width, height, *, face, edge, style="-", line_width=1.2, radius=0.09):
    """Draw a rounded box around a centre."""
    corner = (x - width / 2 + radius, y - height / 2 + radius)
    shape = f"round,pad={radius},rounding_size={radius}"
    size = (width - 2 * radius, height - 2 * radius)
    axes.add_patch(
        FancyBboxPatch(corner, *size, boxstyle=shape, facecolor=face, edgecolor=edge, linestyle=style, lw=line_width)
    )


def token(axes, index, y, word, colours, *, style="-", line_width=1.3, weight="normal", ink=None):
    """Draw one token of a text."""
    edge, face = colours
    box(axes, column(index), y, TOKEN_WIDTH, TOKEN_HEIGHT, face=face, edge=edge, style=style, line_width=line_width)
    axes.text(column(index), y - 0.01, word, ha="center", va="center", size=12.5, color=ink or edge, weight=weight)


def step_label(axes, theme, number, y, title, lines):
    """Write the number, name and explanation of a step into the left margin."""
    axes.add_patch(Circle((0.23, y), 0.17, facecolor=theme.ink, edgecolor="none"))
    hole = theme.plain
    axes.text(0.23, y - 0.012, str(number), ha="center", va="center", size=11.5, weight="bold", color=hole)
    axes.text(0.50, y - 0.01, title, ha="left", va="center", size=13, weight="bold", color=theme.ink)
    axes.text(0.50, y - 0.24, lines, ha="left", va="top", size=10.5, color=theme.quiet, linespacing=1.3)


def brace(axes, first, last, y, colour, words, *, above=True):
    """Draw a line over some tokens, with words on it."""
    sign = 1 if above else -1
    left, right = column(first) - TOKEN_WIDTH / 2, column(last) + TOKEN_WIDTH / 2
    tick = y - sign * 0.07
    axes.plot([left, left, right, right], [tick, y, y, tick], color=colour, lw=1.2, solid_joinstyle="round")
    place = "bottom" if above else "top"
    axes.text((left + right) / 2, y + sign * 0.05, words, ha="center", va=place, size=10.5, color=colour)


def draw_draft(axes, theme):
    """Step 1: text, anchor, and the block drafted from it."""
    y = ROWS["draft"]
    step_label(axes, theme, 1, y, "Draft", "The small drafter proposes\na block of next tokens.")
    token(axes, 0, y, TEXT[0], (theme.line, theme.plain), ink=theme.ink)
    token(axes, 1, y, TEXT[1], theme.anchor, weight="bold", line_width=1.8)
    axes.text(column(1), y + 0.29, "anchor", ha="center", va="bottom", size=10.5, color=theme.anchor[0])
    for slot, word in enumerate(DRAFTS):
        token(axes, 2 + slot, y, word, (theme.quiet, "none"), style=(0, (3, 2)), ink=theme.ink)
    brace(axes, 2, 6, y + 0.32, theme.quiet, "one block of 5 drafts")


def draw_verify(axes, theme):
    """Step 2: the target's own choice under every draft."""
    y = ROWS["verify"]
    step_label(
        axes,
        theme,
        2,
        y,
        "Verify",
        "One pass of the frozen target\nchecks them all. It keeps drafts\nup to its first disagreement.",
    )
    for slot, word in enumerate(CHOICES):
        middle = middle_of("draft", "verify")
        if slot < NUM_KEPT:
            colours, mark = theme.kept, "✓"
        elif slot == NUM_KEPT:
            colours, mark = theme.error, "✗"
        else:
            x = column(2 + slot)
            axes.text(x, y, "not\nreached", ha="center", va="center", size=10.5, color=theme.quiet)
            continue
        axes.text(column(2 + slot), middle, mark, ha="center", va="center", size=16, color=colours[0], weight="bold")
        token(axes, 2 + slot, y, word, colours, weight="bold" if slot == NUM_KEPT else "normal")
    words = "error position"
    x = column(2 + NUM_KEPT) + 0.2
    axes.text(
        x, middle_of("draft", "verify"), words, ha="left", va="center", size=10.5, color=theme.error[0], weight="bold"
    )
    axes.text(column(1), y, "the target's\nchoice", ha="center", va="center", size=10.5, color=theme.quiet)


def draw_text(axes, theme):
    """Step 3: the committed text, which is the target's own."""
    y = ROWS["text"]
    lines = "3 drafts kept, 1 token of its own:\nthis pass gave 4 tokens."
    step_label(axes, theme, 3, y, "Continue", lines)
    words = (*TEXT, *CHOICES[:NUM_KEPT])
    for index, word in enumerate(words):
        colours = theme.kept if index >= len(TEXT) else (theme.line, theme.plain)
        token(axes, index, y, word, colours, ink=None if index >= len(TEXT) else theme.ink)
    token(axes, len(words), y, CHOICES[NUM_KEPT], theme.anchor, weight="bold", line_width=1.8)
    note = "next anchor"
    axes.text(
        column(len(words) + 1) - TOKEN_WIDTH / 2, y, note, ha="left", va="center", size=10.5, color=theme.anchor[0]
    )
    x, top, bottom = column(2 + NUM_KEPT), ROWS["verify"] - 0.27, y + 0.27
    axes.annotate(
        "",
        (x, bottom),
        (x, top),
        arrowprops={"arrowstyle": "-|>", "color": theme.quiet, "lw": 1.2, "shrinkA": 0, "shrinkB": 0},
    )
    axes.text(x + 0.12, (top + bottom) / 2, "target writes this", ha="left", va="center", size=10.5, color=theme.quiet)


def draw_bars(axes, theme, x, y, rows):
    """Draw pairs of bars: what target and drafter expect next."""
    for index, (word, target, drafter) in enumerate(rows):
        middle = y - 0.28 * index
        axes.text(x - 0.08, middle - 0.005, word, ha="right", va="center", size=10.5, color=theme.ink)
        for share, offset, colour in ((target, 0.055, theme.target_bar), (drafter, -0.055, theme.drafter_bar)):
            corner = (x, middle + offset - 0.05)
            axes.add_patch(Rectangle(corner, BAR_LENGTH * share, 0.1, facecolor=colour, edgecolor="none"))


def draw_card(axes, theme, first, last, colours, divergence, words, rows):
    """Draw one stream of the loss below the slots that it trains on."""
    edge, face = colours
    top, height = ROWS["train"] - 0.32, 1.9
    left, right = column(first) - TOKEN_WIDTH / 2, column(last) + TOKEN_WIDTH / 2
    box(axes, (left + right) / 2, top - height / 2, right - left, height, face=face, edge=edge, radius=0.1)
    axes.text(left + 0.14, top - 0.22, divergence, ha="left", va="center", size=12, weight="bold", color=edge)
    axes.text(left + 0.14, top - 0.40, words, ha="left", va="top", size=10.5, color=theme.ink, linespacing=1.35)
    draw_bars(axes, theme, left + 0.64, top - 1.14, rows)


def draw_legend(axes, theme, x, y):
    """Say once which bar is whose."""
    axes.text(x, y, "How likely is each next token?", ha="left", va="center", size=10.5, color=theme.quiet)
    for place, colour, name in ((0.0, theme.target_bar, "target p"), (1.05, theme.drafter_bar, "drafter q")):
        axes.add_patch(Rectangle((x + place, y - 0.3), 0.12, 0.12, facecolor=colour, edgecolor="none"))
        axes.text(x + place + 0.19, y - 0.245, name, ha="left", va="center", size=10.5, color=theme.ink)


def draw_train(axes, theme):
    """Step 4: what each slot of the drafter's own block teaches."""
    y = ROWS["train"]
    lines = (
        "From the same anchor the drafter drafts\nagain, now with gradient. It learns from\nits own drafts: "
        "the accepted ones, and\nthe one at the error position."
    )
    axes.plot([0.06, column(6) + TOKEN_WIDTH / 2], [y + 0.46] * 2, color=theme.line, lw=1)
    step_label(axes, theme, 4, y, "Train", lines)
    token(axes, 1, y, TEXT[1], theme.anchor, weight="bold", line_width=1.8)
    for slot, word in enumerate(DRAFTS):
        colours = theme.kept if slot < NUM_KEPT else theme.error
        if slot > NUM_KEPT:
            x = column(2 + slot)
            axes.text(x, y, "left out", ha="center", va="center", size=10.5, color=theme.quiet)
        else:
            token(axes, 2 + slot, y, word, colours, style=(0, (3, 2)))
    last = 1 + NUM_KEPT
    words = "accepted drafts: keep covering\nwhat the target may write"
    draw_card(axes, theme, 2, last, theme.kept, "forward KL(p ‖ q)", words, KEPT_BARS)
    words = "error position: learn what\nthe target writes there"
    draw_card(axes, theme, last + 1, last + 2, theme.error, "forward KL(p ‖ q)", words, ERROR_BARS)
    draw_legend(axes, theme, 0.50, y - 1.62)


def draw(theme: Theme, path: Path) -> None:
    """Draw the whole picture in one theme."""
    figure = plt.figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    for part in (draw_draft, draw_verify, draw_text, draw_train):
        part(axes, theme)
    # No date and no random ids: the same script gives the same bytes.
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    matplotlib.rcParams |= {"svg.hashsalt": "method", "font.family": "DejaVu Sans"}
    for name, theme in THEMES.items():
        draw(theme, folder / name)
