# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A run that has come to its end stays as it is, however often it is started again, unless more steps are asked for.
"""

from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from helpers.oracle import greedy_rows
from helpers.tiny import TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer


# Three steps of two an epoch: no end of an epoch.
END = 3


class Steps(TrainerCallback):
    """Notes every step that is begun and every evaluation, and ends training after a step or when an epoch ends."""

    def __init__(self, stop_after=None, at_epoch_end=False):
        self.begun, self.evaluated = [], []
        self.stop_after, self.at_epoch_end = stop_after, at_epoch_end

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun.append(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_after and not self.at_epoch_end:
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_after and self.at_epoch_end:
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(state.global_step)


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    return greedy_rows(target, 8, 10)


def start(folder, target, rows, *callbacks, kind="sft", resume="auto", stream=False, **changes):
    """Run one command that begins or goes on; return its trainer and the steps it made."""
    options = {
        "output_dir": str(folder / "out"),
        **TINY_RUN,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_completion_length": 10,
        "max_steps": END,
        "eval_rollouts": False,
    }
    if kind == "opd" or changes.get("regenerate"):
        options["responses"] = str(folder / "responses")
    trainer_class, config = (DraftSFTTrainer, DraftSFTConfig) if kind == "sft" else (DraftOPDTrainer, DraftOPDConfig)
    args = config(**options | changes)
    steps, drafter = Steps(), make_drafter("dflash", target, seed=1)
    held_out = rows.select(range(2)) if args.eval_strategy != "no" or args.eval_on_start else None
    data = rows.to_iterable_dataset() if stream else rows
    trainer = trainer_class(drafter, target, args, data, held_out, callbacks=[steps, *callbacks])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, steps


def files(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder, "out").rglob("*")) if path.is_file()}


def steps_saved(folder):
    return sorted(int(path.name.split("-")[1]) for path in Path(folder, "out").glob("checkpoint-*"))


def check_stays(folder, first, *started):
    """Check that starting a run again, as `started` says, finds it complete, with the weights of its end."""
    before, weights = files(folder), {name: t.clone() for name, t in first.model.state_dict().items()}
    trainer, steps = started
    assert (steps.begun, steps.evaluated) == ([], [])
    assert trainer.state.global_step == first.state.global_step
    assert files(folder) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())


ENDS = {
    "max_steps": {},
    "epochs": {"max_steps": -1, "num_train_epochs": 1.5},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "stream": {"stream": True},
    "replay": {"kind": "opd"},
    "live": {"kind": "opd", "rollout": "live", "responses": None},
    "limit": {"save_total_limit": 1},
    "epoch_saves": {"save_strategy": "epoch"},
    "evaluated_first": {"eval_on_start": True},
}


@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_ended_in_the_middle_of_an_epoch_is_not_trained_further(tmp_path, caplog, target, rows, end):
    first, steps = start(tmp_path, target, rows, **ENDS[end])
    assert steps.begun == [0, 1, 2] and steps_saved(tmp_path)[-1] == END
    for resume in ("auto", True, tmp_path / "out" / f"checkpoint-{END}"):
        caplog.clear()
        check_stays(tmp_path, first, *start(tmp_path, target, rows, resume=resume, **ENDS[end]))
        assert "This run is complete, so nothing is trained: it ended after step 3. To train further," in caplog.text


def test_a_complete_run_goes_on_when_more_steps_are_asked_for(tmp_path, target, rows):
    start(tmp_path, target, rows)
    trainer, steps = start(tmp_path, target, rows, max_steps=5)
    assert steps.begun == [3, 4] and trainer.state.global_step == 5
    assert steps_saved(tmp_path) == [1, 2, 3, 4, 5]


def test_fewer_steps_than_were_made_leave_a_run_as_it_is(tmp_path, target, rows):
    first, _ = start(tmp_path, target, rows)
    check_stays(tmp_path, first, *start(tmp_path, target, rows, max_steps=2))


@pytest.mark.parametrize("at_epoch_end", [False, True])
@pytest.mark.parametrize("saves", ["steps", "no step", "epoch"])
def test_a_run_that_a_callback_ended_is_complete(tmp_path, caplog, target, rows, saves, at_epoch_end):
    strategy = {"steps": {}, "no step": {"save_steps": 100}, "epoch": {"save_strategy": "epoch"}}[saves]
    settings = {"max_steps": 9} | strategy
    first, steps = start(tmp_path, target, rows, Steps(2, at_epoch_end), **settings)
    assert steps.begun == [0, 1] and steps_saved(tmp_path)[-1] == 2
    check_stays(tmp_path, first, *start(tmp_path, target, rows, **settings))
    assert "it ended after step 2 of 9, at the word of a callback" in caplog.text
    _, steps = start(tmp_path, target, rows, **settings | {"max_steps": 10})
    assert steps.begun == list(range(2, 10))


def test_early_stopping_with_the_best_weights_and_one_checkpoint_stays_ended(tmp_path, target, rows):
    best = {
        "max_steps": 9,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        # Of every evaluation but the first nothing is better, so that the last step is not the best.
        "learning_rate": 30.0,
        "save_total_limit": 1,
    }
    first, steps = start(tmp_path, target, rows, EarlyStoppingCallback(2), **best)
    assert steps.begun == [0, 1, 2] and first.state.best_global_step == 1
    assert steps_saved(tmp_path) == [1, 3], "the best, and the end"
    check_stays(tmp_path, first, *start(tmp_path, target, rows, EarlyStoppingCallback(2), **best))


def test_the_last_step_is_saved_where_only_better_ones_are(tmp_path, target, rows):
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    first, _ = start(tmp_path, target, rows, learning_rate=30.0, **best)
    assert first.state.best_global_step == 1 and steps_saved(tmp_path) == [1, END]
    check_stays(tmp_path, first, *start(tmp_path, target, rows, learning_rate=30.0, **best))


def test_the_best_weights_that_are_gone_are_said_to_be(tmp_path, caplog, target, rows):
    best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss", "learning_rate": 30.0}
    start(tmp_path, target, rows, load_best_model_at_end=True, **best)
    (tmp_path / "out" / "checkpoint-1").rename(tmp_path / "elsewhere")
    start(tmp_path, target, rows, load_best_model_at_end=True, **best)
    assert "The best weights, of step 1, are not here: their checkpoint is gone. The last stay." in caplog.text
