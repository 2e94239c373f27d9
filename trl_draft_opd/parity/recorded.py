# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The tau that was recorded when the drafter was trained, measured again from the published files on the same prompts.
"""

from ..evaluation import evaluate_drafter
from ..export.record import Measurement, prompts_digest, read_record
from .report import Row, VerificationReport
from .scene import Scene


def compare_with_record(scene: Scene, report: VerificationReport, tolerance: float) -> None:
    """Measure again what the folder's training record says of these prompts, and add what is found to the report."""
    try:
        record = read_record(scene.folder)
    except ValueError as error:
        report.problems.append(f"The training record cannot be read: {error}")
        return
    if record is None:
        report.skipped["record"] = "the folder holds no training record"
        return
    digest = prompts_digest(scene.prompts)
    matching = [m for m in record.measurements if m.prompts_sha256 == digest]
    if not matching:
        report.skipped["record"] = "none of its measurements is of these prompts"
        return
    greedy = [m for m in matching if m.temperature == 0 and m.draft_sampling == "greedy"]
    if not greedy:
        report.skipped["record"] = "it was measured with draws, which another run repeats in distribution alone"
    for measurement in greedy:
        _measure_again(scene, report, measurement, tolerance)


def _measure_again(scene: Scene, report: VerificationReport, recorded: Measurement, tolerance: float) -> None:
    found = evaluate_drafter(
        scene.target,
        scene.drafter,
        scene.prompts,
        num_drafts=recorded.num_drafts,
        max_new_tokens=recorded.max_new_tokens,
        batch_size=recorded.batch_size,
        ignore_eos=recorded.ignore_eos,
        compare_with_target=False,
        num_resamples=200,
        show_progress=False,
    )
    remark = f"recorded in training: {recorded.tau:.4f} [{recorded.tau_low:.4f}, {recorded.tau_high:.4f}]"
    report.rows.append(Row("recorded", found.tau, found.acceptance_per_slot, found.num_blocks, None, None, remark))
    gap = found.tau / recorded.tau - 1
    if abs(gap) <= tolerance:
        return
    text = f"tau is {found.tau:.4f} from the published files, and {recorded.tau:.4f} was recorded in training ({gap:+.2%})"
    # Rounding to bfloat16, and a target in bfloat16 then and float32 now, move tau within its noise; a wrong export moves it out.
    if recorded.tau_low <= found.tau <= recorded.tau_high:
        report.notes.append(
            f"{text}; it lies in the recorded interval. Weights were in float32 then, and the target in {recorded.target_dtype}."
        )
    else:
        report.problems.append(
            f"{text[0].upper()}{text[1:]}, outside of the recorded interval: the export is not what was measured."
        )
