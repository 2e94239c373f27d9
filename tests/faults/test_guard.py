# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Fault 29: no loss and no gradient that is not finite makes an update, no weight that is not finite trains on or is
written; the samples are named, the update stopped or skipped.
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


def spoil_once(value, at):
    """Return a hook that puts a value into one element of a gradient, the `at`-th time it is called."""
    calls = []

    def hook(grad):
        calls.append(grad)
        grad = grad.clone()
        if len(calls) in at:
            grad.view(-1)[-1] = value
        return grad

    return hook


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_one_bad_element_of_one_gradient_is_caught_under_default_clipping(
    tmp_path, target, rows, value, which, on_nonfinite
):
    # Clipping by an infinite norm makes zeros of all the others.
    drafter = make_drafter("eagle3", target)
    changes = {"on_nonfinite": on_nonfinite, "max_steps": 1, "gradient_accumulation_steps": 1}
    trainer = make_trainer("sft", tmp_path, drafter, target, rows, **changes)
    assert trainer.args.max_grad_norm == 1.0
    before = weights(drafter)
    trained = [parameter for parameter in drafter.parameters() if parameter.requires_grad]
    trained[which].register_hook(spoil_once(value, {1}))
    if on_nonfinite == "stop":
        with pytest.raises(FloatingPointError, match=r"The gradient is not finite at step 0, .*Nothing was updated"):
            trainer.train()
    else:
        trainer.train()
        assert trainer._guard.num_skipped == 1
    assert all(torch.equal(before[name], value) for name, value in weights(drafter).items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_though_every_gradient_is(monkeypatch, tmp_path, target, rows, kind):
    drafter = make_drafter("dflash", target)
    trainer = make_trainer(kind, tmp_path, drafter, target, rows)
    before, honest = weights(drafter), trainer._step_loss

    def step_loss(*args):
        result = honest(*args)
        return result._replace(loss=result.loss + float("inf"))

    monkeypatch.setattr(trainer, "_step_loss", step_loss)
    with pytest.raises(FloatingPointError, match=r"The loss is inf at step 0 on samples \[\d, \d\].*Nothing was"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in weights(drafter).items())


@pytest.mark.parametrize(
    ("bad_steps", "limit", "ends_at"),
    [((1, 2, 4, 5), 2, None), ((1, 2, 3), 2, 2), ((2, 3), 1, 2), ((1,), 0, 0), ((1, 3, 5), 1, None)],
)
def test_updates_are_counted_in_a_row_and_one_that_is_made_starts_the_count_anew(
    tmp_path, target, rows, bad_steps, limit, ends_at
):
    drafter = make_drafter("eagle3", target)
    changes = {"on_nonfinite": "skip", "max_skipped_updates": limit, "max_steps": 5, "gradient_accumulation_steps": 1}
    trainer = make_trainer("sft", tmp_path, drafter, target, rows, **changes)
    drafter.fc.weight.register_hook(spoil_once(float("nan"), bad_steps))
    if ends_at is None:
        trainer.train()
        assert trainer._guard.num_skipped == len(bad_steps)
    else:
        with pytest.raises(FloatingPointError, match=f"at step {ends_at}, .* {limit} updates in a row were skipped"):
            trainer.train()
        assert trainer.state.global_step == ends_at


def test_the_count_in_a_row_goes_on_when_a_run_is_resumed(tmp_path, target, rows):
    changes = {"on_nonfinite": "skip", "max_skipped_updates": 2, "gradient_accumulation_steps": 1}

    def run(max_steps, resume):
        drafter = make_drafter("eagle3", target)
        drafter.fc.weight.register_hook(lambda grad: grad * float("nan"))
        make_trainer("sft", tmp_path, drafter, target, rows, max_steps=max_steps, **changes).train(resume)

    run(2, None)
    with pytest.raises(FloatingPointError, match="at step 2, .* 2 updates in a row were skipped before it"):
        run(5, True)


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_an_update_that_leaves_weights_not_finite_ends_the_run_before_a_checkpoint(
    tmp_path, target, rows, on_nonfinite
):
    drafter = make_drafter("eagle3", target)
    changes = {"on_nonfinite": on_nonfinite, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 1}
    trainer = make_trainer("sft", tmp_path, drafter, target, rows, **changes)

    def overflow(grad):
        # Of the second step, as a schedule that went wrong would.
        if trainer.state.global_step == 1:
            trainer.optimizer.param_groups[0]["lr"] = 3e38
            trainer.optimizer.param_groups[0]["weight_decay"] = 1e3
        return grad

    drafter.fc.weight.register_hook(overflow)
    with pytest.raises(
        FloatingPointError,
        match=r"The update of step 1 left weights that.*samples were \[\d\].*Nothing of it was written",
    ):
        trainer.train()
    assert not all(value.isfinite().all() for value in weights(drafter).values())
    assert steps_saved(tmp_path) == [1]


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
    optimizer_step_was_skipped = False


class Float16Run:
    """Steps of one weight under float16's loss scale, in the order in which the trainer makes them."""

    def __init__(self, on_nonfinite="stop", max_skipped_updates=10, scale=2.0**16):
        self.accelerator = Float16Accelerator(cpu=True)
        self.scaler = self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)
        self.guard = NonFiniteGuard(self.accelerator, on_nonfinite, max_skipped_updates)
        self.guard.on_train_begin(None, None, None, optimizer=self.optimizer)
        self.num_steps = 0

    def step(self, loss=1.0, gradient=1.0):
        event = (None, TrainerState(global_step=self.num_steps), TrainerControl())
        self.guard.on_step_begin(*event)
        self.guard.note_loss(torch.tensor(loss), [self.num_steps])
        scaled = self.scaler.scale((self.weight * gradient).sum())
        scaled.backward()
        self.guard.on_pre_optimizer_step(*event)
        self.scaler.step(self.optimizer)
        before = self.scaler.get_scale()
        self.scaler.update()
        self.accelerator.optimizer_step_was_skipped = self.scaler.get_scale() < before
        self.guard.on_optimizer_step(*event)
        self.optimizer.zero_grad()
        self.num_steps += 1


