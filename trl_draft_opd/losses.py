# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Full-vocabulary divergences between the target's and the drafter's next-token distributions, row by row and in chunks.

Each chunk is projected, compared and differentiated in one go, and only the gradient of its hidden states is kept.
This file knows hidden states, heads, labels and weights; it refuses to know anchors, trainers and process groups.

Shape letters:  N = rows, M = rows of nonzero weight, C = rows of one chunk, H = hidden size, V = vocabulary of the
target, D = vocabulary of the drafter (`D == V` unless it is reduced), K = drafts per block
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


LOSS_TYPES = ("forward_kl", "reverse_kl", "jsd", "tv", "lk", "lk_hybrid", "ce")
LK_HYBRID_DECAY = 3.0  # eta of the LK losses, at the value their authors recommend
NO_TOKEN = -1


@dataclass(frozen=True)
class Head:
    """
    Project hidden states to logits, and name the parameters that this projection trains.

    Args:
        project (`Callable`):
            Maps hidden states `(n, H)` to finite logits `(n, vocab_size)`, each row on its own. Called once per chunk.
        parameters (`tuple[nn.Parameter, ...]`):
            All trainable parameters that `project` reads (one left out gets no gradient); empty for a frozen head.
        vocab_size (`int`):
            Number of logits per row.
    """

    project: Callable[[Tensor], Tensor]
    parameters: tuple[nn.Parameter, ...]
    vocab_size: int

    @classmethod
    def linear(cls, weight: Tensor, bias: Tensor | None = None) -> "Head":
        """
        Build a linear head, computed in the dtype of `weight` or of autocast.

        Args:
            weight (`torch.Tensor` of shape `(vocab_size, H)`), bias (`torch.Tensor`, *optional*):
                Those that require a gradient become `parameters`. Under autocast, each chunk casts a frozen weight
                anew: hold it in the dtype of autocast.
        """
        parameters = tuple(tensor for tensor in (weight, bias) if tensor is not None and tensor.requires_grad)
        return cls(lambda hidden_CH: F.linear(hidden_CH.to(weight.dtype), weight, bias), parameters, weight.shape[0])


@dataclass(frozen=True)
class RowLosses:
    """
    Hold the weighted loss of a set of rows, and two detached values of each row (`0` where its weight is `0`).

    Args:
        total (`torch.Tensor` of shape `()`):
            Differentiable `sum_n weights_n * loss_n` in nats, connected to the graph even without rows.
        rows_N (`torch.Tensor` of shape `(N,)`), lost_mass_N (`torch.Tensor` of shape `(N,)`):
            Losses before weighting, in nats, and the target's probability outside the drafter's vocabulary.
    """

    total: Tensor
    rows_N: Tensor
    lost_mass_N: Tensor


def divergence(
    draft_logits_NV: Tensor, target_logits_NV: Tensor | None, labels_N: Tensor | None, loss_type: str
) -> Tensor:
    """
    Compare the drafter's next-token distribution `q` with the target's `p` at temperature 1, in nats per row.

    With `alpha = sum_v min(p(v), q(v))`, the probability that speculative sampling accepts a draft:

    | `loss_type` | value |
    |---|---|
    | `"forward_kl"`, `"reverse_kl"` | `KL(p, q) = sum p log(p / q)`, `KL(q, p)` |
    | `"jsd"` | `KL(p, m) / 2 + KL(q, m) / 2` with `m = (p + q) / 2`, at most `log 2` |
    | `"tv"` | `sum abs(p - q) / 2 = 1 - alpha` |
    | `"lk"` | `-log alpha` |
    | `"lk_hybrid"` | `w KL(p, q) + (1 - w) (1 - alpha)` with `w = exp(-3 alpha)` detached |
    | `"ce"` | `-log q(label)` |

    Source: Leviathan et al., [Fast Inference from Transformers via Speculative
    Decoding](https://huggingface.co/papers/2211.17192), section 3 for `alpha`; Samarin et al., [LK Losses: Direct
    Acceptance Rate Optimization](https://huggingface.co/papers/2602.23881) for `lk` and `lk_hybrid`.

    Args:
        draft_logits_NV (`torch.Tensor` of shape `(N, V)`):
            Finite logits of any floating dtype; accumulated in float32, or float64 if given so.
        target_logits_NV (`torch.Tensor` of shape `(N, V)`, *optional*):
            Finite logits over the same vocabulary. May be `None` under `"ce"` if no label is `-1`.
        labels_N (`torch.LongTensor` of shape `(N,)`, *optional*), loss_type (`str`):
            One of `LOSS_TYPES`; labels are read under `"ce"` only. `-1` says that no token was committed: the target's
            argmax stands in.

    Returns:
        `torch.Tensor` of shape `(N,)`: differentiable losses, float32 or float64.

    Raises:
        ValueError: If `loss_type` is unknown, the shapes differ, or what the loss needs is missing.
    """
    has_target = target_logits_NV is not None
    _check_sources(loss_type, has_target, labels_N)
    if has_target and target_logits_NV.shape != draft_logits_NV.shape:
        shapes = [draft_logits_NV.shape, target_logits_NV.shape]
        raise ValueError(f"Logits of drafter and target have shapes {shapes}. Index both by the same token ids.")
    if loss_type == "ce":
        _check_labels(labels_N, labels_N, draft_logits_NV.shape[1], has_target)
    return _compare_rows(draft_logits_NV, target_logits_NV, labels_N, loss_type)


