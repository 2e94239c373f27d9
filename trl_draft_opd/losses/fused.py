# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The divergences in few passes over memory, on CUDA by Triton: losses, and weighted gradients in place of the logits.

Values and gradients are those of `divergences.differentiate` in float32, for any vocabulary, without temporaries of
the logits' size and without a copy of the target's logits per row. Where Triton is missing or fails, one warning says
so and the eager formulas are used.

Shape letters:  C = rows of one chunk, S = target states of one chunk, V = vocabulary of the target, D = of the drafter
"""

import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor


# Logits that a program has at hand, and its warps: two tensors of 16 logits per thread.
BLOCK, NUM_WARPS = 4096, 8
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Passes of `differentiate_kernel` that read the drafter's and the target's logits, beside the pass that writes.
_READS = {
    "forward_kl": (2, 1),
    "reverse_kl": (2, 2),
    "jsd": (3, 2),
    "tv": (3, 2),
    "lk": (3, 2),
    "lk_hybrid": (3, 2),
    "ce": (2, 0),
}

Function = TypeVar("Function", bound=Callable[..., Any])

# Why the kernels are used no more in this process.
_failure: str | None = None


def _uncompiled(function: Function) -> Function:
    """Have `torch.compile` leave a function alone, whose kernels are compiled already."""
    return cast(Function, torch.compiler.disable(function))


def is_used_for(hidden_NH: Tensor) -> bool:
    """Return whether the kernels compare logits of these hidden states: on CUDA, float64 aside, where Triton runs."""
    return hidden_NH.device.type == "cuda" and hidden_NH.dtype != torch.float64 and can_run()


def can_run() -> bool:
    """Return whether there is Triton, and no kernel has failed; warn once if not."""
    return _kernels() is not None and _failure is None


@_uncompiled
def read_target(logits_SV: Tensor, draft_token_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """
    Return the target's logits over the drafter's vocabulary, what normalises them, and the probability of all others.

    Returns:
        `(logits_SD, statistics_2S, lost_mass_S)`: with a full vocabulary the logits as given, and no lost mass. The
        statistics are the largest logit and the logarithm of the sum of exponentials relative to it. `None` if the
        kernel does not run, or not on this dtype.
    """
    if logits_SV.dtype not in LOGIT_DTYPES:
        return None
    num_states, num_logits = logits_SV.shape
    statistics_2S = logits_SV.new_empty(2, num_states, dtype=torch.float32)
    logits_SD, lost_mass_S, num_drafted = logits_SV, None, 0
    if draft_token_ids is not None:
        num_drafted = len(draft_token_ids)
        logits_SD = logits_SV.new_empty(num_states, num_drafted)
        lost_mass_S = logits_SV.new_empty(num_states, dtype=torch.float32)
    has_run = _launch(
        "read_target_kernel",
        num_states,
        logits_SV,
        *logits_SV.stride(),
        draft_token_ids,
        logits_SD,
        statistics_2S,
        lost_mass_S,
        num_states,
        num_logits,
        num_drafted,
        IS_REDUCED=draft_token_ids is not None,
    )
    return (logits_SD, statistics_2S, lost_mass_S) if has_run else None


@_uncompiled
def differentiate(
    draft_logits_CD: Tensor,
    target_logits_SD: Tensor | None,
    statistics_2S: Tensor | None,
    places_C: Tensor,
    labels_C: Tensor | None,
    weights_C: Tensor | None,
    loss_type: str,
) -> Tensor | None:
    """
    Return the loss of each row; given weights, overwrite the drafter's logits with the gradient of the weighted sum.

    Args:
        draft_logits_CD (`torch.Tensor` of shape `(C, D)`): Of a dtype of `LOGIT_DTYPES`.
        target_logits_SD, statistics_2S: From [`read_target`]; not read under `"ce"`.
        places_C (`torch.LongTensor` of shape `(C,)`): Row of the target's logits that each row is compared with.
        labels_C (`torch.LongTensor` of shape `(C,)`, *optional*): Under `"ce"`, tokens in the drafter's ids.
        weights_C (`torch.Tensor` of shape `(C,)`, *optional*): Weight of each row, float32.

    Returns:
        `torch.Tensor` of shape `(C,)`, float32; `None`, with the logits as they were, if the kernel does not run, or
        not on this dtype.
    """
    if draft_logits_CD.dtype not in LOGIT_DTYPES:
        return None
    num_rows, num_logits = draft_logits_CD.shape
    losses_C = draft_logits_CD.new_empty(num_rows, dtype=torch.float32)
    has_run = _launch(
        "differentiate_kernel",
        num_rows,
        draft_logits_CD,
        *draft_logits_CD.stride(),
        target_logits_SD,
        *((0, 0) if target_logits_SD is None else target_logits_SD.stride()),
        statistics_2S,
        places_C,
        labels_C,
        weights_C,
        losses_C,
        0 if statistics_2S is None else statistics_2S.shape[1],
        num_logits,
        LOSS=loss_type,
        WITH_GRAD=weights_C is not None,
    )
    if not has_run:
        return None
    if weights_C is not None:
        # So that autograd refuses a head whose backward pass needs these logits.
        torch.autograd.graph.increment_version(draft_logits_CD)
    return losses_C


def bytes_per_logit(loss_type: str, logit_bytes: int, states_per_row: float, *, has_grad: bool = True) -> float:
    """
    Return the bytes that the kernels load and store per logit of the drafter, over a full vocabulary.

    Counted per pass over the vocabulary: `read_target_kernel` loads each distinct state of the target once;
    `differentiate_kernel` loads the drafter's row once per pass and the target's in those passes that use it, and
    stores the gradient once. What a row has once (weight, label, loss, statistics) is left out, and caches count for
    nothing.

    Args:
        logit_bytes (`int`): Bytes of a logit: 2 under bf16.
        states_per_row (`float`): Distinct target states over rows: 1 where none is shared, 1 / 7 in a TTT of 7 steps.
    """
    of_draft, of_target = _READS[loss_type]
    if not has_grad and loss_type != "forward_kl":
        of_draft, of_target = of_draft - 1, max(0, of_target - 1)
    reading_target = states_per_row if loss_type != "ce" else 0
    return logit_bytes * (of_draft + of_target + has_grad + reading_target)


@cache
def _kernels() -> ModuleType | None:
    try:
        from . import fused_kernels
    except ImportError as error:
        _warn(f"Triton cannot be imported ({error})")
        return None
    return fused_kernels


def _launch(name: str, num_programs: int, *arguments: Any, **constants: Any) -> bool:
    """Run a kernel, one program per row. Return whether it runs; what fails once is tried no more."""
    global _failure
    kernels = _kernels()
    if kernels is None or _failure is not None:
        return False
    kernel: Callable[..., Any] = getattr(kernels, name)[(num_programs,)]
    try:
        with torch.cuda.device_of(arguments[0]):
            # Without contracted products both kernels normalise alike, so that equal logits stay ties.
            kernel(*arguments, **constants, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False)
    except Exception as error:  # noqa: BLE001  compilers raise what they like, and have written nothing then
        _failure = f"{type(error).__name__}: {error}".splitlines()[0]
        _warn(f"The fused divergence does not run on {arguments[0].device} ({_failure})")
        return False
    return True


def _warn(what: str) -> None:
    warnings.warn(f"{what}. The eager formulas are used in its place: the same result, slower.", stacklevel=2)
