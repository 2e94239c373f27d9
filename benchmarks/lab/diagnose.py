# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A drafter along greedy responses of its target: how the two differ on the states of accepted slots, of first rejections
and behind them, and which tokens the drafter gets right from every position.
"""

from typing import Any

import torch
from datasets import Dataset

from trl_draft_opd import FrozenTarget
from trl_draft_opd.drafters.base import Drafter, run_blocks
from trl_draft_opd.losses import divergence
from trl_draft_opd.rollout.blocks import mark_slots, sample_anchors
from trl_draft_opd.trainer.texts import join_responses

from .anatomy import Response, describe
from .measure import BATCH_SIZE, replays
from .trainers import states_of_slots


ROWS_AT_ONCE = 512
MEASURES = ("forward_kl", "tv", "is_wrong", "target_entropy", "top_prob", "outside_mass")


def diagnose_drafter(target: FrozenTarget, drafter: Drafter, rows: Dataset, states_rows: Dataset) -> dict[str, Any]:
    """
    Return everything that the laboratory says of a drafter along greedy responses: see `describe` of `anatomy`, and
    `mismatch` of [`diagnose_states`].

    Args:
        target ([`FrozenTarget`]), drafter ([`Drafter`]): The pair.
        rows (`Dataset`): `prompt_ids` and `completion_ids`, written greedily by the target.
        states_rows (`Dataset`): Those of them that the kinds of state are compared on, which takes the target itself.
    """
    numbers = describe(look_along(target, drafter, rows), drafter.config.default_position_decay)
    return numbers | {"mismatch": diagnose_states(target, drafter, states_rows)["mismatch"]}


@torch.no_grad()
def diagnose_states(target: FrozenTarget, drafter: Drafter, rows: Dataset) -> dict[str, Any]:
    """
    Compare drafter and target over the vocabulary by kind of state, along greedy responses.

    Returns:
        `dict`: `target_entropy` in nats over all kept states, and `mismatch`: for `accepted`, `first_rejected` and
        `suffix` the means of `forward_kl` (nats), `tv`, `is_wrong` (share of slots whose argmax is not the target's),
        `target_entropy`, `top_prob` (the target's probability of its argmax), `outside_mass` (that of the tokens that
        cannot be drafted), and `count`. Divergences and argmax are over the tokens that can be drafted, with the
        target's probabilities made to add up to 1; entropy and top probability are over all.
    """
    sums = {kind: torch.zeros(len(MEASURES) + 1).double() for kind in ("accepted", "first_rejected", "suffix")}
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
    mismatch = {
        kind: dict(zip(MEASURES, (total[:-1] / total[-1]).tolist(), strict=True)) | {"count": int(total[-1])}
        for kind, total in sums.items()
        if total[-1] > 0
    }
    everything = sum(sums.values())
    entropy = everything[MEASURES.index("target_entropy")] / everything[-1]
    return {"target_entropy": float(entropy), "mismatch": mismatch}


def _compare(target: FrozenTarget, drafter: Drafter, q_states: torch.Tensor, p_states: torch.Tensor) -> torch.Tensor:
    """Return sums over rows of all `MEASURES`, and the number of rows."""
    p_logits = target.project(p_states).float()
    entropy, top_prob, outside = _describe_target(p_logits, drafter.draft_token_ids)
    q_logits = drafter.draft_logits(q_states, target.project).float()
    if drafter.draft_token_ids is not None:
        p_logits = p_logits[:, drafter.draft_token_ids]
    columns = (
        divergence(q_logits, p_logits, None, "forward_kl"),
        divergence(q_logits, p_logits, None, "tv"),
        (q_logits.argmax(dim=1) != p_logits.argmax(dim=1)).float(),
        entropy,
        top_prob,
        outside,
        torch.ones(len(p_logits)),
    )
    return torch.stack([column.double().sum().cpu() for column in columns])


def _describe_target(logits: torch.Tensor, draft_token_ids: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return entropy, largest probability, and probability of the tokens that cannot be drafted, of each row."""
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    inside = p.sum(dim=1) if draft_token_ids is None else p[:, draft_token_ids].sum(dim=1)
    return -(p * log_p).sum(dim=1), p.amax(dim=1), (1 - inside).clamp(min=0)


@torch.no_grad()
def look_along(target: FrozenTarget, drafter: Drafter, rows: Dataset) -> list[Response]:
    """
    Return the responses of `rows`, and what the drafter makes of every token from every anchor within K of it.

    The drafts that a slot reads are the response's tokens, as those of decoding are up to its first mismatch.
    """
    found = []
    for start in range(0, len(rows), BATCH_SIZE):
        part = rows[start : start + BATCH_SIZE]
        found += _look_along(target, drafter, part["prompt_ids"], part["completion_ids"])
    return found


def _look_along(
    target: FrozenTarget, drafter: Drafter, prompt_ids: list[list[int]], completion_ids: list[list[int]]
) -> list[Response]:
    sample_ids, num_drafts = list(range(len(prompt_ids))), drafter.default_num_drafts
    text = join_responses(prompt_ids, completion_ids, sample_ids, target.pad_token_id, target.device)
    options = {"num_anchors": None, "num_drafts": num_drafts, "seed": 0, "epoch": 0}
    blocks = sample_anchors(text.input_ids, text.completion_mask, sample_ids, **options)
    reading = target.read_text(text.input_ids, text.attention_mask, drafter.config.target_layer_ids).padded()
    with drafter.evaluating():
        hidden = run_blocks(drafter, reading.features, text.input_ids, blocks.anchors, blocks.drafts, target.embed)
    is_right, prob = (torch.zeros(blocks.labels.shape, device=target.device) for _ in range(2))
    for index in (blocks.labels >= 0).flatten().nonzero()[:, 0].split(ROWS_AT_ONCE):
        logits = drafter.draft_logits(hidden.flatten(0, 2)[index], target.project).float()
        labels = blocks.labels.flatten()[index]
        is_right.view(-1)[index] = (drafter.to_target_ids(logits.argmax(dim=1)) == labels).float()
        prob.view(-1)[index] = drafter.to_target_probs(logits.softmax(dim=1)).gather(1, labels[:, None])[:, 0]
    found = []
    for row, (prompt, ids) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        # The state before a token predicts it.
        states = reading.last_hidden[row, len(prompt) - 1 : len(prompt) + len(ids) - 1]
        parts = [
            _describe_target(target.project(chunk).float(), drafter.draft_token_ids)
            for chunk in states.split(ROWS_AT_ONCE)
        ]
        entropy, top_prob, outside = (torch.cat(columns).cpu().numpy() for columns in zip(*parts, strict=True))
        known = torch.ones(len(ids), dtype=torch.bool)
        if drafter.draft_token_ids is not None:
            known = torch.isin(torch.tensor(ids), drafter.draft_token_ids.cpu())
        num_anchors = max(len(ids) - 1, 0)
        found.append(
            Response(
                torch.tensor(ids).numpy(),
                entropy,
                top_prob,
                outside,
                known.numpy(),
                is_right[row, :num_anchors].bool().cpu().numpy(),
                prob[row, :num_anchors].cpu().numpy(),
            )
        )
    return found