def test_an_overflow_that_lowers_float16s_scale_is_no_fault():
    run = Float16Run()
    for gradient in (float("inf"), float("nan"), 1.0):
        run.step(gradient=gradient)
    assert (run.guard.num_skipped, run.scaler.get_scale()) == (0, 2.0**14)
    assert not torch.equal(run.weight, torch.ones(2)) and run.weight.isfinite().all()


def test_gradients_that_overflow_at_every_scale_of_float16_end_the_run():
    run = Float16Run(scale=4.0)
    for _ in range(2):
        run.step(gradient=float("nan"))
    with pytest.raises(FloatingPointError, match="The gradient is not finite at step 2, on samples .2. together"):
        run.step(gradient=float("nan"))
    skipping = Float16Run("skip", 1, scale=1.0)
    skipping.step(gradient=float("inf"))
    with pytest.raises(FloatingPointError, match="at step 1, .* 1 updates in a row were skipped before it"):
        skipping.step(gradient=float("inf"))
    assert torch.equal(skipping.weight, torch.ones(2))


@pytest.mark.parametrize("gradient", [1.0, float("inf")])
def test_a_bad_loss_under_float16_is_counted_once_and_changes_nothing(gradient):
    run = Float16Run("skip")
    run.step(loss=float("nan"), gradient=gradient)
    assert (run.guard.num_skipped, run.guard.num_in_a_row) == (1, 1)
    assert torch.equal(run.weight, torch.ones(2))
    run.step()
    assert (run.guard.num_skipped, run.guard.num_in_a_row) == (1, 0)
    assert not torch.equal(run.weight, torch.ones(2))


def test_a_bad_loss_under_float16_stops_with_its_samples():
    run = Float16Run()
    run.step()
    with pytest.raises(FloatingPointError, match=r"loss is inf at step 1 on samples \[1\].*Nothing was updated"):
        run.step(loss=float("inf"))
