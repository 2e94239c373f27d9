# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The weighted divergence of many rows from hidden states, with one chunk of logits alive at a time.

Each chunk is projected, compared and differentiated in one go: its logits are overwritten by their gradient, and only
the gradient behind the head is kept. Knows no anchors, trainers or process groups.

Shape letters:  N = rows, M = target states (in private code also rows of nonzero weight), C = rows of one chunk,
S = target states of one chunk, b = rows of one block of a chunk, H = hidden size, W = H and the rank of a selector,
V = vocabulary of the target, D = vocabulary of the drafter (`D == V` unless it is reduced)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import fused
from .budget import Chunk, cut_chunks, fit_budget
from .candidates import Selector, SelectorPass, find_candidates, score
from .comparison import Comparison, Target
from .divergences import NO_TOKEN, accumulation_dtype, check_labels, check_sources, find_wrong_labels, normalise
from .heads import Head, open_head
from .keeping import Verification


@dataclass(frozen=True)
class RowLosses:
    """
    The weighted loss of a set of rows, and detached values of each row (`0` where its weight is `0`).

    Args:
        total (`torch.Tensor` of shape `()`):
            Differentiable `sum_n weights_n * loss_n` in nats, that of a selector included; connected to the graph even
            without rows.
        rows_N (`torch.Tensor` of shape `(N,)`), lost_mass_N (`torch.Tensor` of shape `(N,)`):
            Losses before weighting, in nats, and the target's probability outside the drafter's vocabulary.
        kept_N (`torch.Tensor` of shape `(N,)` or `None`): Chance that the draft is kept, where it was asked for.
        selector_N (`torch.Tensor` of shape `(N,)` or `None`), is_found_N (the same):
            With a selector, the loss of its choice before weighting, and whether the label under `"ce"`, the target's
            likeliest token otherwise, was among the candidates (1 or 0).
    """

    total: Tensor
    rows_N: Tensor
    lost_mass_N: Tensor
    kept_N: Tensor | None = None
    selector_N: Tensor | None = None
    is_found_N: Tensor | None = None


def chunked_divergence(
    hidden_NW: Tensor,
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
    verification: Verification | None = None,
    selector: Selector | None = None,
) -> RowLosses:
    """
    Compute the weighted sum of [`divergence`] from hidden states, with one chunk of logits alive at a time.

    First-order gradients are taken together with the loss, and for the head only if it trains; the target is frozen.
    In float16 they are rounded before any loss scaling: prefer bfloat16.

    Args:
        hidden_NW (`torch.Tensor` of shape `(N, W)`), head (`Head`):
            What the drafter's head reads, and behind it what its selector reads; and that head, with `D` logits. It
            may be the target's as well.
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
        verification ([`Verification`], *optional*):
            How drafts are verified, to have `kept_N` from the same logits. Needs the target, under `"ce"` too.
        selector ([`Selector`], *optional*):
            What chooses among the likeliest tokens: its loss is added with the same weights, see [`SelectorPass`].

    Returns:
        `RowLosses`, its values per row in the order given.

    Raises:
        ValueError: If arguments do not fit together, or a label the drafter lacks has a nonzero weight under `"ce"`.
    """
    check_sources(loss_type, target_head is not None, labels_N)
    if verification is not None and target_head is None:
        raise ValueError("The chance that a draft is kept needs the target, got None. Pass it, or no `verification`.")
    if verification is not None and selector is not None:
        raise ValueError("The chance that a draft is kept is not known where a selector chooses it. Leave one out.")
    if (target_hidden_MH is None) != (target_head is None):
        raise ValueError("Pass `target_hidden_MH` and `target_head` together, or neither: one of them is None.")
    if weights_N.requires_grad:
        raise ValueError("`weights_N` requires a gradient but is a constant of this loss. Detach it.")
    _check_shapes(hidden_NW, [weights_N, labels_N], head, target_head, draft_token_ids)
    num_states = len(hidden_NW if target_hidden_MH is None else target_hidden_MH)
    _check_target_rows(target_rows_N, num_states, len(hidden_NW))
    if loss_type == "ce":
        assert labels_N is not None, "checked above"
        labels_N, needs_target = _draft_labels(labels_N, weights_N, head, target_head, draft_token_ids)
        if not needs_target and verification is None:
            target_head = None  # nothing would be read from it: spare its projection
    is_fused = fused.is_used_for(hidden_NW)
    budget = fit_budget(
        chunk_bytes,
        hidden_NW,
        head,
        target_head,
        is_reduced=draft_token_ids is not None,
        # No kernel takes the chances.
        is_fused=is_fused and verification is None,
        holds_probs=verification is not None and verification.text is not None,
        values_per_row=0 if selector is None else selector.values_per_row,
    )
    chunks = cut_chunks(weights_N, target_rows_N, num_states, budget.rows_per_chunk)
    work = _Work(
        Comparison(
            loss_type,
            draft_token_ids,
            budget.rows_per_block,
            is_fused,
            verification,
            needs_choices=selector is not None,
        ),
        chunks,
        head,
        target_head,
        target_hidden_MH,
        labels_N if loss_type == "ce" else None,
        weights_N.to(accumulation_dtype(hidden_NW)),
        selector,
    )
    parameters: list[Tensor] = []
    if torch.is_grad_enabled():
        # The parameters travel as inputs so that autograd, and through it DDP, sees that this loss trains them.
        own = [*head.parameters, *([] if selector is None else [selector.rows_DR])]
        parameters = list(dict.fromkeys(parameter for parameter in own if parameter.requires_grad))
    else:
        hidden_NW = hidden_NW.detach()
    total, rows_N, lost_mass_N, kept_N, selector_N, is_found_N = _GradInForward.apply(work, hidden_NW, *parameters)
    return RowLosses(
        total,
        rows_N,
        lost_mass_N,
        None if verification is None else kept_N,
        *((None, None) if selector is None else (selector_N, is_found_N)),
    )


