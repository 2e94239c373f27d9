# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The weighted divergence of many rows from hidden states, with one chunk of logits alive at a time.

Each chunk is projected, compared and differentiated in one go: its logits are overwritten by their gradient, and only
the gradient behind the head is kept. Knows no anchors, trainers or process groups.

Shape letters:  N = rows, M = target states (in private code also rows of nonzero weight), C = rows of one chunk,
S = target states of one chunk, b = rows of one block of a chunk, H = hidden size, V = vocabulary of the target,
D = vocabulary of the drafter (`D == V` unless it is reduced)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import (
    NO_TOKEN,
    accumulation_dtype,
    check_labels,
    check_sources,
    differentiate,
    differentiate_ce,
    normalise,
)


NUM_TEMPORARIES = 5  # rows of logits in the accumulation dtype that comparing one row takes, at most
# What part of the budget is for them: small blocks of rows stay in the cache of a CPU, few blocks suit a GPU.
BLOCK_SHARE, BLOCK_SHARE_CPU = 1 / 4, 1 / 16


@dataclass(frozen=True)
class Head:
    """
    Project hidden states to logits, and name the parameters that this projection trains.

    Args:
        project (`Callable`):
            Maps hidden states `(n, H)` to finite logits `(n, vocab_size)`, each row on its own, called once per chunk.
            These logits are overwritten by their gradient, so its backward pass must not need them: it may end in a
            product, a scale or a soft cap, not in `log_softmax` (autograd then raises a `RuntimeError`).
        parameters (`tuple[torch.Tensor, ...]`):
            All trainable parameters that `project` reads (one left out gets no gradient); empty for a frozen head.
        vocab_size (`int`): Logits per row.
        num_buffers (`int`, defaults to `1`):
            Tensors of logits that `project` and its backward pass hold at once, the result included: 1 for a product,
            2 if it is scaled, 4 if it is soft-capped. Too small a number only exceeds `chunk_bytes`.
    """

    project: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    vocab_size: int
    num_buffers: int = 1
    # Set by `linear`: `project` is a product with this matrix. `replace` drops it with the projection.
    weight: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def linear(cls, weight: Tensor, bias: Tensor | None = None) -> "Head":
        """
        Build a linear head of a weight `(vocab_size, H)`, computed in its dtype or that of autocast.

        Under autocast, each chunk casts a frozen weight anew: hold it in the dtype of autocast.
        """
        parameters = tuple(tensor for tensor in (weight, bias) if tensor is not None and tensor.requires_grad)
        head = cls(lambda hidden_CH: F.linear(hidden_CH.to(weight.dtype), weight, bias), parameters, weight.shape[0])
        object.__setattr__(head, "weight", weight)
        return head


@dataclass(frozen=True)
class RowLosses:
    """
    The weighted loss of a set of rows, and two detached values of each row (`0` where its weight is `0`).

    Args:
        total (`torch.Tensor` of shape `()`):
            Differentiable `sum_n weights_n * loss_n` in nats, connected to the graph even without rows.
        rows_N (`torch.Tensor` of shape `(N,)`), lost_mass_N (`torch.Tensor` of shape `(N,)`):
            Losses before weighting, in nats, and the target's probability outside the drafter's vocabulary.
    """

    total: Tensor
    rows_N: Tensor
    lost_mass_N: Tensor


