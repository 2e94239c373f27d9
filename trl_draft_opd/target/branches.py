# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The target's states on drafted branches of a text. A branch starts at the first rejected draft of a block, on the
committed prefix before it; many branches are packed behind the text's cache and read in one forward pass.

Shape letters:  B = sequences, A = blocks per sequence, K = drafts per block, L = tokens of a row's text,
                N = branch tokens of all rows, n = of one row in one pass, H = the target's hidden size
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .attention import Span, Spans
from .frozen import FrozenTarget
from .reading import CachedTexts, TextReading
from .texts import tokens_at_once


# Elements of the masks of one pass: each branch token has one for every token of its text.
_MASK_ELEMENTS = 2**24


@torch.no_grad()
def score_branches(
    target: FrozenTarget,
    reading: TextReading,
    anchors: torch.Tensor,
    drafts: torch.Tensor,
    is_branch: torch.Tensor,
) -> torch.Tensor:
    """
    Return the target's hidden states on draft-induced states: packed forward passes on top of the text's cache, of
    bounded size.

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
    row, block, slot = is_branch.nonzero(as_tuple=True)
    # The state of slot k (index k - 1) ends with the draft before it, at position a + k - 1.
    tokens, positions = drafts[row, block, slot - 1], anchors[row, block] + slot
    first_slot = is_branch.to(torch.uint8).argmax(dim=-1)[row, block]
    prefix_ends, branch = positions - slot + first_slot, row * is_branch.shape[1] + block
    lengths, dtype, limit = reading.packing.lengths, target.causal_lm.dtype, tokens_at_once(target.device)
    for texts, parts in _passes(reading, is_branch.sum(dim=-1).tolist(), limit):
        run = slice(parts[0].first, parts[-1].last)
        spans = []
        for part in parts:
            own = slice(part.first, part.last)
            is_visible = branch_mask(prefix_ends[own], branch[own], slot[own], lengths[part.row])
            # In the additive form, which every attention implementation takes.
            mask = torch.zeros(is_visible.shape, dtype=dtype, device=is_visible.device)
            mask.masked_fill_(~is_visible, torch.finfo(dtype).min)
            spans.append(_span(part, run, texts, lengths, mask))
        ids, places = tokens[None, run], positions[None, run]
        if target.reads_packed:
            scored = target.step(ids, None, places, texts.cache, (), Spans(spans)).last_hidden
        else:
            scored = target.step(ids, spans[0].mask[None, None], places, texts.cache, ()).last_hidden
        hidden[row[run], block[run], slot[run]] = scored[0].to(hidden)
        texts.cache.crop(run.start - run.stop)
    return hidden


class _Part(NamedTuple):
    """Branch tokens `first..last` of all, which are of one row."""

    row: int
    first: int
    last: int


def _passes(
    reading: TextReading, counts: Sequence[Sequence[int]], limit: int
) -> Iterator[tuple[CachedTexts, list[_Part]]]:
    """
    Yield the parts of each forward pass, whole branches of `counts` `(B, A)` tokens in order of row and block, and the
    texts that they are of: at most `limit` tokens and `_MASK_ELEMENTS`, or a single branch.
    """
    first = 0
    for texts in reading.caches:
        parts: list[_Part] = []
        num_tokens = num_elements = 0
        for row in texts.rows:
            for count in counts[row]:
                if count == 0:
                    continue
                # Tokens of earlier branches of the row are keys, too: at most as many as a pass has.
                elements = count * (reading.packing.lengths[row] + limit)
                if parts and (num_tokens + count > limit or num_elements + elements > _MASK_ELEMENTS):
                    yield texts, parts
                    parts, num_tokens, num_elements = [], 0, 0
                if parts and parts[-1].row == row:
                    parts[-1] = parts[-1]._replace(last=first + count)
                else:
                    parts.append(_Part(row, first, first + count))
                first, num_tokens, num_elements = first + count, num_tokens + count, num_elements + elements
        if parts:
            yield texts, parts


def _span(part: _Part, run: slice, texts: CachedTexts, lengths: Sequence[int], mask: torch.Tensor) -> Span:
    """Return the span of a part of the pass `run`: its keys are its row's text, and its own tokens behind all."""
    start = sum(lengths[texts.rows.start : part.row])
    stop, num_cached = start + lengths[part.row], sum(lengths[texts.rows.start : texts.rows.stop])
    own = slice(part.first - run.start, part.last - run.start)
    keys = (slice(start, stop), slice(num_cached + own.start, num_cached + own.stop))
    return Span(own, keys if stop < keys[1].start else (slice(start, keys[1].stop),), mask)


def branch_mask(prefix_ends: torch.Tensor, block: torch.Tensor, slot: torch.Tensor, length: int) -> torch.Tensor:
    """
    Return `(n, length + n)`, true where a branch token may see a key: a text position before `prefix_ends` (its
    branch's first token), or a token of its own branch up to itself.
    """
    sees_text = torch.arange(length, device=block.device) < prefix_ends[:, None]
    sees_branch = (block[:, None] == block) & (slot[:, None] >= slot)
    return torch.cat([sees_text, sees_branch], dim=1)
