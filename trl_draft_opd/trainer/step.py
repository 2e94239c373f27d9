# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One training step as pure functions, shared by both trainers: blocks in, a loss normalised per stream out.

Shape letters:  B = sequences, L = text length, A = blocks per sequence, K = drafts per block, H = hidden size,
                N = rows
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
from ..rollout.replay import TargetText
from ..rollout.types import Rollout
from ..target.frozen import FrozenTarget
from ..target.reading import TextReading


STREAMS = ("accepted", "rejected", "supervised")


@dataclass(frozen=True)
class PreparedBatch:
    """
    One micro-batch: text that the target wrote, and the blocks to train on it.

    Attributes:
        rollout: Where the blocks come from; `None` in supervised training.
        reading: The target's reading at the drafter's layers, where it was kept.
    """

    text: TargetText
    rollout: Rollout | None
    blocks: BlockBatch
    reading: TextReading | None

    def read_by(self, target: FrozenTarget, layer_ids: Sequence[int]) -> TextReading:
        """Return the reading, which the target makes at `layer_ids` where it was not kept."""
        return self.reading or target.read_text(self.text.input_ids, self.text.attention_mask, layer_ids)

    def describe(self) -> str:
        """Return rows, length and blocks, for messages."""
        num_rows, length = self.text.input_ids.shape
        num_blocks, num_drafts = int((self.blocks.anchors >= 0).sum()), self.blocks.drafts.shape[-1]
        return f"{num_rows} rows of up to {length} tokens, {num_blocks} blocks of {num_drafts} drafts"


@dataclass(frozen=True)
class StreamSettings:
    """
    How one stream is weighed: the divergence of its rows, its share of the loss (lambda), its decay per slot in (0,
    1].
    """

    loss_type: str
    weight: float
    decay: float


@dataclass(frozen=True)
class SlotRules:
    """
    How slots are weighed by the drafter's current probabilities of the committed tokens, on top of their stream.

    Attributes:
        d_pace_floor: Floor of D-PACE's weights, in [0, 1]; `None` leaves them out.
        is_until_fail: Whether slots behind the drafter's first mismatch weigh nothing.
    """

    d_pace_floor: float | None = None
    is_until_fail: bool = False


@dataclass(frozen=True)
class Objective:
    """
    What an optimiser step minimises.

    Attributes:
        streams: The streams that take part, of `STREAMS`.
        slot_rules: Factors of the row weights, decided in the forward pass.
        chunk_bytes: Memory of the loss, see [`chunked_divergence`].
        weight_sums (`torch.Tensor` of shape `(3,)`): [`weight_sums`] of the whole step, all ranks together.
    """

    streams: dict[str, StreamSettings]
    slot_rules: SlotRules
    chunk_bytes: int
    weight_sums: torch.Tensor

    def scale(self, stream: str) -> float:
        """Return the factor of each row weight of a stream: its share of the loss over the sum of its weights."""
        total_weight = sum(settings.weight for settings in self.streams.values())
        weight_sum = float(self.weight_sums[STREAMS.index(stream)])
        return float(stream_scale(weight_sum, self.streams[stream].weight, total_weight))


class StepLoss(NamedTuple):
    """
    The loss of one micro-batch. A tuple, so that the wrappers of sharded drafters find the tensor in it.

    Attributes:
        loss: Scalar with gradient: this micro-batch's share of the optimiser step's loss.
        sums: Numerator and denominator of each metric, to be summed before dividing.
    """

    loss: torch.Tensor
    sums: dict[str, tuple[float, float]]


def row_weights(
    blocks: BlockBatch, stream: str, settings: StreamSettings, draft_token_ids: torch.Tensor | None
) -> torch.Tensor:
    """
    Return the weight of every slot in a stream, `(B, A, K)`: 0 outside of it and in a stream without a share.

    Under `ce` a committed token outside the draft vocabulary cannot be learnt, so its slot weighs nothing.
    [`SlotRules`] have no part in it: they need a forward pass, before which the sum over a whole step must be known.
    """
    mask = _stream_mask(blocks, stream)
    weights = mask * position_weights(mask.shape[-1], settings.decay).to(mask.device) * float(settings.weight > 0)
    if settings.loss_type == "ce" and draft_token_ids is not None:
        known = torch.isin(blocks.labels, draft_token_ids.to(mask.device)) | (blocks.labels < 0)
        weights = weights * known
    return weights


def weight_sums(
    batches: Sequence[BlockBatch], streams: dict[str, StreamSettings], draft_token_ids: torch.Tensor | None
) -> torch.Tensor:
    """
    Return the sum of each stream's weights over micro-batches, `(3,)` in the order of `STREAMS`, float64; 0 for a
    stream that takes no part.
    """
    sums = [
        sum(
            float(row_weights(batch, name, streams[name], draft_token_ids).sum(dtype=torch.float64))
            for batch in batches
            if name in streams
        )
        for name in STREAMS
    ]
    return torch.tensor(sums, dtype=torch.float64)


