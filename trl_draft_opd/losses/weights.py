# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Weights of rows: by slot within a block, and per stream over a whole optimiser step. Knows no losses.

Shape letters:  B = sequences, A = anchors per sequence, K = drafts per block
"""

import torch
from torch import Tensor


def position_weights(num_drafts: int, decay: float) -> Tensor:
    """
    Weight the slots of a block by their distance from the anchor: `decay ** (k - 1)` at slot `k`.

    Returns:
        `torch.FloatTensor` of shape `(K,)` on the CPU.

    Raises:
        ValueError: If there is no slot, or `decay` is not in `(0, 1]`.
    """
    if num_drafts < 1:
        raise ValueError(f"`num_drafts` must be at least 1, got {num_drafts}. Count the drafts without the anchor.")
    if not 0 < decay <= 1:
        raise ValueError(f"`decay` must be in (0, 1], got {decay}. Use 1 to weight all slots alike.")
    return (decay ** torch.arange(num_drafts, dtype=torch.float64)).float()


def d_pace_weights(log_probs_BAK: Tensor, mask_BAK: Tensor, floor: float) -> Tensor:
    """
    Weight each slot of a block by what the block's expected accepted length owes to it: D-PACE.

    With `q` the drafter's probability of the committed token and `s = (1 - floor) q + floor`, slot `j` weighs
    `sum_{m >= j} prod_{i <= m} s_i`: the gradient of the expected accepted length `sum_m prod_{i <= m} s_i` in `log
    s_j`.

    Source: [D-PACE](https://huggingface.co/papers/2605.18810).

    Args:
        log_probs_BAK (`torch.Tensor` of shape `(B, A, K)`):
            The drafter's log-probability of the committed token at each slot, in nats, at most 0; `-inf` where it
            cannot draft that token. Slots behind the last one of the mask are not read.
        mask_BAK (`torch.BoolTensor` of shape `(B, A, K)`):
            Slots `m` that the sum counts. The product runs over all slots up to `m`.
        floor (`float`):
            What a slot passes on where the drafter gives the token probability 0, in `[0, 1]`. 1 weighs a slot by the
            number of counted slots from it on.

    Returns:
        `torch.Tensor` of shape `(B, A, K)`: weights in `[0, K]` without gradient, 0 behind the last slot of the mask.

    Raises:
        ValueError: If `floor` is out of range.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"`floor` must be in [0, 1], got {floor}. 1 ignores the drafter's probabilities.")
    reach_BAK = ((1 - floor) * log_probs_BAK.detach().exp() + floor).cumprod(dim=-1)
    counted_BAK = torch.where(mask_BAK, reach_BAK, 0)
    return counted_BAK.flip(-1).cumsum(dim=-1).flip(-1)


def mark_until_fail(is_top_BAK: Tensor) -> Tensor:
    """
    Mark the slots of each block up to and including the first whose argmax is not the committed token.

    Source: [Spec-AUF](https://huggingface.co/papers/2607.01893), accept-until-fail.

    Args:
        is_top_BAK (`torch.BoolTensor` of shape `(B, A, K)`): Whether the drafter's argmax is the committed token.

    Returns:
        `torch.BoolTensor` of shape `(B, A, K)`.
    """
    misses_BAK = (~is_top_BAK).long()
    # Misses before a slot: the one that misses first is still trained.
    return misses_BAK.cumsum(dim=-1) == misses_BAK


def stream_scale(weight_sum: Tensor | float, stream_weight: float, total_stream_weight: float) -> Tensor | float:
    """
    Compute the factor `stream_weight / (weight_sum * total_stream_weight)` that each row weight of a stream carries.

    Args:
        weight_sum (`torch.Tensor` or `float`):
            Sum of the stream's row weights over the whole optimiser step (all micro-batches, all ranks), at least 0.
        stream_weight (`float`), total_stream_weight (`float`):
            Weight of this stream, at least 0, and of all streams together, empty ones included, above 0.

    Returns:
        `torch.Tensor` or `float`, as `weight_sum`; `0` if the stream is empty (the other keeps its share).

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
