# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The arms that search for a gain on a real model, in miniature: a drafter with a reduced vocabulary."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from benchmarks.lab import trainers as trainers_module
from benchmarks.lab.__main__ import diagnose
from benchmarks.lab.arms import make_trainer
from benchmarks.lab.plan import Arm, SftPlan, read_arms
from benchmarks.lab.trainers import AverageCallback
from benchmarks.lab.workbench import Machine, Workbench
from helpers.tiny import VOCAB, make_drafter
from helpers.tiny_lab import make_eagle3_pair, write_shared
from trl_draft_opd import build_draft_vocabulary


pytestmark = pytest.mark.lab

SEARCH_TIER = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Workbench:
    """Return a workbench of a tiny target and a few prompts."""
    folder = tmp_path_factory.mktemp("search")
    write_shared(folder, 8)
    pair = make_eagle3_pair(
        name="search",
        num_tests=2,
        sft=SftPlan({}, 1, 1, 1, 1),
        budgets={SEARCH_TIER: 1.0},
        seeds={SEARCH_TIER: 1},
        common={"learning_rate": 3e-4, "muon_learning_rate": 3e-3},
        opd={"rejected_scope": "suffix"},
        continued_sft={"num_anchors": 4},
    )
    return Workbench(pair, Machine(folder, Path(folder / "out"), "cpu", "float32", 10**7, 8, None, False))


def test_every_arm_in_search_of_the_gain_trains_a_drafter_with_a_reduced_vocabulary(bench, tmp_path):
    arms = read_arms(bench.pair, SEARCH_TIER)
    assert len(arms) > 12
    rows, vocabulary = bench.training_rows(), build_draft_vocabulary(torch.arange(VOCAB), VOCAB // 2)
    for arm in arms:
        drafter = make_drafter("eagle3", bench.target, draft_vocabulary=vocabulary)
        before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
        options = {"max_steps": 2, "save_strategy": "no", "warmup_steps": 0, "logging_steps": 1}
        trainer = make_trainer(bench, arm, drafter, rows, tmp_path / arm.name, 0, **options)
        trainer.train()
        assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row), arm.name
        assert any(not torch.equal(before[name], now) for name, now in trainer.model.state_dict().items()), arm.name


def test_the_diagnosis_of_drafters_is_printed_written_and_drawn(bench, tmp_path, capsys):
    for name in ("first", "second"):
        make_drafter("eagle3", bench.target).save_pretrained(tmp_path / name)
    args = argparse.Namespace(of=[tmp_path / "first", tmp_path / "second"], prompts=2, out=tmp_path)
    diagnose(bench, args)
    printed = capsys.readouterr().out
    assert "## first" in printed and "## second" in printed and "| always right | 5.000" in printed
    found = json.loads((tmp_path / "diagnosis-search-words.json").read_text(encoding="utf-8"))
    assert found["first"] == found["second"] and found["first"]["mismatch"]
    assert (tmp_path / "diagnosis-search-words.png").exists() and (tmp_path / "diagnosis-search-trained.json").exists()


def one_step(bench, arm, folder, **settings):
    """Return a trainer of an arm that has taken one step without moving, and its log."""
    options = {"max_steps": 1, "save_strategy": "no", "learning_rate": 0.0, "logging_steps": 1} | settings
    drafter = make_drafter("eagle3", bench.target)
    trainer = make_trainer(bench, arm, drafter, bench.training_rows(), folder, 0, **options)
    batches = []
    inner = trainer._step_loss
    trainer._step_loss = lambda drafter, target, batch, objective: (
        batches.append(batch) or inner(drafter, target, batch, objective)
    )
    trainer.train()
    return batches[0], trainer.state.log_history[0]["loss"]