def chunked_divergence(
    hidden_NH: Tensor,
    head: Head,
    target_hidden_MH: Tensor | None,
    target_head: Head | None,
    *,
    target_rows_N: Tensor | None,
    labels_N: Tensor | None,
    weights_N: Tensor,
    loss_type: str,
    draft_token_ids: Tensor | None,
    chunk_bytes: int,
) -> RowLosses:
    """
    Compute the weighted sum of [`divergence`] from hidden states, with one chunk of logits alive at a time.

    First-order gradients are taken together with the loss, and for the head only if it trains; the target is frozen.
    In float16 they are rounded before any loss scaling: prefer bfloat16.

    Args:
        hidden_NH (`torch.Tensor` of shape `(N, H)`), head (`Head`):
            What the drafter's head reads, and that head, with `D` logits. It may be the target's as well.
        target_hidden_MH (`torch.Tensor` of shape `(M, H_target)`, *optional*), target_head (`Head`, *optional*):
            What the target's head reads at its distinct states, and that head, with `V` logits; each state is
            projected once. Optional under `"ce"` only.
        target_rows_N (`torch.LongTensor` of shape `(N,)`, *optional*):
            Index of the state each row is compared with, in `0..M-1`. `None` where row `n` has state `n` to itself.
        labels_N (`torch.LongTensor` of shape `(N,)`, *optional*), loss_type (`str`):
            As in [`divergence`], in target ids; `-1` stands for the target's argmax over the drafter's vocabulary.
        weights_N (`torch.Tensor` of shape `(N,)`):
            Weight of each row, a constant. Rows of weight `0` are never projected, whatever they hold.
        draft_token_ids (`torch.LongTensor` of shape `(D,)`, *optional*):
            Distinct target ids of the drafter's logits; the target is renormalised over them. `None` for the full one.
        chunk_bytes (`int`):
            Budget of all logit-sized tensors alive at a time, counted in float32 (float64 if given so). Exceeded only
            if one row does not fit. The gradient of a head that trains is beside it.

    Returns:
        `RowLosses`, its values per row in the order given.

    Raises:
        ValueError: If arguments do not fit together, or a label the drafter lacks has a nonzero weight under `"ce"`.
    """
    check_sources(loss_type, target_head is not None, labels_N)
    if (target_hidden_MH is None) != (target_head is None):
        raise ValueError("Pass `target_hidden_MH` and `target_head` together, or neither: one of them is None.")
    if weights_N.requires_grad:
        raise ValueError("`weights_N` requires a gradient but is a constant of this loss. Detach it.")
    _check_shapes(hidden_NH, [weights_N, labels_N], head, target_head, draft_token_ids)
    kept_M = weights_N.nonzero().squeeze(1)
    _check_target_rows(target_rows_N, kept_M, target_hidden_MH, len(hidden_NH))
    if loss_type == "ce":
        assert labels_N is not None, "checked above"
        draft_labels_N = labels_N if draft_token_ids is None else _map_labels(labels_N, draft_token_ids)
        check_labels(labels_N[kept_M], draft_labels_N[kept_M], head.vocab_size, target_head is not None)
        labels_N = draft_labels_N
        if draft_token_ids is None and not (labels_N[kept_M] == NO_TOKEN).any():
            target_head = None  # nothing would be read from it: spare its projection
    is_reduced = draft_token_ids is not None
    rows_per_chunk, rows_per_block = _fit_budget(chunk_bytes, hidden_NH, head, target_head, is_reduced)
    comparison = _Comparison(head, target_head, target_hidden_MH, labels_N, loss_type, draft_token_ids, rows_per_block)
    chunks = _cut_chunks(kept_M, target_rows_N, rows_per_chunk)
    parameters: list[Tensor] = []
    if torch.is_grad_enabled():
        # The parameters travel as inputs so that autograd, and through it DDP, sees that this loss trains them.
        parameters = list(dict.fromkeys(parameter for parameter in head.parameters if parameter.requires_grad))
    else:
        hidden_NH = hidden_NH.detach()
    return RowLosses(*_GradInForward.apply(comparison, chunks, weights_N, hidden_NH, *parameters))


@dataclass(frozen=True)
class LabelScores:
    """
    The drafter's log-probability of each row's label, in nats, and whether the label is its argmax; without gradient.

    A label that it has no logit for has `-inf`. Both are of shape `(N,)`, the first in float32 or float64.
    """

    log_probs_N: Tensor
    is_top_N: Tensor