def chunked_divergence(
    hidden_NH: Tensor,
    head: Head,
    target_hidden_NH: Tensor | None,
    target_head: Head | None,
    *,
    labels_N: Tensor | None,
    weights_N: Tensor,
    loss_type: str,
    draft_token_ids: Tensor | None,
    chunk_bytes: int,
) -> RowLosses:
    """
    Compute the weighted sum of [`divergence`] from hidden states, with one chunk of logits alive at a time.

    First-order gradients are taken together with the loss (none under `torch.no_grad()`), and for the head only if it
    trains; the target is frozen. In float16 they are rounded before any loss scaling: prefer bfloat16.

    Args:
        hidden_NH (`torch.Tensor` of shape `(N, H)`), head (`Head`):
            What the drafter's head reads, and that head, with `D` logits. It may be the target's as well.
        target_hidden_NH (`torch.Tensor` of shape `(N, H_target)`, *optional*), target_head (`Head`, *optional*):
            What the target's head reads at these rows, and that head, with `V` logits. Optional under `"ce"` only.
        labels_N (`torch.LongTensor` of shape `(N,)`, *optional*), loss_type (`str`):
            As in [`divergence`], in target ids; `-1` stands for the target's argmax over the drafter's vocabulary.
        weights_N (`torch.Tensor` of shape `(N,)`):
            Weight of each row, a constant. Rows of weight `0` are never projected, whatever they hold.
        draft_token_ids (`torch.LongTensor` of shape `(D,)`, *optional*):
            Distinct target ids of the drafter's logits; the target is renormalised over them. `None` for the full one.
        chunk_bytes (`int`):
            Size of a chunk's float32 logits (at least one row, larger vocabulary); up to 9 such tensors live at once.

    Returns:
        `RowLosses`: the weighted sum, and the detached values per row.

    Raises:
        ValueError: If arguments do not fit together, or a label the drafter lacks has a nonzero weight under `"ce"`.
    """
    _check_sources(loss_type, target_head is not None, labels_N)
    _check_shapes(hidden_NH, head, target_hidden_NH, target_head, labels_N, weights_N, draft_token_ids)
    kept_M = weights_N.nonzero().squeeze(1)
    if loss_type == "ce":
        draft_labels_N = labels_N if draft_token_ids is None else _map_labels(labels_N, draft_token_ids)
        _check_labels(labels_N[kept_M], draft_labels_N[kept_M], head.vocab_size, target_head is not None)
        labels_N = draft_labels_N
        if draft_token_ids is None and not (labels_N[kept_M] == NO_TOKEN).any():
            target_head = None  # nothing would be read from it: spare its projection
    vocab_size = max(head.vocab_size, target_head.vocab_size if target_head else 0)
    chunks = kept_M.split(max(1, chunk_bytes // (4 * vocab_size))) if len(kept_M) else ()
    chunk_losses = partial(_chunk_losses, head, target_hidden_NH, target_head, labels_N, loss_type, draft_token_ids)
    if not torch.is_grad_enabled():
        return RowLosses(*_GradInForward.apply(chunk_losses, chunks, weights_N, hidden_NH.detach()))
    # The parameters travel as inputs so that autograd, and through it DDP, sees that this loss trains them.
    parameters = dict.fromkeys(parameter for parameter in head.parameters if parameter.requires_grad)
    return RowLosses(*_GradInForward.apply(chunk_losses, chunks, weights_N, hidden_NH, *parameters))


def position_weights(num_drafts: int, decay: float) -> Tensor:
    """
    Weight the slots of a block by their distance from the anchor: `decay ** (k - 1)` at slot `k`.

    Args:
        num_drafts (`int`), decay (`float`):
            Drafts per block `K`, at least 1, and factor per slot, in `(0, 1]`.

    Returns:
        `torch.FloatTensor` of shape `(K,)`: weights of slots `1..K`, on the CPU.

    Raises:
        ValueError: If an argument is out of range.
    """
    if num_drafts < 1:
        raise ValueError(f"`num_drafts` must be at least 1, got {num_drafts}. Count the drafts without the anchor.")
    if not 0 < decay <= 1:
        raise ValueError(f"`decay` must be in (0, 1], got {decay}. Use 1 to weight all slots alike.")
    return (decay ** torch.arange(num_drafts, dtype=torch.float64)).float()


def stream_scale(weight_sum: Tensor | float, stream_weight: float, total_stream_weight: float) -> Tensor | float:
    """
    Compute the factor `stream_weight / (weight_sum * total_stream_weight)` that each row weight of a stream carries.

    Args:
        weight_sum (`torch.Tensor` or `float`):
            Sum of the stream's row weights over the whole optimiser step (all micro-batches, all ranks), at least 0.
            Used as it is: decayed weights of few slots may well sum to less than 1.
        stream_weight (`float`), total_stream_weight (`float`):
            Weight of this stream, at least 0, and of all streams together, empty ones included, above 0.

    Returns:
        `torch.Tensor` or `float`, as `weight_sum`: the factor; `0` if the stream is empty (the other keeps its share).

    Raises:
        ValueError: If a stream weight is out of range.
    """
    if not 0 <= stream_weight <= total_stream_weight or total_stream_weight == 0:
        given = f"{stream_weight} of {total_stream_weight}"
        raise ValueError(f"Stream weights must be at least 0 and not all 0, got {given}. Give one a positive weight.")
    if isinstance(weight_sum, Tensor):
        is_empty = weight_sum == 0
        return torch.where(is_empty, 0, stream_weight / total_stream_weight / torch.where(is_empty, 1, weight_sum))
    return stream_weight / total_stream_weight / weight_sum if weight_sum else 0.0


class _GradInForward(torch.autograd.Function):
    """Differentiate every chunk while its logits exist; the backward pass only scales what was stored."""

    @staticmethod
    def forward(ctx, chunk_losses, chunks, weights_N, hidden_NH, *parameters):
        wants_hidden_grad = ctx.needs_input_grad[3]
        weights_N = weights_N.to(_accumulation_dtype(hidden_NH))
        rows_N, lost_mass_N = torch.zeros_like(weights_N), torch.zeros_like(weights_N)
        hidden_grad_NH = torch.zeros_like(hidden_NH) if wants_hidden_grad else None
        # A sum over many chunks would lose its small terms in bfloat16.
        parameter_grads = [torch.zeros_like(tensor, dtype=_accumulation_dtype(tensor)) for tensor in parameters]
        for rows_C in chunks:
            hidden_CH = hidden_NH[rows_C].requires_grad_(wants_hidden_grad)
            inputs = (hidden_CH, *parameters) if wants_hidden_grad else parameters
            with torch.set_grad_enabled(len(inputs) > 0):
                losses_C, lost_mass_C = chunk_losses(rows_C, hidden_CH)
                chunk_total = (losses_C * weights_N[rows_C]).sum()
            grads = torch.autograd.grad(chunk_total, inputs) if inputs else ()
            if wants_hidden_grad:
                hidden_grad_NH[rows_C], *grads = grads
            for summed, grad in zip(parameter_grads, grads, strict=True):
                summed.add_(grad)
            rows_N[rows_C] = losses_C.detach().to(rows_N.dtype)
            lost_mass_N[rows_C] = lost_mass_C.to(rows_N.dtype).clamp(0, 1)
        ctx.save_for_backward(
            hidden_grad_NH, *(g.to(p.dtype) for g, p in zip(parameter_grads, parameters, strict=True))
        )
        ctx.mark_non_differentiable(rows_N, lost_mass_N)
        return (rows_N * weights_N).sum(), rows_N, lost_mass_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, _grad_rows_N, _grad_lost_mass_N):
        return None, None, None, *(None if grad is None else grad * grad_total for grad in ctx.saved_tensors)


def _chunk_losses(head, target_hidden_NH, target_head, labels_N, loss_type, draft_token_ids, rows_C, hidden_CH):
    """Return losses and lost mass of one chunk; its logits live no longer than the graph of the losses."""
    lost_mass_C, target_logits_CD = torch.zeros(len(rows_C), device=rows_C.device), None
    if target_head is not None:
        with torch.no_grad():
            target_logits_CD = target_head.project(target_hidden_NH[rows_C])
            if draft_token_ids is not None:
                dtype = _accumulation_dtype(target_logits_CD)
                lost_mass_C = 1 - target_logits_CD.softmax(1, dtype).index_select(1, draft_token_ids).sum(dim=1)
                target_logits_CD = target_logits_CD.index_select(1, draft_token_ids)
    labels_C = labels_N[rows_C] if loss_type == "ce" else None
    return _compare_rows(head.project(hidden_CH), target_logits_CD, labels_C, loss_type), lost_mass_C


def _compare_rows(draft_logits_NV, target_logits_NV, labels_N, loss_type):
    log_q_NV = draft_logits_NV.to(_accumulation_dtype(draft_logits_NV)).log_softmax(dim=1)
    if loss_type == "ce":
        if target_logits_NV is not None:
            labels_N = torch.where(labels_N == NO_TOKEN, target_logits_NV.argmax(dim=1), labels_N)
        return -log_q_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1)
    log_p_NV = target_logits_NV.to(_accumulation_dtype(target_logits_NV)).log_softmax(dim=1)
    if loss_type == "forward_kl":
        return _kl(log_p_NV, log_q_NV)
    if loss_type == "reverse_kl":
        return _kl(log_q_NV, log_p_NV)
    if loss_type == "jsd":
        log_m_NV = torch.logaddexp(log_p_NV, log_q_NV) - math.log(2)
        return (_kl(log_p_NV, log_m_NV) + _kl(log_q_NV, log_m_NV)) / 2
    if loss_type == "lk":
        # In the log domain alpha cannot underflow, so rows that agree nowhere keep a finite loss and a gradient.
        return -torch.minimum(log_p_NV, log_q_NV).logsumexp(dim=1)
    tv_N = (log_p_NV.exp() - log_q_NV.exp()).abs().sum(dim=1) / 2
    if loss_type == "tv":
        return tv_N
    kl_share_N = torch.exp(-LK_HYBRID_DECAY * (1 - tv_N.detach()))
    return kl_share_N * _kl(log_p_NV, log_q_NV) + (1 - kl_share_N) * tv_N


