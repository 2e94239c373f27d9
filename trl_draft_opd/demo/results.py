# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Shows two evaluations side by side, as a table and as a plot."""

from pathlib import Path

from rich.table import Table

from ..evaluation import EvaluationReport


def require_matplotlib() -> None:
    """Raise `ValueError` if the plot could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("The demo draws a plot with matplotlib. Run `pip install matplotlib`.") from error


def results_table(
    before: EvaluationReport, after: EvaluationReport, gain: tuple[float, float, float], family: str
) -> Table:
    """Return a table to print with `rich`: plain decoding, the SFT drafter, the drafter after Draft-OPD."""
    table = Table(
        "",
        "target",
        "SFT drafter",
        "after Draft-OPD",
        title=f"{family}, {before.num_drafts} drafts per block, {before.num_prompts} held-out prompts, temperature 0",
        caption=(
            "tau: tokens per verification, the target's own included. [..]: 95 % interval over prompts.\n"
            "equal outputs: the target's own text to the last token. speed: against plain decoding, "
            f"{before.batch_size} prompts at a time.\n"
            "After so short a training more SFT would help too; this shows the method at work, not that it wins."
        ),
        caption_justify="left",
    )
    reports = (before, after)
    slots = (" ".join(f"{100 * rate:.0f}" for rate in r.acceptance_per_slot) for r in reports)
    table.add_row("tau", "1", *(f"{r.tau:.2f} [{r.tau_low:.2f}, {r.tau_high:.2f}]" for r in reports))
    table.add_row("gain in tau", "", "", "{:+.1%} [{:+.1%}, {:+.1%}]".format(*gain))
    table.add_row("kept per slot", "", *(f"{rates} %" for rates in slots))
    table.add_row(
        "equal outputs", "", *(f"{r.num_prompts - len(r.different_prompts)} of {r.num_prompts}" for r in reports)
    )
    table.add_row("speed", "1.00x", *(f"{r.speedup:.2f}x" for r in reports))
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
