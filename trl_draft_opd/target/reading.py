# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a forward pass of the target leaves behind, and which rows it reads together. Data and lists: knows no model.

Shape letters:  B = sequences, L = text length, T = tokens of all texts, n = tokens, F = feature width,
                H = hidden size
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from transformers import DynamicCache

from ..drafters.packing import RowPacking


# Where rows are padded, they are read together down to this share of the widest one's tokens, and in any case within
# this many tokens of it: beyond, padding costs more than another forward.
SIMILAR_WIDTH, SIMILAR_TOKENS = 0.6, 64


@dataclass(frozen=True)
class CachedTexts:
    """Keys and values of consecutive rows of a text, end to end."""

    rows: range
    cache: DynamicCache


@dataclass(frozen=True)
class TargetReading:
    """
    What one forward pass of the target leaves behind.

    Attributes:
        features (`torch.Tensor` of shape `(B, n, F)`): Outputs of the tapped layers, concatenated in ascending order.
        last_hidden (`torch.Tensor` of shape `(B, n, H)`): Input of the target's head.
    """

    features: torch.Tensor
    last_hidden: torch.Tensor


@dataclass(frozen=True)
class TextReading:
    """
    What the target makes of a text: its rows lie end to end, without padding.

    Attributes:
        features (`torch.Tensor` of shape `(T, F)`): Outputs of the tapped layers, concatenated in ascending order.
        last_hidden (`torch.Tensor` of shape `(T, H)`): Input of the target's head.
        packing ([`RowPacking`]): Which token of which row each entry is of.
        caches (`tuple[CachedTexts, ...]`): Keys and values of what was read, where they were kept.
    """

    features: torch.Tensor
    last_hidden: torch.Tensor
    packing: RowPacking
    caches: tuple[CachedTexts, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes held by features and hidden states."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.features, self.last_hidden))

    def without_caches(self) -> "TextReading":
        """Return the same reading without its caches."""
        return TextReading(self.features, self.last_hidden, self.packing)

    def padded(self) -> TargetReading:
        """Return the states as `(B, L, ...)`, zero in the padding."""
        return TargetReading(self.packing.unpack(self.features), self.packing.unpack(self.last_hidden))


class TextStates(NamedTuple):
    """
    The target's states of one text, computed elsewhere; on the host.

    Attributes:
        features (`torch.Tensor` of shape `(L, F)`): Outputs of the tapped layers, concatenated in ascending order.
        last_hidden (`torch.Tensor` of shape `(L, H)`):
            Input of the target's head; output of the last layer, before the final norm, where the source says so.
    """

    features: torch.Tensor
    last_hidden: torch.Tensor


class ReadingSource(Protocol):
    """Where the target's states come from when they are computed elsewhere: a store, or servers."""

    # Whether `last_hidden` is what the last layer returns, before the target's final norm.
    is_before_norm: bool

    def read(self, texts: Sequence[Sequence[int]], layer_ids: Sequence[int]) -> list[TextStates]:
        """
        Return the states of each text, which is its token ids, at `layer_ids`, ascending; waits for them.

        Raises:
            ValueError: If a text is not there, or what was delivered for it is not what the target computes.
            OSError: If it cannot be fetched.
        """
        ...

    def expect(self, texts: Sequence[Sequence[int]]) -> None:
        """Announce texts that will be read soon, in this order; never waits, and need not do anything."""
        ...


class StateBuffer:
    """
    States of `num_tokens` tokens, which come column by column and run by run; made when the first of them come.

    Args:
        num_tokens (`int`): T.
        num_parts (`int`): Columns of H numbers each: F = num_parts * H.
    """

    def __init__(self, num_tokens: int, num_parts: int):
        self._states: torch.Tensor | None = None
        self._num_tokens, self._num_parts = num_tokens, num_parts

    def put(self, part: int, places: slice | torch.Tensor, states: torch.Tensor) -> None:
        """Write the states `(n, H)` of the tokens at `places` into column `part`."""
        size = states.shape[-1]
        if self._states is None:
            if self._num_parts == 1 and len(states) == self._num_tokens and isinstance(places, slice):
                self._states = states
                return
            self._states = states.new_empty(self._num_tokens, self._num_parts * size)
        self._states[places, part * size : (part + 1) * size] = states

    def states(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """Return what was written, `(T, F)`; without columns or tokens, nothing of the kind of `like`."""
        if self._states is not None:
            return self._states
        assert like is not None, "some tokens were read"
        return like.new_empty(self._num_tokens, 0)


def rows_in_turn(lengths: Sequence[int], limit: int) -> list[range]:
    """Group consecutive rows of at most `limit` tokens together; a longer one is alone."""
    groups: list[range] = []
    num_tokens = 0
    for row, length in enumerate(lengths):
        if groups and num_tokens + length <= limit:
            groups[-1] = range(groups[-1].start, row + 1)
        else:
            groups.append(range(row, row + 1))
            num_tokens = 0
        num_tokens += length
    return groups


def rows_of_similar_width(widths: Sequence[int], limit: int) -> list[list[int]]:
    """
    Group rows of similar width, see `SIMILAR_WIDTH`, widest first, of at most `limit` padded tokens together; rows
    without tokens are left out.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(widths)), key=lambda row: -widths[row]):
        if widths[row] == 0:
            continue
        widest = widths[groups[-1][0]] if groups else 0
        is_similar = widths[row] >= min(SIMILAR_WIDTH * widest, widest - SIMILAR_TOKENS)
        if not groups or not is_similar or (len(groups[-1]) + 1) * widest > limit:
            groups.append([])
        groups[-1].append(row)
    return [sorted(group) for group in groups]
