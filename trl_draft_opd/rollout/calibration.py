# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How far a drafter's confidences are from what happened to its drafts, as sums that add up over batches. Knows no model.

Shape letters:  B = sequences, A = blocks per sequence, K = drafts per block
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .types import Rollout


NUM_BINS = 10


@dataclass(frozen=True)
class Calibration:
    """
    Confidences and fates of the slots that were reached: those whose earlier drafts were all kept and that were
    verified themselves. Only their fate is known, and it is what a confidence is the chance of.

    The expected calibration error sorts slots into `NUM_BINS` bins of equal width by their confidence, and averages
    the distance between a bin's mean confidence and its share of kept drafts, weighted by its slots. Source: Guo et
    al., [On Calibration of Modern Neural Networks](https://huggingface.co/papers/1706.04599), section 2. It is 0 for
    a head that always says the mean, so the Brier score stands beside it: the mean of `(confidence - kept)^2`, lower
    for confidences that tell kept drafts from others too (Brier, Verification of forecasts expressed in terms of
    probability, 1950).

    Attributes:
        sums (`torch.DoubleTensor` of shape `(K, NUM_BINS, 4)`):
            By slot and bin: slots, and the sums of their confidences, kept drafts and squared errors. On the host.
    """

    sums: Tensor

    @classmethod
    def of_rollout(cls, rollout: Rollout) -> "Calibration":
        """Take the reached slots of the counted blocks of a rollout that kept its confidences."""
        assert rollout.confidences is not None, "`keep_confidences` asks for them"
        num_drafts = rollout.drafts.shape[-1]
        slots = torch.arange(1, num_drafts + 1, device=rollout.drafts.device)
        is_reached = (slots <= rollout.accepted[..., None] + 1) & rollout.is_counted[..., None]
        if rollout.verified is not None:
            is_reached &= slots <= rollout.verified[..., None]
        is_kept = (slots <= rollout.accepted[..., None])[is_reached].double()
        confidences = rollout.confidences[is_reached]
        bins = (confidences * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        places = slots.expand_as(is_reached)[is_reached].sub(1) * NUM_BINS + bins
        values = torch.stack(
            [torch.ones_like(is_kept), confidences, is_kept, (confidences - is_kept).square()], dim=-1
        ).double()
        sums = values.new_zeros(num_drafts * NUM_BINS, 4).index_add_(0, places, values)
        return cls(sums.view(num_drafts, NUM_BINS, 4).cpu())

    def __add__(self, other: "Calibration") -> "Calibration":
        return Calibration(self.sums + other.sums)

    def report(self) -> dict[str, Any]:
        """
        Return plain numbers for JSON: of all slots together (`error`, `brier`, `mean_confidence`, `mean_kept`), and by
        slot from 1 on (the same with `_per_slot`, and `num_reached_per_slot`); `None` where no slot was reached.
        """
        whole, slots = _measures(self.sums.sum(dim=0)), [_measures(sums) for sums in self.sums]
        by_slot = {f"{name}_per_slot": [each[name] for each in slots] for name in whole}
        return whole | by_slot | {"num_reached_per_slot": self.sums[..., 0].sum(dim=1).long().tolist()}


def _measures(sums: Tensor) -> dict[str, float | None]:
    """Return the measures of one set of bins, `(NUM_BINS, 4)`."""
    count, confidence, kept, squares = sums.sum(dim=0).tolist()
    if not count:
        return dict.fromkeys(("error", "brier", "mean_confidence", "mean_kept"))
    return {
        "error": float((sums[:, 1] - sums[:, 2]).abs().sum()) / count,
        "brier": squares / count,
        "mean_confidence": confidence / count,
        "mean_kept": kept / count,
    }
