# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Attention of blocks by torch's `flex_attention`: one fused kernel over the keys of the context and of all blocks, which
passes over tiles of keys that no query of a tile sees.

EAGLE-3's slots add one key per block each, which the same kernel reads. Merging them by log-sum-exp would be work on
float32 tensors of the size of the queries; their nearly empty tiles take less time in matrix units. By count for 8,192
blocks of 7 slots: about 20 ms at 3 TB/s, against 5 ms at 350 TFLOP/s.

Shape letters:  B = sequences, L = context length, A = anchors per sequence, S = queries per block, Q = A S, T = keys
                per block of one piece, M = keys of context and pieces together, X = tiles of queries, Y = tiles of
                keys, h = query heads, g = key/value heads, d = head dimension
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .plan import SEES_ALL, AttentionPlan, Sight


# Queries, and keys, of one tile: torch's own choice, which its kernels divide further.
TILE = 128


def attend_by_flex(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    pieces: list[Tensor],
    plan: AttentionPlan,
    scaling: float,
    sight: Sight = SEES_ALL,
    sinks: Tensor | None = None,
) -> Tensor:
    """As [`attend_in_tiles`]."""
    B, h, A, S, d = query.shape
    keys, values = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
    sizes = tuple(piece.shape[3] for piece in keys)
    shape = (S, context_key.shape[2], sizes)
    mask = plan.remember(("flex", shape, sight), lambda: block_mask(plan, *shape, sight))
    run: Callable[..., Any] = compiled_flex() if query.is_cuda else flex_attention
    if scaling != d**-0.5:
        # The kernel's own scaling is a constant of its code; one handed in would be compiled as a variable.
        query = query * (scaling * d**0.5)
    with torch.autocast(query.device.type, enabled=False):
        result = run(
            query.flatten(2, 3),
            torch.cat([context_key, *(piece.flatten(2, 3) for piece in keys)], dim=2),
            torch.cat([context_value, *(piece.flatten(2, 3) for piece in values)], dim=2),
            block_mask=mask,
            enable_gqa=h != context_key.shape[1],
            return_aux=None if sinks is None else AuxRequest(lse=True),
        )
        if sinks is None:
            out = result
        else:
            # What the softmax over keys alone gives, times the share that the sink leaves the keys.
            out, lse = result[0], result[1].lse
            out = out * (lse - sinks.to(lse.dtype)[:, None]).sigmoid()[..., None].to(out.dtype)
    return out.transpose(1, 2).reshape(B, A, S, h * d)


@cache
def compiled_flex() -> Callable[..., Any]:
    """Return the fused kernel, compiled once for all lengths."""
    return torch.compile(flex_attention, dynamic=True)


def block_mask(
    plan: AttentionPlan, num_queries: int, context_length: int, sizes: Sequence[int], sight: Sight = SEES_ALL
) -> BlockMask:
    """
    Return who sees whom in terms of tiles, without looking at any pair: from the least and greatest entries that the
    queries of a tile see. Waits for nothing.
    """
    B, A = plan.anchors.shape
    device = plan.anchors.device
    # By query: its block, and the context entries it sees, `first <= entry < end`.
    block = torch.arange(A * num_queries, device=device, dtype=torch.int32) // num_queries
    ends = plan.anchors.int().repeat_interleave(num_queries, dim=1, output_size=len(block))
    entries = plan.first_entries(num_queries, sight.window)
    firsts = torch.zeros_like(ends) if entries is None else entries.int().expand(-1, -1, num_queries).reshape(B, -1)
    # By key: its block, -1 in the context.
    owners = [torch.arange(A * size, device=device, dtype=torch.int32) // size for size in sizes]
    owner = torch.cat([block.new_full((context_length,), -1), *owners])

    def is_seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Lookups alone, and no number: a number would be compiled in. An own key's index lies above every end.
        return ((firsts[b, q] <= k) & (k < ends[b, q])) | (owner[k] == block[q])

    # Where causal blocks have one key per query, in their order: the place of each query's own key.
    places = torch.arange(context_length, context_length + len(block), device=device, dtype=torch.int32)

    def is_seen_in_order(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((firsts[b, q] <= k) & (k < ends[b, q])) | ((owner[k] == block[q]) & (k <= places[q]))

    some, all_ = tile_sight(ends, firsts, block, A, context_length, sizes)
    counts, order = _in_order(torch.stack([some & ~all_, all_]))
    shown, lengths = is_seen_in_order if sight.is_causal else is_seen, (len(block), len(owner))
    return BlockMask.from_kv_blocks(counts[0], order[0], counts[1], order[1], TILE, shown, lengths)


def tile_sight(
    ends: Tensor, firsts: Tensor, block: Tensor, num_blocks: int, context_length: int, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """
    Return whether any query of a tile may see any key of a tile, and whether all see all, `(B, 1, X, Y)` each.

    Args:
        ends (`torch.IntTensor` of shape `(B, Q)`), firsts (same shape): Context that each query sees.
        block (`torch.IntTensor` of shape `(Q,)`): Block of each query.
    """
    ends, firsts = _by_tile(ends), _by_tile(firsts)
    block = _by_tile(block[None])[0]
    num_keys = context_length + num_blocks * sum(sizes)
    start = torch.arange(0, num_keys, TILE, device=ends.device)
    some = _overlap(start, firsts.amin(dim=-1), ends.amax(dim=-1))
    all_ = (start >= firsts.amax(dim=-1)[..., None]) & (start + TILE <= ends.amin(dim=-1)[..., None])
    lowest, highest, offset = block[:, 0], block[:, -1], context_length
    for size in sizes:
        some = some | _overlap(start, offset + lowest * size, offset + (highest + 1) * size)
        offset += num_blocks * size
    return some[:, None], all_[:, None]


def _by_tile(values: Tensor) -> Tensor:
    """Turn `(B, Q)` into `(B, X, TILE)`, the last query repeated."""
    missing = -values.shape[1] % TILE
    return torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, TILE))


def _overlap(start: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return whether tiles of keys `(Y,)` overlap the ranges `low..high-1`, `(..., X)` each: `(..., X, Y)`."""
    return (start < high[..., None]) & (start + TILE > low[..., None])


def _in_order(is_needed: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many tiles of keys each tile of queries needs, and the tiles with those first."""
    order = is_needed.byte().argsort(dim=-1, descending=True, stable=True)
    return is_needed.sum(dim=-1, dtype=torch.int32), order.int()
