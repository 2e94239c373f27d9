# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""How far confidences are from what happened, by hand; and in a report."""

import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from test_blocks import ROUNDS, make_rollout

from helpers.tiny import make_drafter, make_prompts, make_target
from trl_draft_opd import EvaluationReport, evaluate_drafter
from trl_draft_opd.export.record import measurement_of
from trl_draft_opd.rollout.calibration import Calibration


# The worked example: of its counted blocks one keeps 2 of 5 drafts, one none, one all.
CONFIDENCES = [[0.92, 0.85, 0.34, 9, 9], [0.38, 9, 9, 9, 9], [0.95, 0.85, 0.75, 0.65, 1.0], [9] * 5, [9] * 5]


def make(**changes):
    return replace(make_rollout(ROUNDS), confidences=torch.tensor([CONFIDENCES], dtype=torch.float64), **changes)


def test_only_reached_slots_of_counted_blocks_are_measured():
    report = Calibration.of_rollout(make()).report()
    assert report["num_reached_per_slot"] == [3, 2, 2, 1, 1]
    pairs = [(0.92, 1), (0.85, 1), (0.34, 0), (0.38, 0), (0.95, 1), (0.85, 1), (0.75, 1), (0.65, 1), (1.0, 1)]
    assert report["mean_confidence"] == pytest.approx(sum(c for c, _ in pairs) / 9)
    assert report["mean_kept"] == 7 / 9
    assert report["brier"] == pytest.approx(sum((c - kept) ** 2 for c, kept in pairs) / 9)
    # Bins: [.3, .4) holds .34 and .38, [.6, .7) .65, [.7, .8) .75, [.8, .9) .85 twice, [.9, 1] .92, .95 and 1.
    assert report["error"] == pytest.approx((0.72 + 0.35 + 0.25 + 0.3 + 0.13) / 9)
    # By slot: 0.38 was refused, 0.92 and 0.95 were kept.
    assert report["error_per_slot"][0] == pytest.approx((0.38 + 0.13) / 3)
    assert report["brier_per_slot"][0] == pytest.approx((0.38**2 + 0.08**2 + 0.05**2) / 3)


def test_slots_that_were_not_verified_were_not_reached():
    verified = torch.tensor([[2, 1, 5, 5, 0]])
    report = Calibration.of_rollout(make(verified=verified)).report()
    # The first block ends behind its two kept drafts, so the fate of its third is not known.
    assert report["num_reached_per_slot"] == [3, 2, 1, 1, 1]


def test_measurements_of_batches_add_up():
    one = Calibration.of_rollout(make())
    double, single = (one + one).report(), one.report()
    assert double["num_reached_per_slot"] == [6, 4, 4, 2, 2]
    for name in ("error", "brier", "mean_kept", "mean_confidence"):
        assert double[name] == pytest.approx(single[name]) and double[f"{name}_per_slot"] == single[f"{name}_per_slot"]


def test_a_slot_that_was_never_reached_has_no_measures():
    rollout = make(accepted=torch.zeros(1, 5, dtype=torch.long))
    report = Calibration.of_rollout(rollout).report()
    assert report["num_reached_per_slot"] == [3, 0, 0, 0, 0] and report["error_per_slot"][1:] == [None] * 4


@pytest.fixture(scope="module")
def reports():
    target = make_target()
    drafter = make_drafter("dspark", target)
    options = {"max_completion_length": 16, "num_resamples": 20, "show_progress": False}
    found = [evaluate_drafter(target, drafter, make_prompts(2), **options, min_confidence=m) for m in (None, 0.5)]
    plain = evaluate_drafter(target, make_drafter("dflash", target), make_prompts(2), **options)
    return [*found, plain]


def test_a_report_holds_calibration_and_what_was_verified(reports):
    whole, adaptive, plain = reports
    assert whole.calibration["num_reached_per_slot"][0] == whole.num_blocks
    assert plain.calibration is None and plain.drafts_per_block == whole.drafts_per_block == 4
    assert 1 <= adaptive.drafts_per_block < 4 and adaptive.min_confidence == 0.5
    assert adaptive.num_different == 0 and adaptive.kept_share >= whole.kept_share
    assert whole.tau == pytest.approx(1 + whole.kept_share * whole.drafts_per_block)
    for report in reports:
        assert EvaluationReport(**json.loads(json.dumps(report.to_dict()))) == report
    console = Console(file=StringIO(), width=100)
    console.print(adaptive.table("dspark"))
    assert f"{adaptive.drafts_per_block:.2f} of 4" in console.file.getvalue()
    assert f"{adaptive.calibration['error']:.3f}, {adaptive.calibration['brier']:.3f}" in console.file.getvalue()


def test_a_measurement_records_the_errors_of_the_head(reports):
    conditions = {"prompt_set": "x", "prompts_sha256": "0" * 64, "target_dtype": "float32"}
    found = [measurement_of(report, **conditions) for report in reports]
    assert found[0].calibration_error == reports[0].calibration["error"] and found[2].brier_score is None
    assert found[0].brier_score == reports[0].calibration["brier"]


def test_a_drafter_without_the_head_takes_no_threshold():
    target = make_target()
    with pytest.raises(ValueError, match="no confidence head, which `min_confidence` reads"):
        evaluate_drafter(target, make_drafter("dflash", target), make_prompts(1), min_confidence=0.5)
