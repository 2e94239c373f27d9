# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Replay: the blocks the current drafter would draft along text the target already wrote. No generation.

Given the text, the chain of anchors is a deterministic function of the drafter at temperature 0; the walk runs all rows
of a batch in parallel and reads the target once. Knows nothing of losses or trainers.

Shape letters:  B = sequences, L = text length, A = blocks per sequence, K = drafts per block
"""

from dataclasses import dataclass

import torch

from ..drafters.base import DraftContext, Drafter
from ..target import FrozenTarget
from ..verification import count_accepted, settle_blocks
from .sampler import greedy_chooser
from .types import Rollout


@dataclass(frozen=True)
class TargetText:
    """
    Text the target wrote.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(B, L)`): Prompt and response, right-padded.
        attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for text, 0 for padding.
        prompt_lengths (`torch.LongTensor` of shape `(B,)`): Tokens of each prompt.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_lengths: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each row, `(B,)`."""
        return self.attention_mask.sum(dim=1)


@torch.no_grad()
def rollout_replay(
    target: FrozenTarget, drafter: Drafter, text: TargetText, *, num_drafts: int, keep_branch_hidden: bool
) -> Rollout:
    """
    Walk the chain of blocks the drafter, drafting greedily, makes along the target's text.

    Equal to [`rollout_live`] at temperature 0 on the same text. With argmax drafts the rule "accept iff the draft equals
    the text" holds in law at any temperature (method: the posterior collapses when the draft law is one-hot).

    Args:
        target ([`FrozenTarget`]): Writer of the text.
        drafter ([`Drafter`]): Put in evaluation mode for the call and back afterwards.
        text ([`TargetText`]): Prompts and responses.
        num_drafts (`int`): K.
        keep_branch_hidden (`bool`): Also score the branches the drafts opened, in one packed forward.

    Returns:
        [`Rollout`]
    """
    was_training = drafter.training
    drafter.eval()
    try:
        context = encode_text(target, drafter, text)
        last = text.lengths - 1
        anchor = text.prompt_lengths.clone()
        chain: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        while True:
            is_open = anchor < last
            if not is_open.any():
                break
            drafts, accepted = draft_blocks(target, drafter, text, context, anchor[:, None], num_drafts)
            chain.append((torch.where(is_open, anchor, -1), drafts[:, 0], accepted[:, 0]))
            anchor = torch.where(is_open, anchor + accepted[:, 0] + 1, anchor)
        if not chain:
            chain.append((torch.full_like(anchor, -1), anchor[:, None].expand(-1, num_drafts) * 0, anchor * 0))
        anchors, drafts, accepted = (torch.stack(parts, dim=1) for parts in zip(*chain, strict=True))
        return assemble_rollout(target, text, anchors, drafts, accepted, keep_branch_hidden)
    finally:
        drafter.train(was_training)


def encode_text(target: FrozenTarget, drafter: Drafter, text: TargetText) -> DraftContext:
    """Read the text with the target and return the drafter's context of it."""
    reading = target.read_text(text.input_ids, text.attention_mask, drafter.config.target_layer_ids)
    positions = torch.arange(text.input_ids.shape[1], device=text.input_ids.device).expand_as(text.input_ids)
    next_ids = torch.cat([text.input_ids[:, 1:], text.input_ids[:, -1:]], dim=1)
    return drafter.encode_context(reading.features.to(drafter.device), target.embed(next_ids), positions)


def draft_blocks(
    target: FrozenTarget,
    drafter: Drafter,
    text: TargetText,
    context: DraftContext,
    anchors: torch.Tensor,
    num_drafts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draft greedily at given anchors and count the leading drafts that equal the text.

    Returns:
        `tuple`: drafts `(B, A, K)` and accepted drafts `(B, A)`, which count to the text's end at most.
    """
    length = text.input_ids.shape[1]
    safe = anchors.clamp(1, length - 1)
    proposal = drafter.propose(
        context, safe, text.input_ids.gather(1, safe), num_drafts, target.embed, target.project, greedy_chooser()
    )
    positions = safe[..., None] + torch.arange(1, num_drafts + 1, device=safe.device)
    committed = text.input_ids.gather(1, positions.clamp(max=length - 1).flatten(1)).view_as(positions)
    committed = torch.where(positions < text.lengths[:, None, None], committed, -1)
    return proposal.drafts, count_accepted(proposal.drafts, committed)


def assemble_rollout(
    target: FrozenTarget,
    text: TargetText,
    anchors: torch.Tensor,
    drafts: torch.Tensor,
    accepted: torch.Tensor,
    keep_branch_hidden: bool,
) -> Rollout:
    """Apply the end-of-text rules to drafted blocks and, if wished, score their branches."""
    num_drafts = drafts.shape[-1]
    outcome = settle_blocks(accepted, anchors, (text.lengths - 1)[:, None], num_drafts)
    is_block = anchors >= 0
    hidden = None
    if keep_branch_hidden:
        hidden = target.score_branches(text.input_ids, text.attention_mask, anchors, drafts)
    return Rollout(
        input_ids=text.input_ids,
        attention_mask=text.attention_mask,
        prompt_lengths=text.prompt_lengths,
        lengths=text.lengths,
        anchors=anchors,
        drafts=drafts,
        accepted=outcome.accepted * is_block,
        is_censored=outcome.is_censored & is_block,
        is_counted=outcome.is_counted & is_block,
        branch_hidden=hidden,
        num_target_forwards=1 + int(keep_branch_hidden),
    )


@torch.no_grad()
def redraft(
    target: FrozenTarget, drafter: Drafter, rollout: Rollout, anchors: torch.Tensor, *, keep_branch_hidden: bool
) -> Rollout:
    """
    Draft greedily along a rollout's text at other anchors, drafted and split as the chain's own are.

    Args:
        rollout ([`Rollout`]): Its text is used, its blocks are not.
        anchors (`torch.LongTensor` of shape `(B, A)`): Anchors, -1 for padding.
    """
    was_training = drafter.training
    drafter.eval()
    try:
        text = TargetText(rollout.input_ids, rollout.attention_mask, rollout.prompt_lengths)
        context = encode_text(target, drafter, text)
        drafts, accepted = draft_blocks(target, drafter, text, context, anchors, rollout.drafts.shape[-1])
        return assemble_rollout(target, text, anchors, drafts, accepted * (anchors >= 0), keep_branch_hidden)
    finally:
        drafter.train(was_training)
