# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What DeepSpeed's ZeRO does to parameters and optimizer state: where each rank's pieces are, and how they are joined.

DeepSpeed need not be installed; it is imported only where it is in use. Stages 1 and 2 keep parameters whole and cut
each parameter group's masters, laid end to end, into one piece per rank; stage 3 cuts every parameter by itself.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter under stage 3, of which every rank holds a part."""
    return hasattr(tensor, "ds_id")


def is_managed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter that a ZeRO optimizer holds a master of, or that is sharded."""
    return is_sharded(tensor) or hasattr(tensor, "_hp_mapping")


def full_shape(tensor: Any) -> torch.Size:
    """Return the shape of the whole tensor."""
    return tensor.ds_shape if is_sharded(tensor) else tensor.shape


def without_accelerate(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper: torch's or DeepSpeed's."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def is_optimizer(optimizer: Any) -> bool:
    """Whether this is one of DeepSpeed's optimizers, which keeps a plain one inside."""
    return type(optimizer).__module__.startswith("deepspeed.runtime.")


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the plain optimizer inside DeepSpeed's, or the optimizer itself."""
    return optimizer.optimizer if is_optimizer(optimizer) else optimizer


@contextmanager
def gathered(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Make sharded parameters whole while the context lasts; nothing to do for others. Collective for sharded ones."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(sharded):
        yield


def full_parameter(parameter: Any) -> torch.Tensor:
    """Return a parameter's whole float32 master, or the parameter itself where it has none. Collective."""
    if not _has_master(parameter):
        with gathered([parameter]):
            return parameter.detach().float().clone()
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    assert whole is not None, "a parameter with a master has a value"
    return whole


def load_parameter(parameter: Any, value: torch.Tensor) -> None:
    """Write a whole value, the same on every rank, into a parameter and its master. Collective."""
    value = value.to(parameter.device)
    if is_sharded(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)
    if not _has_master(parameter):
        return
    if is_sharded(parameter):
        place = _masters(parameter._z3_optimizer, parameter)
        assert place is not None, "a trained parameter has masters"
        _write_piece(parameter._z3_optimizer, parameter, place[0], value)
    else:
        parameter.set_full_hp_param(value.float())


def parameter_state(optimizer: Any, parameter: Any) -> dict[str, Any]:
    """
    Return what the optimizer keeps of a parameter: whole tensors, and numbers shared with its group. Collective.

    `safe_get_full_optimizer_state` finds the state of the first parameter group alone under stages 1 and 2.
    """
    place = _masters(optimizer, parameter)
    if place is None:
        return {}
    flat, _ = place
    state = optimizer.optimizer.state.get(flat, {})
    is_cut = {key: isinstance(value, torch.Tensor) and value.shape == flat.shape for key, value in state.items()}
    return {key: _join(optimizer, parameter, value) if is_cut[key] else value for key, value in state.items()}


def group_of(optimizer: Any, parameter: Any) -> int | None:
    """Return the index of a parameter's group in the inner optimizer, `None` if it is not trained. Not collective."""
    place = _masters(optimizer, parameter)
    return None if place is None else place[1]


def load_parameter_states(optimizer: Any, states: dict[torch.Tensor, dict[str, Any]]) -> None:
    """Replace the inner optimizer's state by that of the given parameters."""
    inner = optimizer.optimizer
    inner.state.clear()
    for parameter, entries in states.items():
        place = _masters(optimizer, parameter)
        assert place is not None, "only trained parameters have state"
        flat, index = place
        state, group = inner.state[flat], inner.param_groups[index]
        is_on_device = group.get("fused") or group.get("capturable")
        for key, value in entries.items():
            if not isinstance(value, torch.Tensor):
                state[key] = value
            elif value.dim() == 0:
                state[key] = value.to(flat.device if is_on_device else "cpu")
            else:
                state.setdefault(key, torch.zeros_like(flat))
                _write_piece(optimizer, parameter, state[key], value)


def _has_master(parameter: Any) -> bool:
    """Whether an optimizer steps this parameter: it is trained, and training is set up."""
    return parameter.requires_grad and (not is_sharded(parameter) or hasattr(parameter, "_z3_optimizer"))


def _masters(optimizer: Any, parameter: Any) -> tuple[torch.Tensor, int] | None:
    """
    Return this rank's masters of the group that a parameter is in, which key the inner optimizer's state, and the
    group's index; `None` for a parameter that is not trained.
    """
    if is_sharded(parameter):
        if not _has_master(parameter):
            return None
        piece, _, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return optimizer.fp32_partitioned_groups_flat[piece], optimizer.sub_group_to_group_id[piece]
    for index, group in enumerate(optimizer.bit16_groups):
        if any(own is parameter for own in group):
            return optimizer.single_partition_of_fp32_groups[index], index
    return None


def _join(optimizer: Any, parameter: Any, flat: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor of a parameter's shape from the pieces of all ranks. Collective."""
    if is_sharded(parameter):
        _, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return optimizer._fp32_state_allgather(parameter, flat.narrow(0, start, length).to(parameter.device))
    whole = torch.zeros(parameter.numel(), dtype=flat.dtype, device=parameter.device)
    mapping = parameter._hp_mapping
    if mapping is not None:
        own, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        whole.narrow(0, own.start, own.numel).copy_(flat.narrow(0, there.start, there.numel))
    torch.distributed.all_reduce(whole, group=parameter._dp_group)
    return whole.view_as(parameter)


def _write_piece(optimizer: Any, parameter: Any, flat: torch.Tensor, value: torch.Tensor) -> None:
    """Write this rank's piece of a whole tensor of the parameter's shape into `flat`."""
    if is_sharded(parameter):
        _, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        num_ranks = torch.distributed.get_world_size(parameter.ds_process_group)
        # Every rank's part has the same length; the last one is padded.
        padded = value.new_zeros(length * num_ranks)
        padded[: value.numel()] = value.flatten()
        flat.narrow(0, start, length).copy_(padded.narrow(0, length * rank, length))
        return
    mapping = parameter._hp_mapping
    if mapping is not None:
        own, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        flat.narrow(0, there.start, there.numel).copy_(value.flatten().narrow(0, own.start, own.numel))
