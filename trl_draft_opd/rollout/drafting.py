# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How blocks are drafted: the settings that live decoding and replay share, and the choice of drafts, by argmax or from
uniforms that are handed in. Holds no random state.

Shape letters:  B = sequences, A = blocks per sequence, K = drafts per block, V = vocabulary, DV = the drafter's
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..drafters.base import DraftContext, Drafter
from ..target.frozen import FrozenTarget
from .acceptance import SamplingSettings, choose_tokens, token_probs


DRAFT_SAMPLING = ("greedy", "sample")


@dataclass(frozen=True)
class DraftingSettings:
    """
    How blocks are drafted and verified, live or by replay.

    Attributes:
        num_drafts (`int`): Drafts per block, K.
        sampling ([`SamplingSettings`]): The distribution the text is drawn from; temperature 0 for greedy text.
        draft_sampling (`str`):
            `"greedy"` (drafts are argmax) or `"sample"` (drafts are drawn from the drafter's distribution).
        keep_branch_hidden (`bool`):
            Keep the target's hidden states on draft-induced states; replay drafts behind first rejections only then.
    """

    num_drafts: int
    sampling: SamplingSettings
    draft_sampling: str
    keep_branch_hidden: bool

    def __post_init__(self) -> None:
        check_draft_sampling(self.draft_sampling)

    @property
    def draws_drafts(self) -> bool:
        """Whether drafts are random: at temperature 0 they never are."""
        return self.draft_sampling == "sample" and not self.sampling.is_greedy


def check_draft_sampling(draft_sampling: str) -> None:
    """Raise `ValueError` unless `draft_sampling` is known."""
    if draft_sampling not in DRAFT_SAMPLING:
        raise ValueError(f"`draft_sampling` must be one of {DRAFT_SAMPLING}, got {draft_sampling!r}.")


def choose_drafts(logits: Tensor, sampling: SamplingSettings, uniforms: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """
    Choose one draft per row of logits `(..., DV)`, by one number in [0, 1) per row or, without uniforms, by argmax.

    Returns:
        `tuple` of draft ids `(...)` and the distribution they were drawn from, `(..., DV)`; `None` for argmax.
    """
    if uniforms is None:
        return logits.argmax(dim=-1), None
    probs = token_probs(logits, sampling)
    return choose_tokens(probs, uniforms), probs


@torch.no_grad()
def draft_blocks(
    target: FrozenTarget,
    drafter: Drafter,
    context: DraftContext,
    anchors: Tensor,
    anchor_tokens: Tensor,
    settings: DraftingSettings,
    uniforms: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """
    Draft a block from each anchor.

    Args:
        context ([`DraftContext`]): The drafter's, of every position before the largest anchor.
        anchors (`torch.LongTensor` of shape `(B, A)`), anchor_tokens (same shape):
            Anchors, at least 1, and the tokens there.
        uniforms (`torch.Tensor` of shape `(B, A, K)`, *optional*):
            One number in [0, 1) per slot; `None` drafts argmax tokens.

    Returns:
        `tuple` of drafts `(B, A, K)` in target ids and their distributions `(B, A, K, V)`; `None` for argmax.
    """
    state = drafter.begin(context, anchors, anchor_tokens, settings.num_drafts, target.embed)
    if state.block_hidden is not None:
        logits = drafter.draft_logits(state.block_hidden, target.project)
        ids, probs = choose_drafts(logits, settings.sampling, uniforms)
        return drafter.to_target_ids(ids), None if probs is None else drafter.to_target_probs(probs)
    drafts: list[Tensor] = []
    distributions: list[Tensor] = []
    for slot in range(1, settings.num_drafts + 1):
        if slot > 1:
            state = drafter.advance(state, drafts[-1])
        logits = drafter.draft_logits(state.hidden, target.project)
        ids, probs = choose_drafts(logits, settings.sampling, None if uniforms is None else uniforms[:, :, slot - 1])
        drafts.append(drafter.to_target_ids(ids))
        if probs is not None:
            distributions.append(drafter.to_target_probs(probs))
    return torch.stack(drafts, dim=2), torch.stack(distributions, dim=2) if distributions else None
