# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Drafts whose fate is known in advance: the target's own greedy continuation, wrong at chosen positions.

Knows the target alone; how a drafter drafts is replaced, so both rollout engines meet the same blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import one_hot

from helpers.tiny import EOS, MASK, VOCAB, make_prompts
from trl_draft_opd import FrozenTarget
from trl_draft_opd.drafters.base import Drafter, DraftState
from trl_draft_opd.rollout import live
from trl_draft_opd.rollout.drafting import DraftedBlocks
from trl_draft_opd.rollout.replay import ReplayWalk


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


@dataclass(frozen=True)
class PlantedState(DraftState):
    """Blocks of planted drafts, at `(row, position)` each."""

    places: list[tuple[int, int]]


def plant(monkeypatch, drafter: Drafter, truths: list[list[int]], wrong: Callable[[int], set[int]]) -> None:
    """Make live rollouts and replay draft along `truths`, wrong at the positions `wrong(row)` names."""

    def at_slot(places, slot):
        drafts = []
        for row, anchor in places:
            # A truth may end before the last slot of an anchor near its end.
            truth = [*truths[row], *[0] * (anchor + slot - len(truths[row]) + 1)]
            drafts.append(planted_drafts(truth, anchor, slot, wrong(row))[-1])
        # The hidden state is the draft itself; the head below turns it into logits.
        return PlantedState(slot, torch.tensor([drafts], dtype=torch.float32)[..., None], None, places)

    def advance(state, tokens, columns=None):
        places = state.places if columns is None else [state.places[column] for column in columns[0].tolist()]
        return at_slot(places, state.slot + 1)

    def draft_logits(hidden, project):
        return one_hot(hidden[..., 0].long(), VOCAB).float()

    def planted(method):
        def run(walk, *args):
            def begin(context, anchors, anchor_tokens, num_drafts, embed):
                rows = walk.rows[anchors[0]].tolist()
                places = list(zip(rows, walk.positions[anchors[0]].tolist(), strict=True))
                first = at_slot(places, 1)
                if drafter.reads_drafts:
                    return first
                hidden = [at_slot(places, slot).hidden for slot in range(1, num_drafts + 1)]
                return replace(first, block_hidden=torch.stack(hidden, dim=2))

            # Only while it is replayed: what is trained is the drafter itself.
            with pytest.MonkeyPatch.context() as patch:
                for own in (begin, advance, draft_logits):
                    patch.setattr(drafter, own.__name__, own)
                return method(walk, *args)

        return run

    for name in ("draft", "_draft_suffixes"):
        monkeypatch.setattr(ReplayWalk, name, planted(getattr(ReplayWalk, name)))

    def draft_live(batch, anchors):
        # A live batch loses rows as they end; it alone knows which are left.
        rows = zip(batch.active, anchors.tolist(), strict=True)
        drafts = [planted_drafts(truths[row], anchor, batch.settings.num_drafts, wrong(row)) for row, anchor in rows]
        return DraftedBlocks(torch.tensor(drafts, device=anchors.device), None, None)

    monkeypatch.setattr(live._LiveBatch, "_draft", draft_live)


def greedy_rows(target: FrozenTarget, count: int, num_tokens: int) -> Dataset:
    """
    Return prompts with the target's own greedy responses, all of `num_tokens`: of a random target, those without EOS
    and mask.
    """
    texts = [(len(prompt), greedy_text(target, prompt, num_tokens)) for prompt in make_prompts(2 * count)]
    texts = [(start, text) for start, text in texts if not {EOS, MASK} & set(text)][:count]
    assert len(texts) == count
    return Dataset.from_dict(
        {"prompt_ids": [text[:n] for n, text in texts], "completion_ids": [text[n:] for n, text in texts]}
    )
