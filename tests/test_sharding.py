# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Weights and optimizer state by name: what is saved of one run and loaded into another makes the two go on alike, to the
bit.
"""

import json

import pytest
import torch
from accelerate import Accelerator

from helpers.tiny import make_drafter, make_target
from trl_draft_opd import build_draft_vocabulary
from trl_draft_opd.runs.distributed.sharding import (
    OptimizerState,
    full_optimizer_state,
    full_weights,
    load_full_optimizer_state,
    load_full_weights,
    whole_drafter,
)


FROZEN = "midlayer.mlp.up_proj.weight"
OPTIMIZERS = {
    "adamw": (lambda groups: torch.optim.AdamW(groups, lr=1e-2), {"step", "exp_avg", "exp_avg_sq"}),
    "adamw with a tensor as rate": (
        lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2), foreach=False),
        {"step", "exp_avg", "exp_avg_sq"},
    ),
    "sgd": (lambda groups: torch.optim.SGD(groups, lr=1e-2), set()),
    "momentum": (lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9), {"momentum_buffer"}),
    # State of other shapes than the parameter's.
    "adafactor": (lambda groups: torch.optim.Adafactor(groups, lr=1e-2), {"step", "row_var", "col_var", "variance"}),
}


def _pair(kind: str, seed: int):
    """Return a drafter with buffers and a frozen parameter, and its optimizer over two groups."""
    target = make_target()
    vocabulary = build_draft_vocabulary(torch.arange(target.vocab_size), 48)
    drafter = make_drafter("eagle3", target, seed, draft_vocabulary=vocabulary)
    drafter.get_parameter(FROZEN).requires_grad_(False)
    trained = [parameter for parameter in drafter.parameters() if parameter.requires_grad]
    groups = [{"params": trained[:3], "weight_decay": 0.1}, {"params": trained[3:]}]
    return drafter, OPTIMIZERS[kind][0](groups)


def _step(drafter, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in drafter.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_loaded_weights_and_state_go_on_to_the_same_bits(kind):
    accelerator = Accelerator(cpu=True)
    drafter, optimizer = accelerator.prepare(*_pair(kind, seed=1))
    for seed in range(2):
        _step(drafter, optimizer, seed)
    optimizer.param_groups[0]["lr"] /= 2
    weights = full_weights(accelerator, drafter)
    state = full_optimizer_state(accelerator, drafter, optimizer)
    assert {path.split("/")[0] for path in state.tensors} == OPTIMIZERS[kind][1]
    assert not any(FROZEN in path for path in state.tensors)
    on_disk = OptimizerState(state.tensors, json.loads(json.dumps(state.values)))
    other, other_optimizer = _pair(kind, seed=2)
    load_full_weights(accelerator, other, weights)
    load_full_optimizer_state(accelerator, other, other_optimizer, on_disk)
    for seed in range(2, 4):
        _step(drafter, optimizer, seed)
        _step(other, other_optimizer, seed)
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_state_without_its_counters_is_noticed():
    # What the test above would show if a part were lost.
    accelerator = Accelerator(cpu=True)
    drafter, optimizer = _pair("adamw", seed=1)
    _step(drafter, optimizer, 0)
    state = full_optimizer_state(accelerator, drafter, optimizer)
    for path in [path for path in state.tensors if path.startswith("step/")]:
        state.tensors[path] = torch.tensor(9.0)
    other, other_optimizer = _pair("adamw", seed=1)
    load_full_weights(accelerator, other, full_weights(accelerator, drafter))
    load_full_optimizer_state(accelerator, other, other_optimizer, state)
    _step(drafter, optimizer, 1)
    _step(other, other_optimizer, 1)
    assert not torch.equal(drafter.fc.weight, other.fc.weight)


def test_full_weights_are_copies_with_the_buffers():
    accelerator = Accelerator(cpu=True)
    drafter, _ = _pair("sgd", seed=1)
    weights = full_weights(accelerator, drafter)
    assert weights.keys() == drafter.state_dict().keys() and weights["d2t"].dtype == torch.int64
    before = weights["fc.weight"].clone()
    with torch.no_grad():
        drafter.fc.weight.add_(1.0)
    assert torch.equal(weights["fc.weight"], before)


def test_weights_of_another_drafter_are_refused_by_name():
    accelerator = Accelerator(cpu=True)
    drafter, _ = _pair("sgd", seed=1)
    weights = full_weights(accelerator, drafter)
    weights["fc.weight"] = weights["fc.weight"][:-1]
    with pytest.raises(ValueError, match=r"fc\.weight"):
        load_full_weights(accelerator, drafter, weights)


def test_state_of_other_parameters_or_groups_is_refused():
    accelerator = Accelerator(cpu=True)
    drafter, optimizer = _pair("adamw", seed=1)
    _step(drafter, optimizer, 0)
    state = full_optimizer_state(accelerator, drafter, optimizer)
    one_group = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="2 parameter groups, this optimizer 1"):
        load_full_optimizer_state(accelerator, drafter, one_group, state)
    state.tensors["exp_avg/elsewhere.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"elsewhere\.weight"):
        load_full_optimizer_state(accelerator, drafter, optimizer, state)


def test_groups_of_the_same_number_and_other_parameters_are_refused():
    accelerator = Accelerator(cpu=True)
    drafter, optimizer = _pair("adamw", seed=1)
    _step(drafter, optimizer, 0)
    state = full_optimizer_state(accelerator, drafter, optimizer)
    trained = [parameter for parameter in drafter.parameters() if parameter.requires_grad]
    other = torch.optim.AdamW([{"params": trained[3:]}, {"params": trained[:3]}])
    before = other.state_dict()
    with pytest.raises(ValueError, match=r"Parameter group 0 holds other parameters .*fc\.weight.*`optim`"):
        load_full_optimizer_state(accelerator, drafter, other, state)
    assert other.state_dict() == before


def test_a_plain_drafter_is_whole_as_it_stands():
    accelerator = Accelerator(cpu=True)
    drafter, _ = _pair("sgd", seed=1)
    with whole_drafter(accelerator, drafter) as found:
        assert found is drafter
