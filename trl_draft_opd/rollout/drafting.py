# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How blocks are drafted: the settings that live decoding and replay share, and the choice of drafts, by argmax or from
uniforms that are handed in. Holds no random state.

Shape letters:  B = sequences, A = blocks per sequence, K = drafts per block, V = vocabulary, DV = the drafter's
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

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
        min_confidence (`float` or `None`):
            Verify a block only as far as the running product of its confidences is at least this, see
            [`mark_verified`]; `None` verifies whole blocks.
        keep_confidences (`bool`): Keep the confidences of all slots.
    """

    num_drafts: int
    sampling: SamplingSettings
    draft_sampling: str
    keep_branch_hidden: bool
    min_confidence: float | None = None
    keep_confidences: bool = False

    def __post_init__(self) -> None:
        check_draft_sampling(self.draft_sampling)
        check_min_confidence(self.min_confidence)
        if self.min_confidence is not None and self.keep_branch_hidden:
            raise ValueError(
                "`min_confidence` leaves slots without a state of the target, which `keep_branch_hidden` keeps. "
                "Training verifies whole blocks: leave it out."
            )

    @property
    def draws_drafts(self) -> bool:
        """Whether drafts are random: at temperature 0 they never are."""
        return self.draft_sampling == "sample" and not self.sampling.is_greedy

    @property
    def reads_confidences(self) -> bool:
        """Whether the drafter's confidence head is needed."""
        return self.keep_confidences or self.min_confidence is not None

    def check_drafter(self, drafter: Drafter) -> None:
        """Raise `ValueError` if confidences are asked of a drafter without a confidence head."""
        config: Any = drafter.config
        if self.reads_confidences and not config.has_confidence_head:
            raise ValueError(
                f"This {config.title} drafter has no confidence head, which `min_confidence` reads. Leave it out, or "
                "take a drafter that was trained with one."
            )


class DraftedBlocks(NamedTuple):
    """
    Drafts of blocks, and how they came about.

    Attributes:
        ids (`torch.LongTensor` of shape `(B, A, K)`): Drafts, in target ids.
        probs (`torch.Tensor` of shape `(B, A, K, V)` or `None`): Their distributions; `None` for argmax.
        confidences (`torch.DoubleTensor` of shape `(B, A, K)` or `None`): See [`read_confidences`].
    """

    ids: Tensor
    probs: Tensor | None
    confidences: Tensor | None


def check_draft_sampling(draft_sampling: str) -> None:
    """Raise `ValueError` unless `draft_sampling` is known."""
    if draft_sampling not in DRAFT_SAMPLING:
        raise ValueError(f"`draft_sampling` must be one of {DRAFT_SAMPLING}, got {draft_sampling!r}.")


def check_min_confidence(min_confidence: float | None) -> None:
    """Raise `ValueError` unless `min_confidence` is unset or in (0, 1]."""
    if min_confidence is not None and not 0 < min_confidence <= 1:
        raise ValueError(
            f"`min_confidence` must be in (0, 1], got {min_confidence}. Leave it out to verify whole blocks."
        )


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


def read_confidences(drafter: Drafter, hidden: Tensor) -> Tensor:
    """Return the chance that each slot's draft is kept if it is reached, as the drafter sees it, float64 `(...)`."""
    logits = drafter.confidence_logits(hidden)
    assert logits is not None, "`check_drafter` refuses a drafter without the head"
    return logits.double().sigmoid()


def mark_verified(reach: Tensor, min_confidence: float, first_slot: int = 1) -> Tensor:
    """
    Mark the slots of blocks that are verified: the first, and those up to which the chance that all drafts are kept is
    at least `min_confidence`.

    The chance of slot `k` is the running product of confidences 1 to `k`. Confidence `k` is read before draft `k` is
    chosen, so whether a draft is verified does not depend on the draft, and the text keeps the target's distribution.
    A rule that looks at drafts it then drops would prefer some tokens. Source:
    [DSpark](https://huggingface.co/papers/2607.05147), appendix A.

    The first draft is always verified: the drafter's pass is spent by then, and one more token costs the target's pass
    least. (vLLM's adaptive verification, which shares a budget among requests, may leave a request without one.)

    Args:
        reach (`torch.Tensor` of shape `(..., n)`):
            Running products of the confidences, at `n` slots from `first_slot` on.

    Returns:
        `torch.BoolTensor` of shape `(..., n)`.
    """
    slots = torch.arange(first_slot, first_slot + reach.shape[-1], device=reach.device)
    return (reach >= min_confidence) | (slots == 1)


@torch.no_grad()
def draft_blocks(
    target: FrozenTarget,
    drafter: Drafter,
    context: DraftContext,
    anchors: Tensor,
    anchor_tokens: Tensor,
    settings: DraftingSettings,
    uniforms: Tensor | None,
) -> DraftedBlocks:
    """
    Draft a block from each anchor.

    Args:
        context ([`DraftContext`]): The drafter's, of every position before the largest anchor.
        anchors (`torch.LongTensor` of shape `(B, A)`), anchor_tokens (same shape):
            Anchors, at least 1, and the tokens there.
        uniforms (`torch.Tensor` of shape `(B, A, K)`, *optional*):
            One number in [0, 1) per slot; `None` drafts argmax tokens.
    """
    state = drafter.begin(context, anchors, anchor_tokens, settings.num_drafts, target.embed)
    if state.block_hidden is not None:
        logits = drafter.draft_logits(state.block_hidden, target.project)
        ids, probs = choose_drafts(logits, settings.sampling, uniforms)
        return DraftedBlocks(
            drafter.to_target_ids(ids),
            None if probs is None else drafter.to_target_probs(probs),
            read_confidences(drafter, state.block_hidden) if settings.reads_confidences else None,
        )
    drafts: list[Tensor] = []
    distributions: list[Tensor] = []
    confidences: list[Tensor] = []
    for slot in range(1, settings.num_drafts + 1):
        if slot > 1:
            state = drafter.advance(state, drafts[-1])
        logits = drafter.draft_logits(state.hidden, target.project)
        ids, probs = choose_drafts(logits, settings.sampling, None if uniforms is None else uniforms[:, :, slot - 1])
        drafts.append(drafter.to_target_ids(ids))
        if probs is not None:
            distributions.append(drafter.to_target_probs(probs))
        if settings.reads_confidences:
            confidences.append(read_confidences(drafter, state.hidden))
    stacked = (torch.stack(each, dim=2) if each else None for each in (distributions, confidences))
    return DraftedBlocks(torch.stack(drafts, dim=2), *stacked)
