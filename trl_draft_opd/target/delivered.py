# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Puts states that were computed elsewhere in place of a forward pass of the target.

Shape letters:  B = sequences, L = text length, T = tokens of all texts, F = feature width, H = hidden size
"""

from collections.abc import Callable, Sequence

import torch

from ..drafters.packing import RowPacking
from .reading import ReadingSource, TextReading


def read_delivered(
    source: ReadingSource,
    input_ids: torch.Tensor,
    packing: RowPacking,
    layer_ids: Sequence[int],
    dtype: torch.dtype,
    norm: Callable[[torch.Tensor], torch.Tensor],
) -> TextReading:
    """
    Return the reading of rows `(B, L)` from a source, in `dtype` and where the ids are; `norm` is the target's final
    norm, for sources that deliver states from before it.

    Raises:
        ValueError, OSError: As [`ReadingSource.read`].
    """
    rows = input_ids.tolist()
    texts = [row[:length] for row, length in zip(rows, packing.lengths, strict=True)]
    states = source.read(texts, layer_ids)
    for text, each in zip(texts, states, strict=True):
        if {len(text)} != set(map(len, each)):
            raise ValueError(
                f"The target's source delivers {len(each.features)} and {len(each.last_hidden)} states for a text of "
                f"{len(text)} tokens, and every token has one. Mend the source, or read the texts again."
            )
    features, last_hidden = (
        torch.cat(parts).to(input_ids.device, dtype, non_blocking=True) for parts in zip(*states, strict=True)
    )
    if source.is_before_norm:
        last_hidden = norm(last_hidden)
    return TextReading(features, last_hidden, packing)