def step_loss(drafter: Drafter, target: FrozenTarget, batch: PreparedBatch, objective: Objective) -> StepLoss:
    """
    Draft every block of a micro-batch anew, with gradient, and compare the drafter with the target on the same states.

    Slots behind a first rejection need the `branch_hidden` of the batch's rollout.
    """
    blocks, reading = batch.blocks, batch.read_by(target, drafter.config.target_layer_ids).padded()
    features = reading.features.to(drafter.device)
    hidden = run_blocks(drafter, features, batch.text.input_ids, blocks.anchors, blocks.drafts, target.embed)
    target_head = Head(target.project, (), target.vocab_size, target.num_logit_buffers)
    head = _own_head(drafter, target) if drafter.owns_head else target_head
    branch_hidden = batch.rollout.branch_hidden if batch.rollout is not None else None
    factors = _slot_factors(drafter, hidden, head, blocks, objective)
    # Each total reaches every parameter even without rows, so that every rank takes part in the gradient exchange.
    loss = hidden.new_zeros(())
    sums: dict[str, tuple[float, float]] = {}
    for name in STREAMS:
        if name not in objective.streams:
            continue
        weights = row_weights(blocks, name, objective.streams[name], drafter.draft_token_ids)
        if factors is not None:
            weights = weights * factors
        picked = weights > 0
        states, target_rows = _target_states(reading.last_hidden, branch_hidden, blocks, picked)
        rows = chunked_divergence(
            hidden[picked],
            head,
            states,
            target_head,
            target_rows_N=target_rows,
            labels_N=blocks.labels[picked],
            weights_N=weights[picked],
            loss_type=objective.streams[name].loss_type,
            draft_token_ids=drafter.draft_token_ids,
            chunk_bytes=objective.chunk_bytes,
        )
        loss = loss + objective.scale(name) * rows.total
        sums |= _stream_sums(name, rows, weights[picked], drafter)
    return StepLoss(loss, sums)


def _own_head(drafter: Drafter, target: FrozenTarget) -> Head:
    """Return the head of a family that has one; an adapter around it is applied and trained."""
    head = drafter.lm_head
    if type(head) is nn.Linear:
        return Head.linear(head.weight)
    # Four buffers: base and adapter product, the scaled one, and their sum, which the gradient may overwrite.
    trained = tuple(parameter for parameter in head.parameters() if parameter.requires_grad)
    return Head(
        lambda hidden: drafter.draft_logits(hidden, target.project), trained, drafter.config.draft_vocab_size, 4
    )


def _stream_mask(blocks: BlockBatch, stream: str) -> torch.Tensor:
    """Return the slots of a stream, `(B, A, K)`."""
    mask = {"accepted": blocks.is_accepted, "rejected": blocks.is_rejected, "supervised": blocks.is_supervised}[stream]
    return torch.zeros_like(blocks.is_accepted) if mask is None else mask


def _slot_factors(
    drafter: Drafter, hidden: torch.Tensor, head: Head, blocks: BlockBatch, objective: Objective
) -> torch.Tensor | None:
    """Return the factor of every slot's weight under the slot rules, `(B, A, K)`; `None` without any rule."""
    rules, labels = objective.slot_rules, blocks.labels
    if rules == SlotRules():
        return None
    # Trained slots that stand for a committed token.
    mask = torch.zeros_like(blocks.is_accepted)
    for name, stream in objective.streams.items():
        if stream.weight > 0:
            mask = mask | _stream_mask(blocks, name)
    mask = mask & (labels >= 0)
    # A slot's chance of being reached depends on all slots before it, trained or not.
    is_read = (mask.flip(-1).cumsum(dim=-1).flip(-1) > 0) & (labels >= 0)
    scores = score_labels(
        hidden[is_read],
        head,
        labels[is_read],
        draft_token_ids=drafter.draft_token_ids,
        chunk_bytes=objective.chunk_bytes,
    )
    factors = scores.log_probs_N.new_ones(mask.shape)
    if rules.d_pace_floor is not None:
        log_probs = torch.zeros_like(factors)
        log_probs[is_read] = scores.log_probs_N
        factors = factors * d_pace_weights(log_probs, mask, rules.d_pace_floor)
    if rules.is_until_fail:
        is_top = torch.zeros_like(mask)
        is_top[is_read] = scores.is_top_N
        factors = factors * mark_until_fail(is_top)
    return factors


def _target_states(
    last_hidden: torch.Tensor, branch_hidden: torch.Tensor | None, blocks: BlockBatch, picked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the distinct target states of the picked slots, `(M, H)`, and the index of each slot's own, `(N,)`.

    On the committed text, slots of different blocks that propose for one position share its state.
    """
    row, block, slot = picked.nonzero(as_tuple=True)
    B, L, H = last_hidden.shape
    # Slot k (index k - 1) is predicted by the token before it, at a + k - 1.
    state = row * L + (blocks.anchors[row, block] + slot).clamp(0, L - 1)
    is_branch = blocks.is_branch[picked]
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
