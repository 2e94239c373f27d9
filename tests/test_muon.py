# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Muon beside AdamW: which parameters each trains, that each does what torch's own does, and what is refused.
"""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from test_resume import differing, train

from helpers.oracle import greedy_rows
from helpers.tiny import TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.trainer.muon import MuonWithAdamW, check_muon, is_matrix


RATES = {"learning_rate": 1e-2, "muon_learning_rate": 3e-2}


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    return greedy_rows(target, 12, 10)


def make_trainer(tmp_path, target, rows, drafter=None, peft_config=None, **changes):
    args = DraftSFTConfig(str(tmp_path), **TINY_RUN | RATES | {"max_steps": 2, "save_strategy": "no"} | changes)
    return DraftSFTTrainer(drafter or make_drafter("eagle3", target), target, args, rows, peft_config=peft_config)


@pytest.mark.parametrize("family", ["eagle3", "dflash"])
def test_matrices_of_layers_are_muons_and_heads_norms_and_biases_are_not(target, family):
    names = dict(make_drafter(family, target).named_parameters())
    matrices = {name for name, parameter in names.items() if is_matrix(name, parameter)}
    assert all(name.endswith("proj.weight") or name == "fc.weight" for name in matrices)
    assert {name for name in names if name.endswith("proj.weight")} <= matrices
    assert "lm_head.weight" not in matrices and ("lm_head.weight" in names) == (family == "eagle3")


def test_every_parameter_has_its_own_optimizer_rate_and_decay(tmp_path, target, rows):
    trainer = make_trainer(tmp_path, target, rows, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    by_name = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert by_name.keys() == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert by_name["fc.weight"]["lr"] == 3e-2 and by_name["fc.weight"]["weight_decay"] == 0.1
    assert by_name["lm_head.weight"]["lr"] == 1e-2 and by_name["lm_head.weight"]["weight_decay"] == 0.1
    assert by_name["norm.weight"]["lr"] == 1e-2 and by_name["norm.weight"]["weight_decay"] == 0.0


def test_each_part_steps_as_torchs_own_optimizer_does_also_after_a_state_was_loaded():
    def parameters():
        torch.manual_seed(0)
        return torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(6))

    def feed(values, seed):
        generator = torch.Generator().manual_seed(seed)
        for value in values:
            value.grad = torch.randn(value.shape, generator=generator)

    (matrix, vector), (own_matrix, own_vector) = parameters(), parameters()
    adamw = {"lr": 1e-2, "weight_decay": 0.0}
    both = MuonWithAdamW([own_matrix], 2e-2, 0.1, [{"params": [own_vector]}], adamw)
    muon = torch.optim.Muon([matrix], lr=2e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    alone = torch.optim.AdamW([vector], **adamw)
    for step in range(3):
        if step == 2:
            stored = both.state_dict()
            both = MuonWithAdamW([own_matrix], 9.0, 0.0, [{"params": [own_vector]}], {"lr": 9.0})
            both.load_state_dict(stored)
        feed((matrix, vector), step)
        feed((own_matrix, own_vector), step)
        for optimizer in (muon, alone, both):
            optimizer.step()
        assert torch.equal(matrix, own_matrix) and torch.equal(vector, own_vector)
    assert both.state[own_matrix].keys() == {"momentum_buffer"}


def test_one_schedule_scales_both_rates_and_the_logged_one_is_adamws(tmp_path, target, rows):
    trainer = make_trainer(tmp_path, target, rows, logging_steps=1, lr_scheduler_type="linear", warmup_steps=0)
    trainer.train()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0}, "the schedule has come to its end for both"
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([1e-2, 5e-3])


def test_a_run_with_muon_goes_on_bit_for_bit(tmp_path, target, rows):
    options = {"muon_learning_rate": 2e-2, "weight_decay": 0.1}
    whole = train(tmp_path / "whole", "sft", target, rows, **options)
    start = tmp_path / "whole" / "checkpoint-2"
    resumed = train(tmp_path / "resumed", "sft", target, rows, resume=start, seed=9, **options)
    assert differing(whole, resumed) == []
    without = train(tmp_path / "without", "sft", target, rows, weight_decay=0.1)
    assert "model.safetensors" in differing(whole, without)


def test_what_muon_cannot_train_is_refused_with_the_reason(tmp_path, target, rows, monkeypatch):
    make_drafter("eagle3", target).save_pretrained(tmp_path / "drafter")
    with pytest.raises(ValueError, match="an adapter is trained"):
        make_trainer(tmp_path, target, rows, tmp_path / "drafter", LoraConfig())
    args = SimpleNamespace(muon_learning_rate=1e-3)
    zero = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=object()))
    drafter = make_drafter("dflash", target)
    with pytest.raises(ValueError, match="ZeRO lays parameters end to end"):
        check_muon(args, zero, drafter, None)
    with pytest.raises(ValueError, match="optimizer of its own"):
        check_muon(args, zero, drafter, torch.optim.SGD(drafter.parameters()))
    with pytest.raises(ValueError, match="`optim='sgd'` asks for another"):
        DraftSFTConfig(str(tmp_path), **TINY_RUN | RATES | {"optim": "sgd"})
    with pytest.raises(ValueError, match="must be above 0"):
        DraftSFTConfig(str(tmp_path), **TINY_RUN | {"muon_learning_rate": 0.0})
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="Install torch 2.9 or newer"):
        DraftSFTConfig(str(tmp_path), **TINY_RUN | RATES)