def score_labels(
    hidden_NH: Tensor, head: Head, labels_N: Tensor, *, draft_token_ids: Tensor | None, chunk_bytes: int
) -> LabelScores:
    """
    Return how likely the drafter is to draft each label, with one chunk of logits alive at a time.

    Args:
        labels_N (`torch.LongTensor` of shape `(N,)`): Target ids; `-1` is a label that the drafter lacks.
        hidden_NH, head, draft_token_ids, chunk_bytes: As for [`chunked_divergence`].

    Raises:
        ValueError: If arguments do not fit together.
    """
    _check_shapes(hidden_NH, [labels_N], head, None, draft_token_ids)
    draft_labels_N = labels_N if draft_token_ids is None else _map_labels(labels_N, draft_token_ids)
    is_known_N = (draft_labels_N >= 0) & (draft_labels_N < head.vocab_size)
    dtype = accumulation_dtype(hidden_NH)
    log_probs_N = torch.full(labels_N.shape, -torch.inf, dtype=dtype, device=hidden_NH.device)
    is_top_N = torch.zeros_like(is_known_N)
    rows_per_chunk, rows_per_block = _fit_budget(chunk_bytes, hidden_NH, head, None, False)
    kept_M = is_known_N.nonzero().squeeze(1)
    for rows_C in kept_M.split(rows_per_chunk):
        # Not under `no_grad`: older torch's autocast would cache the head's weight without its gradient.
        logits_CD = head.project(hidden_NH[rows_C].detach()).detach()
        labels_C = draft_labels_N[rows_C]
        is_top_N[rows_C] = logits_CD.argmax(dim=1) == labels_C
        for rows_b, logits_bD, labels_b in zip(
            rows_C.split(rows_per_block), logits_CD.split(rows_per_block), labels_C.split(rows_per_block), strict=True
        ):
            log_q_bD = normalise(logits_bD)[0]
            log_probs_N[rows_b] = log_q_bD.gather(1, labels_b.unsqueeze(1)).squeeze(1).to(dtype)
            del log_q_bD  # before the next block's exists
        del logits_CD, logits_bD  # before the next chunk's exist
    return LabelScores(log_probs_N, is_top_N)


# The target states to project (`None`: those of the chunk before), the rows, and the place of each row's state.
_Chunk = tuple[Tensor | None, Tensor, Tensor]


