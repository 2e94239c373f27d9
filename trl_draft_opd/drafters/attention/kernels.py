# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Attention of one tile of queries over its slice of the context: a kernel per device, with one meaning.

Every kernel returns the output and the log-sum-exp over the context alone. The backward pass is handed both, and what
it is handed may be merged with another part of the softmax: its formulas then differentiate the merged softmax.

Shape letters:  B = sequences, Q = queries of the tile, L = context entries of the tile, h = query heads,
                g = key/value heads, r = h / g, d = head dimension
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .own_keys import softmax_dtype


# Puts -inf into `(B, heads, ..., L)` scores of what a query does not see; `None` where all see all.
Hide = Callable[[Tensor], Tensor] | None

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash(query: Tensor, key: Tensor, value: Tensor, hide: Hide, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the output `(B, h, Q, d)` and log-sum-exp `(B, h, Q)` from the fused kernel of the CPU."""
    return _flash(query, key, value, attn_mask=_mask(query, key, hide), scale=scaling)


def flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, hide: Hide, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value for given output and log-sum-exp."""
    mask = _mask(query, key, hide)
    return _flash_backward(grad, query, key, value, out, lse, 0.0, False, attn_mask=mask, scale=scaling)


def _mask(query: Tensor, key: Tensor, hide: Hide) -> Tensor | None:
    """Return what the kernel adds to the scores: one row per query, all heads alike."""
    return None if hide is None else hide(query.new_zeros(query.shape[0], 1, query.shape[2], key.shape[2]))


def products(query: Tensor, key: Tensor, value: Tensor, hide: Hide, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the same from matrix products alone, for every device; one tile's scores exist at a time."""
    r = query.shape[1] // key.shape[1]
    scores = _scores(_fold(query, r), key, hide, scaling)
    lse = scores.logsumexp(dim=-1)
    weights = scores.sub_(lse[..., None]).exp_().to(value.dtype)
    return _unfold(weights @ value, r), _unfold(lse[..., None], r)[..., 0]


def products_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, hide: Hide, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same gradients from matrix products alone."""
    r = query.shape[1] // key.shape[1]
    delta = (grad * out).sum(dim=-1, keepdim=True, dtype=softmax_dtype(query))
    query, grad = _fold(query, r), _fold(grad, r)
    weights = _scores(query, key, hide, scaling).sub_(_fold(lse[..., None], r)).exp_()
    grad_value = weights.to(grad.dtype).transpose(-1, -2) @ grad
    grad_scores = (grad @ value.transpose(-1, -2)).to(weights.dtype).sub_(_fold(delta, r))
    grad_scores = grad_scores.mul_(weights).mul_(scaling).to(query.dtype)
    return _unfold(grad_scores @ key, r), grad_scores.transpose(-1, -2) @ query, grad_value


def _scores(query: Tensor, key: Tensor, hide: Hide, scaling: float) -> Tensor:
    """Return scores `(B, g, r Q, L)` in the softmax's precision."""
    scores = (query @ key.transpose(-1, -2)).to(softmax_dtype(query)).mul_(scaling)
    return scores if hide is None else hide(scores)


def _fold(rows: Tensor, r: int) -> Tensor:
    """Turn `(B, h, Q, n)` into `(B, g, r Q, n)`: heads that share a key are rows, so that no key is copied."""
    return rows.unflatten(1, (-1, r)).flatten(2, 3)


def _unfold(rows: Tensor, r: int) -> Tensor:
    """Turn `(B, g, r Q, n)` into `(B, h, Q, n)`."""
    return rows.unflatten(2, (r, -1)).flatten(1, 2)
