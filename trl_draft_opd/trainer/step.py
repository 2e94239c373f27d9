# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One training step as pure functions, shared by both trainers: anchors in, a loss normalised per stream out.

Shape letters:  B = sequences, L = text length, A = anchors per sequence, K = drafts per block, H = hidden size, N = rows
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..drafters.base import Drafter, run_blocks
from ..losses import (
    Head,
    RowLosses,
    chunked_divergence,
    d_pace_weights,
    mark_until_fail,
    position_weights,
    score_labels,
    stream_scale,
)
from ..rollout.blocks import BlockBatch
from ..target.frozen import FrozenTarget, TargetReading


STREAMS = ("accepted", "rejected", "supervised")


@dataclass(frozen=True)
class StreamSettings:
    """
    How one stream is weighed.

    Attributes:
        loss_type (`str`): Divergence of its rows.
        weight (`float`): Its share of the loss, lambda.
        decay (`float`): Weight decay per slot, in (0, 1].
    """

    loss_type: str
    weight: float
    decay: float


@dataclass(frozen=True)
class SlotRules:
    """
    How slots are weighed by what the current drafter makes of the committed text, on top of their stream's weights.

    Attributes:
        d_pace_floor (`float`, *optional*): Floor of D-PACE's weights, in [0, 1]; `None` leaves them out.
        is_until_fail (`bool`): Whether slots behind the drafter's first mismatch weigh nothing.
    """

    d_pace_floor: float | None
    is_until_fail: bool

    @property
    def needs_scores(self) -> bool:
        """Whether the drafter's probabilities of the committed tokens are asked for."""
        return self.d_pace_floor is not None or self.is_until_fail


@dataclass(frozen=True)
class StepLoss:
    """
    The loss of one micro-batch.

    Attributes:
        loss (`torch.Tensor`): Scalar with gradient: this micro-batch's share of the optimiser step's loss.
        sums (`dict[str, tuple[float, float]]`): Numerator and denominator of each metric, to be summed before dividing.
    """

    loss: torch.Tensor
    sums: dict[str, tuple[float, float]]


def row_weights(
    anchors: BlockBatch, stream: str, settings: StreamSettings, draft_token_ids: torch.Tensor | None
) -> torch.Tensor:
    """
    Return the weight of every slot in a stream, `(B, A, K)`, zero outside of it and throughout a stream without a share.

    Under `ce` a committed token outside the draft vocabulary cannot be learnt, so its slot weighs nothing. [`SlotRules`] are not
    in these weights: they depend on a forward pass, and the sum over a whole optimiser step is needed before the first one.
    """
    mask = _stream_mask(anchors, stream)
    weights = mask * position_weights(mask.shape[-1], settings.decay).to(mask.device) * float(settings.weight > 0)
    if settings.loss_type == "ce" and draft_token_ids is not None:
        known = torch.isin(anchors.labels, draft_token_ids.to(mask.device)) | (anchors.labels < 0)
        weights = weights * known
    return weights


def weight_sums(
    batches: list[BlockBatch], settings: dict[str, StreamSettings], draft_token_ids: torch.Tensor | None
) -> torch.Tensor:
    """
    Return the sum of each stream's weights over micro-batches, `(3,)` in the order of `STREAMS`, float64.

    A stream that `settings` does not name takes no part: its sum is 0.
    """
    sums = [
        sum(
            float(row_weights(batch, name, settings[name], draft_token_ids).sum(dtype=torch.float64))
            for batch in batches
            if name in settings
        )
        for name in STREAMS
    ]
    return torch.tensor(sums, dtype=torch.float64)


def step_loss(
    drafter: Drafter,
    target: FrozenTarget,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    anchors: BlockBatch,
    branch_hidden: torch.Tensor | None,
    settings: dict[str, StreamSettings],
    global_weight_sums: torch.Tensor,
    chunk_bytes: int,
    reading: TargetReading | None = None,
    slot_rules: SlotRules | None = None,
) -> StepLoss:
    """
    Run the drafter from every anchor of a micro-batch and compare it with the target on the same states.

    Args:
        drafter ([`Drafter`]): Gradient flows into it.
        target ([`FrozenTarget`]): Reads the text once.
        input_ids (`torch.LongTensor` of shape `(B, L)`), attention_mask (`torch.LongTensor` of shape `(B, L)`): The text.
        anchors ([`BlockBatch`]): Where to draft and which slots belong to which stream.
        branch_hidden (`torch.Tensor` of shape `(B, A', K, H)`, *optional*):
            The target's hidden states on draft-induced states of the first `A'` blocks; needed when a slot lies behind a first
            rejection.
        settings (`dict`): [`StreamSettings`] of the streams that take part.
        global_weight_sums (`torch.Tensor` of shape `(3,)`):
            Weight sums over the whole optimiser step, see `weight_sums`. Slot rules do not change them.
        chunk_bytes (`int`): See `chunked_divergence`.
        reading ([`TargetReading`], *optional*): The target's reading of the text at the drafter's layers, made here if not given.
        slot_rules ([`SlotRules`], *optional*):
            Factors of the row weights, decided in this same forward pass; none if not given.

    Returns:
        [`StepLoss`]
    """
    if reading is None:
        reading = target.read_text(input_ids, attention_mask, drafter.config.target_layer_ids)
    device = drafter.device
    hidden = run_blocks(drafter, reading.features.to(device), input_ids, anchors.anchors, anchors.drafts, target.embed)
    own_head = _own_head(drafter, target) if drafter.owns_head else None
    target_head = Head(target.project, (), target.vocab_size, target.num_logit_buffers)
    total_weight = sum(settings[name].weight for name in STREAMS if name in settings)
    factors = None
    if slot_rules is not None and slot_rules.needs_scores:
        mask = _weighed_slots(anchors, settings)
        factors = _slot_factors(
            slot_rules, hidden, own_head or target_head, anchors.labels, mask, drafter.draft_token_ids, chunk_bytes
        )
    # Each total below reaches every parameter even without rows, so that every rank takes part in the gradient exchange.
    loss = hidden.new_zeros(())
    sums: dict[str, tuple[float, float]] = {}
    for index, name in enumerate(STREAMS):
        if name not in settings:
            continue
        weights = row_weights(anchors, name, settings[name], drafter.draft_token_ids)
        if factors is not None:
            weights = weights * factors
        picked = weights > 0
        states, target_rows = _target_states(reading.last_hidden, branch_hidden, anchors, picked)
        rows = chunked_divergence(
            hidden[picked],
            own_head or target_head,
            states,
            target_head,
            target_rows_N=target_rows,
            labels_N=anchors.labels[picked],
            weights_N=weights[picked],
            loss_type=settings[name].loss_type,
            draft_token_ids=drafter.draft_token_ids,
            chunk_bytes=chunk_bytes,
        )
        scale = stream_scale(float(global_weight_sums[index]), settings[name].weight, total_weight)
        loss = loss + scale * rows.total
        sums |= _stream_sums(name, rows, weights[picked], drafter)
    return StepLoss(loss, sums)


