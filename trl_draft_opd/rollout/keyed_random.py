# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Random numbers by what they are for: functions of seed, epoch, sample, position, slot and purpose. No random state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


# Purposes of draws. Live rollout and replay share none: a replay of text that was just drawn must not use the numbers
# the text depends on, or its blocks would not have their distribution given the text.
REPLAY_ACCEPT, REPLAY_DRAFT, LIVE_DRAFT, LIVE_ACCEPT, LIVE_TOKEN, PLAIN_TOKEN, ANCHOR = range(7)


@dataclass(frozen=True)
class DrawKeys:
    """
    What the draws of a batch depend on, besides position, slot and purpose, and on nothing else: not on the batch, the
    order of rows or calls, or the rank.

    Attributes:
        seed (`int`): Of the run.
        epoch (`int`): Pass over the data; another one draws anew.
        sample_ids (`Sequence[int]`): One id per row. Rows with one id draw alike.
    """

    seed: int
    epoch: int
    sample_ids: Sequence[int]

    def check_rows(self, num_rows: int) -> None:
        """Raise `ValueError` unless there is one sample id for each of `num_rows` prompts."""
        if len(self.sample_ids) != num_rows:
            raise ValueError(f"{num_rows} prompts need as many sample ids in `keys`, got {len(self.sample_ids)}.")

    def uniforms(
        self, rows: Sequence[int] | torch.Tensor, anchors: torch.Tensor, slots: int | torch.Tensor, purpose: int
    ) -> torch.Tensor:
        """
        Return one number in [0, 1) per draw, or per draw and slot.

        Args:
            rows (`Sequence[int]` or `torch.LongTensor` of shape `(B,)`, on the host):
                Indices into `sample_ids`, one per draw.
            anchors (`torch.LongTensor` of shape `(B,)`): Position of each draw.
            slots (`int` or `torch.LongTensor` of shape `(S,)`): Slots to draw for.
            purpose (`int`): One of this module's constants.

        Returns:
            `torch.DoubleTensor` of shape `(B,)`, or `(B, S)` for a tensor of slots, on the device of `anchors`.
        """
        sample_ids = torch.tensor(list(self.sample_ids))[rows].to(anchors.device, non_blocking=True)
        if isinstance(slots, torch.Tensor):
            sample_ids, anchors = sample_ids[:, None], anchors[:, None]
        return keyed_uniforms(self.seed, self.epoch, sample_ids, anchors, slots, purpose)


def keyed_uniforms(
    seed: int, epoch: int, sample_ids: torch.Tensor, anchors: torch.Tensor, slot: int | torch.Tensor, purpose: int
) -> torch.Tensor:
    """
    Return one uniform number per block that depends on these six values alone: not on the batch, the order or the
    rank.

    A counter-based generator, so that two walks which meet at an anchor draw the same block there.
    Source: Steele et al., Fast splittable pseudorandom number generators (OOPSLA 2014), the mixing function of
    SplitMix64.

    Args:
        seed (`int`), epoch (`int`), purpose (`int`): Keys; `purpose` keeps different uses of one slot apart.
        sample_ids (`torch.LongTensor`), anchors (`torch.LongTensor`), slot (`int` or `torch.LongTensor`):
            Keys of each block, broadcast together.

    Returns:
        `torch.DoubleTensor` of the broadcast shape, in [0, 1).
    """
    # Numbers are mixed on the host; the first tensor takes the key to its own device.
    key = torch.zeros((), dtype=torch.long)
    for value in (seed, epoch, sample_ids, anchors, slot, purpose):
        key = _mix((key + _GOLDEN) ^ value)
    return _shift_right(key, 11).double() * 2.0**-53


def _signed(value: int) -> int:
    """Return the 64-bit pattern of `value` as the signed number torch holds it in."""
    return value - 2**64 if value >= 2**63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Scramble 64-bit patterns; products wrap around."""
    bits = (bits ^ _shift_right(bits, 30)) * _FIRST
    bits = (bits ^ _shift_right(bits, 27)) * _SECOND
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Shift without carrying the sign in, which torch's own shift of signed numbers would."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
