# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What target and drafter thought of a rejected draft and of the token that stands in its place: both read a finished
response once more. Only responses that are shown are read so.
"""

from typing import NamedTuple

import torch

from ..drafters.base import Drafter
from ..rollout.types import Rollout
from ..target.frozen import FrozenTarget


# Blocks whose distributions are alive at a time: four of them, a vocabulary each.
_BLOCKS_AT_ONCE = 64


class Preference(NamedTuple):
    """
    Probabilities at the slot of a rejected draft: the models' own, at temperature 1 whatever the text was decoded
    with.

    Attributes:
        target_of_draft (`float`), drafter_of_draft (`float`): Of the rejected draft.
        target_of_token (`float`), drafter_of_token (`float`): Of the token that the target wrote there.
    """

    target_of_draft: float
    drafter_of_draft: float
    target_of_token: float
    drafter_of_token: float


@torch.no_grad()
def read_preferences(target: FrozenTarget, drafter: Drafter, rollout: Rollout) -> dict[int, Preference]:
    """
    Return preferences at the rejected drafts of a rollout of one row, by the place of the token written there.

    The prefix of such a slot is committed text, so one reading of the response and one pass of the drafter serve all.
    """
    text, length = rollout.input_ids[:, : int(rollout.lengths[0])], int(rollout.lengths[0])
    slots = rollout.accepted[0] + 1
    places = rollout.anchors[0] + slots
    num_verified = rollout.drafts.shape[-1] if rollout.verified is None else rollout.verified[0]
    is_rejected = rollout.is_block[0] & ~rollout.is_censored[0] & (slots <= num_verified) & (places < length)
    found: dict[int, Preference] = {}
    blocks = is_rejected.nonzero()[:, 0]
    if not len(blocks):
        return found
    reading = target.read_text(text, torch.ones_like(text), drafter.config.target_layer_ids)
    with drafter.evaluating():
        context = drafter.encode_text(reading.features[None].to(drafter.device), text, target.embed)
        for part in blocks.split(_BLOCKS_AT_ONCE):
            anchors, index, place = rollout.anchors[0, part], slots[part] - 1, places[part]
            rows = torch.arange(len(part), device=text.device)
            num_drafts = int(slots[part].max())
            state = drafter.begin(context, anchors[None], text[:, anchors], rollout.drafts.shape[-1], target.embed)
            # Up to the rejected draft the drafts equal the text, and later slots are not looked at.
            along = (anchors[:, None] + torch.arange(1, num_drafts, device=text.device)).clamp(max=length - 1)
            hidden = drafter.run_along(state, text[:, along])[1] if drafter.reads_drafts else state.block_hidden
            assert hidden is not None, "a family whose slots read no draft fills it"
            drafted = drafter.draft_logits(hidden[0, rows, index], target.project).float().softmax(dim=-1)
            wanted = target.project(reading.last_hidden[place - 1]).float().softmax(dim=-1)
            ids = torch.stack([rollout.drafts[0, part, index], text[0, place]], dim=1)
            both = [wanted.gather(1, ids), drafter.to_target_probs(drafted).gather(1, ids)]
            # By block: of the draft from target and drafter, then of the token.
            values = torch.stack(both, dim=2).flatten(1).tolist()
            found |= {at: Preference(*each) for at, each in zip(place.tolist(), values, strict=True)}
    return found
