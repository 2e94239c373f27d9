# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a forward pass of the target leaves behind, and which rows it reads together. Data and lists: knows no model.

Shape letters:  B = sequences, L = text length, T = tokens of all texts, R = rows of a group, n = tokens,
                F = feature width, H = hidden size
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from ..drafters.packing import RowPacking


# Rows are read together down to this share of the widest one's tokens, and in any case within this many tokens of it:
# beyond, padding costs more than another forward.
SIMILAR_WIDTH, SIMILAR_TOKENS = 0.6, 64


@dataclass(frozen=True)
class CachedRows:
    """Keys and values of some rows `(R,)` of a text, ascending, over the `length` of the longest of them."""

    rows: torch.Tensor
    length: int
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
        caches (`tuple[CachedRows, ...]`): Keys and values of what was read, where they were kept.
    """

    features: torch.Tensor
    last_hidden: torch.Tensor
    packing: RowPacking
    caches: tuple[CachedRows, ...] = ()

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


def pad_rows(parts: Sequence[tuple[torch.Tensor, int, torch.Tensor]], shape: torch.Size) -> torch.Tensor:
    """Put the parts, `(rows, length, (R, length, ...) tensor)` each, into one `(B, L, ...)` tensor."""
    rows, length, first = parts[0]
    if len(rows) == shape[0] and length == shape[1]:
        return first
    padded = first.new_zeros(*shape, first.shape[-1])
    for rows, length, part in parts:
        padded[rows, :length] = part
    return padded


def rows_of_similar_width(widths: torch.Tensor) -> list[list[int]]:
    """Group rows of similar width `(B,)`, see `SIMILAR_WIDTH`, widest first; rows without tokens are left out."""
    counts = widths.tolist()
    groups: list[list[int]] = []
    for row in sorted(range(len(counts)), key=lambda row: -counts[row]):
        if counts[row] == 0:
            continue
        widest = counts[groups[-1][0]] if groups else None
        if widest is None or counts[row] < min(SIMILAR_WIDTH * widest, widest - SIMILAR_TOKENS):
            groups.append([])
        groups[-1].append(row)
    return [sorted(group) for group in groups]
