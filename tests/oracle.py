# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Drafts whose fate is known in advance: the target's own greedy continuation, wrong at chosen positions.

Knows the target alone; how a drafter drafts is replaced, so both rollout engines meet the same blocks.
"""

from collections.abc import Callable

import torch
from datasets import Dataset
from tiny import EOS, MASK, VOCAB, make_prompts
from torch.nn.functional import one_hot

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

    def draft_along(context, anchor_positions, anchor_tokens, num_drafts, embed, decide):
        # Padding repeats an early anchor; anchors near a truth's end are asked for fewer slots.
        anchors = torch.stack([anchor_positions[row].clamp(1, len(truth) - 1) for row, truth in enumerate(truths)])
        for slot in range(1, num_drafts + 1):
            drafts = [
                [
                    planted_drafts([*truth, *[0] * num_drafts], anchor, slot, wrong(row))[-1]
                    for anchor in anchors[row].tolist()
                ]
                for row, truth in enumerate(truths)
            ]
            # The hidden state is the draft itself; the head below turns it into logits.
            decided = decide(torch.tensor(drafts, dtype=torch.float32)[..., None], slot)
            if decided is None:
                return
            anchors = anchors if decided[1] is None else anchors.gather(1, decided[1].clamp(min=0))

    monkeypatch.setattr(drafter, "draft_along", draft_along, raising=False)
    monkeypatch.setattr(
        drafter, "draft_logits", lambda hidden, project: one_hot(hidden[..., 0].long(), VOCAB).float(), raising=False
    )
    # A live batch loses rows as they end; it alone knows which are left.
    monkeypatch.setattr(
        live._LiveBatch,
        "_propose",
        lambda self, anchors: blocks(self.active, anchors[:, None], self.settings.num_drafts),
    )


def greedy_rows(target: FrozenTarget, count: int, num_tokens: int) -> Dataset:
    """Return prompts with the target's own greedy responses, all of `num_tokens`: of a random target, those without EOS and mask."""
    texts = [(len(prompt), greedy_text(target, prompt, num_tokens)) for prompt in make_prompts(2 * count)]
    texts = [(start, text) for start, text in texts if not {EOS, MASK} & set(text)][:count]
    assert len(texts) == count
    return Dataset.from_dict(
        {"prompt_ids": [text[:n] for n, text in texts], "completion_ids": [text[n:] for n, text in texts]}
    )