def _kl(log_a_NV, log_b_NV):
    # Log-probabilities of finite logits are finite, so an `a` that underflows to 0 contributes 0 and not NaN.
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(dim=1)


def _accumulation_dtype(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)


def _map_labels(labels_N, draft_token_ids):
    """Turn target ids into drafter ids; `NO_TOKEN` stays, ids that the drafter lacks become `NO_TOKEN - 1`."""
    sorted_ids, order = draft_token_ids.sort()
    places_N = torch.searchsorted(sorted_ids, labels_N).clamp(max=len(sorted_ids) - 1)
    draft_labels_N = torch.where(sorted_ids[places_N] == labels_N, order[places_N], NO_TOKEN - 1)
    return torch.where(labels_N == NO_TOKEN, labels_N, draft_labels_N)


def _check_sources(loss_type, has_target, labels_N):
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"Unknown loss_type {loss_type!r}. Choose one of {', '.join(LOSS_TYPES)}.")
    if loss_type == "ce" and labels_N is None:
        raise ValueError("loss_type 'ce' needs labels, got None. Pass token ids, or -1 for the target's argmax.")
    if loss_type != "ce" and not has_target:
        raise ValueError(f"loss_type {loss_type!r} needs a target, got None. Pass it, or use 'ce' with labels.")


