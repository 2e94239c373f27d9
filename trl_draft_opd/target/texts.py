# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Reads texts in forward passes of bounded size: end to end, or in padded rows. A text longer than one pass is read in
chunks on its own cache.

Shape letters:  B = sequences, L = text length, T = tokens of all texts, R = rows of a group, n = tokens of a pass,
                H = the target's hidden size
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import DynamicCache

from ..drafters.packing import RowPacking
from .attention import Spans, chunk_mask, chunk_spans, text_spans
from .reading import CachedTexts, StateBuffer, TextReading, rows_in_turn, rows_of_similar_width


# Takes an output `(R, n, H)`: that of the layer at an index of the tapped ones, or the last hidden states.
Keep = Callable[[int, torch.Tensor], None]
LAST = -1


# Tokens of one forward pass. An accelerator is at its full speed with 8,192, and their activations are a few GB at
# most. A CPU is at its full speed with far fewer, and is faster while they stay in its cache.
_TOKENS_AT_ONCE, _CPU_TOKENS_AT_ONCE = 8192, 1024


class Forward(Protocol):
    """One forward pass of the target, see `FrozenTarget.step`."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: DynamicCache | None,
        layer_ids: Sequence[int],
        keep: Keep,
        spans: Spans | None = None,
    ) -> None: ...


@dataclass(frozen=True)
class Passes:
    """
    How texts are read.

    Attributes:
        layer_ids (`Sequence[int]`): Layers to tap.
        limit (`int`): Tokens of one pass.
        keep_cache (`bool`): Whether keys and values are kept.
        new_cache (`Callable`): Returns an empty cache for a number of tokens.
    """

    layer_ids: Sequence[int]
    limit: int
    keep_cache: bool
    new_cache: Callable[[int], DynamicCache]


def tokens_at_once(device: torch.device) -> int:
    """Return how many tokens one forward pass reads at most."""
    return _CPU_TOKENS_AT_ONCE if device.type == "cpu" else _TOKENS_AT_ONCE


def read_packed(
    forward: Forward, passes: Passes, input_ids: torch.Tensor, packing: RowPacking, dtype: torch.dtype
) -> TextReading:
    """Read rows `(B, L)` end to end, as many as fit into a pass of a model of `dtype`; padding is not computed."""
    states, caches = _States(packing.num_tokens, len(passes.layer_ids)), []
    ids, positions = packing.pack(input_ids), packing.position_ids
    start = 0
    for rows in rows_in_turn(packing.lengths, passes.limit):
        lengths = packing.lengths[rows.start : rows.stop]
        length = sum(lengths)
        is_long = length > passes.limit
        cache = passes.new_cache(length) if is_long or passes.keep_cache else None
        mask = chunk_mask(length, dtype, ids.device) if is_long else None
        for first in range(0, length, passes.limit):
            last = min(first + passes.limit, length)
            run = slice(start + first, start + last)
            spans = chunk_spans(first, last, mask) if is_long else text_spans(lengths)
            keep = states.keeper(run, _only_row)
            forward(ids[None, run], None, positions[None, run], cache, passes.layer_ids, keep, spans)
        if cache is not None and passes.keep_cache and length > 0:
            caches.append(CachedTexts(rows, cache))
        start += length
    return states.reading(packing, caches)


def read_padded(
    forward: Forward,
    passes: Passes,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    packing: RowPacking,
    can_chunk: bool,
) -> TextReading:
    """
    Read rows `(B, L)` of similar length together, padded and with a mask; each alone where caches are kept, and a row
    longer than a pass in chunks where the model allows it.
    """
    states, caches = _States(packing.num_tokens, len(passes.layer_ids)), []
    groups = rows_of_similar_width(packing.lengths, passes.limit)
    for group in [[row] for row in sorted(sum(groups, []))] if passes.keep_cache else groups:
        rows, width = torch.tensor(group, device=input_ids.device), max(packing.lengths[row] for row in group)
        is_alone = len(group) == 1
        own = RowPacking.of(attention_mask[rows, :width])
        places = packing.index(rows[own.rows], own.position_ids)
        is_long = is_alone and can_chunk and width > passes.limit
        cache = passes.new_cache(width) if is_long or passes.keep_cache else None
        size = passes.limit if is_long else width
        for first in range(0, width, size):
            run = slice(first, min(first + size, width))
            index = torch.arange(run.start, run.stop, device=rows.device).expand(len(group), -1)
            keep = states.keeper(places[run] if is_alone else places, _only_row if is_alone else own.pack)
            forward(input_ids[rows, run], attention_mask[rows, : run.stop], index, cache, passes.layer_ids, keep)
        if cache is not None and passes.keep_cache:
            caches.append(CachedTexts(range(group[0], group[0] + 1), cache))
    return states.reading(packing, caches)


class _States:
    """Features and hidden states of all tokens, which come from the layers of one pass after another."""

    def __init__(self, num_tokens: int, num_parts: int):
        self.features, self.hidden = StateBuffer(num_tokens, num_parts), StateBuffer(num_tokens, 1)

    def keeper(self, places: slice | torch.Tensor, take: Callable[[torch.Tensor], torch.Tensor]) -> Keep:
        """Return what keeps the outputs of a pass over the tokens at `places`."""

        def keep(part: int, output: torch.Tensor) -> None:
            buffer, part = (self.hidden, 0) if part == LAST else (self.features, part)
            buffer.put(part, places, take(output))

        return keep

    def reading(self, packing: RowPacking, caches: list[CachedTexts]) -> TextReading:
        last_hidden = self.hidden.states()
        return TextReading(self.features.states(last_hidden), last_hidden, packing, tuple(caches))


def _only_row(output: torch.Tensor) -> torch.Tensor:
    return output[0]
