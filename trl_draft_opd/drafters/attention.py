# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Attention of drafted blocks over the committed context: pure tensor math shared by every drafter family, by training,
replay and serving.

The softmax over context and block is computed in two parts that are merged by their log-sum-exp: the context part by a
fused kernel in tiles of anchors, the small block part by plain products. No tensor of all pairs is ever made, and the
cost is linear in the number of anchors. The backward pass hands the merged output and log-sum-exp to the same kernels.

Shape letters:  B = sequences, L = context length, A = anchors per sequence, S = queries per block, T = keys of a
                block, Q = A S = queries per sequence, h = query heads, g = key/value heads, r = h / g, d = head
                dimension
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


# Queries of one tile: large enough to fill the kernel, small enough that tiles hug the diagonal.
TILE_QUERIES = 256

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def anchored_attention(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_keys: Sequence[Tensor],
    block_values: Sequence[Tensor],
    anchor_positions: Tensor,
    scaling: float,
    first_positions: Tensor | None = None,
) -> Tensor:
    """
    Let every block attend to the context before its anchor and to its own block keys.

    A context entry is visible to a block iff its index is at least the block's first and smaller than its anchor;
    blocks never see each other. Differentiable once.

    Args:
        query (`torch.Tensor` of shape `(B, h, A, S, d)`): Queries, positions already rotated in.
        context_key (`torch.Tensor` of shape `(B, g, L, d)`), context_value (same shape):
            Keys and values of the context, one per committed position; finite.
        block_keys (`Sequence[torch.Tensor]` of shapes `(B, g, A, T_i, d)`), block_values (same shapes):
            Keys and values of the block itself, in as many pieces as it was made in; empty when it has none yet.
        anchor_positions (`torch.LongTensor` of shape `(B, A)`):
            Anchor of each block, above its first, so that every query sees a key. Cheapest when ascending.
        scaling (`float`): Factor on the scores, usually `d ** -0.5`.
        first_positions (`torch.LongTensor` of shape `(B, A)`, *optional*):
            First context entry of each block, where its own text starts; 0 if not given.

    Returns:
        `torch.Tensor` of shape `(B, A, S, h * d)`.
    """
    dtype = context_value.dtype
    pieces = [piece.to(dtype) for piece in (*block_keys, *block_values)]
    return _AnchoredAttention.apply(
        anchor_positions, first_positions, scaling, query.to(dtype), context_key.to(dtype), context_value, *pieces
    )


class _Tile(NamedTuple):
    """Anchors `start..stop-1`, which see the context `first..end-1` at most; `mask` adds -inf, or is `None`."""

    start: int
    stop: int
    first: int
    end: int
    mask: Tensor | None