class _GradInForward(torch.autograd.Function):
    """Differentiate every chunk while its logits exist; the backward pass only scales what was stored."""

    @staticmethod
    def forward(
        ctx: Any,
        comparison: "_Comparison",
        chunks: Iterable[_Chunk],
        weights_N: Tensor,
        hidden_NH: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden_grad = ctx.needs_input_grad[3]
        wants_grad = wants_hidden_grad or len(parameters) > 0
        weights_N = weights_N.to(accumulation_dtype(hidden_NH))
        rows_N, lost_mass_N = torch.zeros_like(weights_N), torch.zeros_like(weights_N)
        hidden_grad_NH = torch.zeros_like(hidden_NH) if wants_hidden_grad else None
        # A sum over many chunks would lose its small terms in bfloat16.
        parameter_grads = [torch.zeros_like(tensor, dtype=accumulation_dtype(tensor)) for tensor in parameters]
        target = None
        for states_S, rows_C, places_C in chunks:
            if states_S is not None and comparison.target_head is not None:
                target = None  # makes room for the next logits
                target = comparison.read_target(states_S)
            hidden_CH = hidden_NH[rows_C].requires_grad_(wants_hidden_grad)
            with torch.set_grad_enabled(wants_grad):
                logits_CD = comparison.head.project(hidden_CH)
            weights_C = weights_N[rows_C] if wants_grad else None
            losses_C = comparison.compare(logits_CD.detach(), weights_C, target, rows_C, places_C)
            rows_N[rows_C] = losses_C.to(rows_N.dtype)
            if target is not None:
                lost_mass_N[rows_C] = target.lost_mass_S[places_C].to(rows_N.dtype).clamp(0, 1)
            if wants_grad:
                grad_CH = _pull_back(comparison.head, logits_CD, hidden_CH, parameters, parameter_grads)
                if hidden_grad_NH is not None and grad_CH is not None:
                    hidden_grad_NH[rows_C] = grad_CH
            del logits_CD  # before the next chunk's exist
        ctx.save_for_backward(
            hidden_grad_NH, *(g.to(p.dtype) for g, p in zip(parameter_grads, parameters, strict=True))
        )
        ctx.mark_non_differentiable(rows_N, lost_mass_N)
        return (rows_N * weights_N).sum(), rows_N, lost_mass_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return None, None, None, *(None if grad is None else grad * grad_total for grad in ctx.saved_tensors)


@dataclass(frozen=True)
class _Target:
    """What rows are compared with: the target's logits, or under `ce` only the token it would choose."""

    logits_SD: Tensor | None
    choices_S: Tensor | None
    lost_mass_S: Tensor


@dataclass(frozen=True)
class _Comparison:
    """Compares chunks with the target. Blocks of few rows keep the temporaries small, and on the CPU in its cache."""

    head: Head
    target_head: Head | None
    target_hidden_MH: Tensor | None
    labels_N: Tensor | None
    loss_type: str
    draft_token_ids: Tensor | None
    rows_per_block: int

    def read_target(self, states_S: Tensor) -> _Target:
        assert self.target_head is not None and self.target_hidden_MH is not None
        with torch.no_grad():
            logits_SD = self.target_head.project(self.target_hidden_MH[states_S])
            if self.draft_token_ids is None:
                lost_mass_S = torch.zeros(len(states_S), device=states_S.device)
            else:
                logits_SD, lost_mass_S = self._reduce(logits_SD, self.draft_token_ids)
            if self.loss_type == "ce":
                return _Target(None, logits_SD.argmax(dim=1), lost_mass_S)
            return _Target(logits_SD, None, lost_mass_S)

    def _reduce(self, logits_SV: Tensor, draft_token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the drafter's vocabulary, and the probability of all others."""
        logits_SD = logits_SV.new_empty(len(logits_SV), len(draft_token_ids))
        lost_mass_S = logits_SV.new_empty(len(logits_SV), dtype=accumulation_dtype(logits_SV))
        for block in self._blocks(len(logits_SV)):
            probs_bV = logits_SV[block].softmax(1, lost_mass_S.dtype)
            lost_mass_S[block] = 1 - probs_bV.index_select(1, draft_token_ids).sum(dim=1)
            logits_SD[block] = logits_SV[block].index_select(1, draft_token_ids)
        return logits_SD, lost_mass_S

    def compare(
        self, logits_CD: Tensor, weights_C: Tensor | None, target: _Target | None, rows_C: Tensor, places_C: Tensor
    ) -> Tensor:
        """Return the losses of a chunk; given weights, overwrite its logits with the gradient of the weighted sum."""
        labels_C = self.labels_N[rows_C] if self.loss_type == "ce" and self.labels_N is not None else None
        if labels_C is not None and target is not None and target.choices_S is not None:
            labels_C = torch.where(labels_C == NO_TOKEN, target.choices_S[places_C], labels_C)
        losses_C = logits_CD.new_empty(len(rows_C), dtype=accumulation_dtype(logits_CD))
        for block in self._blocks(len(rows_C)):
            if labels_C is not None:
                found = differentiate_ce(logits_CD[block], labels_C[block])
            else:
                assert target is not None and target.logits_SD is not None, "read for every loss but `ce`"
                target_logits_bD = target.logits_SD.index_select(0, places_C[block])
                found = differentiate(logits_CD[block], target_logits_bD, self.loss_type)
                del target_logits_bD
            losses_C[block], grad_bD = found
            if weights_C is not None:
                torch.mul(grad_bD, weights_C[block].unsqueeze(1).to(grad_bD.dtype), out=logits_CD[block])
            del found, grad_bD  # before the next block's temporaries exist
        return losses_C

    def _blocks(self, num_rows: int) -> list[slice]:
        return [slice(first, first + self.rows_per_block) for first in range(0, num_rows, self.rows_per_block)]


def _fit_budget(
    chunk_bytes: int, hidden_NH: Tensor, head: Head, target_head: Head | None, is_reduced: bool
) -> tuple[int, int]:
    """Return how many rows, and as many target states, make a chunk of at most `chunk_bytes`, and how many a block."""
    num_logits = chunk_bytes // accumulation_dtype(hidden_NH).itemsize
    block_share = BLOCK_SHARE_CPU if hidden_NH.device.type == "cpu" else BLOCK_SHARE
    draft_vocab, target_vocab = head.vocab_size, target_head.vocab_size if target_head else 0
    temporaries = NUM_TEMPORARIES * max(draft_vocab, target_vocab)
    rows_per_block = max(1, int(num_logits * block_share) // temporaries)
    while_reading = target_vocab * target_head.num_buffers if target_head else 0
    if target_head and is_reduced:
        while_reading = max(while_reading, target_vocab + draft_vocab)
    while_comparing = draft_vocab * (head.num_buffers + (target_head is not None))
    rows_per_chunk = (num_logits - rows_per_block * temporaries) // max(while_reading, while_comparing)
    return max(1, rows_per_chunk), rows_per_block


def _cut_chunks(kept_M: Tensor, target_rows_N: Tensor | None, size: int) -> Iterator[_Chunk]:
    """Order rows by their target state and cut them into even chunks of at most `size` rows and as many states."""
    if target_rows_N is None:
        states, places_M = kept_M, torch.arange(len(kept_M), device=kept_M.device)
    else:
        ordered_states_M, order_M = target_rows_N[kept_M].sort(stable=True)
        kept_M = kept_M[order_M]
        states, places_M = ordered_states_M.unique_consecutive(return_inverse=True)
    cuts = _even_cuts(len(states), size)
    row_cuts = torch.searchsorted(places_M, torch.tensor(cuts, device=places_M.device)).tolist()
    for (first, end), (first_row, end_row) in zip(pairwise(cuts), pairwise(row_cuts), strict=True):
        states_S = states[first:end]
        for start, stop in pairwise(_even_cuts(end_row - first_row, size)):
            rows = slice(first_row + start, first_row + stop)
            yield states_S, kept_M[rows], places_M[rows] - first
            states_S = None


def _even_cuts(length: int, size: int) -> list[int]:
    num_parts = -(-length // size)
    return [length * part // num_parts for part in range(num_parts + 1)] if num_parts else [0]


def _pull_back(
    head: Head, logits_CD: Tensor, hidden_CH: Tensor, parameters: Sequence[Tensor], parameter_grads: list[Tensor]
) -> Tensor | None:
    """Send the gradient in `logits_CD` through the head; return the gradient of the hidden states."""
    grad_CD = logits_CD.detach()
    wanted = [hidden_CH] if hidden_CH.requires_grad else []
    summed_later = []
    for parameter, summed in zip(parameters, parameter_grads, strict=True):
        if parameter is head.weight and parameter.dtype == grad_CD.dtype == summed.dtype:
            # One product adds to the sum in place, where autograd would fill and add another tensor of this size.
            summed.addmm_(grad_CD.T, hidden_CH.detach().to(summed.dtype))
        else:
            wanted.append(parameter)
            summed_later.append(summed)
    grads = list(torch.autograd.grad(logits_CD, wanted, grad_CD)) if wanted else []
    grad_CH = grads.pop(0) if hidden_CH.requires_grad else None
    for summed, grad in zip(summed_later, grads, strict=True):
        summed.add_(grad)
    return grad_CH


def _map_labels(labels_N: Tensor, draft_token_ids: Tensor) -> Tensor:
    """Turn target ids into drafter ids; `NO_TOKEN` stays, ids that the drafter lacks become `NO_TOKEN - 1`."""
    sorted_ids, order = draft_token_ids.sort()
    places_N = torch.searchsorted(sorted_ids, labels_N).clamp(max=len(sorted_ids) - 1)
    draft_labels_N = torch.where(sorted_ids[places_N] == labels_N, order[places_N], NO_TOKEN - 1)
    return torch.where(labels_N == NO_TOKEN, labels_N, draft_labels_N)


def _check_shapes(
    hidden_NH: Tensor,
    rows: Sequence[Tensor | None],
    head: Head,
    target_head: Head | None,
    draft_token_ids: Tensor | None,
) -> None:
    shapes = [hidden_NH.shape[:-1], *(tensor.shape for tensor in rows if tensor is not None)]
    if hidden_NH.dim() != 2 or len(set(shapes)) > 1:
        raise ValueError(f"Hidden states, weights and labels must share one axis of rows, got {shapes}. Flatten them.")
    num_logits = (target_head or head).vocab_size if draft_token_ids is None else len(draft_token_ids)
    if head.vocab_size != num_logits:
        found = f"has {head.vocab_size} logits, expected {num_logits}"
        raise ValueError(f"The drafter's head {found}. Pass their target ids as `draft_token_ids`, one per logit.")


def _check_target_rows(
    target_rows_N: Tensor | None, kept_M: Tensor, target_hidden_MH: Tensor | None, num_rows: int
) -> None:
    num_states = num_rows if target_hidden_MH is None else len(target_hidden_MH)
    if target_rows_N is None:
        if num_states != num_rows:
            found = f"{num_states} target states for {num_rows} rows"
            raise ValueError(f"Got {found}. Pass the index of each row's state as `target_rows_N`.")
        return
    if target_rows_N.shape != (num_rows,) or target_rows_N.dtype != torch.long:
        found = f"{target_rows_N.dtype} of shape {tuple(target_rows_N.shape)}"
        raise ValueError(f"`target_rows_N` is {found}, expected one torch.int64 index for each of {num_rows} rows.")
    used_M = target_rows_N[kept_M]
    is_wrong_M = (used_M < 0) | (used_M >= num_states)
    if is_wrong_M.any():
        found = f"names state {int(used_M[is_wrong_M][0])}, but there are {num_states}"
        raise ValueError(f"`target_rows_N` {found}. Count the rows of `target_hidden_MH` from 0.")
