# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Attention of blocks in two parts, merged by their log-sum-exp: the context by a kernel in tiles of anchors, the block's
own keys by plain products. The cost is linear in the number of anchors.

Shape letters:  B = sequences, L = context length, A = anchors per sequence, S = queries per block, h = query heads,
                g = key/value heads, d = head dimension
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .kernels import Hide
from .own_keys import block_backward, block_scores, mix_block, softmax_dtype
from .plan import SEES_ALL, AttentionPlan, Sight


# Forward and backward of the context part, by name.
KERNELS = {
    "flash": (kernels.flash, kernels.flash_backward),
    "products": (kernels.products, kernels.products_backward),
}


def attend_in_tiles(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    pieces: list[Tensor],
    plan: AttentionPlan,
    scaling: float,
    kernel: str,
    sight: Sight = SEES_ALL,
    sinks: Tensor | None = None,
) -> Tensor:
    """
    Attend with a kernel of `KERNELS`, all tensors of one dtype; `pieces` are the blocks' keys, then their values. The
    shapes are those of [`anchored_attention`]. Differentiable once.
    """
    return _Attention.apply(plan, scaling, kernel, sight, sinks, query, context_key, context_value, *pieces)


def _walk(plan: AttentionPlan, num_queries: int, window: int | None) -> Iterator[tuple[slice, slice, Hide]]:
    """Yield each tile's queries, its context entries, and how to hide those that a query does not see."""
    for tile in plan.tiles(num_queries, window):
        hide = None
        if tile.has_hidden:
            hide = partial(plan.hide, tile=tile, num_queries=num_queries, window=window)
        yield slice(tile.start * num_queries, tile.stop * num_queries), slice(tile.first, tile.end), hide


class _Attention(torch.autograd.Function):
    """Two parts, one softmax. Saved are the inputs, the output and one log-sum-exp per query."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: AttentionPlan,
        scaling: float,
        kernel: str,
        sight: Sight,
        sinks: Tensor | None,
        query: Tensor,
        context_key: Tensor,
        context_value: Tensor,
        *pieces: Tensor,
    ) -> Tensor:
        B, h, A, S, d = query.shape
        keys, values = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
        attend, _ = KERNELS[kernel]
        with torch.autocast(query.device.type, enabled=False):
            # Laid out as it is returned, so that saving it for the backward pass costs nothing.
            out = query.new_empty(B, A * S, h, d)
            lse = query.new_empty(B, h, A * S, dtype=softmax_dtype(query))
            flat = query.flatten(2, 3)
            for part, seen, hide in _walk(plan, S, sight.window):
                tile_key, tile_value = context_key[:, :, seen], context_value[:, :, seen]
                tile_out, lse[:, :, part] = attend(flat[:, :, part], tile_key, tile_value, hide, scaling)
                out[:, part] = tile_out.transpose(1, 2)
            weights, scores, merged = None, None, lse
            if keys:
                scores = block_scores(query, keys, scaling, sight.is_causal)
                merged = torch.logaddexp(merged, scores.logsumexp(dim=-1).flatten(2, 3))
            if sinks is not None:
                merged = torch.logaddexp(merged, sinks.to(merged.dtype)[:, None])
            if merged is not lse:
                out *= (lse - merged).exp_().transpose(1, 2)[..., None].to(out.dtype)
            if scores is not None:
                weights = scores.sub_(merged.unflatten(2, (A, S))[..., None]).exp_().to(query.dtype)
                out += mix_block(weights, values).transpose(1, 2)
        ctx.save_for_backward(sinks, query, context_key, context_value, out, merged, weights, *pieces)
        ctx.plan, ctx.scaling, ctx.sight, ctx.kernel = plan, scaling, sight, kernel
        return out.view(B, A, S, h * d)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sinks, query, context_key, context_value, out, lse, weights, *pieces = ctx.saved_tensors
        keys, values = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
        B, h, A, S, d = query.shape
        _, attend_backward = KERNELS[ctx.kernel]
        with torch.autocast(query.device.type, enabled=False):
            grad = grad.to(query.dtype).reshape(B, A * S, h, d).transpose(1, 2)
            out = out.view(B, A * S, h, d).transpose(1, 2)
            flat = query.flatten(2, 3)
            grad_query = torch.empty_like(flat)
            grad_key, grad_value = torch.zeros_like(context_key), torch.zeros_like(context_value)
            for part, seen, hide in _walk(ctx.plan, S, ctx.sight.window):
                # With the merged output and log-sum-exp, the kernel's formulas differentiate the merged softmax.
                tile_grads = attend_backward(
                    grad[:, :, part],
                    flat[:, :, part],
                    context_key[:, :, seen],
                    context_value[:, :, seen],
                    out[:, :, part],
                    lse[:, :, part],
                    hide,
                    ctx.scaling,
                )
                grad_query[:, :, part] = tile_grads[0]
                grad_key[:, :, seen] += tile_grads[1]
                grad_value[:, :, seen] += tile_grads[2]
            grad_query, grad_sinks, grad_pieces = grad_query.view_as(query), None, []
            delta = None if sinks is None and not keys else (grad * out).sum(dim=-1, dtype=lse.dtype)
            if delta is not None and sinks is not None:
                # A sink is a key like others, whose value is zero.
                grad_sinks = -((sinks.to(lse.dtype)[:, None] - lse).exp_() * delta).sum(dim=(0, 2)).to(sinks.dtype)
            if delta is not None and keys:
                grad_block, *grad_pieces = block_backward(
                    grad.unflatten(2, (A, S)), query, keys, values, weights, delta.unflatten(2, (A, S)), ctx.scaling
                )
                grad_query += grad_block
        return None, None, None, None, grad_sinks, grad_query, grad_key, grad_value, *grad_pieces