def _own_head(drafter: Drafter, target: FrozenTarget) -> Head:
    """Return the head of a family that has one; an adapter around it is applied and trained."""
    head = drafter.lm_head
    if type(head) is nn.Linear:
        return Head.linear(head.weight)
    # Base and adapter product, the scaled one, their sum; the gradient overwrites the sum, which no backward pass reads.
    trained = tuple(parameter for parameter in head.parameters() if parameter.requires_grad)
    return Head(
        lambda hidden: drafter.draft_logits(hidden, target.project), trained, drafter.config.draft_vocab_size, 4
    )


def _stream_mask(anchors: BlockBatch, stream: str) -> torch.Tensor:
    if stream == "supervised" and anchors.is_supervised is None:
        return torch.zeros_like(anchors.is_accepted)
    masks = {
        "accepted": anchors.is_accepted,
        "rejected": anchors.is_rejected,
        "supervised": anchors.is_supervised,
    }
    return masks[stream]


def _weighed_slots(anchors: BlockBatch, settings: dict[str, StreamSettings]) -> torch.Tensor:
    """Return the slots of streams with a share that stand for a committed token, `(B, A, K)`."""
    mask = torch.zeros_like(anchors.is_accepted)
    for name in settings:
        if settings[name].weight > 0:
            mask = mask | _stream_mask(anchors, name)
    return mask & (anchors.labels >= 0)


def _slot_factors(
    slot_rules: SlotRules,
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    mask: torch.Tensor,
    draft_token_ids: torch.Tensor | None,
    chunk_bytes: int,
) -> torch.Tensor:
    """Return the factor of every slot's weight under the slot rules, `(B, A, K)`; `mask` says which slots are trained."""
    # A slot's chance of being reached depends on all slots before it, trained or not.
    is_read = (mask.flip(-1).cumsum(dim=-1).flip(-1) > 0) & (labels >= 0)
    scores = score_labels(
        hidden[is_read], head, labels[is_read], draft_token_ids=draft_token_ids, chunk_bytes=chunk_bytes
    )
    factors = scores.log_probs_N.new_ones(mask.shape)
    if slot_rules.d_pace_floor is not None:
        log_probs = torch.zeros_like(factors)
        log_probs[is_read] = scores.log_probs_N
        factors = factors * d_pace_weights(log_probs, mask, slot_rules.d_pace_floor)
    if slot_rules.is_until_fail:
        is_top = torch.zeros_like(mask)
        is_top[is_read] = scores.is_top_N
        factors = factors * mark_until_fail(is_top)
    return factors


def _target_states(
    last_hidden: torch.Tensor, branch_hidden: torch.Tensor | None, anchors: BlockBatch, picked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the distinct target states of the picked slots, `(M, H)`, and which of them each slot is compared with, `(N,)`.

    On the committed text, slots of different blocks that propose for one position share its state.
    """
    row, block, slot = picked.nonzero(as_tuple=True)
    B, L, H = last_hidden.shape
    # Slot k (index k - 1) is predicted by the token before it, at a + k - 1.
    state = row * L + (anchors.anchors[row, block] + slot).clamp(0, L - 1)
    is_branch = anchors.is_branch[picked]
    pool = last_hidden.reshape(B * L, H)
    if is_branch.any():
        assert branch_hidden is not None, "slots behind a first rejection need the target's branch states"
        A, K = branch_hidden.shape[1:3]
        state = torch.where(is_branch, B * L + (row * A + block) * K + slot, state)
    distinct, target_rows = state.unique(return_inverse=True)
    is_on_text = distinct < B * L
    states = pool[distinct[is_on_text]]
    if branch_hidden is not None:
        states = torch.cat([states, branch_hidden.flatten(0, 2)[distinct[~is_on_text] - B * L].to(states)])
    return states, target_rows


def _stream_sums(
    name: str, rows: RowLosses, weights: torch.Tensor, drafter: Drafter
) -> dict[str, tuple[float, float]]:
    total = float(weights.sum())
    sums = {f"loss/{name}": (float((rows.rows_N * weights).sum()), total), f"slots/{name}": (float(len(weights)), 1.0)}
    if drafter.draft_token_ids is not None:
        sums[f"lost_target_mass/{name}"] = (float((rows.lost_mass_N * weights).sum()), total)
    return sums
