# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Attention of drafted blocks with one dense mask: every query gets a column for every key of every block.

Its cost grows with the square of the number of blocks. Same arguments and result as `anchored_attention`.

Shape letters:  B = sequences, L = context length, A = anchors per sequence, S = queries per block, T = keys of a block
                in one piece, h = query heads, g = key/value heads, d = head dimension
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def visible_pairs(
    anchor_positions: Tensor, context_length: int, num_queries: int, piece_sizes: Sequence[int]
) -> Tensor:
    """
    Say which query may see which key.

    Args:
        anchor_positions (`torch.LongTensor` of shape `(B, A)`):
            Anchor of each block: it sees the context entries before it.
        context_length (`int`), num_queries (`int`):
            `L` and `S`.
        piece_sizes (`Sequence[int]`):
            Keys per block in each piece; a query sees those of its own block only.

    Returns:
        `torch.BoolTensor` of shape `(B, A * S, L + A * sum(piece_sizes))`.
    """
    B, A = anchor_positions.shape
    device = anchor_positions.device
    block_of_query = torch.arange(A, device=device).repeat_interleave(num_queries)
    sees_context = torch.arange(context_length, device=device) < anchor_positions[:, block_of_query, None]
    columns = [sees_context]
    for size in piece_sizes:
        block_of_key = torch.arange(A, device=device).repeat_interleave(size)
        sees_key = block_of_query[:, None] == block_of_key
        columns.append(sees_key.expand(B, -1, -1))
    return torch.cat(columns, dim=2)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attend with torch's own function, `(B, h, Q, d)`."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], scale=scaling)


def written_out_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attend by scores, softmax and weighted sum, each in full, `(B, h, Q, d)`."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(dim=-1)
    return weights.to(value.dtype) @ value


def dense_attention(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_keys: Sequence[Tensor],
    block_values: Sequence[Tensor],
    anchor_positions: Tensor,
    scaling: float,
    attend=sdpa_attention,
) -> Tensor:
    """
    Let every block attend to the context before its anchor and to its own keys, under one mask over all blocks' keys.

    Args:
        query (`torch.Tensor` of shape `(B, h, A, S, d)`):
            Queries.
        context_key (`torch.Tensor` of shape `(B, g, L, d)`), context_value (same shape):
            Keys and values of the context.
        block_keys (`Sequence[torch.Tensor]` of shapes `(B, g, A, T_i, d)`), block_values (same shapes):
            Keys and values of the blocks, in pieces.
        anchor_positions (`torch.LongTensor` of shape `(B, A)`), scaling (`float`):
            As in `anchored_attention`.
        attend (`Callable`, *optional*):
            `sdpa_attention` or `written_out_attention`.

    Returns:
        `torch.Tensor` of shape `(B, A, S, h * d)`.
    """
    B, h, A, S, d = query.shape
    key = torch.cat([context_key, *(piece.flatten(2, 3) for piece in block_keys)], dim=2)
    value = torch.cat([context_value, *(piece.flatten(2, 3) for piece in block_values)], dim=2)
    sizes = [piece.shape[3] for piece in block_keys]
    mask = visible_pairs(anchor_positions, context_key.shape[2], S, sizes)
    mixed = attend(query.flatten(2, 3), key, value, mask, scaling)
    return mixed.transpose(1, 2).reshape(B, A, S, h * d)
