# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The target's states on drafted branches of a text. A branch starts at the first rejected draft of a block, on the
committed prefix before it; many branches are packed behind the text's cache and read in one forward pass.

Shape letters:  B = sequences, A = blocks per sequence, K = drafts per block, L = text length, n = branch tokens of a
                row, H = the target's hidden size
"""

from typing import Any

import torch
from transformers import DynamicCache

from .frozen import FrozenTarget
from .reading import TextReading, rows_of_similar_width


@torch.no_grad()
def score_branches(
    target: FrozenTarget,
    reading: TextReading,
    anchors: torch.Tensor,
    drafts: torch.Tensor,
    is_branch: torch.Tensor,
) -> torch.Tensor:
    """
    Return the target's hidden states on draft-induced states: one packed forward on top of the text's cache, or a few
    where rows differ widely in length or in the number of branch tokens.

    The tokens of a branch attend to the committed prefix and to their own branch, at the positions the drafts were
    proposed for; blocks do not see each other.

    Args:
        reading ([`TextReading`]): The committed text, read with `keep_cache=True`. Its cache is used up.
        anchors (`torch.LongTensor` of shape `(B, A)`): Anchors; negative entries are padding.
        drafts (`torch.LongTensor` of shape `(B, A, K)`): Drafts of each block.
        is_branch (`torch.BoolTensor` of shape `(B, A, K)`):
            Slots whose state holds a rejected draft: per block one run of slots, its first slot at least the second.

    Returns:
        `torch.Tensor` of shape `(B, A, K, H)`: input of the head at the state `x, y_<=a, d_<k` for slot `k`; zero
        outside `is_branch`.
    """
    target.require_rollback()
    assert reading.caches, "branches are scored on top of the text's cache"
    hidden = reading.last_hidden.new_zeros(*drafts.shape, reading.last_hidden.shape[-1])
    num_tokens = is_branch.flatten(1).sum(dim=1)
    for text in reading.caches:
        for places in rows_of_similar_width(num_tokens[text.rows]):
            picked = torch.tensor(places, device=hidden.device)
            rows = text.rows[picked]
            cache = text.cache
            if len(places) < len(text.rows):
                cache = DynamicCache(config=target.config)
                layers: list[Any] = text.cache.layers
                for number, layer in enumerate(layers):
                    own = picked.to(layer.keys.device)
                    cache.update(layer.keys[own], layer.values[own], number)
            scored = _score_rows(target, cache, text.length, anchors[rows], drafts[rows], is_branch[rows])
            hidden[rows] = scored.to(hidden)
    return hidden


def _score_rows(
    target: FrozenTarget,
    cache: DynamicCache,
    length: int,
    anchors: torch.Tensor,
    drafts: torch.Tensor,
    is_branch: torch.Tensor,
) -> torch.Tensor:
    """Score the branches of rows whose text of padded `length` is in `cache`, as [`score_branches`] does."""
    B, A, K = drafts.shape
    num_tokens = is_branch.flatten(1).sum(dim=1)
    # The tokens of a row's branches, packed to the front in order of block and slot.
    order = is_branch.flatten(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    order = order[:, : int(num_tokens.max())]
    is_token = torch.arange(order.shape[1], device=order.device) < num_tokens[:, None]
    block, slot = order // K, order % K  # the slot's index: slot k is at k - 1
    # The state of slot k ends with the draft before it, at position a + k - 1.
    tokens = drafts.flatten(1).gather(1, (order - 1).clamp(min=0))
    positions = (anchors.gather(1, block) + slot).clamp(min=0)
    first_slot = is_branch.to(torch.uint8).argmax(dim=-1).gather(1, block)
    is_visible = branch_mask(positions - slot + first_slot, block, slot, is_token, length)
    # In the additive form, which every attention implementation takes.
    mask = torch.zeros(is_visible.shape, dtype=target.causal_lm.dtype, device=is_visible.device)
    mask = mask.masked_fill_(~is_visible, torch.finfo(mask.dtype).min)[:, None]
    tokens, positions = (torch.where(is_token, ids, 0) for ids in (tokens, positions))
    scored = target.step(tokens, mask, positions, cache, ()).last_hidden
    row = torch.arange(B, device=order.device)[:, None].expand_as(order)
    hidden = scored.new_zeros(B, A, K, scored.shape[-1])
    hidden[row[is_token], block[is_token], slot[is_token]] = scored[is_token]
    return hidden


def branch_mask(
    prefix_ends: torch.Tensor, block: torch.Tensor, slot: torch.Tensor, is_token: torch.Tensor, length: int
) -> torch.Tensor:
    """
    Return `(B, n, length + n)`, true where a branch token may see a key: a text position before `prefix_ends` (its
    branch's first token), or a token of its own branch up to itself.
    """
    index = torch.arange(length, device=block.device)
    # Position 0 is text in every row, so that no query is left without a key.
    sees_text = (index < prefix_ends[..., None]) | (index == 0)
    sees_branch = (block[:, :, None] == block[:, None]) & (slot[:, :, None] >= slot[:, None]) & is_token[:, None]
    return torch.cat([sees_text, sees_branch], dim=2)
