# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How a launch treats the drafter: refused if a step would compute something else, sharded as one unit otherwise.

Our steps and rollouts call a drafter's methods and never its layers' own `forward`, so hooks on layers would never
fire. The drafter is therefore one unit of FSDP2 and one leaf of ZeRO-3, whatever the launcher's wrapping policy.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import broadcast, get_cpu_distributed_information, parse_flag_from_env
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Trainer


# As accelerate looks for it: torchrun's name, then MPI's.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a launch splits the drafter's weights between ranks: FSDP or DeepSpeed ZeRO-3."""
    return accelerator.distributed_type == DistributedType.FSDP or _is_zero3(accelerator)


def _is_zero3(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def _num_launched() -> int:
    """Return how many processes the launcher says it has started, under torchrun's name for that or MPI's."""
    return get_cpu_distributed_information().world_size


def is_launched_on_cpus() -> bool:
    """Whether torchrun's processes can have nothing but CPUs, and neither DeepSpeed nor FSDP asks for more."""
    asks_for_more = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") or parse_flag_from_env("ACCELERATE_USE_FSDP")
    is_joined = torch.distributed.is_torchelastic_launched() and _num_launched() > 1
    return is_joined and not torch.accelerator.is_available() and not asks_for_more


def check_launcher() -> None:
    """
    Raise `ValueError` where several processes are stated, but not what they would find each other by: to be called
    before accelerate or torch look for it, who ask for single variables, and then wait for processes that never come.
    """
    # What a launcher tells its processes, and no setting of ours.
    told = os.environ  # noqa: TID251
    missing = ["an address (MASTER_ADDR)"] if not told.get("MASTER_ADDR") else []
    missing += ["a number (RANK)"] if not any(told.get(name) for name in _RANKS) else []
    launched = _num_launched()
    if launched > 1 and missing and not torch.distributed.is_initialized():
        raise ValueError(
            f"The environment states {launched} processes (WORLD_SIZE, or MPI's name for it), but this one lacks "
            f"{' and '.join(missing)}, so it was not started by a launcher that joins them. If it is the only one, "
            "unset that variable. Start several with `accelerate launch` or `torchrun`."
        )


def check_processes(state: PartialState) -> None:
    """Raise `ValueError` where each process of a launch would train for itself, all into one folder."""
    launched = _num_launched()
    if state.num_processes == 1 and launched > 1:
        raise ValueError(
            f"The launcher states {launched} processes (WORLD_SIZE, or MPI's name for it), but they do not know of "
            "each other: each would train for itself, into one folder. Start them with `accelerate launch` or "
            "`torchrun`, which give each its number and an accelerator, or all of them the CPU under `use_cpu=True`. "
            "If this is the only process, unset that variable."
        )
    if state.num_processes > 1 and state.distributed_type == DistributedType.NO:
        raise ValueError(
            f"The {state.num_processes} processes of this launch are joined by {state.backend}, but would not share "
            "gradients: accelerate takes them for single ones. Set `use_cpu=True` to train on CPUs, or leave "
            "`ddp_backend` out."
        )


def check_launch(accelerator: Accelerator, num_visible_gpus: int) -> None:
    """Raise `ValueError` at a launch under which a step would compute something else, or that is not supported."""
    if num_visible_gpus > 1:
        raise ValueError(
            f"{num_visible_gpus} GPUs are visible to one process, which would run torch's DataParallel. Launch with "
            "`accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        zero = plugin.deepspeed_config.get("zero_optimization", {})
        devices = {zero.get(part, {}).get("device", "none") for part in ("offload_optimizer", "offload_param")}
        if plugin.zero_stage == 0 or "nvme" in devices:
            raise ValueError(
                f"DeepSpeed with `zero_stage` {plugin.zero_stage} and states on {sorted(devices)} is not supported. "
                "Use ZeRO stage 1, 2 or 3 with states on the device or the CPU, or DDP: see "
                "examples/accelerate_configs."
            )


def _check_fsdp(accelerator: Accelerator) -> None:
    plugin: Any = accelerator.state.fsdp_plugin
    if not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP's first version is not supported. Set `fsdp_version: 2` in the accelerate config, as "
            "examples/accelerate_configs/fsdp2.yaml does."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "`fsdp_activation_checkpointing: true` is not supported. Set `activation_checkpointing` of the trainer's "
            "config in its place."
        )
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise ValueError(
            "`fsdp_offload_params: true` is not supported: every rollout would fetch the drafter. Set it to false in "
            "the accelerate config."
        )


def prepare_drafter(accelerator: Accelerator, model: nn.Module, num_visible_gpus: int) -> None:
    """Check the launch, and put the drafter on its device, with the first rank's weights, as one unit. Collective."""
    check_launch(accelerator, num_visible_gpus)
    model.to(accelerator.device)
    if accelerator.num_processes > 1:
        # FSDP2 takes each rank's own weights: equal if loaded, but fresh ones only under equal seeds.
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                broadcast(tensor.data, from_process=0)
    if accelerator.is_fsdp2:
        _shard_as_one(accelerator, model)
    if _is_zero3(accelerator):
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [type(model)])


def _shard_as_one(accelerator: Accelerator, model: nn.Module) -> None:
    """Shard the drafter as a single unit of FSDP2; accelerate leaves a sharded model as it is."""
    mesh, parallelism = accelerator.torch_device_mesh, accelerator.parallelism_config
    if mesh is not None and parallelism is not None:
        mesh = mesh[tuple(parallelism.fsdp_dim_names)]
    else:
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Parameters stay in float32 under autocast, as under DDP. The backward pass follows the forward pass at once.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(), reshard_after_forward=False)
    # It would look in the drafter for the classes it names, and fail.
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = None
    # So that an evaluation before training takes it as prepared: accelerate would ask for an optimizer.
    accelerator._models.append(model)


@contextmanager
def evaluating_before_training(trainer: Trainer) -> Iterator[None]:
    """
    Keep an evaluation before training from preparing the drafter, which is on its device already.

    transformers takes what it prepared for evaluation as prepared for training: a drafter that DDP never wraps, so
    that ranks drift apart, or a DeepSpeed engine without an optimizer.
    """
    if trainer.accelerator._models:
        yield
        return
    is_deepspeed, trainer.is_deepspeed_enabled = trainer.is_deepspeed_enabled, False
    trainer.accelerator._models.append(trainer.model)
    try:
        yield
    finally:
        trainer.is_deepspeed_enabled = is_deepspeed
        trainer.accelerator._models.remove(trainer.model)


def loss_entry(accelerator: Accelerator) -> torch.Tensor:
    """
    Return a zero to hand through the drafter's wrapper and add to the loss.

    Under ZeRO-3 it has a gradient: ZeRO-3 waits for the gradients of a unit's inputs before it releases the weights,
    and no other input has one.
    """
    return torch.zeros((), device=accelerator.device, requires_grad=_is_zero3(accelerator))
