# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How drafts are chosen from draft logits: argmax, or draws from uniforms that are handed in. Holds no random state.
"""

import torch

from ..drafters.base import ChooseDrafts
from .acceptance import SamplingSettings, choose_tokens, token_probs


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
    Return a chooser that draws each slot's draft from the warped draft distribution.

    Args:
        sampling ([`SamplingSettings`]): Temperature, top-k and top-p, the same as the target's.
        uniforms (`torch.Tensor` of shape `(B, A, K)`): One number in [0, 1) per slot.
    """

    def choose(logits: torch.Tensor, first_slot: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        probs = token_probs(logits, sampling)
        slots = slice(first_slot, first_slot + logits.shape[2])
        return choose_tokens(probs, uniforms[:, :, slots]), probs

    return choose
