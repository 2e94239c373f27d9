# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Fault 29: nothing that is not finite reaches the weights or a checkpoint; the samples are named, the update stopped or
skipped.
"""

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState

from helpers.oracle import greedy_rows
from helpers.tiny import TINY_RUN, make_drafter, make_target
from trl_draft_opd import (
    AutoDrafter,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
)
from trl_draft_opd.runs.checkpoints import read_checkpoint
from trl_draft_opd.runs.guard import NonFiniteGuard


KINDS = ["sft", "opd"]


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    return greedy_rows(target, 6, 8)


def make_trainer(kind, tmp_path, drafter, target, rows, **changes):
    options = {
        "output_dir": str(tmp_path / "out"),
        **TINY_RUN,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_completion_length": 8,
    }
    trainer_class, config = (DraftSFTTrainer, DraftSFTConfig) if kind == "sft" else (DraftOPDTrainer, DraftOPDConfig)
    return trainer_class(drafter, target, config(**options | changes), rows)


def poison_loss(monkeypatch, trainer, sample_id):
    """Make the loss of every micro-batch with this row NaN; return the ids of the other rows of its updates."""
    honest = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        if sample_id in inputs.text.sample_ids:
            poisoned = trainer._step_loss
            with monkeypatch.context() as patch:
                patch.setattr(trainer, "_step_loss", lambda *a: spoil(poisoned(*a)))
                return honest(model, inputs, *args, **kwargs)
        return honest(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)


def spoil(result):
    return result._replace(loss=result.loss * float("nan"))


def weights(drafter):
    return {name: parameter.detach().clone() for name, parameter in drafter.named_parameters()}


def steps_saved(tmp_path):
    return sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_before_the_update(monkeypatch, tmp_path, target, rows, kind):
    drafter = make_drafter("dflash", target)
    trainer = make_trainer(kind, tmp_path, drafter, target, rows)
    poison_loss(monkeypatch, trainer, 4)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d on samples \[4\].*Nothing was updated"):
        trainer.train()
    # Updates before it were made and saved; the weights are those of the last one.
    done = trainer.state.global_step
    assert steps_saved(tmp_path) == list(range(1, done + 1))
    if done:
        saved = AutoDrafter.from_pretrained(tmp_path / "out" / f"checkpoint-{done}")
        assert all(torch.equal(value, saved.state_dict()[name]) for name, value in weights(drafter).items())
    assert all(value.isfinite().all() for value in weights(drafter).values())


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_is_skipped_leaves_no_trace_but_its_count(monkeypatch, tmp_path, caplog, target, rows, kind):
    drafter = make_drafter("dflash", target)
    trainer = make_trainer(kind, tmp_path, drafter, target, rows, on_nonfinite="skip", lr_scheduler_type="constant")
    poison_loss(monkeypatch, trainer, 4)
    trainer.train()
    assert caplog.text.count("This update was skipped") == 1 and "on samples [4]" in caplog.text
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["skipped_updates"] == 1 and len(logs) == 3 == trainer.state.global_step
    assert all(value.isfinite().all() for value in weights(drafter).values())
    saved = {step: AutoDrafter.from_pretrained(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2, 3)}
    first = make_drafter("dflash", target)
    moved = [
        any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
        for before, after in zip([first, saved[1], saved[2]], saved.values(), strict=True)
    ]
    assert sorted(moved) == [False, True, True]
    counts = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert counts == {2}  # the optimiser's own counter and moments did not see it either


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_not_finite_is_caught_though_the_loss_is(tmp_path, target, rows, kind):
    drafter = make_drafter("eagle3", target)
    trainer = make_trainer(kind, tmp_path, drafter, target, rows, max_grad_norm=0.0)
    before = weights(drafter)
    drafter.fc.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(
        FloatingPointError, match=r"The gradient is not finite at step 0, on samples \[\d, \d\] together"
    ):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in weights(drafter).items())
    assert steps_saved(tmp_path) == []


def test_skipping_ends_when_the_weights_are_at_fault(tmp_path, target, rows):
    drafter = make_drafter("eagle3", target)
    trainer = make_trainer("sft", tmp_path, drafter, target, rows, on_nonfinite="skip", max_skipped_updates=1)
    drafter.fc.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match="1 updates in a row were skipped before it.*weights are at fault"):
        trainer.train()


def test_weights_that_are_not_finite_are_never_written(tmp_path, target, rows):
    drafter = make_drafter("dflash", target)
    trainer = make_trainer("sft", tmp_path, drafter, target, rows, max_steps=1)
    trainer.train()
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    with torch.no_grad():
        drafter.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="1 of the drafter's .* not finite, 'norm.weight' first"):
        trainer.save_model()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_weights_that_are_not_finite_is_not_written_and_the_one_before_stays(
    tmp_path, target, rows, kind
):
    drafter = make_drafter("dflash", target)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    drafter.norm.weight[0] = float("inf")

    trainer = make_trainer(kind, tmp_path, drafter, target, rows)
    trainer.add_callback(Spoil())
    with pytest.raises(FloatingPointError, match="1 of the drafter's .* not finite, 'norm.weight' first"):
        trainer.train()
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"_responses"} == {"checkpoint-1"}
    assert read_checkpoint(tmp_path / "out" / "checkpoint-1").is_resumable


def test_settings_of_the_guard_out_of_range_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`on_nonfinite` must be one of \('stop', 'skip'\), got 'ignore'"):
        DraftSFTConfig(str(tmp_path), use_cpu=True, bf16=False, on_nonfinite="ignore")
    with pytest.raises(ValueError, match="`max_skipped_updates` must be at least 0, got -1"):
        DraftSFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_skipped_updates=-1)


class Float16Accelerator(Accelerator):
    """What the guard asks of an accelerator, as it is on a GPU under float16."""

    mixed_precision = "fp16"


def test_a_loss_that_is_not_finite_is_no_overflow_of_float16s_scale():
    guard = NonFiniteGuard(Float16Accelerator(cpu=True), "stop", 10)
    event = (None, TrainerState(global_step=7), TrainerControl())
    guard.on_step_begin(*event)
    guard.note_loss(torch.tensor(1.0), [0])
    guard.on_pre_optimizer_step(*event)  # whatever the scaled gradients are, that is the scale's business
    guard.note_loss(torch.tensor(float("inf")), [3])
    with pytest.raises(FloatingPointError, match=r"loss is inf at step 7 on samples \[3\]"):
        guard.on_pre_optimizer_step(*event)
