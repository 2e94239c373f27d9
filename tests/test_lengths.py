# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One rule for lengths: prompt, response and a block of drafts fit into the target's positions, said before the first
step.
"""

import logging

import pytest
from datasets import Dataset

from helpers.tiny import TINY_RUN, make_drafter, make_prompts, make_target
from trl_draft_opd import (
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    SamplingSettings,
    evaluate_drafter,
    generate_responses,
    verify_drafter,
)
from trl_draft_opd.cli import main
from trl_draft_opd.target.lengths import Lengths, fit_lengths, fit_text_length


DEFAULTS = Lengths(prompt=1024, completion=2048)
# Of the tiny target; its drafters draft four tokens.
POSITIONS, NUM_DRAFTS = 256, 4
RUN = ["--max-steps", "1", "--use-cpu", "--report-to", "none", "--save-strategy", "no"]
GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)


@pytest.fixture(scope="module")
def target():
    return make_target()


def fit(num_positions, prompt=None, completion=None, num_drafts=NUM_DRAFTS):
    lengths = fit_lengths(
        num_positions, prompt=prompt, completion=completion, num_drafts=num_drafts, defaults=DEFAULTS
    )
    return lengths.prompt, lengths.completion


def make_trainer(kind, tmp_path, target, rows, **changes):
    config, trainer = {"sft": (DraftSFTConfig, DraftSFTTrainer), "opd": (DraftOPDConfig, DraftOPDTrainer)}[kind]
    args = config(str(tmp_path), **TINY_RUN, save_strategy="no", max_steps=1, **changes)
    return trainer(make_drafter("dflash", target), target, args, Dataset.from_list(rows))


ROWS = [{"prompt": "w9 w10", "completion": "w20 w21"}]


@pytest.mark.parametrize(
    "given,expected",
    [
        ((40960,), (1024, 2048)),
        ((None,), (1024, 2048)),
        ((2048,), (1020, 1024)),
        ((256,), (124, 128)),
        # What is given stays, the other makes room.
        ((2048, None, 1900), (144, 1900)),
        ((2048, 1500), (1500, 274)),
        ((256, 100, 152), (100, 152)),
    ],
)
def test_a_length_that_was_not_given_is_lowered_to_the_targets_positions(given, expected):
    assert fit(*given) == expected


def test_the_longest_response_does_not_depend_on_the_drafter():
    assert {fit(2048, num_drafts=drafts)[1] for drafts in (0, 1, 15)} == {1024}


@pytest.mark.parametrize("given", [(256, 100, 153), (256, 300), (256, None, 256), (256, 252, 1)])
def test_lengths_that_were_given_and_do_not_fit_are_refused(given):
    with pytest.raises(ValueError, match="and a block of 4 drafts take [0-9]+ positions, but the target has 256"):
        fit(*given)


def test_a_lowered_length_is_noted_and_one_that_fits_is_not(caplog):
    with caplog.at_level(logging.WARNING):
        fit(40960)
        fit(256, 100, 100)
    assert not caplog.records
    fit(256)
    assert "256 positions" in caplog.text and "`max_prompt_length` to 124 and `max_completion_length` to 128" in (
        caplog.text
    )


def test_whole_texts_leave_a_block_its_positions():
    assert fit_text_length(2048, None, num_drafts=7, default=4096) == 2041
    assert fit_text_length(40960, None, num_drafts=7, default=4096) == 4096
    assert fit_text_length(None, 10**6, num_drafts=7, default=4096) == 10**6
    assert fit_text_length(2048, 2041, num_drafts=7, default=4096) == 2041
    with pytest.raises(ValueError, match="Lower `max_length` to 2041"):
        fit_text_length(2048, 2042, num_drafts=7, default=4096)


@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_trainers_work_with_lengths_that_fit_and_leave_the_settings_they_were_given_alone(kind, tmp_path, target):
    trainer = make_trainer(kind, tmp_path, target, ROWS)
    assert (trainer.args.max_prompt_length, trainer.args.max_completion_length) == (124, 128)
    args = DraftSFTConfig(str(tmp_path), **TINY_RUN)
    assert args.fit_to(POSITIONS, NUM_DRAFTS).max_length == 252
    assert (args.max_prompt_length, args.max_completion_length, args.max_length) == (None, None, None)


@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_trainers_refuse_lengths_beyond_the_targets_positions_before_a_row_is_read(kind, tmp_path, target):
    with pytest.raises(ValueError, match="take 257 positions, but the target has 256"):
        make_trainer(kind, tmp_path, target, [{"unread": 1}], max_prompt_length=120, max_completion_length=133)


def test_sft_rows_longer_than_the_positions_are_cut_and_counted_before_the_first_step(tmp_path, target):
    rows = [*ROWS, {"prompt": "w9", "completion": "w20 " * 400}]
    with pytest.warns(UserWarning, match="1 of 2 rows are longer than `max_length` 252 and were cut there"):
        trainer = make_trainer("sft", tmp_path, target, rows)
    assert list(map(len, trainer.train_dataset["input_ids"])) == [5, 252]
    trainer.train()


def test_opd_counts_long_rows_that_the_target_is_said_to_have_written(tmp_path, target):
    rows = [*ROWS, {"prompt": "w9", "completion": "w20 " * 400}]
    with pytest.warns(UserWarning, match="1 of 2 rows are longer than `max_length` 252 and were cut there"):
        trainer = make_trainer("opd", tmp_path, target, rows, completions_from_target=True)
    assert max(map(len, trainer.train_dataset["input_ids"])) + NUM_DRAFTS == POSITIONS


def test_prompts_beyond_what_the_response_leaves_are_skipped_and_counted(tmp_path, target):
    rows = [*ROWS, {"prompt": "w9 " * 60, "completion": "w20"}]
    with pytest.warns(UserWarning, match="1 have a prompt longer than `max_prompt_length` 52"):
        make_trainer("opd", tmp_path, target, rows, max_completion_length=200)


def test_evaluation_takes_a_length_that_fits_the_longest_prompt(target):
    drafter = make_drafter("dflash", target)
    report = evaluate_drafter(target, drafter, [[9] * 200], ignore_eos=True, num_resamples=10, show_progress=False)
    assert report.num_tokens == (POSITIONS - 200) // 2
    with pytest.raises(ValueError, match="take 304 positions, but the target has 256"):
        evaluate_drafter(target, drafter, [*make_prompts(3), [9] * 200], max_completion_length=100)


def test_verification_refuses_what_does_not_fit_before_it_decodes(tmp_path, target):
    target.causal_lm.save_pretrained(tmp_path / "target")
    make_drafter("dflash", target).save_pretrained(tmp_path / "drafter")
    with pytest.raises(ValueError, match="a block of 9 drafts take 259 positions, but the target has 256"):
        verify_drafter(tmp_path / "drafter", target, [[9] * 50], max_completion_length=200)


def test_plain_decoding_refuses_a_prompt_that_leaves_no_room(target):
    with pytest.raises(ValueError, match="take 257 positions, but the target has 256"):
        generate_responses(
            target, [[9]] * 2 + [[9] * 250], max_completion_length=7, sampling=GREEDY, batch_size=2, seed=0,
            show_progress=False,
        )  # fmt: skip


def test_the_text_of_a_user_longer_than_the_targets_positions_is_counted_before_the_first_step(shared_dir, tmp_path):
    target, rows = str(shared_dir / "targets" / "gsm8k-qwen3-7m"), str(shared_dir / "cases" / "long_text.jsonl")
    fresh = ["--family", "eagle3", "--ttt-steps", "2", "--num-anchors", "2", "--output-dir", str(tmp_path)]
    with pytest.warns(UserWarning, match="1 of 1 rows are longer than `max_length` 2046 and were cut there"):
        assert main(["sft", "--target", target, "--dataset", rows, *fresh, *RUN]) == 0
    words = ["--drafter", str(tmp_path), "--target", target, "--dataset", rows]
    assert main(["evaluate", *words, "--max-completion-length", "12"]) == 0
    assert main(["evaluate", *words, "--max-completion-length", "2040"]) == 2