@dataclass(frozen=True)
class LabelScores:
    """
    The drafter's log-probability of each row's label, in nats, and whether the label is its argmax; without gradient.

    A label that it has no logit for has `-inf`. Both are of shape `(N,)`, the first in float32 or float64.
    """

    log_probs_N: Tensor
    is_top_N: Tensor


def score_labels(
    hidden_NW: Tensor,
    head: Head,
    labels_N: Tensor,
    *,
    draft_token_ids: Tensor | None,
    chunk_bytes: int,
    selector: Selector | None = None,
) -> LabelScores:
    """
    Return how likely the drafter is to draft each label, with one chunk of logits alive at a time.

    Args:
        labels_N (`torch.LongTensor` of shape `(N,)`): Target ids; `-1` is a label that the drafter lacks.
        hidden_NW, head, draft_token_ids, chunk_bytes, selector: As for [`chunked_divergence`].

    Raises:
        ValueError: If arguments do not fit together.
    """
    _check_shapes(hidden_NW, [labels_N], head, None, draft_token_ids)
    draft_labels_N = labels_N if draft_token_ids is None else _map_labels(labels_N, draft_token_ids)
    is_known_N = (draft_labels_N >= 0) & (draft_labels_N < head.vocab_size)
    dtype = accumulation_dtype(hidden_NW)
    log_probs_N = torch.full(labels_N.shape, -torch.inf, dtype=dtype, device=hidden_NW.device)
    is_top_N = torch.zeros_like(is_known_N)
    budget = fit_budget(
        chunk_bytes,
        hidden_NW,
        head,
        None,
        is_reduced=False,
        is_fused=False,
        values_per_row=0 if selector is None else selector.values_per_row,
    )
    rows_per_block = budget.rows_per_block
    opened = open_head(head)
    kept_M = is_known_N.nonzero().squeeze(1)
    for rows_C in kept_M.split(budget.rows_per_chunk):
        hidden_CW = hidden_NW[rows_C]
        logits_CD = opened.project(hidden_CW if selector is None else selector.head_columns(hidden_CW))
        labels_C = draft_labels_N[rows_C]
        if selector is not None:
            log_probs_N[rows_C], is_top_N[rows_C] = _score_choices(selector, logits_CD, hidden_CW, labels_C)
            continue
        is_top_N[rows_C] = logits_CD.argmax(dim=1) == labels_C
        for rows_b, logits_bD, labels_b in zip(
            rows_C.split(rows_per_block), logits_CD.split(rows_per_block), labels_C.split(rows_per_block), strict=True
        ):
            log_q_bD = normalise(logits_bD)[0]
            log_probs_N[rows_b] = log_q_bD.gather(1, labels_b.unsqueeze(1)).squeeze(1).to(dtype)
            del log_q_bD  # before the next block's exists
        del logits_CD, logits_bD  # before the next chunk's exist
    return LabelScores(log_probs_N, is_top_N)


