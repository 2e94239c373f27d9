# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Blocks at anchors that are not the chain of the current drafter: given ones, and random ones.

Shape letters:  B = sequences, A = blocks per sequence
"""

import torch

from trl_draft_opd import FrozenTarget
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.rollout.blocks import draw_positions
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.replay import ReplayWalk, TargetText
from trl_draft_opd.rollout.types import Rollout, pack_columns
from trl_draft_opd.target.reading import TextReading


@torch.no_grad()
def redraft(
    target: FrozenTarget,
    drafter: Drafter,
    text: TargetText,
    anchors: torch.Tensor,
    settings: DraftingSettings,
    keys: DrawKeys,
    *,
    chunk_bytes: int,
    reading: TextReading | None = None,
) -> Rollout:
    """
    Draft at given anchors of the text, as the chain's own blocks are drafted.

    Args:
        anchors (`torch.LongTensor` of shape `(B, A)`):
            Positions of tokens the target wrote, behind each of which it wrote another; -1 for padding.
        target, drafter, text, settings, keys, chunk_bytes, reading: As for `rollout_replay`.
    """
    with drafter.evaluating():
        walk = ReplayWalk(target, drafter, text, settings, keys, chunk_bytes, reading)
        return walk.draft_at(anchors)


def random_anchors(rollout: Rollout, keys: DrawKeys) -> torch.Tensor:
    """
    Draw as many anchors per row as its chains have, uniform without replacement (the paper's ablation).

    Returns:
        `torch.LongTensor` of the shape of `rollout.anchors`, ascending, -1 for padding.
    """
    is_eligible = rollout.completion_mask.clone()
    is_eligible[:, :-1] &= rollout.completion_mask[:, 1:]
    is_eligible[:, -1] = False
    columns, is_anchor = pack_columns(draw_positions(is_eligible, rollout.num_rounds[:, None], keys))
    anchors = torch.full_like(rollout.anchors, -1)
    anchors[:, : columns.shape[1]] = torch.where(is_anchor, columns, -1)
    return anchors