def test_a_target_sharpened_to_its_argmax_is_cross_entropy_and_at_its_own_temperature_nothing_changes(bench, tmp_path):
    losses = {}
    for name, fields in {
        "kl": {},
        "same": {"sharpen": 1.0},
        "sharp": {"sharpen": 1e-3},
        "ce": {"settings": {"accepted_loss": "ce"}},
    }.items():
        losses[name] = one_step(bench, Arm(name=name, tiers=(6,), trainer="sft", **fields), tmp_path)[1]
    assert losses["same"] == losses["kl"] != losses["ce"]
    assert losses["sharp"] == pytest.approx(losses["ce"], rel=1e-4)


def test_dense_anchors_are_all_positions_that_have_a_token_behind_them(bench, tmp_path):
    arm = Arm(name="a", tiers=(6,), trainer="dense", settings={"rejected_scope": "first"})
    batch, _ = one_step(bench, arm, tmp_path)
    num_anchors = (batch.blocks.anchors >= 0).sum(dim=1)
    assert num_anchors.tolist() == (batch.text.completion_mask.sum(dim=1) - 1).tolist()
    assert batch.blocks.is_rejected.sum() > 0 and batch.blocks.is_accepted.sum() >= 0


def test_hard_anchors_come_twice(bench, tmp_path):
    settings = {"rejected_scope": "first"}
    plain, _ = one_step(bench, Arm(name="a", tiers=(6,), trainer="opd", settings=settings), tmp_path)
    hard, _ = one_step(bench, Arm(name="b", tiers=(6,), trainer="hard", settings=settings), tmp_path)
    first_slot = int(plain.blocks.is_rejected[..., 0].sum())
    assert int(hard.blocks.is_rejected.sum()) == int(plain.blocks.is_rejected.sum()) + first_slot
    assert first_slot > 0


def test_only_errors_at_which_the_target_is_confident_are_kept(bench, tmp_path, monkeypatch):
    settings = {"rejected_scope": "first"}
    plain, _ = one_step(bench, Arm(name="a", tiers=(6,), trainer="opd", settings=settings), tmp_path)
    reading = bench.target.read_text(plain.text.input_ids, plain.text.attention_mask, [1, 3, 5]).padded()
    top_prob = bench.target.project(reading.last_hidden).softmax(dim=-1).amax(dim=-1)
    rows, blocks, slots = plain.blocks.is_rejected.nonzero(as_tuple=True)
    probs = top_prob[rows, plain.blocks.anchors[rows, blocks] + slots]
    # Between two of them, so that some are kept and some are not.
    least = float(probs.median())
    monkeypatch.setattr(trainers_module, "LEAST_CONFIDENCE", least)
    kept, _ = one_step(bench, Arm(name="b", tiers=(6,), trainer="confident", settings=settings), tmp_path)
    expected = (probs >= least).sum()
    assert 0 < int(expected) < len(probs)
    assert int(kept.blocks.is_rejected.sum()) == int(expected)


def test_a_killed_arm_goes_on_with_its_average(bench, tmp_path):
    arm = Arm(name="a", tiers=(6,), trainer="sft", average=0.5, settings={"learning_rate": 1e-2})

    def train(folder, dies_at=None, resume=None):
        drafter = make_drafter("eagle3", bench.target)
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        made = make_trainer(bench, arm, drafter, bench.training_rows(), folder, 0, **options)
        made.add_callback(DieAt(dies_at))
        made.train(resume_from_checkpoint=resume)
        return made

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", dies_at=3)
    killed = train(tmp_path / "killed", resume=str(tmp_path / "killed" / "checkpoint-2"))
    last = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    for name, weight in whole.model.named_parameters():
        torch.testing.assert_close(killed.model.get_parameter(name), weight, rtol=0, atol=0, msg=name)
    assert any(not torch.equal(last[name], weight) for name, weight in whole.model.named_parameters())


class DieAt(TrainerCallback):
    """Kills training at a step."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_an_average_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    averaging, state = AverageCallback(0.75), TrainerState()
    torch.nn.init.constant_(model.weight, 4.0)
    averaging.on_train_begin(None, state, None, model=model)
    torch.nn.init.constant_(model.weight, 8.0)
    averaging.on_step_end(None, state, None, model=model)
    averaging.on_train_end(None, state, None, model=model)
    assert model.weight.item() == 5.0
