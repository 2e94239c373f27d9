# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The part of each query's softmax that lies over its own block's keys, by plain products batched over blocks.

Shape letters:  B = sequences, A = anchors per sequence, S = queries per block, T = keys of a block, Q = A S,
                h = query heads, g = key/value heads, d = head dimension
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def softmax_dtype(tensor: Tensor) -> torch.dtype:
    """Low precision is raised to float32 for the softmax; float64 stays what it is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def block_scores(query: Tensor, keys: Sequence[Tensor], scaling: float, is_causal: bool) -> Tensor:
    """Return the scores of every query with its own block's keys, `(B, h, A, S, T)`; -inf where it is blind."""
    dtype = softmax_dtype(query)
    scores = torch.cat([_pairwise(query.to(dtype), key.to(dtype)) for key in keys], dim=-1).mul_(scaling)
    if is_causal:
        slots = torch.arange(query.shape[3], device=query.device)
        scores.masked_fill_(slots > slots[:, None], float("-inf"))
    return scores


def _pairwise(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of `(B, h, A, S, d)` with `(B, g, A, T, d)` rows of the same block, `(B, h, A, S, T)`."""
    S, T = left.shape[3], right.shape[3]
    grouped = left.unflatten(1, (right.shape[1], -1))
    if S == T == 1:
        # A batch of dot products: the matrix kernel is slow on 1 x 1 results.
        return (grouped * right[:, :, None]).sum(dim=-1, keepdim=True).flatten(1, 2)
    return (grouped @ right[:, :, None].transpose(-1, -2)).flatten(1, 2)


def mix_block(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Return the block's share of the output, `(B, h, Q, d)`."""
    parts = zip(weights.split([v.shape[3] for v in values], dim=-1), values, strict=True)
    mixed = _spread(*next(parts))
    for weight, value in parts:
        mixed.add_(_spread(weight, value))
    return mixed.flatten(2, 3)


def _spread(weight: Tensor, rows: Tensor) -> Tensor:
    """Return `(B, h, A, S, T)` weights times `(B, g, A, T, d)` rows of the same block, `(B, h, A, S, d)`."""
    grouped = weight.unflatten(1, (rows.shape[1], -1))
    return (grouped * rows[:, :, None] if rows.shape[3] == 1 else grouped @ rows[:, :, None]).flatten(1, 2)


def _gather_back(weight: Tensor, rows: Tensor, num_groups: int) -> Tensor:
    """Return weights `(B, h, A, S, T)` transposed, times rows `(B, h, A, S, d)`, per group: `(B, g, A, T, d)`."""
    weight, rows = weight.unflatten(1, (num_groups, -1)), rows.unflatten(1, (num_groups, -1))
    if weight.shape[-2:] == (1, 1):
        return (weight * rows).sum(dim=2)
    return (weight.transpose(-1, -2) @ rows).sum(dim=2)


def block_backward(
    grad: Tensor,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Tensor,
    delta: Tensor,
    scaling: float,
) -> list[Tensor]:
    """Return the block part's gradients of the query, of every key piece and of every value piece."""
    grad_query: Tensor | None = None
    grad_keys, grad_values = [], []
    for weight, key, value in zip(weights.split([k.shape[3] for k in keys], dim=-1), keys, values, strict=True):
        num_groups = key.shape[1]
        grad_values.append(_gather_back(weight, grad, num_groups))
        grad_scores = (_pairwise(grad, value) - delta[..., None]).mul_(weight).mul_(scaling).to(query.dtype)
        part = _spread(grad_scores, key)
        grad_query = part if grad_query is None else grad_query.add_(part)
        grad_keys.append(_gather_back(grad_scores, query, num_groups))
    assert grad_query is not None, "there is a piece"
    return [grad_query, *grad_keys, *grad_values]