def _tiles(anchors_BA: Tensor, firsts_BA: Tensor | None, num_queries: int, dtype: torch.dtype) -> Iterator[_Tile]:
    """Cut the anchors into tiles, each with the context that any of its anchors sees."""
    longest = anchors_BA.amax(dim=0).tolist()
    earliest = [0] * len(longest) if firsts_BA is None else firsts_BA.amin(dim=0).tolist()
    step = max(1, TILE_QUERIES // num_queries)
    for start in range(0, len(longest), step):
        stop = min(start + step, len(longest))
        first, end = min(earliest[start:stop]), max(longest[start:stop])
        if anchors_BA.numel() == 1:
            yield _Tile(start, stop, first, end, None)
            continue
        index = torch.arange(first, end, device=anchors_BA.device)
        is_hidden = index >= anchors_BA[:, start:stop, None]
        if firsts_BA is not None:
            is_hidden |= index < firsts_BA[:, start:stop, None]
        mask = torch.zeros(is_hidden.shape, dtype=dtype, device=index.device).masked_fill_(is_hidden, float("-inf"))
        # One row per query, all heads alike: (B, 1, Q, end - first).
        yield _Tile(start, stop, first, end, mask.repeat_interleave(num_queries, dim=1)[:, None])


class _AnchoredAttention(torch.autograd.Function):
    """Two parts, one softmax. Saved are the inputs, the output and one log-sum-exp per query."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        firsts: Tensor | None,
        scaling: float,
        query: Tensor,
        context_key: Tensor,
        context_value: Tensor,
        *pieces: Tensor,
    ) -> Tensor:
        B, h, A, S, d = query.shape
        keys, values = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
        with torch.autocast(query.device.type, enabled=False):
            # Laid out as it is returned, so that saving it for the backward pass costs nothing.
            out = query.new_empty(B, A * S, h, d)
            lse = query.new_empty(B, h, A * S, dtype=_softmax_dtype(query))
            flat = query.flatten(2, 3)
            for tile in _tiles(anchors, firsts, S, query.dtype):
                part, seen = slice(tile.start * S, tile.stop * S), slice(tile.first, tile.end)
                tile_key, tile_value = context_key[:, :, seen], context_value[:, :, seen]
                tile_out, lse[:, :, part] = _context(flat[:, :, part], tile_key, tile_value, tile.mask, scaling)
                out[:, part] = tile_out.transpose(1, 2)
            weights = None
            if keys:
                scores = _block_scores(query, keys, scaling)
                merged = torch.logaddexp(lse, scores.logsumexp(dim=-1).flatten(2, 3))
                out *= (lse - merged).exp_().transpose(1, 2)[..., None].to(out.dtype)
                weights = scores.sub_(merged.unflatten(2, (A, S))[..., None]).exp_().to(query.dtype)
                lse = merged
                out += _mix_block(weights, values).transpose(1, 2)
        ctx.save_for_backward(anchors, firsts, query, context_key, context_value, out, lse, weights, *pieces)
        ctx.scaling = scaling
        return out.view(B, A, S, h * d)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, firsts, query, context_key, context_value, out, lse, weights, *pieces = ctx.saved_tensors
        keys, values = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
        B, h, A, S, d = query.shape
        with torch.autocast(query.device.type, enabled=False):
            grad = grad.to(query.dtype).reshape(B, A * S, h, d).transpose(1, 2)
            out = out.view(B, A * S, h, d).transpose(1, 2)
            flat = query.flatten(2, 3)
            grad_query = torch.empty_like(flat)
            grad_key, grad_value = torch.zeros_like(context_key), torch.zeros_like(context_value)
            for tile in _tiles(anchors, firsts, S, query.dtype):
                part, seen = slice(tile.start * S, tile.stop * S), slice(tile.first, tile.end)
                # With the merged output and log-sum-exp, the kernel's formulas differentiate the merged softmax.
                tile_grads = _context_backward(
                    grad[:, :, part],
                    flat[:, :, part],
                    context_key[:, :, seen],
                    context_value[:, :, seen],
                    out[:, :, part],
                    lse[:, :, part],
                    tile.mask,
                    ctx.scaling,
                )
                grad_query[:, :, part] = tile_grads[0]
                grad_key[:, :, seen] += tile_grads[1]
                grad_value[:, :, seen] += tile_grads[2]
            grad_query = grad_query.view_as(query)
            grad_pieces = []
            if keys:
                delta = (grad * out).sum(dim=-1, dtype=lse.dtype).unflatten(2, (A, S))
                grad_block, *grad_pieces = _block_backward(
                    grad.unflatten(2, (A, S)), query, keys, values, weights, delta, ctx.scaling
                )
                grad_query += grad_block
        return None, None, None, grad_query, grad_key, grad_value, *grad_pieces


def _softmax_dtype(tensor: Tensor) -> torch.dtype:
    """Low precision is raised to float32 for the softmax; float64 stays what it is."""
    return torch.promote_types(tensor.dtype, torch.float32)


# -- the context part: a kernel per device, with one meaning ----------------------------------------------------------


def _context(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the attention output `(B, h, Q, d)` and log-sum-exp `(B, h, Q)` over the context alone."""
    if query.device.type == "cpu":
        return _flash(query, key, value, attn_mask=mask, scale=scaling)
    return _context_by_products(query, key, value, mask, scaling)


def _context_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value for given output and log-sum-exp, which may be merged ones."""
    if query.device.type == "cpu":
        return _flash_backward(grad, query, key, value, out, lse, 0.0, False, attn_mask=mask, scale=scaling)
    return _context_by_products_backward(grad, query, key, value, out, lse, mask, scaling)


def _context_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """The same from matrix products alone, for every device; one tile's scores exist at a time."""
    scores = _grouped_scores(query, key, mask, scaling)
    lse = scores.logsumexp(dim=-1)
    weights = scores.sub_(lse[..., None]).exp_().to(value.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2), lse.flatten(1, 2)


def _context_by_products_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = (key.shape[1], -1)
    scores = _grouped_scores(query, key, mask, scaling)
    weights = scores.sub_(lse.unflatten(1, groups)[..., None]).exp_()
    grad_g, query_g = grad.unflatten(1, groups), query.unflatten(1, groups)
    delta = (grad * out).sum(dim=-1, dtype=weights.dtype).unflatten(1, groups)
    grad_weights = (grad_g @ value[:, :, None].transpose(-1, -2)).to(weights.dtype)
    grad_scores = grad_weights.sub_(delta[..., None]).mul_(weights).mul_(scaling).to(query.dtype)
    grad_query = (grad_scores @ key[:, :, None]).flatten(1, 2)
    grad_key = (grad_scores.transpose(-1, -2) @ query_g).sum(dim=2)
    grad_value = (weights.to(grad.dtype).transpose(-1, -2) @ grad_g).sum(dim=2)
    return grad_query, grad_key, grad_value


def _grouped_scores(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return masked scores `(B, g, r, Q, L)` in the softmax's precision."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key[:, :, None].transpose(-1, -2)).to(_softmax_dtype(query)) * scaling
    return scores if mask is None else scores + mask[:, :, None]


# -- the block part ---------------------------------------------------------------------------------------------------


def _block_scores(query: Tensor, keys: Sequence[Tensor], scaling: float) -> Tensor:
    """Return the scores of every query with its own block's keys, `(B, h, A, S, T)`."""
    dtype = _softmax_dtype(query)
    return torch.cat([_pairwise(query.to(dtype), key.to(dtype)) for key in keys], dim=-1).mul_(scaling)


def _pairwise(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of `(B, h, A, S, d)` with `(B, g, A, T, d)` rows of the same block, `(B, h, A, S, T)`."""
    S, T = left.shape[3], right.shape[3]
    grouped = left.unflatten(1, (right.shape[1], -1))
    if S == T == 1:
        # A batch of dot products: the matrix kernel is slow on 1 x 1 results.
        return (grouped * right[:, :, None]).sum(dim=-1, keepdim=True).flatten(1, 2)
    return (grouped @ right[:, :, None].transpose(-1, -2)).flatten(1, 2)


def _mix_block(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
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


def _block_backward(
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
