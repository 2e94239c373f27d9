# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
No loss and no gradient that is not finite makes an update, and no weight that is not finite trains on or is written.

Losses and gradients are checked right before the optimizer's step, and weights right after it, by hooks of the
innermost torch optimizer, so it is the same under plain, data-parallel, FSDP2 and ZeRO training. ZeRO may drop an
update before it gets that far; this is noticed right after.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState

from .distributed import zero
from .distributed.ranks import any_rank


logger = logging.getLogger(__name__)


class NonFiniteGuard(TrainerCallback):
    """
    Stops or skips an update whose losses or gradients are not finite, and stops after one that left weights that are
    not; on all ranks alike.
    """

    def __init__(self, accelerator: Accelerator, on_nonfinite: str, max_skipped_updates: int):
        self.accelerator = accelerator
        self.on_nonfinite, self.max_skipped_updates = on_nonfinite, max_skipped_updates
        # Updates skipped in this run, and since the last one that was made.
        self.num_skipped = self.num_in_a_row = 0
        self._losses: list[tuple[torch.Tensor, list[int]]] = []
        self._decided: tuple[int, bool] | None = None
        self._global_step = 0
        self._are_weights_finite = True
        self._optimizer: Any = None
        self._hooks: list[Any] = []

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
        for hook in self._hooks:
            hook.remove()
        self._optimizer = zero.without_accelerate(optimizer)
        inner = zero.torch_optimizer(self._optimizer)
        self._hooks = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_step_post_hook(self._after_step),
        ]

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget the last update's losses."""
        self._losses, self._decided, self._global_step = [], None, state.global_step
        self._are_weights_finite = True

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
            # The hook need not count it a second time, should the step be tried all the same.
            self._decided = (self._global_step, False)
            self._refuse_everywhere()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """
        Stop if the step left weights that are not finite: such an update cannot be undone. Treat one that float16's
        loss scale dropped as skipped here, once the scale is not at fault. Collective.
        """
        if self.accelerator.mixed_precision == "fp16" and self._is_beyond_the_scale():
            self._refuse_everywhere()
        if any_rank(self.accelerator, not self._are_weights_finite):
            ids = sorted(i for rows in gather_object([ids for _, ids in self._losses]) for i in rows)
            raise FloatingPointError(
                f"The update of step {self._global_step} left weights that are not finite, though its losses and "
                f"gradients were. Its samples were {ids} (row indices of the dataset). Nothing of it was written. "
                "Resume from the last checkpoint with a lower `learning_rate`."
            )

    def _is_beyond_the_scale(self) -> bool:
        """Whether the last step was dropped, not by this guard, for gradients that overflow unscaled. Collective."""
        was_decided = self._decided is not None and self._decided[0] == self._global_step
        is_dropped = self.accelerator.optimizer_step_was_skipped and not was_decided
        scaler = self.accelerator.scaler
        # By now it is half of what the gradients were scaled by.
        return any_rank(self.accelerator, is_dropped and scaler is not None and scaler.get_scale() < 1.0)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # ZeRO takes one step per group of parameters; the first decides for all.
        if self._decided is None or self._decided[0] != self._global_step:
            self._decided = (self._global_step, self._is_update_finite(optimizer))
        if not self._decided[1]:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    # Optimizers skip parameters without a gradient: weights, moments and counters stay.
                    parameter.grad = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # ZeRO shows the optimizer one group at a time, and none of them afterwards.
        stepped = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
        self._are_weights_finite = self._are_weights_finite and _are_finite(stepped)

    def _is_update_finite(self, optimizer: torch.optim.Optimizer) -> bool:
        gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        is_finite = _are_finite(gradients, [loss for loss, _ in self._losses])
        # ZeRO's norm covers the groups whose step is yet to come.
        norm = self._optimizer._global_grad_norm if zero.is_optimizer(self._optimizer) else None
        is_finite = is_finite and (norm is None or bool(torch.isfinite(torch.as_tensor(norm))))
        if not any_rank(self.accelerator, not is_finite):
            self.num_in_a_row = 0
            return True
        self._refuse_everywhere()
        return False

    def _bad_losses(self) -> list[tuple[float, list[int]]]:
        losses = torch.stack([loss for loss, _ in self._losses]).tolist() if self._losses else []
        return [(loss, ids) for loss, (_, ids) in zip(losses, self._losses, strict=True) if not math.isfinite(loss)]

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
                f"{what} {self.max_skipped_updates} updates in a row were skipped before it (`max_skipped_updates`), "
                "so most likely the weights are at fault and not these rows. Nothing was updated since. Go back to an "
                "earlier checkpoint with a lower `learning_rate`."
            )
        logger.warning("%s This update was skipped, %d so far.", what, self.num_skipped)


def _are_finite(tensors: Iterable[torch.Tensor], losses: Sequence[torch.Tensor] = ()) -> bool:
    """Whether all elements that this rank holds are finite, and all losses; one wait for the device."""
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    # The largest of all, without a copy of any; a rank may hold nothing of some.
    largest = get_total_norm([each for each in local if each.numel()], float("inf"))
    return bool(torch.stack([largest, *(loss.to(largest) for loss in losses)]).isfinite().all())


def check_weights(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse to write weights that are not finite, with a `FloatingPointError` that names the first."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise FloatingPointError(
            f"{len(bad)} of the drafter's {len(tensors)} tensors are not finite, {bad[0]!r} first. They were not "
            "written: resume from the last checkpoint with a lower `learning_rate`."
        )
