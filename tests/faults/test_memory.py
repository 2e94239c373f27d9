# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Fault 30: out of memory is an error that names what was done, how large it was, and the settings to lower.
"""

import pytest
import torch

from helpers.oracle import greedy_rows
from helpers.tiny import TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.runs.out_of_memory import explained_memory
from trl_draft_opd.target.frozen import FrozenTarget
from trl_draft_opd.trainer.resuming import describe_batches


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    return greedy_rows(target, 4, 8)


def make_trainer(kind, tmp_path, target, rows, **changes):
    options = {
        "output_dir": str(tmp_path),
        **TINY_RUN,
        "save_strategy": "no",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_completion_length": 8,
    }
    trainer_class, config = (DraftSFTTrainer, DraftSFTConfig) if kind == "sft" else (DraftOPDTrainer, DraftOPDConfig)
    return trainer_class(make_drafter("dflash", target), target, config(**options | changes), rows, rows)


def exhaust(*args, **kwargs):
    """Ask the CPU's allocator for more than any machine has: its own error, not one made up here."""
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_a_training_step_names_rows_tokens_and_blocks(monkeypatch, tmp_path, target, rows, kind):
    trainer = make_trainer(kind, tmp_path, target, rows)
    monkeypatch.setattr(trainer, "_step_loss", exhaust)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"Out of memory in a training step \(2 rows of up to \d+ tokens, \d+ blocks of 4 drafts\): .*allocate.*"
        r"lower `per_device_train_batch_size`.*`activation_checkpointing=True`.*`loss_chunk_bytes`.*"
        "resume_from_checkpoint=True",
    ):
        trainer.train()


def test_a_setting_that_is_on_is_not_advised(monkeypatch, tmp_path, target, rows):
    trainer = make_trainer("sft", tmp_path, target, rows, activation_checkpointing=True)
    monkeypatch.setattr(trainer, "_step_loss", exhaust)
    with pytest.raises(torch.OutOfMemoryError, match="lower `per_device_train_batch_size`") as caught:
        trainer.train()
    assert "_checkpointing=True" not in str(caught.value)


def test_a_rollout_names_its_rows_and_settings(monkeypatch, tmp_path, target, rows):
    trainer = make_trainer("opd", tmp_path, target, rows)
    monkeypatch.setattr(FrozenTarget, "read_text", exhaust)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"in a rollout \(2 rows of up to \d+ tokens\).*`reading_bytes`, `generation_batch_size`",
    ):
        trainer.train()


@pytest.mark.parametrize("kind", ["sft", "opd"])
def test_an_evaluation_step_names_its_rows_and_settings(monkeypatch, tmp_path, target, rows, kind):
    trainer = make_trainer(kind, tmp_path, target, rows)
    monkeypatch.setattr(trainer, "_count_rollout", exhaust)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"in an evaluation step \(3 rows of up to \d+ tokens.*lower `per_device_eval_batch_size`",
    ):
        trainer.evaluate()


def test_other_errors_pass_through_as_they_are():
    with (
        pytest.raises(RuntimeError, match="^something else$"),
        explained_memory("a step", lambda: pytest.fail("nothing to explain"), ("x",)),
    ):
        raise RuntimeError("something else")
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"in a step \(sizes unknown\): no further details"),
        explained_memory("a step", lambda: describe_batches([]), ("lower `x`",)),
    ):
        raise MemoryError
