# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Drafts whose fate is known in advance: the target's own greedy continuation, wrong at chosen positions.

Knows the target alone; a drafter's `propose` is replaced, so both rollout engines meet the same blocks.
"""

from collections.abc import Callable

import torch
from tiny import VOCAB

from trl_draft_opd import FrozenTarget
from trl_draft_opd.drafters.base import Drafter, Proposal
from trl_draft_opd.rollout import live


def greedy_text(target: FrozenTarget, prompt: list[int], num_tokens: int) -> list[int]:
    """Return prompt and greedy continuation, one full forward per token: no cache, no padding, no EOS."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = target.causal_lm(input_ids=torch.tensor([ids], device=target.device), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids


def planted_drafts(truth: list[int], anchor: int, num_drafts: int, wrong_positions: set[int]) -> list[int]:
    """Return the true tokens behind an anchor, another token at every wrong position."""
    return [
        (truth[p] + 1) % VOCAB if p in wrong_positions else truth[p]
        for p in range(anchor + 1, anchor + 1 + num_drafts)
    ]


def plant(monkeypatch, drafter: Drafter, truths: list[list[int]], wrong: Callable[[int], set[int]]) -> None:
    """Make live rollouts, replay and redrafting draft along `truths`, wrong at the positions `wrong(row)` names."""

    def blocks(rows: list[int], anchors: torch.Tensor, num_drafts: int) -> Proposal:
        drafts = [
            [planted_drafts(truths[row], anchor, num_drafts, wrong(row)) for anchor in row_anchors]
            for row, row_anchors in zip(rows, anchors.tolist(), strict=True)
        ]
        return Proposal(torch.tensor(drafts, device=anchors.device), None)

    def propose(context, anchor_positions, anchor_tokens, num_drafts, embed, project, choose):
        # Replay drafts for all rows; those that are done repeat their last anchor.
        capped = [anchor_positions[row].clamp(max=len(truth) - 1 - num_drafts) for row, truth in enumerate(truths)]
        return blocks(list(range(len(truths))), torch.stack(capped), num_drafts)

    monkeypatch.setattr(drafter, "propose", propose, raising=False)
    # A live batch loses rows as they end; it alone knows which are left.
    monkeypatch.setattr(
        live._LiveBatch,
        "_propose",
        lambda self, anchors: blocks(self.active, anchors[:, None], self.settings.num_drafts),
    )
