# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The drafter and its optimizer whole again, whatever wrapper cuts them: weights and state by name, complete on the CPU.

One form for one process, DDP, FSDP2 and ZeRO, so that what is saved under one is read under another, with any number of
processes. What DeepSpeed does with parameters stands in `zero.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ...drafters.base import Drafter
from . import zero


# How an optimizer computes its step, not which: another machine's choice is not this one's.
_KERNEL_SETTINGS = {"foreach", "fused", "capturable", "differentiable"}


@dataclass(frozen=True)
class OptimizerState:
    """
    State of an optimizer by the names of the drafter's parameters.

    Attributes:
        tensors (`dict[str, torch.Tensor]`):
            Tensors of one dimension and more on the CPU, by `"<state's name>/<parameter's name>"`, e.g. `"exp_avg/fc.weight"`.
        values (`dict[str, Any]`):
            The rest, as JSON holds it. `"groups"`: the settings of each parameter group, learning rate included.
            `"parameters"`: by parameter's name, numbers such as its count of steps; those that are tensors with their dtype.
    """

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


@contextmanager
def whole_drafter(accelerator: Accelerator, model: nn.Module) -> Iterator[Drafter]:
    """
    Yield the drafter with whole parameters, to be called outside of its wrapper. Collective where parameters are sharded.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Of the trainer.
        model (`nn.Module`): The drafter, wrapped or not.
    """
    drafter = accelerator.unwrap_model(model)
    if isinstance(drafter, FSDPModule):
        drafter.unshard()
        try:
            yield drafter
        finally:
            drafter.reshard()
    else:
        with zero.gathered(list(drafter.parameters())):
            yield drafter


def full_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Return the drafter's weights on the CPU, copied: float32 masters, and buffers as they are. Collective.

    Args:
        accelerator ([`~accelerate.Accelerator`]), model (`nn.Module`): As for [`whole_drafter`].

    Returns:
        `dict[str, torch.Tensor]` by the names of the drafter's `state_dict()` on the main process, empty on all others.
    """
    drafter = accelerator.unwrap_model(model)
    weights = {}
    for name, tensor in drafter.state_dict(keep_vars=True).items():
        whole = zero.full_parameter(tensor) if zero.is_managed(tensor) else _whole(tensor)
        if accelerator.is_main_process:
            weights[name] = _on_cpu(whole.float() if whole.is_floating_point() else whole)
    return weights


@torch.no_grad()
def load_full_weights(accelerator: Accelerator, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """
    Load weights into the drafter, and into the float32 masters behind it where there are any. Collective.

    Args:
        accelerator ([`~accelerate.Accelerator`]), model (`nn.Module`): As for [`whole_drafter`].
        tensors (`dict[str, torch.Tensor]`): What [`full_weights`] returned on the main process, the same on every rank.

    Raises:
        ValueError: Naming tensors that are missing, unknown, or of another shape.
    """
    own = accelerator.unwrap_model(model).state_dict(keep_vars=True)
    shapes = {name: tuple(zero.full_shape(tensor)) for name, tensor in own.items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != given:
        differing = sorted({name for name, _ in shapes.items() ^ given.items()})
        raise ValueError(
            f"The weights are not this drafter's: {differing[:10]} are missing, unknown or of another shape. Load the "
            "drafter that they were saved with."
        )
    for name, tensor in own.items():
        value = tensors[name]
        if zero.is_managed(tensor):
            zero.load_parameter(tensor, value)
        elif isinstance(tensor, DTensor):
            tensor.copy_(_cut_as(tensor, value))
        else:
            tensor.copy_(value)


def full_optimizer_state(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> OptimizerState:
    """
    Return the optimizer's state by parameter names, copied to the CPU. Collective.

    Args:
        accelerator ([`~accelerate.Accelerator`]), model (`nn.Module`): As for [`whole_drafter`].
        optimizer (`torch.optim.Optimizer`): The trainer's, wrapped or not.

    Returns:
        [`OptimizerState`]: complete on the main process, empty on all others. Parameters without state, frozen ones and those not
        stepped yet, have no entries.
    """
    optimizer = _inner(optimizer)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if zero.is_optimizer(optimizer):
            entries = zero.parameter_state(optimizer, parameter)
        else:
            entries = {key: _whole(value) for key, value in optimizer.state.get(parameter, {}).items()}
        if not accelerator.is_main_process:
            continue
        for key, value in entries.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                tensors[f"{key}/{name}"] = _on_cpu(value)
            else:
                numbers.setdefault(name, {})[key] = _as_json(value)
    if not accelerator.is_main_process:
        return OptimizerState({}, {})
    left_out = _KERNEL_SETTINGS | {"params"}
    groups = [
        {key: value for key, value in group.items() if key not in left_out} for group in zero.torch_groups(optimizer)
    ]
    return OptimizerState(tensors, {"groups": _as_json(groups), "parameters": numbers})


def load_full_optimizer_state(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, state: OptimizerState
) -> None:
    """
    Load the state of [`full_optimizer_state`], the same on every rank, into the optimizer of the same parameter groups.

    Args:
        accelerator ([`~accelerate.Accelerator`]), model (`nn.Module`): As for [`whole_drafter`].
        optimizer (`torch.optim.Optimizer`): The trainer's, wrapped or not.
        state ([`OptimizerState`]): What to load.

    Raises:
        ValueError: If the state belongs to other parameters or other parameter groups.
    """
    optimizer = _inner(optimizer)
    groups = [_from_json(group) for group in state.values["groups"]]
    own_groups = zero.torch_groups(optimizer)
    if len(groups) != len(own_groups):
        raise ValueError(
            f"The optimizer's state has {len(groups)} parameter groups, this optimizer {len(own_groups)}. Resume with the settings it was "
            "saved under (`optim`, `weight_decay`, adapters)."
        )
    parameters = dict(accelerator.unwrap_model(model).named_parameters())
    entries = _entries_by_name(state)
    unknown = sorted(set(entries) - set(parameters))
    if unknown:
        raise ValueError(
            f"The optimizer's state is of parameters that this drafter has not: {unknown[:10]}. Load the drafter that it was saved with."
        )
    if zero.is_optimizer(optimizer):
        zero.load_parameter_states(optimizer, {parameters[name]: values for name, values in entries.items()})
        for own, group in zip(own_groups, groups, strict=True):
            own.update(group)
        return
    _load_torch_state(optimizer, parameters, entries, groups)


def _load_torch_state(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    entries: dict[str, dict[str, Any]],
    groups: list[dict[str, Any]],
) -> None:
    """Load through the optimizer's own `load_state_dict`, which knows where its counters have to be."""
    names = {parameter: name for name, parameter in parameters.items()}
    states: dict[int, dict[str, Any]] = {}
    packed = []
    number = 0
    for own, group in zip(optimizer.param_groups, groups, strict=True):
        numbers = []
        for parameter in own["params"]:
            numbers.append(number)
            if names[parameter] in entries:
                values = entries[names[parameter]]
                states[number] = {key: _cut_as(parameter, value) for key, value in values.items()}
            number += 1
        packed.append(own | group | {"params": numbers})
    optimizer.load_state_dict({"state": states, "param_groups": packed})


def _entries_by_name(state: OptimizerState) -> dict[str, dict[str, Any]]:
    """Return tensors and numbers of each parameter together."""
    entries = {
        name: {key: _from_json(value) for key, value in values.items()}
        for name, values in state.values["parameters"].items()
    }
    for path, tensor in state.tensors.items():
        key, name = path.split("/", 1)
        entries.setdefault(name, {})[key] = tensor
    return entries


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside of accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _whole(value: Any) -> Any:
    """Return a sharded tensor whole, and everything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _cut_as(parameter: torch.Tensor, value: Any) -> Any:
    """Return this rank's part of a whole tensor where the parameter is sharded; no rank is asked for anything."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the CPU that nothing changes any more."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _as_json(value: Any) -> Any:
    """Return a number, a tensor of one number, or a nest of them as JSON holds it."""
    if isinstance(value, torch.Tensor):
        return {"tensor": str(value.dtype).removeprefix("torch."), "value": value.item()}
    if isinstance(value, tuple):
        return {"tuple": [_as_json(item) for item in value]}
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list) else value


def _from_json(value: Any) -> Any:
    """Undo [`_as_json`]."""
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor", "value"}:
        return torch.tensor(value["value"], dtype=getattr(torch, value["tensor"]))
    if value.keys() == {"tuple"}:
        return tuple(_from_json(item) for item in value["tuple"])
    return {key: _from_json(item) for key, item in value.items()}
