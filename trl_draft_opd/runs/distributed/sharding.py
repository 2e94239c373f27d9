# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The whole drafter and its whole optimizer state under every launch: tensors by name, complete on the CPU.

One form for one process, DDP, FSDP2 and ZeRO, so that what is saved under one launch is read under another, with any
number of processes. What is specific to DeepSpeed is in `zero.py`.

`torch.distributed.checkpoint.state_dict` is not used: reading an optimizer that has not stepped yet makes it step,
which moves its counters and calls the guard; it refuses a state that lacks a trained parameter; and on the CPU it
returns weights without copying.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ...drafters.base import Drafter
from . import zero


# How an optimizer computes its step on this machine; not part of its state.
_KERNEL_SETTINGS = {"foreach", "fused", "capturable", "differentiable"}
# A setting that only Muon's parameter groups have.
OF_MUON = "ns_steps"


@dataclass(frozen=True)
class OptimizerState:
    """
    State of an optimizer by the names of the drafter's parameters.

    Attributes:
        tensors: On the CPU, by `"<state's name>/<parameter's name>"`, e.g. `"exp_avg/fc.weight"`. Step counters too.
        values:
            The rest, as JSON holds it. `"groups"`: the settings of each parameter group, learning rate included.
            `"members"`: the names of each group's parameters. `"parameters"`: by parameter's name, what is not a
            tensor.
    """

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


@contextmanager
def whole_drafter(accelerator: Accelerator, model: nn.Module) -> Iterator[Drafter]:
    """Yield the drafter with whole parameters, to be called outside of its wrapper. Collective where it is sharded."""
    drafter: Any = accelerator.unwrap_model(model)
    unit: Any = drafter
    if isinstance(drafter, FSDPModule):
        unit.unshard()
        try:
            yield unit
        finally:
            unit.reshard()
    else:
        with zero.gathered(list(drafter.parameters())):
            yield drafter