def _check_shapes(hidden_NH, head, target_hidden_NH, target_head, labels_N, weights_N, draft_token_ids):
    if (target_hidden_NH is None) != (target_head is None):
        raise ValueError("Pass `target_hidden_NH` and `target_head` together, or neither: one of them is None.")
    shapes = [tensor.shape[:-1] for tensor in (hidden_NH, target_hidden_NH) if tensor is not None]
    shapes += [tensor.shape for tensor in (weights_N, labels_N) if tensor is not None]
    if hidden_NH.dim() != 2 or len(set(shapes)) > 1:
        raise ValueError(f"Hidden states, weights and labels must share one axis of rows, got {shapes}. Flatten them.")
    if weights_N.requires_grad:
        raise ValueError("`weights_N` requires a gradient but is a constant of this loss. Detach it.")
    num_logits = (target_head or head).vocab_size if draft_token_ids is None else len(draft_token_ids)
    if head.vocab_size != num_logits:
        found = f"has {head.vocab_size} logits, expected {num_logits}"
        raise ValueError(f"The drafter's head {found}. Pass their target ids as `draft_token_ids`, one per logit.")


def _check_labels(labels_M, draft_labels_M, vocab_size, has_target):
    is_wrong_M = (draft_labels_M < (NO_TOKEN if has_target else 0)) | (draft_labels_M >= vocab_size)
    if is_wrong_M.any():
        raise ValueError(
            f"{int(is_wrong_M.sum())} labels, the first of them {int(labels_M[is_wrong_M][0])}, are not among the "
            f"drafter's {vocab_size} tokens (nor -1 beside a target). Give their rows the weight 0 under 'ce'."
        )
