# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How drafts are chosen from draft logits: argmax, or draws from uniforms that are handed in or keyed. Holds no random state.
"""

import torch

from ..drafters.base import ChooseDrafts
from ..verification import SamplingSettings, choose_tokens, token_probs


DRAFT_SAMPLING = ("greedy", "sample")


def check_draft_sampling(draft_sampling: str) -> None:
    """Raise `ValueError` unless `draft_sampling` is known."""
    if draft_sampling not in DRAFT_SAMPLING:
        raise ValueError(f"`draft_sampling` must be one of {DRAFT_SAMPLING}, got {draft_sampling!r}.")


def draws_drafts(sampling: SamplingSettings, draft_sampling: str) -> bool:
    """Whether drafts are random: at temperature 0 they never are."""
    check_draft_sampling(draft_sampling)
    return draft_sampling == "sample" and not sampling.is_greedy


def greedy_chooser() -> ChooseDrafts:
    """Return a chooser that takes the argmax, the lowest id on ties."""

    def choose(logits: torch.Tensor, first_slot: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return logits.argmax(dim=-1), None

    return choose


def sampling_chooser(sampling: SamplingSettings, uniforms: torch.Tensor) -> ChooseDrafts:
    """
    Return a chooser that draws each slot's draft from the warped draft law.

    Args:
        sampling ([`SamplingSettings`]): Temperature, top-k and top-p, the same as the target's.
        uniforms (`torch.Tensor` of shape `(B, A, K)`): One number in [0, 1) per slot.
    """

    def choose(logits: torch.Tensor, first_slot: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        probs = token_probs(logits, sampling)
        slots = slice(first_slot, first_slot + logits.shape[2])
        return choose_tokens(probs, uniforms[:, :, slots]), probs

    return choose


def keyed_uniforms(
    seed: int, epoch: int, sample_ids: torch.Tensor, anchors: torch.Tensor, slot: int, purpose: int
) -> torch.Tensor:
    """
    Return one uniform number per block that depends on these six values alone: not on the batch, the order or the rank.

    A counter-based generator, so that two walks which meet at an anchor draw the same block there.
    Source: Steele et al., Fast splittable pseudorandom number generators (OOPSLA 2014), the mixing function of SplitMix64.

    Args:
        seed (`int`), epoch (`int`), slot (`int`), purpose (`int`): Keys; `purpose` keeps different uses of one slot apart.
        sample_ids (`torch.LongTensor`), anchors (`torch.LongTensor`, broadcast together): Keys of each block.

    Returns:
        `torch.DoubleTensor` of the broadcast shape, in [0, 1).
    """
    key = torch.zeros((), dtype=torch.long, device=anchors.device)
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