def full_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Return a copy of the drafter's weights by name, on the CPU: float32 masters, and buffers as they are. Collective.

    Other ranks than the first get an empty dictionary.
    """
    drafter: Any = accelerator.unwrap_model(model)
    weights = {}
    for name, tensor in drafter.state_dict(keep_vars=True).items():
        whole = zero.full_parameter(tensor) if zero.is_managed(tensor) else _whole(tensor)
        if accelerator.is_main_process:
            weights[name] = _on_cpu(whole.float() if whole.is_floating_point() else whole)
    return weights


@torch.no_grad()
def load_full_weights(accelerator: Accelerator, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """
    Load what [`full_weights`] returned, the same on every rank, into the drafter and the masters behind it.
    Collective.
    """
    drafter: Any = accelerator.unwrap_model(model)
    own = drafter.state_dict(keep_vars=True)
    shapes = {(name, tuple(zero.full_shape(tensor))) for name, tensor in own.items()}
    given = {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if shapes != given:
        raise ValueError(
            f"The weights are not this drafter's: {sorted({name for name, _ in shapes ^ given})[:10]} are missing, "
            "unknown or of another shape. Load the drafter that they were saved with."
        )
    for name, tensor in own.items():
        if zero.is_managed(tensor):
            zero.load_parameter(tensor, tensors[name])
        else:
            tensor.copy_(_shard_like(tensor, tensors[name]))


def full_optimizer_state(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> OptimizerState:
    """
    Return a copy of the optimizer's state, complete on the first rank and empty on all others. Collective.

    Frozen parameters, and those that were never stepped, have no entries.
    """
    optimizer = zero.without_accelerate(optimizer)
    drafter: Any = accelerator.unwrap_model(model)
    state = OptimizerState({}, {"groups": [], "members": [], "parameters": {}})
    for name, parameter in drafter.named_parameters():
        if zero.is_optimizer(optimizer):
            entries = zero.parameter_state(optimizer, parameter)
        else:
            entries = {key: _whole(value) for key, value in optimizer.state.get(parameter, {}).items()}
        if not accelerator.is_main_process:
            continue
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                state.tensors[f"{key}/{name}"] = _on_cpu(value)
            else:
                state.values["parameters"].setdefault(name, {})[key] = value
    if accelerator.is_main_process:
        state.values["members"] = _members(optimizer, drafter)
        for group in zero.torch_optimizer(optimizer).param_groups:
            settings = {name: group[name] for name in sorted(group.keys() - _KERNEL_SETTINGS - {"params"})}
            # A learning rate may be a tensor.
            state.values["groups"].append(
                {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in settings.items()}
            )
    return state


def load_full_optimizer_state(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, state: OptimizerState
) -> None:
    """
    Load the state of [`full_optimizer_state`], the same on every rank, into an optimizer of the same parameter groups.

    Raises:
        ValueError: If the groups are others, by their number, kind or parameters. Nothing was loaded.
    """
    optimizer = zero.without_accelerate(optimizer)
    drafter: Any = accelerator.unwrap_model(model)
    groups, own_groups = state.values["groups"], zero.torch_optimizer(optimizer).param_groups
    _check_groups(groups, state.values["members"], own_groups, _members(optimizer, drafter))
    settings = [
        {key: _like(own.get(key), value) for key, value in group.items()}
        for own, group in zip(own_groups, groups, strict=True)
    ]
    entries = {name: dict(values) for name, values in state.values["parameters"].items()}
    for path, tensor in state.tensors.items():
        key, name = path.split("/", 1)
        entries.setdefault(name, {})[key] = tensor
    parameters = dict(drafter.named_parameters())
    if unknown := sorted(entries.keys() - parameters.keys()):
        raise ValueError(
            f"The optimizer's state is of parameters that this drafter does not have: {unknown[:10]}. Load the "
            "drafter that it was saved with."
        )
    by_parameter = {parameters[name]: values for name, values in entries.items()}
    if zero.is_optimizer(optimizer):
        zero.load_parameter_states(optimizer, by_parameter)
        for own, group in zip(own_groups, settings, strict=True):
            own.update(group)
    else:
        _load_torch_state(optimizer, by_parameter, settings)


def _members(optimizer: Any, drafter: nn.Module) -> list[list[str]]:
    """Return the names of the trained parameters in each parameter group, sorted. Not collective."""
    own_groups = zero.torch_optimizer(optimizer).param_groups
    group_of = {parameter: index for index, group in enumerate(own_groups) for parameter in group["params"]}
    members: list[list[str]] = [[] for _ in own_groups]
    for name, parameter in sorted(drafter.named_parameters()):
        index = zero.group_of(optimizer, parameter) if zero.is_optimizer(optimizer) else group_of.get(parameter)
        if index is not None:
            members[index].append(name)
    return members


def _check_groups(
    groups: list[dict[str, Any]], members: list[list[str]], own_groups: list[dict[str, Any]], own: list[list[str]]
) -> None:
    """Raise `ValueError` unless stored parameter groups and an optimizer's are of the same kinds and parameters."""
    fix = (
        "Resume with the settings it was saved under (`optim`, `muon_learning_rate`, `weight_decay`, adapters), or "
        "start a new run from the checkpoint's folder (`--drafter`, or `model`)."
    )
    if len(groups) != len(own_groups):
        raise ValueError(
            f"The optimizer's state has {len(groups)} parameter groups, this optimizer {len(own_groups)}. {fix}"
        )
    for index, (group, own_group) in enumerate(zip(groups, own_groups, strict=True)):
        kind, own_kind = ("Muon's" if OF_MUON in each else "not Muon's" for each in (group, own_group))
        if kind != own_kind:
            raise ValueError(
                f"Parameter group {index} is {kind} in the optimizer's state and {own_kind} in this optimizer. {fix}"
            )
        if differing := sorted(set(members[index]) ^ set(own[index])):
            raise ValueError(
                f"Parameter group {index} holds other parameters in the optimizer's state than in this optimizer: "
                f"{differing[:10]} are in one of them only. {fix}"
            )


def _load_torch_state(
    optimizer: torch.optim.Optimizer, entries: dict[torch.Tensor, dict[str, Any]], settings: list[dict[str, Any]]
) -> None:
    """Load through the optimizer's own `load_state_dict`, which knows where its counters have to be."""
    packed = optimizer.state_dict()
    numbers = [number for group in packed["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {key: _shard_like(parameter, value) for key, value in entries[parameter].items()}
        for number, parameter in zip(numbers, parameters, strict=True)
        if parameter in entries
    }
    groups = [own | group for own, group in zip(packed["param_groups"], settings, strict=True)]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _whole(value: Any) -> Any:
    """Return a sharded tensor whole, and everything else as it is. Collective for sharded ones."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _shard_like(parameter: torch.Tensor, value: Any) -> Any:
    """Return this rank's part of a whole tensor where the parameter is sharded. Not collective."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _like(own: Any, value: Any) -> Any:
    """Return a setting from JSON in the type that the optimizer has it in."""
    if isinstance(own, torch.Tensor):
        return torch.tensor(value, dtype=own.dtype, device=own.device)
    return tuple(value) if isinstance(own, tuple) else value
