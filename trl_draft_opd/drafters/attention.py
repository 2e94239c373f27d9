# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Attention of drafted blocks over the committed context. Pure tensor math shared by every drafter family, by training,
replay and serving, so that what is trained is what is served. Knows nothing of masks made by a model or of caches.

Shape letters:  B = sequences, L = context length, A = anchors per sequence, S = queries per block, T = block keys,
                h = query heads, g = key/value heads, r = query heads per key/value head (h = g r), d = head dimension
"""

import torch


def anchored_attention(
    query: torch.Tensor,
    context_key: torch.Tensor,
    context_value: torch.Tensor,
    block_key: torch.Tensor | None,
    block_value: torch.Tensor | None,
    anchor_positions: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """
    Let every block attend to the context before its anchor and to all its own block keys.

    A context entry is visible to a block iff its index is smaller than the block's anchor; blocks never see each
    other. The cost is linear in the number of block keys: no mask over all pairs of blocks is built.

    Args:
        query (`torch.Tensor` of shape `(B, h, A, S, d)`):
            Queries, positions already rotated in.
        context_key (`torch.Tensor` of shape `(B, g, L, d)`):
            Keys of the context, one per committed position.
        context_value (`torch.Tensor` of shape `(B, g, L, d)`):
            Values of the context.
        block_key (`torch.Tensor` of shape `(B, g, A, T, d)` or `None`):
            Keys of the block itself; `None` when the block has none yet.
        block_value (`torch.Tensor` of shape `(B, g, A, T, d)` or `None`):
            Values of the block itself.
        anchor_positions (`torch.LongTensor` of shape `(B, A)`):
            Anchor of each block, at least 1, so that every query sees a key.
        scaling (`float`):
            Factor on the scores, usually `d ** -0.5`.

    Returns:
        `torch.Tensor` of shape `(B, A, S, h * d)`.
    """
    B, h, A, S, d = query.shape
    g, L = context_key.shape[1], context_key.shape[2]
    query_BgrASd = query.reshape(B, g, h // g, A, S, d)
    flat_query = query_BgrASd.reshape(B, g, -1, d)
    # Low precision is raised to float32 for the softmax; float64 stays what it is.
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    scores = (flat_query @ context_key.transpose(-1, -2)).to(softmax_dtype) * scaling
    scores_BgrASL = scores.view(B, g, h // g, A, S, L)
    is_visible_BAL = torch.arange(L, device=query.device) < anchor_positions[..., None]
    scores_BgrASL = scores_BgrASL.masked_fill(~is_visible_BAL[:, None, None, :, None, :], float("-inf"))
    if block_key is None or block_value is None:
        weights = scores_BgrASL.softmax(dim=-1).to(query.dtype)
        mixed = weights.reshape(B, g, -1, L) @ context_value
    else:
        block_scores = torch.einsum("bgrasd,bgatd->bgrast", query_BgrASd, block_key).to(softmax_dtype) * scaling
        weights = torch.cat([scores_BgrASL, block_scores], dim=-1).softmax(dim=-1).to(query.dtype)
        mixed = (weights[..., :L].reshape(B, g, -1, L) @ context_value).view(B, g, h // g, A, S, d)
        mixed = mixed + torch.einsum("bgrast,bgatd->bgrasd", weights[..., L:], block_value)
    return mixed.reshape(B, h, A, S, d).permute(0, 2, 3, 1, 4).reshape(B, A, S, h * d)
