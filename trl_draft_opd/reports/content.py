# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What stands in a report: tables and figures of a drafter's training record and of an evaluation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..costs.shapes import DrafterShape
from ..data.token_classes import TOKEN_CLASSES
from ..drafters.portable_config import PortableConfig
from ..evaluation import EvaluationReport, paired_gain
from ..export.costs import break_even, cost_table
from ..export.curves import curve_panels, curve_table, stage_names
from ..export.record import StageRecord, TrainingRecord
from ..export.served import ServedSpeed, describe_served, served_rows
from ..rollout.rejections import STRETCHES
from . import figures
from .completions import Completion
from .page import Figure, Page, Section, Table


_CLASS_NAMES = {
    "word_start": "word, behind a space",
    "word_part": "word, without a space",
    "code_symbol": "code symbol",
}
_NOT_MEASURED = {
    "tau": "tau: not measured. Train with `--eval-strategy`, or run `trl-draft-opd evaluate --report`.",
    "slots": "Acceptance per slot: not measured of these weights. Run `trl-draft-opd evaluate --report`.",
    "curves": "Training curves: the drafter's folder has no training record with two points or more.",
    "rejections": "Rejections, completions: only `trl-draft-opd evaluate --report` measures them.",
    "served": "Served speed: run `trl-draft-opd bench --record` on the drafter's folder first. Its estimate needs the "
    "target's size, which the training record does not name.",
}


def drafter_page(
    title: str,
    record: TrainingRecord | None,
    evaluation: EvaluationReport | None = None,
    before: EvaluationReport | None = None,
    completions: Sequence[Completion] = (),
    estimate: dict[str, Any] | None = None,
) -> Page:
    """
    Return the page of a drafter.

    Args:
        title (`str`): Of the page.
        record ([`TrainingRecord`], *optional*): What was trained, and measured earlier.
        evaluation ([`EvaluationReport`], *optional*): What was measured now.
        before ([`EvaluationReport`], *optional*): The same of an earlier drafter, on the same prompts.
        completions (`Sequence[Completion]`, *optional*): Responses to show.
        estimate (`dict`, *optional*): Of [`estimate_break_even`], to show where no server's speed was measured.
    """
    stages = record.stages if record is not None else []
    reports = {} if evaluation is None else {"this drafter": evaluation}
    if before is not None:
        reports = {"before": before, **reports}
    found = {
        "tau": _tau(reports, record),
        "slots": _slots(reports, record),
        "curves": _curves(stages),
        "rejections": _rejections(reports),
        "served": _served(record.served if record is not None else []) or _estimated(estimate),
    }
    return Page(
        title=title,
        facts=[*_verdict(evaluation, before, estimate), *_facts(stages, evaluation)],
        sections=[section for section in found.values() if section is not None],
        completions=completions,
        missing=[_NOT_MEASURED[name] for name, section in found.items() if section is None],
    )


def _verdict(
    evaluation: EvaluationReport | None, before: EvaluationReport | None, estimate: dict[str, Any] | None
) -> list[str]:
    """Return what a reader wants to know first, in up to three sentences."""
    if evaluation is None:
        return []
    found = [f"A pass of the target yields {evaluation.tau:.2f} tokens (tau), where plain decoding has 1."]
    if before is not None:
        gain, low, high = paired_gain(before, evaluation)
        word = "Better than before" if low > 0 else "Worse than before" if high < 0 else "Not told apart from before"
        found.append(f"{word} on these prompts: {gain:+.1%} [{low:+.1%}, {high:+.1%}] tau.")
    if estimate is not None:
        alone = estimate["rows"][0]
        word = "faster" if evaluation.tau > alone["break_even_tau"] else "no faster"
        best, hint = alone["best_drafts"], ""
        if best is not None and best["num_drafts"] < evaluation.num_drafts:
            hint = f" {best['num_drafts']} drafts per block would be {best['speedup']:.2f} times as fast as without."
        found.append(
            f"By the estimate below, single requests are decoded {word} with it than without: that takes a tau above "
            f"{alone['break_even_tau']:.2f} at {evaluation.num_drafts} drafts per block.{hint}"
        )
    return found


