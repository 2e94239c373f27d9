# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One training step as pure functions, shared by both trainers: anchors in, a loss normalised per stream out.

Shape letters:  B = sequences, L = text length, A = anchors per sequence, K = drafts per block, H = hidden size, N = rows
"""

from dataclasses import dataclass

import torch

from ..anchors import AnchorBatch
from ..drafters.base import Drafter
from ..losses import Head, RowLosses, chunked_divergence, position_weights, stream_scale
from ..target import FrozenTarget, TargetReading


STREAMS = ("accepted", "rejected")


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
    anchors: AnchorBatch, stream: str, settings: StreamSettings, draft_token_ids: torch.Tensor | None
) -> torch.Tensor:
    """
    Return the weight of every slot in a stream, `(B, A, K)`, zero outside of it and throughout a stream without a share.

    Under `ce` a committed token outside the draft vocabulary cannot be learnt, so its slot weighs nothing.
    """
    mask = anchors.is_accepted if stream == "accepted" else anchors.is_rejected
    weights = mask * position_weights(mask.shape[-1], settings.decay).to(mask.device) * float(settings.weight > 0)
    if settings.loss_type == "ce" and draft_token_ids is not None:
        known = torch.isin(anchors.labels, draft_token_ids.to(mask.device)) | (anchors.labels < 0)
        weights = weights * known
    return weights


def weight_sums(
    batches: list[AnchorBatch], settings: dict[str, StreamSettings], draft_token_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return the sum of each stream's weights over micro-batches, `(2,)` in the order of `STREAMS`, float64."""
    sums = [
        sum(
            float(row_weights(batch, name, settings[name], draft_token_ids).sum(dtype=torch.float64))
            for batch in batches
        )
        for name in STREAMS
    ]
    return torch.tensor(sums, dtype=torch.float64)


def step_loss(
    drafter: Drafter,
    target: FrozenTarget,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    anchors: AnchorBatch,
    branch_hidden: torch.Tensor | None,
    settings: dict[str, StreamSettings],
    global_weight_sums: torch.Tensor,
    chunk_bytes: int,
    reading: TargetReading | None = None,
) -> StepLoss:
    """
    Run the drafter from every anchor of a micro-batch and compare it with the target on the same states.

    Args:
        drafter ([`Drafter`]): Gradient flows into it.
        target ([`FrozenTarget`]): Reads the text once.
        input_ids (`torch.LongTensor` of shape `(B, L)`), attention_mask (`torch.LongTensor` of shape `(B, L)`): The text.
        anchors ([`AnchorBatch`]): Where to draft and which slots belong to which stream.
        branch_hidden (`torch.Tensor` of shape `(B, A, K, H)`, *optional*):
            The target's hidden states on draft-induced states; needed when a slot lies behind a first rejection.
        settings (`dict`): [`StreamSettings`] of both streams.
        global_weight_sums (`torch.Tensor` of shape `(2,)`): Weight sums over the whole optimiser step.
        chunk_bytes (`int`): See `chunked_divergence`.
        reading ([`TargetReading`], *optional*): The target's reading of the text at the drafter's layers, made here if not given.

    Returns:
        [`StepLoss`]
    """
    if reading is None:
        reading = target.read_text(input_ids, attention_mask, drafter.config.target_layer_ids)
    device = drafter.device
    hidden = drafter.draft_hidden(
        reading.features.to(device), input_ids, anchors.anchors, anchors.drafts, target.embed
    )
    own_head = Head.linear(drafter.lm_head.weight) if drafter.owns_head else None
    target_head = Head(target.project, (), target.vocab_size, target.num_logit_buffers)
    total_weight = sum(settings[name].weight for name in STREAMS)
    # Each total below reaches every parameter even without rows, so that every rank takes part in the gradient exchange.
    loss = hidden.new_zeros(())
    sums: dict[str, tuple[float, float]] = {}
    for index, name in enumerate(STREAMS):
        weights = row_weights(anchors, name, settings[name], drafter.draft_token_ids)
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


def _target_states(
    last_hidden: torch.Tensor, branch_hidden: torch.Tensor | None, anchors: AnchorBatch, picked: torch.Tensor
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
        A, K = picked.shape[1:]
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