def _score_choices(
    selector: Selector, logits_CD: Tensor, hidden_CW: Tensor, labels_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what [`LabelScores`] holds of labels in the drafter's ids, where a selector chooses among candidates."""
    ids_Ck = find_candidates(selector, logits_CD)
    log_q_Ck = normalise(score(selector, logits_CD, hidden_CW, ids_Ck).scores_Ck)[0]
    is_label_Ck = ids_Ck == labels_C.unsqueeze(1)
    is_top_C = is_label_Ck.gather(1, log_q_Ck.argmax(dim=1, keepdim=True)).squeeze(1)
    return log_q_Ck.where(is_label_Ck, -torch.inf).amax(dim=1), is_top_C


@dataclass(frozen=True)
class _Work:
    """What there is to compare, and in which chunks."""

    comparison: Comparison
    chunks: Sequence[Chunk]
    head: Head
    target_head: Head | None
    target_hidden_MH: Tensor | None
    labels_N: Tensor | None
    weights_N: Tensor
    selector: Selector | None

    def read_targets(self) -> Iterator[tuple[Target | None, Tensor, Tensor]]:
        """Yield what each chunk is compared with, its rows, and the place of each row's state."""
        opened = None if self.target_head is None else open_head(self.target_head)
        target = None
        for states_S, rows_C, places_C in self.chunks:
            if states_S is not None and opened is not None:
                assert self.target_hidden_MH is not None
                target = None  # makes room for the next logits
                with torch.no_grad():
                    target = self.comparison.read_target(opened.project(self.target_hidden_MH[states_S]))
            yield target, rows_C, places_C


class _GradInForward(torch.autograd.Function):
    """Differentiate every chunk while its logits exist; the backward pass only scales what was stored."""

    @staticmethod
    def forward(ctx: Any, work: _Work, hidden_NW: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        wants_hidden_grad = ctx.needs_input_grad[1]
        wants_grad = wants_hidden_grad or len(parameters) > 0
        selector, weights_N = work.selector, work.weights_N
        of_head = [parameter for parameter in parameters if selector is None or parameter is not selector.rows_DR]
        opened = open_head(work.head, of_head, wants_hidden_grad)
        choosing = None
        if selector is not None:
            wants_rows_grad = len(of_head) < len(parameters)
            choosing = SelectorPass(selector, work.comparison.loss_type, wants_rows_grad, wants_hidden_grad)
        rows_N, lost_mass_N, kept_N, selector_N, is_found_N = (torch.zeros_like(weights_N) for _ in range(5))
        hidden_grad_NW = torch.zeros_like(hidden_NW) if wants_hidden_grad else None
        # Views, of what the head reads and of what the selector does.
        head_grad_NH, own_grad_NR = hidden_grad_NW, None
        if selector is not None and hidden_grad_NW is not None:
            head_grad_NH, own_grad_NR = selector.head_columns(hidden_grad_NW), selector.own_columns(hidden_grad_NW)
        for target, rows_C, places_C in work.read_targets():
            hidden_CW = hidden_NW[rows_C]
            logits_CD = opened.project(hidden_CW if selector is None else selector.head_columns(hidden_CW))
            weights_C = weights_N[rows_C] if wants_grad else None
            labels_C = None if work.labels_N is None else work.labels_N[rows_C]
            if target is not None and target.text_S is not None:
                kept_N[rows_C] = work.comparison.keep_chances(logits_CD, target, places_C).to(kept_N.dtype)
            if choosing is not None:
                wanted_C = work.comparison.wanted(target, places_C, labels_C)
                target_logits_SD = None if target is None else target.logits_SD
                found = choosing.compare(logits_CD, hidden_CW, wanted_C, target_logits_SD, places_C, weights_C)
                selector_N[rows_C], is_found_N[rows_C] = (each.to(rows_N.dtype) for each in found)
            losses_C = work.comparison.compare(logits_CD, weights_C, target, places_C, labels_C)
            rows_N[rows_C] = losses_C.to(rows_N.dtype)
            if target is not None and target.lost_mass_S is not None:
                lost_mass_N[rows_C] = target.lost_mass_S[places_C].to(rows_N.dtype).clamp(0, 1)
            if wants_grad:
                # What the candidates' scores owe to the logits comes on top of the gradient of the head's loss.
                own_grad_CR = None if choosing is None else choosing.pull_back(logits_CD)
                grad_CH = opened.pull_back(logits_CD)
                if head_grad_NH is not None and grad_CH is not None:
                    head_grad_NH[rows_C] = grad_CH.to(head_grad_NH.dtype)
                if own_grad_NR is not None and own_grad_CR is not None:
                    own_grad_NR[rows_C] = own_grad_CR.to(own_grad_NR.dtype)
            del logits_CD, target  # before the next chunk's exist
        sums = [*opened.sums, *([] if choosing is None or choosing.sum_DR is None else [choosing.sum_DR])]
        sums = (summed.to(tensor.dtype) for summed, tensor in zip(sums, parameters, strict=True))
        ctx.save_for_backward(hidden_grad_NW, *sums)
        ctx.mark_non_differentiable(rows_N, lost_mass_N, kept_N, selector_N, is_found_N)
        total = (rows_N * weights_N).sum()
        if selector is not None:
            total = total + selector.weight * (selector_N * weights_N).sum()
        return total, rows_N, lost_mass_N, kept_N, selector_N, is_found_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return None, *(None if grad is None else grad * grad_total for grad in ctx.saved_tensors)


def _draft_labels(
    labels_N: Tensor, weights_N: Tensor, head: Head, target_head: Head | None, draft_token_ids: Tensor | None
) -> tuple[Tensor, bool]:
    """Return labels in drafter ids, and whether the target has to be read for them."""
    draft_labels_N = labels_N if draft_token_ids is None else _map_labels(labels_N, draft_token_ids)
    counts_N = weights_N != 0
    is_wrong_N = counts_N & find_wrong_labels(draft_labels_N, head.vocab_size, target_head is not None)
    is_missing_N = counts_N & (draft_labels_N == NO_TOKEN)
    has_wrong, has_missing = torch.stack([is_wrong_N.any(), is_missing_N.any()]).tolist()
    if has_wrong:
        check_labels(labels_N[is_wrong_N], draft_labels_N[is_wrong_N], head.vocab_size, target_head is not None)
    # With a reduced vocabulary the target says how much of its mass is lost.
    return draft_labels_N, target_head is not None and (has_missing or draft_token_ids is not None)


def _map_labels(labels_N: Tensor, draft_token_ids: Tensor) -> Tensor:
    """Turn target ids into drafter ids; `NO_TOKEN` stays, ids that the drafter lacks become `NO_TOKEN - 1`."""
    sorted_ids, order = draft_token_ids.sort()
    places_N = torch.searchsorted(sorted_ids, labels_N).clamp(max=len(sorted_ids) - 1)
    draft_labels_N = torch.where(sorted_ids[places_N] == labels_N, order[places_N], NO_TOKEN - 1)
    return torch.where(labels_N == NO_TOKEN, labels_N, draft_labels_N)


def _check_shapes(
    hidden_NW: Tensor,
    rows: Sequence[Tensor | None],
    head: Head,
    target_head: Head | None,
    draft_token_ids: Tensor | None,
) -> None:
    shapes = [hidden_NW.shape[:-1], *(tensor.shape for tensor in rows if tensor is not None)]
    if hidden_NW.dim() != 2 or len(set(shapes)) > 1:
        raise ValueError(f"Hidden states, weights and labels must share one axis of rows, got {shapes}. Flatten them.")
    num_logits = (target_head or head).vocab_size if draft_token_ids is None else len(draft_token_ids)
    if head.vocab_size != num_logits:
        found = f"has {head.vocab_size} logits, expected {num_logits}"
        raise ValueError(f"The drafter's head {found}. Pass their target ids as `draft_token_ids`, one per logit.")


def _check_target_rows(target_rows_N: Tensor | None, num_states: int, num_rows: int) -> None:
    if target_rows_N is None:
        if num_states != num_rows:
            found = f"{num_states} target states for {num_rows} rows"
            raise ValueError(f"Got {found}. Pass the index of each row's state as `target_rows_N`.")
    elif target_rows_N.shape != (num_rows,) or target_rows_N.dtype != torch.long:
        found = f"{target_rows_N.dtype} of shape {tuple(target_rows_N.shape)}"
        raise ValueError(f"`target_rows_N` is {found}, expected one torch.int64 index for each of {num_rows} rows.")
