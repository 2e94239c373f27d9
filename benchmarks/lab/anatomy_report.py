# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What `diagnose` found, as Markdown tables and one figure. Runs nothing."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .figures import COLOURS, MARKERS, label, panels, save


LIMITS = {
    "now": "the drafter as it is",
    "known_confident": "right too where the target gives its token >= 0.9 and it can be drafted",
    "confident": "right too where the target gives its token >= 0.9",
    "as_slot_1": "right at every slot where slot 1 of the anchor just before is",
    "vocabulary": "right wherever the token can be drafted",
    "slots": "always right",
}
METHODS = {
    "sft": "SFT, random anchors",
    "until_fail": "SFT until the first wrong draft",
    "chain_sft": "SFT at the chain's anchors",
    "opd_first": "Draft-OPD `first`",
}
KINDS = {"accepted": "accepted", "first_rejected": "first rejected", "suffix": "suffix"}


def render_diagnosis(found: dict[str, dict[str, Any]]) -> str:
    """
    Return the tables.

    Args:
        found (`dict`): By drafter, what `diagnose_drafter` returns.
    """
    parts = []
    for name, numbers in found.items():
        tables = (_states(numbers), _places(numbers), _limits(numbers), _top_probs(numbers), _weights(numbers))
        parts.append("\n\n".join([f"## {name}", _headline(numbers), *tables, _owed(numbers)]))
    return "\n\n".join(parts) + "\n"


def _headline(numbers: dict[str, Any]) -> str:
    outside, loops = numbers["outside"], numbers["loops"]
    slots = " ".join(f"{rate:.3f}" for rate in numbers["slot_acceptance"])
    return (
        f"tau {_tau(numbers['now'])}, acceptance per slot {slots}; {numbers['tokens']:,} tokens, target entropy "
        f"{numbers['target_entropy']:.2f} nats.\n\n"
        f"Outside the draft vocabulary: {outside['tokens']:.1%} of the tokens, {outside['mass']:.1%} of the target's "
        f"probability, {outside['rejections']:.1%} of the rejections.\n\n"
        f"Loops: {loops['tokens']:.1%} of the tokens, in {loops['responses']:.1%} of the responses; tau "
        f"{_tau(loops['with'])} with, {_tau(loops['without'])} without."
    )


def _states(numbers: dict[str, Any]) -> str:
    head = (
        "state",
        "slots",
        "forward KL",
        "TV",
        "wrong",
        "target entropy",
        "top probability",
        "mass outside",
    )
    columns = ("forward_kl", "tv", "is_wrong", "target_entropy", "top_prob", "outside_mass")
    rows = [
        (
            title,
            f"{numbers['mismatch'][kind]['count']:,}",
            *(f"{numbers['mismatch'][kind][key]:.3f}" for key in columns),
        )
        for kind, title in KINDS.items()
        if kind in numbers["mismatch"]
    ]
    return _table(head, rows)


def _places(numbers: dict[str, Any]) -> str:
    rows = [(f"from {row['from']}", str(row["blocks"]), _tau(row)) for row in numbers["by_position"]]
    return _table(("anchor's place in the response", "blocks", "tau"), rows)


def _limits(numbers: dict[str, Any]) -> str:
    found = {"now": numbers["now"]} | numbers["limits"]
    return _table(("a drafter that is", "tau"), [(title, _tau(found[name])) for name, title in LIMITS.items()])


def _top_probs(numbers: dict[str, Any]) -> str:
    head = (
        "target's top probability behind the anchor",
        "all anchors",
        "chain's anchors",
        "slot 1 right",
        "in the chain",
        "drafter's probability of the token",
        "in the chain",
        "first wrong drafts",
    )
    keys = (
        "anchors",
        "chain_anchors",
        "right",
        "right_in_chain",
        "draft_prob",
        "draft_prob_in_chain",
        "first_wrong",
    )
    return _table(head, [(_range(row), *(_number(row[key]) for key in keys)) for row in numbers["by_top_prob"]])


def _weights(numbers: dict[str, Any]) -> str:
    head = (
        "where the loss's weight lies",
        "right",
        "first wrong",
        "behind it",
        "target entropy",
        "drafter's probability of the token",
        "slots per response",
    )
    keys = ("right", "first_wrong", "behind", "target_entropy", "draft_prob")
    rows = [
        (
            title,
            *(f"{numbers['weights'][name][key]:.3f}" for key in keys),
            f"{numbers['weights'][name]['slots_per_response']:.0f}",
        )
        for name, title in METHODS.items()
    ]
    return _table(head, rows)


def _owed(numbers: dict[str, Any]) -> str:
    owed = numbers["owed"]
    rows = [("all", owed)] + [(f"slot {slot}", row) for slot, row in owed["by_slot"].items()]
    rows += [(f"top probability {_range(row)}", row) for row in owed["by_top_prob"]]
    return _table(
        ("first wrong draft", "count", "rounds saved if mended", "saves none"),
        [
            (title, str(row["rejections"]), _number(row["rounds_saved"]), _number(row["saves_none"]))
            for title, row in rows
        ],
    )


def _range(row: dict[str, float]) -> str:
    return f"{row['from']:g} to {row['to']:g}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _tau(row: dict[str, Any]) -> str:
    return f"{row['tau']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if row["blocks"] else "-"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def draw_diagnosis(found: dict[str, dict[str, Any]], folder: Path, name: str) -> list[Path]:
    """
    Draw acceptance per slot, tau by position, how often slot 1 is right by the target's top probability, and where
    the anchors lie; a line per drafter. Returns the files written.
    """
    figure, axes = panels(4, height=2.4)
    titles = (
        ("acceptance per slot", "slot", ""),
        ("tau by the anchor's place", "token of the response", "tau"),
        ("slot 1 right, chain", "target's top probability", ""),
        ("share of anchors", "target's top probability", ""),
    )
    for index, (drafter, numbers) in enumerate(found.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "ms": 3}
        slots = numbers["slot_acceptance"]
        axes[0].plot(range(1, len(slots) + 1), slots, label=drafter, **style)
        places = [row for row in numbers["by_position"] if row["blocks"]]
        axes[1].plot([row["from"] for row in places], [row["tau"] for row in places], **style)
        bins = [row for row in numbers["by_top_prob"] if row["right_in_chain"] is not None]
        middles = [(row["from"] + row["to"]) / 2 for row in bins]
        axes[2].plot(middles, [row["right_in_chain"] for row in bins], **style)
        axes[3].plot(middles, [row["chain_anchors"] for row in bins], **style)
        if index == 0:
            axes[3].plot(middles, [row["anchors"] for row in bins], color="#000000", linestyle=":", label="random")
            axes[3].legend(fontsize=7)
    for axis, (title, across, up) in zip(axes, titles, strict=True):
        label(axis, title, across, up)
    axes[0].legend(fontsize=6)
    return save(figure, folder, name, ("png",))
