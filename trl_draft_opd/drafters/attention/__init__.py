# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Attention of drafted blocks over the committed context: pure tensor math shared by every drafter family, by training,
replay and serving. No tensor of all pairs is ever made.

Three backends with one meaning: `"flash"`, the fused kernel of the CPU in tiles, `"flex"`, the fused kernel of CUDA,
and `"products"`, plain matrix products in tiles, for every device and every dtype.

Shape letters:  B = sequences, L = context length, A = anchors per sequence, S = queries per block, T = keys of a
                block, h = query heads, g = key/value heads, d = head dimension
"""

from collections.abc import Sequence

from torch import Tensor

from .backends import choose_backend
from .flex import attend_by_flex
from .plan import SEES_ALL, AttentionPlan, Sight
from .tiles import attend_in_tiles


__all__ = ["AttentionPlan", "Sight", "anchored_attention", "choose_backend"]


def anchored_attention(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_keys: Sequence[Tensor],
    block_values: Sequence[Tensor],
    blocks: Tensor | AttentionPlan,
    scaling: float,
    backend: str | None = None,
    sight: Sight = SEES_ALL,
    sinks: Tensor | None = None,
) -> Tensor:
    """
    Let every block attend to the context before its anchor and to its own block keys.

    A context entry is visible to a block iff its index is at least the block's first and smaller than its anchor, and
    within the window, if there is one; blocks never see each other. Differentiable once.

    Args:
        query (`torch.Tensor` of shape `(B, h, A, S, d)`): Queries, positions already rotated in.
        context_key (`torch.Tensor` of shape `(B, g, L, d)`), context_value (same shape):
            Keys and values of the context, one per committed token; finite.
        block_keys (`Sequence[torch.Tensor]` of shapes `(B, g, A, T_i, d)`), block_values (same shapes):
            Keys and values of the block itself, in as many pieces as it was made in; empty when it has none yet.
        blocks ([`AttentionPlan`] or `torch.LongTensor` of shape `(B, A)`):
            What each block sees, planned once for all calls about the same blocks; or just the anchors. An anchor lies
            above its block's first entry, so that every query sees a key. Cheapest when ascending.
        scaling (`float`): Factor on the scores, usually `d ** -0.5`.
        backend (`str`, *optional*): `"flash"`, `"flex"` or `"products"`; [`choose_backend`] says which by default.
        sight ([`Sight`], *optional*): Window and order of the layer; all of the plan if not given.
        sinks (`torch.Tensor` of shape `(h,)`, *optional*):
            A logit per head, added to the softmax's denominator: a key that all queries see, whose value is zero.

    Returns:
        `torch.Tensor` of shape `(B, A, S, h * d)`.
    """
    plan = AttentionPlan(blocks) if isinstance(blocks, Tensor) else blocks
    dtype = context_value.dtype
    query, context_key = query.to(dtype), context_key.to(dtype)
    pieces = [piece.to(dtype) for piece in (*block_keys, *block_values)]
    backend = backend or choose_backend(query, context_key.shape[1], sight.is_causal, sinks is not None)
    if backend == "flex":
        return attend_by_flex(query, context_key, context_value, pieces, plan, scaling, sight, sinks)
    return attend_in_tiles(query, context_key, context_value, pieces, plan, scaling, backend, sight, sinks)
