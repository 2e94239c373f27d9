# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Shows two evaluations side by side: a table, a plot, numbers for JSON. Measures and trains nothing.
"""

from pathlib import Path

from rich.table import Table

from ..evaluation import EvaluationReport, paired_gain


def require_matplotlib() -> None:
    """Raise `ValueError` when the plot could not be drawn in the end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("The demo draws a plot with matplotlib. Run `pip install 'trl-draft-opd[plots]'`.") from error


def summary(before: EvaluationReport, after: EvaluationReport) -> dict:
    """Return both reports and the relative gain in tau with its paired 95 % interval, as plain numbers."""
    gain, low, high = paired_gain(before, after)
    return {"sft": before.to_dict(), "opd": after.to_dict(), "gain": {"tau": gain, "low": low, "high": high}}


def results_table(before: EvaluationReport, after: EvaluationReport, family: str) -> Table:
    """Return the table to print with `rich`: plain decoding, the SFT drafter, the drafter after Draft-OPD."""
    gain, low, high = paired_gain(before, after)
    table = Table(
        "",
        "target alone",
        "SFT drafter",
        "after Draft-OPD",
        title=f"{family}, {before.num_drafts} drafts per block, {before.num_prompts} held-out prompts, temperature 0",
        caption="[..]: 95 % interval over prompts. tau: tokens per verification, the target's own token included.",
    )
    rows = {
        "tau": ("1", *(f"{r.tau:.3f} [{r.tau_low:.3f}, {r.tau_high:.3f}]" for r in (before, after))),
        "gain in tau over SFT": ("", "", f"{gain:+.1%} [{low:+.1%}, {high:+.1%}]"),
        "acceptance per slot": (
            "",
            *(" ".join(f"{rate:.0%}" for rate in r.acceptance_per_slot) for r in (before, after)),
        ),
        "outputs equal to the target's": (
            "",
            *(f"{r.num_prompts - (r.num_different or 0)} of {r.num_prompts}" for r in (before, after)),
        ),
        "speed against plain decoding": ("1.00x", *(f"{r.speedup:.2f}x" for r in (before, after))),
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def draw_plot(before: EvaluationReport, after: EvaluationReport, path: Path) -> None:
    """Save acceptance per slot and tau, before and after, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    slots_axis, tau_axis = figure.subplots(1, 2, width_ratios=(2, 1))
    slots = range(1, before.num_drafts + 1)
    named = (("SFT", before, "tab:gray"), ("after Draft-OPD", after, "tab:green"))
    for index, (name, report, colour) in enumerate(named):
        slots_axis.plot(slots, report.acceptance_per_slot, marker="o", color=colour, label=name)
        error = [[report.tau - report.tau_low], [report.tau_high - report.tau]]
        tau_axis.bar(index, report.tau, yerr=error, capsize=5, color=colour, width=0.6)
    slots_axis.set(xlabel="slot in the block", ylabel="share of blocks that keep it", ylim=(0, 1), xticks=list(slots))
    slots_axis.legend()
    tau_axis.set(ylabel="tau (tokens per verification)", xticks=[0, 1], xticklabels=[name for name, _, _ in named])
    tau_axis.axhline(1, color="black", linestyle=":", linewidth=1)
    figure.savefig(path, dpi=150)
