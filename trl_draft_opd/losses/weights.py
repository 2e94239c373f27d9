# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Weights of rows: by slot within a block, and per stream over a whole optimiser step. Knows nothing of losses and logits.

Shape letters:  K = drafts per block
"""

import torch
from torch import Tensor


def position_weights(num_drafts: int, decay: float) -> Tensor:
    """
    Weight the slots of a block by their distance from the anchor: `decay ** (k - 1)` at slot `k`.

    Args:
        num_drafts (`int`), decay (`float`):
            Drafts per block `K`, at least 1, and factor per slot, in `(0, 1]`.

    Returns:
        `torch.FloatTensor` of shape `(K,)`: weights of slots `1..K`, on the CPU.

    Raises:
        ValueError: If an argument is out of range.
    """
    if num_drafts < 1:
        raise ValueError(f"`num_drafts` must be at least 1, got {num_drafts}. Count the drafts without the anchor.")
    if not 0 < decay <= 1:
        raise ValueError(f"`decay` must be in (0, 1], got {decay}. Use 1 to weight all slots alike.")
    return (decay ** torch.arange(num_drafts, dtype=torch.float64)).float()


def stream_scale(weight_sum: Tensor | float, stream_weight: float, total_stream_weight: float) -> Tensor | float:
    """
    Compute the factor `stream_weight / (weight_sum * total_stream_weight)` that each row weight of a stream carries.

    Args:
        weight_sum (`torch.Tensor` or `float`):
            Sum of the stream's row weights over the whole optimiser step (all micro-batches, all ranks), at least 0.
            Used as it is: decayed weights of few slots may well sum to less than 1.
        stream_weight (`float`), total_stream_weight (`float`):
            Weight of this stream, at least 0, and of all streams together, empty ones included, above 0.

    Returns:
        `torch.Tensor` or `float`, as `weight_sum`: the factor; `0` if the stream is empty (the other keeps its share).

    Raises:
        ValueError: If a stream weight is out of range.
    """
    if not 0 <= stream_weight <= total_stream_weight or total_stream_weight == 0:
        given = f"{stream_weight} of {total_stream_weight}"
        raise ValueError(f"Stream weights must be at least 0 and not all 0, got {given}. Give one a positive weight.")
    if isinstance(weight_sum, Tensor):
        is_empty = weight_sum == 0
        return torch.where(is_empty, 0, stream_weight / total_stream_weight / torch.where(is_empty, 1, weight_sum))
    return stream_weight / total_stream_weight / weight_sum if weight_sum else 0.0