def _facts(stages: Sequence[StageRecord], evaluation: EvaluationReport | None) -> list[str]:
    facts = [
        f"{name}: {stage.steps} optimiser steps." for name, stage in zip(stage_names(stages), stages, strict=True)
    ]
    if evaluation is not None:
        how = "by replay along the target's responses" if evaluation.is_replay else "by live decoding"
        facts.append(
            f"Measured {how}: {evaluation.num_prompts} prompts, {evaluation.num_tokens} tokens, "
            f"{evaluation.num_drafts} drafts per block, temperature {evaluation.temperature:g}."
        )
    return facts


def _tau(reports: dict[str, EvaluationReport], record: TrainingRecord | None) -> Section | None:
    """Return tau of what was measured now, in training, and in earlier measurements of the same weights."""
    rows: list[tuple[str, float, float, float]] = [
        (name, report.tau, report.tau_low, report.tau_high) for name, report in reports.items()
    ]
    sentences = [
        "Tau (accepted length) is the number of tokens per verification, the target's own included: 1 is plain "
        "decoding. Intervals: 95 %, resampling prompts."
    ]
    if len(reports) == 2:
        gain, low, high = paired_gain(*reports.values())
        sentences.append(f"Gain in tau: {gain:+.1%} [{low:+.1%}, {high:+.1%}], paired over the same prompts.")
    if record is not None and not reports:
        for name, stage in zip(stage_names(record.stages), record.stages, strict=True):
            points = [point for point in stage.curve if "eval_tau_low" in point and "eval_tau_high" in point]
            ends = points[:1] + points[-1:] if len(points) > 1 else points
            rows += [
                (f"{name}, step {point['step']}", point["eval_tau"], point["eval_tau_low"], point["eval_tau_high"])
                for point in ends
            ]
    for m in record.measurements if record is not None else []:
        rows.append((f"recorded: {m.prompt_set}, temperature {m.temperature:g}", m.tau, m.tau_low, m.tau_high))
    if not rows:
        return None
    cells = [(name, f"{tau:.3f}", f"{low:.3f} to {high:.3f}") for name, tau, low, high in rows]
    return Section(
        "tau",
        "Tau",
        sentences,
        [Figure("tau with its 95 % intervals", figures.taus(rows))],
        [Table("Tau", ("measurement", "tau", "95 % interval"), cells)],
    )


def _slots(reports: dict[str, EvaluationReport], record: TrainingRecord | None) -> Section | None:
    rows = [(name, report.acceptance_per_slot) for name, report in reports.items()]
    rows += [
        (f"recorded: {m.prompt_set}", m.acceptance_per_slot)
        for m in (record.measurements if record is not None else [])
    ]
    if not rows:
        return None
    num_slots = max(len(rates) for _, rates in rows)
    cells = [(name, *(f"{rate:.2f}" for rate in rates), *[""] * (num_slots - len(rates))) for name, rates in rows]
    return Section(
        "slots",
        "Acceptance per slot",
        ["The share of blocks that keep at least this many drafts."],
        [Figure("Acceptance per slot", figures.slots(rows))],
        [Table("Acceptance per slot", ("measurement", *map(str, range(1, num_slots + 1))), cells)],
    )


def _curves(stages: Sequence[StageRecord]) -> Section | None:
    panels = curve_panels(stages)
    if not panels:
        return None
    drawn = [
        Figure(panel.measure, figures.curve(panel, f"curve{number}")) for number, panel in enumerate(panels, start=1)
    ]
    sentences = [
        "Each stage's loss has a figure of its own: SFT and Draft-OPD weigh other slots, so their losses are "
        "different measures. Tau means the same in every stage, on evaluation rows or on the rows trained on."
    ]
    return Section(
        "curves", "Training curves", sentences, drawn, [Table("Points of the curves", *curve_table(panels))]
    )


