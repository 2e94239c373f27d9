# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Nothing that is not finite reaches the weights: losses and gradients are checked right before the optimizer's step.

The check is a hook of the innermost torch optimizer, so it is the same under plain, data-parallel, FSDP2 and ZeRO
training. ZeRO may drop an update before it gets that far; this is noticed right after.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from .distributed import zero
from .distributed.ranks import any_rank


logger = logging.getLogger(__name__)


class NonFiniteGuard(TrainerCallback):
    """Stops or skips an update whose losses or gradients are not finite, on all ranks alike."""

    def __init__(self, accelerator: Accelerator, on_nonfinite: str, max_skipped_updates: int):
        self.accelerator = accelerator
        self.on_nonfinite, self.max_skipped_updates = on_nonfinite, max_skipped_updates
        # Updates skipped in this run, and since the last one that was made.
        self.num_skipped = self.num_in_a_row = 0
        self._losses: list[tuple[torch.Tensor, list[int]]] = []
        self._decided: tuple[int, bool] | None = None
        self._global_step = 0
        self._optimizer: Any = None
        self._hook: Any = None

    def note_loss(self, loss: torch.Tensor, sample_ids: Sequence[int]) -> None:
        """Remember a micro-batch of this update; its loss is checked when the update is about to be made."""
        self._losses.append((loss.detach(), [int(number) for number in sample_ids]))

    def state(self) -> dict[str, int]:
        """Return what a checkpoint keeps."""
        return {"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Undo `state`."""
        self.num_skipped, self.num_in_a_row = state["num_skipped"], state["num_in_a_row"]

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, *, optimizer: Any, **kwargs: Any
    ) -> None:
        """Watch this optimizer's steps, in place of an earlier one's."""
        if self._hook is not None:
            self._hook.remove()
        self._optimizer = zero.without_accelerate(optimizer)
        self._hook = zero.torch_optimizer(self._optimizer).register_step_pre_hook(self._before_step)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget the last update's losses."""
        self._losses, self._decided, self._global_step = [], None, state.global_step

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """
        Treat an update that DeepSpeed or float16's loss scale drop by themselves as one stopped here. Collective.
        """
        # DeepSpeed has made its step by now, at the end of the backward pass.
        if self.accelerator.mixed_precision == "fp16":
            # Gradients that overflow are how the scale is found, but losses are noted before they are scaled.
            is_bad = any_rank(self.accelerator, bool(self._bad_losses()))
        else:
            is_bad = zero.is_optimizer(self._optimizer) and self._optimizer.overflow
        if is_bad:
            self._refuse_everywhere()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # ZeRO takes one step per group of parameters; the first decides for all.
        if self._decided is None or self._decided[0] != self._global_step:
            self._decided = (self._global_step, self._is_update_finite(optimizer))
        if not self._decided[1]:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    # Optimizers skip parameters without a gradient: weights, moments and counters stay.
                    parameter.grad = None

    def _is_update_finite(self, optimizer: torch.optim.Optimizer) -> bool:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # One check for all of them: each costs a wait for the device.
        flags = [(g.to_local() if isinstance(g, DTensor) else g).isfinite().all() for g in grads]
        is_finite = not flags or bool(torch.stack(flags).all())
        # ZeRO's norm covers the groups whose step is yet to come.
        norm = self._optimizer._global_grad_norm if zero.is_optimizer(self._optimizer) else None
        is_finite = is_finite and (norm is None or bool(torch.isfinite(torch.as_tensor(norm))))
        if not any_rank(self.accelerator, not is_finite or bool(self._bad_losses())):
            self.num_in_a_row = 0
            return True
        self._refuse_everywhere()
        return False

    def _bad_losses(self) -> list[tuple[float, list[int]]]:
        return [(float(loss), ids) for loss, ids in self._losses if not torch.isfinite(loss)]

    def _refuse_everywhere(self) -> None:
        """Report what is wrong; raise, unless the update is to be skipped. Collective."""
        bad, all_ids = gather_object(self._bad_losses()), gather_object([ids for _, ids in self._losses])
        step, ids = self._global_step, sorted(i for rows in [rows for _, rows in bad] or all_ids for i in rows)
        if bad:
            what = f"The loss is {bad[0][0]} at step {step} on samples {ids}"
        else:
            what = f"The gradient is not finite at step {step}, on samples {ids} together"
        what += " (row indices of the dataset)."
        if self.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{what} Nothing was updated. Check these rows, lower `learning_rate`, use `bf16` instead of `fp16`, "
                "or leave such updates out with `on_nonfinite='skip'`."
            )
        self.num_skipped += 1
        self.num_in_a_row += 1
        if self.num_in_a_row > self.max_skipped_updates:
            raise FloatingPointError(
                f"{what} {self.max_skipped_updates} updates in a row were skipped before it (`max_skipped_updates`): "
                "the weights are at fault. Go back to an earlier checkpoint with a lower `learning_rate`."
            )
        logger.warning("%s This update was skipped, %d so far.", what, self.num_skipped)


def check_weights(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse to write weights that are not finite, with a `FloatingPointError` that names the first."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"{len(bad)} of the drafter's {len(tensors)} tensors are not finite, {bad[0]!r} first. They were not "
            "written: resume from the last checkpoint with a lower `learning_rate`."
        )
