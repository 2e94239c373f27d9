# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Where the target's weights are: whole on one device, spread over several of one process, or a share of every layer on
each rank. Knows no drafter and no trainer.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel


Loaded = TypeVar("Loaded")


def device_of(module: nn.Module) -> torch.device:
    """Return the device a module with a `weight` runs on, also where accelerate's hooks fetch the weight for it."""
    called: Any = module
    if called.weight.device.type == "meta":
        return torch.device(called._hf_hook.execution_device)
    return called.weight.device


def place_weights(causal_lm: PreTrainedModel, device: torch.device, *, is_quantized: bool) -> None:
    """
    Move a target to `device`, unless its weights were spread over devices or quantised on loading.

    Raises:
        ValueError: If they were spread, and the embedding is not on `device`; or quantised, which cannot be moved, on
            another kind of device.
    """
    is_spread = getattr(causal_lm, "hf_device_map", None) is not None
    if not is_spread and not is_quantized:
        causal_lm.to(device)  # pyright: ignore[reportArgumentType]
    own = device_of(causal_lm.get_input_embeddings())
    if is_spread and own != device:
        raise ValueError(
            f"The target's `device_map` puts its embedding on {own}, but the drafter trains on {device}. Map "
            "`embed_tokens` there."
        )
    if is_quantized and own.type != device.type:
        raise ValueError(
            f"The quantised target was loaded to {own.type!r} but training runs on {device.type!r}. Name its place, "
            "e.g. `target_init_kwargs={'device_map': {'': 0}, 'quantization_config': ...}`."
        )


def check_placement(causal_lm: PreTrainedModel, *, shard: bool, num_processes: int) -> None:
    """Refuse a target that is spread over devices under several processes, or spread or quantised and sharded."""
    devices = {str(device) for device in (getattr(causal_lm, "hf_device_map", None) or {}).values()}
    if num_processes > 1 and len(devices) > 1:
        raise ValueError(
            f"The target's `device_map` spreads it over {sorted(devices)}, but {num_processes} processes share these "
            "devices. Leave `device_map` out and set `shard_target=True`, or launch one process."
        )
    if shard and devices:
        raise ValueError(
            "`shard_target=True` places the target's layers itself, but a `device_map` put them on "
            f"{sorted(devices)}. Leave one of the two out."
        )
    if shard and getattr(causal_lm.config, "quantization_config", None) is not None:
        raise ValueError(
            "`shard_target=True` cannot shard quantised weights. Load the target without its `quantization_config`, "
            "or leave it whole on every rank."
        )


class Lockstep:
    """
    Makes every rank run a sharded backbone as often as the rank that needs it most, in phases that all ranks end
    together: the ranks put a layer together for its forward pass, but their texts differ in number and length.

    Before a forward pass a rank announces that it needs one; a rank whose phase is over announces that it needs none,
    and runs one token along until no rank needs any.
    """

    def __init__(self, backbone: nn.Module, device: torch.device):
        self.backbone, self.device = backbone, device
        self._is_idle = False
        # Counters for tests and reports.
        self.num_idle = 0
        backbone.register_forward_pre_hook(self._announce)

    def _announce(self, module: nn.Module, args: Any) -> None:
        if not self._is_idle:
            self._is_needed(True)

    def _is_needed(self, by_this_rank: bool) -> bool:
        """Tell the other ranks whether this one needs a forward pass, and hear whether any does. Collective."""
        flag = torch.tensor(int(by_this_rank), device=self.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)

    @torch.no_grad()
    def finish(self) -> None:
        """End a phase: run along until no rank needs a forward pass. Collective; once per phase on every rank."""
        while self._is_needed(False):
            self._is_idle = True
            try:
                self.backbone(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
            finally:
                self._is_idle = False
            self.num_idle += 1


def shard_layers(
    causal_lm: PreTrainedModel, backbone: nn.Module, layers: Iterable[nn.Module], device: torch.device
) -> Lockstep:
    """
    Shard a frozen model's decoder layers over all ranks, in place, and move the rest to `device` whole. From now on
    every phase of using the backbone ends with [`Lockstep.finish`].
    """
    mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    in_layers = {parameter for layer in layers for parameter in layer.parameters()}
    # The backbone manages no weights of its own: it is the root that lets one layer be fetched while another runs.
    fully_shard(backbone, mesh=mesh, ignored_params=set(backbone.parameters()) - in_layers)
    causal_lm.to(device)  # pyright: ignore[reportArgumentType]
    return Lockstep(backbone, device)


def load_in_turns(load: Callable[[], Loaded]) -> Loaded:
    """Call `load` on one rank of each machine after another: its memory holds one whole copy at a time. Collective."""
    state = PartialState()
    loaded = None
    for turn in range(state.num_processes):
        if state.local_process_index == turn:
            loaded = load()
        state.wait_for_everyone()
    assert loaded is not None, "every rank has a turn on its machine"
    return loaded