def _rejections(reports: dict[str, EvaluationReport]) -> Section | None:
    if not any(report.rejections for report in reports.values()):
        return None
    ends = [str(end - 1) for end in STRETCHES[1:]]
    stretches = {
        f"from_token_{first}": f"tokens {first} to {end}" for first, end in zip(STRETCHES[:-1], ends, strict=True)
    }
    stretches[f"from_token_{STRETCHES[-1]}"] = f"tokens from {STRETCHES[-1]}"
    classes = {f"class_{name}": _CLASS_NAMES.get(name, name) for name in TOKEN_CLASSES}
    shown, tables = [], []
    for name, first, caption, titles in (
        ("classes", "class", "Rejections by class of the target's token", classes),
        ("positions", "position", "Rejections by position in the response", stretches),
    ):
        met = [key for key in titles if any(f"rejection/{key}" in report.rejections for report in reports.values())]
        if not met:
            continue
        rows = [(label, [_share(report, key) for key in met]) for label, report in reports.items()]
        shown.append(Figure(caption, figures.shares(caption, [titles[key] for key in met], rows, name)))
        head = [f"{label}: {what}" for label in reports for what in ("decided", "rejected", "share")]
        cells = [(titles[key], *(cell for report in reports.values() for cell in _counts(report, key))) for key in met]
        tables.append(Table(caption, (first, *head), cells))
    sentences = [
        "A draft is decided if it was accepted or is the first of its block that the target rejected; what is behind "
        "that was never compared. The class is that of the token that the target wrote there."
    ]
    return Section("rejections", "Where drafts are rejected", sentences, shown, tables)


def _share(report: EvaluationReport, key: str) -> float | None:
    rejected, decided = report.rejections.get(f"rejection/{key}", (0, 0))
    return rejected / decided if decided else None


def _counts(report: EvaluationReport, key: str) -> tuple[str, str, str]:
    rejected, decided = report.rejections.get(f"rejection/{key}", (0, 0))
    return str(decided), str(rejected), f"{rejected / decided:.1%}" if decided else ""


def _served(served: Sequence[ServedSpeed]) -> Section | None:
    if not served:
        return None
    same: Callable[[str], str] = str
    sentences, drawn, tables = [], [], []
    for number, each in enumerate(served, start=1):
        said = describe_served(each, same)
        verdict = "" if said["verdict"] is None else f" Against plain decoding: {said['verdict']}."
        sentences.append(f"{said['where']}: {said['conditions']}.{verdict}")
        levels = [
            (level.concurrency, level.speedup, level.speedup_low, level.speedup_high)
            for level in each.levels
            if level.speedup is not None
        ]
        if levels:
            drawn.append(Figure(f"Speed-up, {said['where']}", figures.speedups(levels, f"served{number}")))
        tables.append(Table(f"Served speed, {said['where']}", *served_rows(each)))
    return Section("served", "Served speed and break-even", sentences, drawn, tables)


def estimate_break_even(
    config: PortableConfig,
    num_target_parameters: int,
    record: TrainingRecord | None,
    evaluation: EvaluationReport | None = None,
) -> dict[str, Any]:
    """
    Return [`break_even`] of a drafter at the tau that is known of it: measured now, or else by its record, of
    measurements with as many drafts per block, or else at the end of its training.
    """
    num_drafts = DrafterShape.of(config).num_drafts if evaluation is None else evaluation.num_drafts
    taus, acceptance = [], []
    if evaluation is not None:
        taus, acceptance = [evaluation.tau], evaluation.acceptance_per_slot
    elif record is not None:
        fitting = [m for m in record.measurements if m.num_drafts == num_drafts]
        curve = record.stages[-1].curve if record.stages else []
        taus = [m.tau for m in fitting] or [point["eval_tau"] for point in curve if "eval_tau" in point][-1:]
        acceptance = fitting[0].acceptance_per_slot if fitting else []
    return break_even(config, num_drafts, num_target_parameters, taus=sorted(set(taus)), acceptance=acceptance)


def _estimated(estimate: dict[str, Any] | None) -> Section | None:
    if estimate is None:
        return None
    sentences = [
        "An estimate from shapes, not a measurement: `trl-draft-opd bench --record` measures. A forward pass costs "
        f"the reading of its weights until it holds {estimate['ridge_tokens']} tokens (bfloat16 on an H100) and grows "
        "with them from there. Attention over the text and the engine's own work are left out, so an engine needs a "
        "higher tau than this.",
        f"Drafting a block reads {estimate['draft_cost']:.1%} of what a target pass reads.",
    ]
    table = Table("Estimated break-even", *cost_table(estimate["rows"]))
    return Section("served", "Break-even, estimated", sentences, tables=[table])


def folder_title(drafter: str, target: str | None) -> str:
    """Return a page's title; of a local folder only its own name, because its path is nobody's business."""
    names = [Path(name).resolve().name if Path(name).exists() else name for name in (drafter, target) if name]
    return " for ".join(names)
