# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decisions that all ranks take alike.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list


T = TypeVar("T")


def any_rank(accelerator: Accelerator, claim: bool) -> bool:
    """Whether the claim is true on any rank. Collective."""
    if accelerator.num_processes == 1:
        # Without a copy to the device and back.
        return claim
    votes: Any = accelerator.reduce(torch.tensor(float(claim), device=accelerator.device), "sum")
    return bool(votes > 0)


def first_rank_decides(accelerator: Accelerator | PartialState, decide: Callable[[], T]) -> T:
    """Run `decide` on the first rank alone; all ranks get its result, or raise its error. Collective."""
    if accelerator.num_processes == 1:
        return decide()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except (ValueError, TypeError, RuntimeError, OSError, FloatingPointError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
