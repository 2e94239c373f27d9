# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Muon for the matrices of a drafter's layers, AdamW for everything else: one optimizer with groups of both kinds.

Sources: Jordan et al., [Muon](https://kellerjordan.github.io/posts/muon/); Liu et al.,
[Muon is scalable for LLM training](https://huggingface.co/papers/2502.16982), for the size of its updates.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers.training_args import OptimizerNames

from ..drafters.base import Drafter
from ..runs.distributed.sharding import OF_MUON
from .adapters import is_adapted


class MuonWithAdamW(torch.optim.Optimizer):
    """
    Both optimizers of torch, each stepping its own groups. One scheduler scales the rates of all groups, and one state
    holds what both keep, by parameter, so that whatever stores an optimizer stores this one.

    Args:
        matrices (`list[torch.nn.Parameter]`): Parameters for Muon, of two dimensions.
        learning_rate (`float`), weight_decay (`float`): Of Muon.
        others (`list[dict]`): AdamW's parameter groups.
        adamw (`dict`): AdamW's arguments.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        learning_rate: float,
        weight_decay: float,
        others: list[dict[str, Any]],
        adamw: dict[str, Any],
    ):
        # Each weight moves by a fifth of the rate, whatever the shape of its matrix.
        options: dict[str, Any] = {"weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        self._muon = torch.optim.Muon(matrices, lr=learning_rate, **options)
        self._adamw = torch.optim.AdamW(others, **adamw)
        # AdamW's first: the rate that is logged is that of the first group.
        super().__init__([*self._adamw.param_groups, *self._muon.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None, "the trainers never hand one in"
        for optimizer in (self._muon, self._adamw):
            is_muon = optimizer is self._muon
            # Loading a state, or a wrapper, puts others in the place of groups and state.
            optimizer.param_groups = [group for group in self.param_groups if (OF_MUON in group) == is_muon]
            optimizer.state = self.state
            optimizer.step()


def check_muon(args: Any, accelerator: Accelerator, drafter: nn.Module, given: torch.optim.Optimizer | None) -> None:
    """Raise `ValueError` where `muon_learning_rate` is set and Muon cannot train this drafter."""
    if args.muon_learning_rate is None:
        return
    reason = None
    if given is not None:
        reason = "`optimizers` brings an optimizer of its own"
    elif is_adapted(drafter):
        reason = "an adapter is trained, whose factors are no weights of layers"
    elif accelerator.state.deepspeed_plugin is not None:
        reason = "DeepSpeed's ZeRO lays parameters end to end, and Muon needs them as matrices"
    if reason is not None:
        raise ValueError(
            f"`muon_learning_rate={args.muon_learning_rate}` cannot be used: {reason}. Leave it out to train with "
            "AdamW."
        )


def make_optimizer(drafter: Drafter, args: Any, decayed: set[str], adamw: dict[str, Any]) -> MuonWithAdamW:
    """
    Return the optimizer of a drafter.

    Args:
        drafter ([`Drafter`]): Its parameters, sharded by FSDP2 or whole.
        args ([`DraftTrainingConfig`]): Rates and weight decay.
        decayed (`set[str]`): Names of AdamW's parameters whose weights decay.
        adamw (`dict`): AdamW's arguments.
    """
    trained = {name: parameter for name, parameter in drafter.named_parameters() if parameter.requires_grad}
    matrices = {name for name, parameter in trained.items() if is_matrix(drafter, name, parameter)}
    rest = trained.keys() - matrices
    others = [
        {"params": [p for name, p in trained.items() if name in rest & decayed], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained.items() if name in rest - decayed], "weight_decay": 0.0},
    ]
    return MuonWithAdamW(
        [p for name, p in trained.items() if name in matrices],
        args.muon_learning_rate,
        args.weight_decay,
        [group for group in others if group["params"]],
        adamw,
    )


def is_matrix(drafter: Drafter, name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix that maps one state to another: Muon's; the rest is AdamW's."""
    # Where rows are tokens, each is a vector of its own, and Muon would mix them.
    is_of_head = any(part in name for part in drafter.names_of_heads)
    return parameter.dim() == 2 and min(parameter.shape) > 1 and not is_of_head


def check_muon_settings(args: Any) -> None:
    """Raise `ValueError` at settings that Muon cannot go with, or a torch without it."""
    rate = args.muon_learning_rate
    if rate is None:
        return
    if rate <= 0:
        raise ValueError(f"`muon_learning_rate` must be above 0, got {rate}. Leave it out to train with AdamW.")
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"`muon_learning_rate={rate}` needs `torch.optim.Muon`, which torch {torch.__version__} does not have. "
            "Install torch 2.9 or newer, or leave it out to train with AdamW."
        )
    if args.optim not in ("adamw_torch", "adamw_torch_fused"):
        raise ValueError(
            f"`muon_learning_rate={rate}` puts Muon beside torch's AdamW, and "
            f"`optim={OptimizerNames(args.optim).value!r}` asks for another optimizer. Leave one of them out."
        )
