# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Muon beside AdamW: which parameters each trains, that each does what torch's own does, and what is refused.
"""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from test_resume import differing, train

from helpers.oracle import greedy_rows
from helpers.tiny import FAMILIES, TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.runs.distributed.sharding import full_optimizer_state, load_full_optimizer_state
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


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_of_layers_are_muons_and_heads_norms_and_biases_are_not(target, family):
    drafter = make_drafter(family, target)
    names = dict(drafter.named_parameters())
    matrices = {name for name, parameter in names.items() if is_matrix(drafter, name, parameter)}
    heads = {
        "dflash2": {f"candidate_selector.{side}_codebook" for side in ("predecessor", "successor")},
        "dspark": {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"},
        "eagle3": {"lm_head.weight"},
    }
    of_heads = heads.get(family, set()) | {"confidence_head.proj.weight"}
    assert heads.get(family, set()) <= names.keys()
    endings = ("fc.weight", "proj.weight", "projection.weight")
    assert matrices == {name for name in names if name.endswith(endings)} - of_heads


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rate,own_rate", [(None, 3e-2), (3e-2, None)])
def test_a_checkpoint_is_not_gone_on_with_across_adamw_and_muon(tmp_path, target, rows, family, rate, own_rate):
    def trainer(folder, rate, **changes):
        options = {"muon_learning_rate": rate, "save_strategy": "steps", "save_steps": 1} | changes
        return make_trainer(tmp_path / folder, target, rows, make_drafter(family, target), **options)

    first = trainer("first", rate, max_steps=1)
    first.train()
    start, other = tmp_path / "first" / "checkpoint-1", trainer("other", own_rate, ignore_data_skip=True)
    fix = r"Set it to 0.03, or start" if rate else "Leave it out, or start"
    with pytest.raises(ValueError, match=f"`muon_learning_rate` is {rate} there, {own_rate} here. {fix}"):
        other.train(resume_from_checkpoint=start)
    # The state itself is refused too, whatever the settings say.
    state = full_optimizer_state(first.accelerator, first.model, first.optimizer)
    weights = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"[Pp]arameter group.*`muon_learning_rate`"):
        load_full_optimizer_state(other.accelerator, other.model, other.create_optimizer(), state)
    assert not other.optimizer.state
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.model.state_dict().items())


def test_groups_of_muon_and_adamw_are_told_apart_where_they_hold_the_same(target):
    accelerator, drafter = Accelerator(cpu=True), make_drafter("dflash", target)
    norms = [parameter for parameter in drafter.parameters() if parameter.dim() == 1]
    matrices = [parameter for parameter in drafter.parameters() if parameter.dim() == 2]
    adamw = torch.optim.AdamW([{"params": norms}, {"params": matrices}])
    muon = MuonWithAdamW(matrices, 1e-2, 0.0, [{"params": norms}], {"lr": 1e-2})
    for first, second, kinds in ((adamw, muon, "not Muon's .* Muon's"), (muon, adamw, "Muon's .* not Muon's")):
        state = full_optimizer_state(accelerator, drafter, first)
        with pytest.raises(ValueError, match=f"Parameter group 1 is {kinds} in this optimizer"):
            load_full_optimizer_state(accelerator, drafter, second, state)


def test_changed_rates_are_told_as_kept_and_they_are(tmp_path, target, rows, caplog):
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    make_trainer(tmp_path / "first", target, rows, max_steps=1, **options).train()
    changed = {"learning_rate": 2e-2, "muon_learning_rate": 5e-2, "weight_decay": 0.3, "adam_beta2": 0.9}
    other = make_trainer(tmp_path / "other", target, rows, **options | changed | {"adam_epsilon": 1e-7})
    other.train(resume_from_checkpoint=tmp_path / "first" / "checkpoint-1")
    groups = other.optimizer.param_groups
    assert {group["lr"] for group in groups} == {1e-2, 3e-2}
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert {group.get("betas", (0.9, 0.999)) for group in groups} == {(0.9, 0.999)}
    assert {group["eps"] for group in groups if "betas" in group} == {1e-8}
    for name, there in {"learning_rate": 0.01, "muon_learning_rate": 0.03, "weight_decay": 0.0}.items():
        assert f"{name}: {there} there, {changed[name]} here (the checkpoint's is kept)" in caplog.text
    for name in ("adam_beta2: 0.999 there, 0.9", "adam_epsilon: 1e-08 there, 1e-07"):
        assert f"{name} here (the checkpoint's is kept)" in caplog.text
    assert "max_steps: 1 there, 2 here;" in caplog.text
    assert "under other settings; but for those that are kept, the run will differ" in caplog.text


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
