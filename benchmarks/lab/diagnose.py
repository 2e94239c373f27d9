# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Where a drafter disagrees with its target: on the states of accepted slots, of first rejections, and behind them."""

from typing import Any

import torch
from datasets import Dataset

from trl_draft_opd import FrozenTarget
from trl_draft_opd.drafters.base import Drafter, run_blocks
from trl_draft_opd.losses import divergence
from trl_draft_opd.rollout.blocks import mark_slots

from .measure import replays
from .trainers import states_of_slots


ROWS_AT_ONCE = 512


@torch.no_grad()
def diagnose_states(target: FrozenTarget, drafter: Drafter, rows: Dataset) -> dict[str, Any]:
    """
    Compare drafter and target over the vocabulary by kind of state, along greedy responses.

    Returns:
        `dict`: `target_entropy` in nats over all kept states, and `mismatch`: for `accepted`, `first_rejected` and
        `suffix` the means of `forward_kl` (nats), `tv`, `is_wrong` (share of slots whose argmax is not the target's),
        `target_entropy`, and `count`.
    """
    sums = {kind: torch.zeros(5, dtype=torch.float64) for kind in ("accepted", "first_rejected", "suffix")}
    for rollout in replays(target, drafter, rows, 0.0, "greedy", keep_branch_hidden=True):
        anchors = mark_slots(rollout, rejected_scope="suffix", eos_token_ids=target.eos_token_ids)
        reading = target.read_text(rollout.input_ids, rollout.attention_mask, drafter.config.target_layer_ids).padded()
        hidden = run_blocks(
            drafter, reading.features, rollout.input_ids, anchors.anchors, anchors.drafts, target.embed
        )
        states = states_of_slots(reading.last_hidden, rollout.branch_hidden, anchors.anchors, anchors.is_branch)
        kinds = {
            "accepted": anchors.is_accepted,
            "first_rejected": anchors.is_rejected & ~anchors.is_branch,
            "suffix": anchors.is_branch,
        }
        for kind, mask in kinds.items():
            for q_states, p_states in zip(
                hidden[mask].split(ROWS_AT_ONCE), states[mask].split(ROWS_AT_ONCE), strict=True
            ):
                sums[kind] += _compare(target, drafter, q_states, p_states)
    names = ("forward_kl", "tv", "is_wrong", "target_entropy")
    mismatch = {
        kind: dict(zip(names, (total[:4] / total[4]).tolist(), strict=True)) | {"count": int(total[4])}
        for kind, total in sums.items()
        if total[4] > 0
    }
    everything = sum(sums.values())
    return {"target_entropy": float(everything[3] / everything[4]), "mismatch": mismatch}


def _compare(target: FrozenTarget, drafter: Drafter, q_states: torch.Tensor, p_states: torch.Tensor) -> torch.Tensor:
    """Return sums over rows of forward KL, TV, wrong argmax and target entropy, and their number."""
    p_logits = target.project(p_states).float()
    q_logits = drafter.draft_logits(q_states, target.project).float()
    if drafter.draft_token_ids is not None:
        p_logits = p_logits[:, drafter.draft_token_ids]
    log_p = p_logits.log_softmax(dim=1)
    columns = (
        divergence(q_logits, p_logits, None, "forward_kl"),
        divergence(q_logits, p_logits, None, "tv"),
        (q_logits.argmax(dim=1) != p_logits.argmax(dim=1)).float(),
        -(log_p.exp() * log_p).sum(dim=1),
        torch.ones(len(log_p)),
    )
    return torch.stack([column.double().sum().cpu() for column in columns])
