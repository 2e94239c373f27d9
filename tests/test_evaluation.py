# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The evaluation report: numbers against hand counts, intervals, and the check that outputs are the target's own.
"""

import dataclasses
import json
from io import StringIO

import pytest
import torch
from rich.console import Console

from helpers.oracle import greedy_text, plant
from helpers.tiny import EOS, FAMILIES, make_drafter, make_prompts, make_target
from trl_draft_opd import (
    EvaluationReport,
    SamplingSettings,
    evaluate_drafter,
    evaluation,
    generate_responses,
)
from trl_draft_opd.evaluation import paired_gain
from trl_draft_opd.responses import progress
from trl_draft_opd.rollout import live
from trl_draft_opd.rollout.counts import Counts


@pytest.fixture(scope="module")
def target():
    target = make_target()
    # No id ends a response: lengths are known.
    target.tokenizer = None
    target.causal_lm.generation_config.eos_token_id = None
    target.config.eos_token_id = None
    return target


def evaluate(target, drafter, prompts, **changes):
    options = {"max_completion_length": 16, "num_resamples": 200, "show_progress": False} | changes
    return evaluate_drafter(target, drafter, prompts, **options)


def tau_interval(accepted_sums, block_counts, num_resamples, seed=0):
    kept = tuple((accepted - blocks,) for accepted, blocks in zip(accepted_sums, block_counts, strict=True))
    return Counts(tuple(block_counts), kept).interval(num_resamples=num_resamples, seed=seed)


def make_report(accepted_sums, block_counts):
    return EvaluationReport(
        tau=sum(accepted_sums) / sum(block_counts),
        tau_low=0.0,
        tau_high=9.0,
        acceptance_per_slot=[0.5],
        tokens_per_target_forward=2.0,
        speedup=1.5,
        num_different=0,
        different_prompts=[],
        num_prompts=len(block_counts),
        num_tokens=100,
        num_blocks=sum(block_counts),
        num_drafts=1,
        batch_size=1,
        temperature=0.0,
        accepted_sums=accepted_sums,
        block_counts=block_counts,
    )


def test_every_number_agrees_with_a_hand_count(monkeypatch, target):
    prompts = [[9, 10, 11], [12, 13]]
    drafter = make_drafter("dflash", target)
    # Row 0: anchors 3, 6, 7, 12, 15, 17 keep 2, 0, 4, 2, 1, 1; the last index is 18, so only the first four lie
    # inside.
    # Row 1: anchors 2, 7, 12 keep 4 each and the last index is 17; the block at 12 fits (12 + 4 <= 17) and one at 17
    # is not drafted.
    wrong = {0: {6, 7, 15, 17}, 1: set()}
    plant(monkeypatch, drafter, [greedy_text(target, prompt, 30) for prompt in prompts], wrong.get)
    report = evaluate(target, drafter, prompts, batch_size=2)
    assert report.block_counts == [4, 3] and report.accepted_sums == [3 + 1 + 5 + 3, 15]
    assert report.num_blocks == 7 and report.tau == 27 / 7
    assert report.acceptance_per_slot == pytest.approx([6 / 7, 6 / 7, 4 / 7, 4 / 7])
    assert report.num_tokens == 32 and report.tokens_per_target_forward == 32 / (6 + 1 + 3 + 1)
    assert (report.num_prompts, report.num_drafts, report.batch_size, report.temperature) == (2, 4, 2, 0.0)
    assert report.num_different == 0 and report.different_prompts == [] and report.speedup > 0
    assert report.tau_low <= report.tau <= report.tau_high


def test_blocks_are_counted_by_geometry_and_not_by_their_fate(monkeypatch, target):
    # A perfect drafter, 8 tokens: the block at 3 is counted; the one at 8 ends beyond index 10 and is not, though it
    # kept 2.
    prompt = [9, 10, 11]
    drafter = make_drafter("dflash", target)
    plant(monkeypatch, drafter, [greedy_text(target, prompt, 30)], lambda row: set())
    report = evaluate(target, drafter, [prompt], max_completion_length=8)
    assert report.block_counts == [1] and report.tau == 5.0
    # A drafter wrong at 9 has its block at 8 refused at once; it is left out all the same.
    plant(monkeypatch, drafter, [greedy_text(target, prompt, 30)], lambda row: {9})
    assert evaluate(target, drafter, [prompt], max_completion_length=8).block_counts == [1]


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_any_size_give_the_same_report(family, target):
    drafter = make_drafter(family, target)
    prompts = make_prompts(3)
    one, three = (evaluate(target, drafter, prompts, batch_size=size) for size in (1, 3))
    left_out = {"speedup": None, "calibration": None}
    assert dataclasses.replace(one, **left_out, batch_size=3) == dataclasses.replace(three, **left_out)
    # Confidences are no integers: products of larger batches are rounded differently.
    for name, value in (one.calibration or {}).items():
        assert three.calibration[name] == pytest.approx(value)
    assert one.num_different == 0


def test_without_a_terminal_lines_tell_how_far_it_is(target, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    drafter = make_drafter("eagle3", target)
    evaluate_drafter(target, drafter, make_prompts(3), max_completion_length=8, batch_size=2)
    shown = capsys.readouterr().err
    assert "Prompts measured: 2 of 3, " in shown and "left" in shown and "Prompts measured: 3 of 3, " in shown


def test_a_lossy_loop_is_caught(monkeypatch, target):
    verify, calls = live.verify_greedy, []

    def accept_one_wrong_draft(drafts, choices, num_verified):
        accepted, next_tokens = verify(drafts, choices, num_verified)
        calls.append(accepted)
        if len(calls) == 2:
            accepted = (accepted + 1).clamp(max=drafts.shape[1])
            next_tokens = choices.gather(1, accepted[:, None])[:, 0]
        return accepted, next_tokens

    monkeypatch.setattr(live, "verify_greedy", accept_one_wrong_draft)
    report = evaluate(target, make_drafter("dflash", target), make_prompts(3))
    assert report.num_different == 1 and report.different_prompts == [0]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: [text[0] ^ 1, *text[1:]],
        lambda text: [*text[:-1], text[-1] ^ 1],
        lambda text: text[:-1],
        lambda text: [*text, 9],
    ],
    ids=["first token", "last token", "shorter", "longer"],
)
def test_outputs_are_equal_only_if_every_token_is(monkeypatch, target, change, batch_size):
    prompts = make_prompts(3)

    def write(target, batch, **options):
        own = generate_responses(target, batch, **options)
        return [change(text) if prompt == prompts[2] else text for prompt, text in zip(batch, own, strict=True)]

    monkeypatch.setattr(evaluation, "generate_responses", write)
    report = evaluate(target, make_drafter("dflash", target), prompts, batch_size=batch_size)
    assert (report.num_different, report.different_prompts) == (1, [2])


def test_without_a_comparison_nothing_is_claimed(target):
    drafter = make_drafter("dflash", target)
    for changes in ({"compare_with_target": False}, {"ignore_eos": True}):
        report = evaluate(target, drafter, make_prompts(1), **changes)
        assert report.speedup is None and report.num_different is None
        assert report.num_tokens == 16
    sampled = evaluate(target, drafter, make_prompts(1), sampling=SamplingSettings(1.0, 0, 1.0))
    # Two draws from one distribution differ; only greedy texts can be compared.
    assert sampled.num_different is None and sampled.speedup > 0 and sampled.temperature == 1.0


def test_no_block_inside_any_text_is_an_error(target):
    with pytest.raises(
        ValueError, match="among 2 prompts is longer than a block of 4 drafts.*Raise `max_completion_length`"
    ):
        evaluate(target, make_drafter("dflash", target), make_prompts(2), max_completion_length=3)


def test_a_repetition_penalty_in_the_targets_files_does_not_reach_the_comparison():
    target = make_target()
    target.causal_lm.generation_config.repetition_penalty = 5.0
    target.causal_lm.generation_config.temperature = 0.6
    target.causal_lm.generation_config.top_k = 20
    prompts = make_prompts(2)
    responses = generate_responses(
        target,
        prompts,
        max_completion_length=12,
        sampling=SamplingSettings(0.0, 0, 1.0),
        batch_size=2,
        seed=0,
        show_progress=False,
    )
    own = [greedy_text(target, prompt, 12)[len(prompt) :] for prompt in prompts]
    assert EOS not in own[0] + own[1] and responses == own
    assert target.causal_lm.generation_config.repetition_penalty == 5.0


# -- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_is_deterministic_and_holds_the_estimate():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(3, 9, (40,), generator=generator).tolist()
    sums = [int(count * (2 + i % 3)) for i, count in enumerate(counts)]
    first, again, other = (tau_interval(sums, counts, num_resamples=500, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] < sum(sums) / sum(counts) < first[1] and first[1] - first[0] < 1


def test_equal_prompts_have_no_interval():
    assert tau_interval([6, 6, 6], [2, 2, 2], num_resamples=50) == (3.0, 3.0)


def test_the_interval_covers_the_true_tau_about_as_often_as_it_says():
    generator, hits = torch.Generator().manual_seed(3), 0
    for trial in range(60):
        accepted = torch.randint(1, 6, (50, 4), generator=generator)
        low, high = tau_interval(accepted.sum(dim=1).tolist(), [4] * 50, num_resamples=400, seed=trial)
        hits += low <= 3.0 <= high
    assert 50 <= hits <= 60


def test_prompts_without_a_counted_block_do_not_pull_the_interval_to_zero():
    assert tau_interval([6, 0], [2, 0], num_resamples=200) == (3.0, 3.0)


@pytest.mark.parametrize("sums,counts", [([6, 9, 4], [2, 3, 2]), ([6, 0], [2, 0])])
def test_a_report_gains_nothing_over_itself(sums, counts):
    report = make_report(sums, counts)
    assert paired_gain(report, report, num_resamples=200) == (0.0, 0.0, 0.0)


def test_a_paired_gain_is_relative_and_paired():
    before, after = make_report([10, 40], [10, 10]), make_report([11, 44], [10, 10])
    gain, low, high = paired_gain(before, after, num_resamples=500)
    # Every prompt gains a tenth: prompts differ fourfold and the interval is a point all the same.
    assert gain == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_reports_on_different_numbers_of_prompts_cannot_be_paired():
    with pytest.raises(ValueError, match="Reports cover 2 and 3 prompts"):
        paired_gain(make_report([6, 6], [2, 2]), make_report([6, 6, 6], [2, 2, 2]))


# -- shape of the report ----------------------------------------------------------------------------------------------


def test_a_report_survives_json(target):
    report = evaluate(target, make_drafter("eagle3", target), make_prompts(2))
    assert EvaluationReport(**json.loads(json.dumps(report.to_dict()))) == report


def test_the_table_shows_tau_and_equality():
    console = Console(file=StringIO(), width=100)
    console.print(make_report([6, 9], [2, 3]).table("dflash"))
    text = console.file.getvalue()
    assert "dflash" in text and "3.000" in text and "2 of 2" in text and "1.50x" in text
