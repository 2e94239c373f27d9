# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One training step as pure functions, shared by both trainers: blocks in, a loss normalised per stream out.

Shape letters:  B = sequences, A = blocks per sequence, N = blocks that are trained, K = drafts per block,
                M = states of the target, H = hidden size
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..drafters.base import Drafter, run_blocks
from ..drafters.packing import RowPacking
from ..losses import (
    Head,
    RowLosses,
    Selector,
    Verification,
    chunked_divergence,
    d_pace_weights,
    mark_until_fail,
    position_weights,
    score_labels,
    stream_scale,
)
from ..rollout.acceptance import token_probs
from ..rollout.blocks import BlockBatch
from ..rollout.drafting import DraftingSettings
from ..rollout.replay import TargetText
from ..rollout.types import Rollout
from ..target.frozen import FrozenTarget
from ..target.reading import TextReading
from .metrics import DeviceSums


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
        weight_sums (`torch.Tensor` of shape `(3,)`):
            [`weight_sums`] of the whole step, all ranks together, on the host.
        blocks_per_pass: Most blocks drafted at once, see [`run_blocks`].
        verification: How drafts are verified, which the labels of a confidence head follow; greedily by default.
        confidence_weight: Weight of a confidence head's loss beside the divergences.
        selector_weight: Weight of the divergence of a selector's choice beside that of the head.
    """

    streams: dict[str, StreamSettings]
    slot_rules: SlotRules
    chunk_bytes: int
    weight_sums: torch.Tensor
    blocks_per_pass: int | None = None
    verification: Verification = Verification(None, None)
    confidence_weight: float = 1.0
    selector_weight: float = 1.0

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
    sums: DeviceSums


def row_weights(
    blocks: BlockBatch, stream: str, settings: StreamSettings, draft_token_ids: torch.Tensor | None
) -> torch.Tensor:
    """
    Return the weight of every slot in a stream, `(B, A, K)`: 0 outside of it and in a stream without a share.

    Under `ce` a committed token outside the draft vocabulary cannot be learnt, so its slot weighs nothing.
    [`SlotRules`] have no part in it: they need a forward pass, before which the sum over a whole step must be known.
    """
    mask = _stream_mask(blocks, stream)
    decays = position_weights(mask.shape[-1], settings.decay).to(mask.device, non_blocking=True)
    weights = mask * decays * float(settings.weight > 0)
    if settings.loss_type == "ce" and draft_token_ids is not None:
        weights = weights * (_are_among(blocks.labels, draft_token_ids.to(mask.device)) | (blocks.labels < 0))
    return weights


def _are_among(labels: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return which labels are among token ids; `isin` would have the host wait for their number."""
    token_ids = token_ids.sort().values
    places = torch.searchsorted(token_ids, labels).clamp(max=len(token_ids) - 1)
    return token_ids[places] == labels


def weight_sums(
    batches: Sequence[BlockBatch], streams: dict[str, StreamSettings], draft_token_ids: torch.Tensor | None
) -> torch.Tensor:
    """
    Return the sum of each stream's weights over micro-batches, `(3,)` in the order of `STREAMS`, float64, where the
    blocks are; 0 for a stream that takes no part.
    """
    # A run that is asked for no more has no batches.
    device = batches[0].anchors.device if batches else None
    sums = torch.zeros(len(STREAMS), dtype=torch.float64, device=device)
    for batch in batches:
        for index, name in enumerate(STREAMS):
            if name in streams and streams[name].weight > 0:
                weights = row_weights(batch, name, streams[name], draft_token_ids)
                sums[index] += weights.sum(dtype=torch.float64)
    return sums


def verification_of(settings: DraftingSettings) -> Verification:
    """
    Return how drafts are verified under these settings: what a confidence head is trained to foresee.

    At temperature 0 a draft is kept or not, and the label is 1 or 0. Above, it is a chance: `sum min(p, q)` where
    drafts are drawn, `p(draft)` where they are argmax, with temperature, top-k and top-p in both distributions.
    """
    probs = partial(token_probs, settings=settings.sampling)
    return Verification(
        text=None if settings.sampling.is_greedy else probs, drafts=probs if settings.draws_drafts else None
    )


def step_loss(drafter: Drafter, target: FrozenTarget, batch: PreparedBatch, objective: Objective) -> StepLoss:
    """
    Draft the blocks of a micro-batch anew, with gradient, and compare the drafter with the target on the same states.

    Rows lie end to end and blocks without a weight are left out, so nothing is computed for padding. Slots behind a
    first rejection need the `branch_hidden` of the batch's rollout.
    """
    reading = batch.read_by(target, drafter.config.target_layer_ids)
    trained = {name: objective.streams[name] for name in STREAMS if name in objective.streams}
    trained = {name: settings for name, settings in trained.items() if settings.weight > 0}
    weights = {
        name: row_weights(batch.blocks, name, settings, drafter.draft_token_ids) for name, settings in trained.items()
    }
    blocks = _PackedBlocks.of(batch, reading.packing, torch.stack(list(weights.values())).sum(dim=(0, -1)) > 0)
    hidden = run_blocks(
        drafter,
        reading.features[None].to(drafter.device),
        reading.packing.pack(batch.text.input_ids)[None],
        blocks.anchors[None],
        blocks.pick(batch.blocks.drafts)[None],
        target.embed,
        reading.packing.starts[reading.packing.rows][None],
        blocks_per_pass=objective.blocks_per_pass,
    )[0]
    target_head = _target_head(target)
    head = _draft_head(drafter, target, target_head)
    labels = blocks.pick(batch.blocks.labels)
    states, target_rows = blocks.target_states(batch, reading.last_hidden)
    selector = _selector(drafter, objective.selector_weight)
    is_trained = blocks.trained_slots(batch.blocks, trained)
    factors = _slot_factors(drafter, hidden, head, selector, labels, is_trained, objective)
    confidence = drafter.confidence_logits(hidden)
    # Each total reaches every parameter even without rows, so that every rank takes part in the gradient exchange.
    loss = hidden.new_zeros(())
    sums: dict[str, tuple[float | torch.Tensor, float | torch.Tensor]] = {}
    sums |= {f"slots/{name}": (0.0, 1.0) for name in objective.streams}
    for name, settings in trained.items():
        own_weights = blocks.pick(weights[name]) if factors is None else blocks.pick(weights[name]) * factors
        rows = chunked_divergence(
            hidden.flatten(0, 1),
            head,
            states,
            target_head,
            target_rows_N=target_rows.flatten(),
            labels_N=labels.flatten(),
            weights_N=own_weights.flatten(),
            loss_type=settings.loss_type,
            draft_token_ids=drafter.draft_token_ids,
            chunk_bytes=objective.chunk_bytes,
            verification=None if confidence is None else objective.verification,
            selector=selector,
        )
        loss = loss + objective.scale(name) * rows.total
        sums |= _stream_sums(name, rows, own_weights.flatten(), drafter)
        if confidence is not None:
            # Without the factors of slot rules, but for the rows that these leave out: those have no label.
            fixed_weights = (blocks.pick(weights[name]) * (own_weights != 0)).flatten()
            total, own_sums = _confidence_loss(name, confidence.flatten(), rows, fixed_weights)
            loss = loss + objective.scale(name) * objective.confidence_weight * total
            sums |= own_sums
    return StepLoss(loss, DeviceSums.of(sums, hidden.device))


@dataclass(frozen=True)
class _PackedBlocks:
    """
    Blocks of a batch that have a weight, in order of row and column; one block without, where none has.

    Attributes:
        rows (`torch.LongTensor` of shape `(N,)`), columns (same shape): Where each block stands in the batch.
        anchors (`torch.LongTensor` of shape `(N,)`): Packed index of each anchor.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    anchors: torch.Tensor

    @classmethod
    def of(cls, batch: PreparedBatch, packing: RowPacking, has_weight: torch.Tensor) -> "_PackedBlocks":
        """Find the blocks that have a weight, `(B, A)`; the host waits for their number."""
        rows, columns = has_weight.nonzero(as_tuple=True)
        if len(rows) == 0:
            # Drafted at the second token of a text, so that every parameter still gets a gradient, of zeros.
            longest = packing.lengths.index(max(packing.lengths))
            rows, columns = rows.new_full((1,), longest), columns.new_zeros(1)
            return cls(rows, columns, packing.index(rows, torch.ones_like(rows)))
        return cls(rows, columns, packing.index(rows, batch.blocks.anchors[rows, columns]))

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """Turn values of the batch's blocks, `(B, A, K)`, into those of these blocks, `(N, K)`."""
        return values[self.rows, self.columns]

    def trained_slots(self, blocks: BlockBatch, streams: Iterable[str]) -> torch.Tensor:
        """Return the slots that any of the streams trains and that stand for a committed token, `(N, K)`."""
        masks = torch.stack([_stream_mask(blocks, name) for name in streams])
        return self.pick(masks.any(dim=0) & (blocks.labels >= 0))

    def target_states(self, batch: PreparedBatch, last_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the target's states, `(M, H)`: of the text, and of branches where there are any; and the index of every
        slot's own, `(N, K)`. Slots of different blocks that propose for one position share its state.
        """
        num_tokens, num_drafts = len(last_hidden), batch.blocks.drafts.shape[-1]
        slots = torch.arange(num_drafts, device=self.anchors.device)
        # Slot k (index k - 1) is predicted by the token before it, at a + k - 1.
        index = (self.anchors[:, None] + slots).clamp(max=num_tokens - 1)
        branch_hidden = batch.rollout.branch_hidden if batch.rollout is not None else None
        if branch_hidden is None:
            return last_hidden, index
        first_slot = (self.rows * branch_hidden.shape[1] + self.columns) * num_drafts
        index = torch.where(self.pick(batch.blocks.is_branch), num_tokens + first_slot[:, None] + slots, index)
        return torch.cat([last_hidden, branch_hidden.flatten(0, 2).to(last_hidden)]), index


def _target_head(target: FrozenTarget) -> Head:
    """Return the target's head: a product in the weight's dtype, unless logits are scaled or come from elsewhere."""
    head = target.causal_lm.get_output_embeddings()
    if type(head) is nn.Linear and target.num_logit_buffers == 1 and head.weight.device == target.device:
        return Head.linear(head.weight, head.bias, keeps_dtype=True)
    return Head(target.project, (), target.vocab_size, target.num_logit_buffers)


def _linear_head(module: nn.Module) -> Head | None:
    """Return the head of a plain linear layer; `None` of one with adapters, which are applied too."""
    return Head.linear(module.weight, module.bias) if type(module) is nn.Linear else None


def _draft_head(drafter: Drafter, target: FrozenTarget, target_head: Head) -> Head:
    """Return the head a drafter drafts through; adapters around its parts are applied and trained."""
    modules = [part.module for part in drafter.head_parts]
    if modules == [None]:
        return target_head
    linear = [target_head if module is None else _linear_head(module) for module in modules]
    parts = [part for part in linear if part is not None and part.products]
    if len(parts) == len(linear):
        return parts[0] if len(parts) == 1 else Head.joined(parts)
    # Four buffers: base and adapter product, the scaled one, and their sum, which the gradient may overwrite; or those
    # of a target that scales its logits. And one for the parts before.
    num_buffers = max(4, target.num_logit_buffers) + len(modules) - 1
    own = [parameter for module in modules if module is not None for parameter in module.parameters()]
    trained = tuple(parameter for parameter in own if parameter.requires_grad)
    return Head(
        lambda hidden: drafter.draft_logits(hidden, target.project),
        trained,
        drafter.config.draft_vocab_size,
        num_buffers,
    )


def _selector(drafter: Drafter, weight: float) -> Selector | None:
    """Return how a drafter chooses among the likeliest tokens of its head, if it does."""
    candidates = drafter.candidates
    return None if candidates is None else Selector(candidates.rows, candidates.top_k, weight)


def _stream_mask(blocks: BlockBatch, stream: str) -> torch.Tensor:
    """Return the slots of a stream, `(B, A, K)`."""
    mask = {"accepted": blocks.is_accepted, "rejected": blocks.is_rejected, "supervised": blocks.is_supervised}[stream]
    return torch.zeros_like(blocks.is_accepted) if mask is None else mask


def _slot_factors(
    drafter: Drafter,
    hidden: torch.Tensor,
    head: Head,
    selector: Selector | None,
    labels: torch.Tensor,
    is_trained: torch.Tensor,
    objective: Objective,
) -> torch.Tensor | None:
    """
    Return the factor of every slot's weight under the slot rules, `(N, K)`; `None` without any rule.

    `is_trained` marks the slots that are trained and stand for a committed token.
    """
    rules = objective.slot_rules
    if rules == SlotRules():
        return None
    # A slot's chance of being reached depends on all slots before it, trained or not.
    is_read = (is_trained.flip(-1).cumsum(dim=-1).flip(-1) > 0) & (labels >= 0)
    scores = score_labels(
        hidden.flatten(0, 1),
        head,
        torch.where(is_read, labels, -1).flatten(),
        draft_token_ids=drafter.draft_token_ids,
        chunk_bytes=objective.chunk_bytes,
        selector=selector,
    )
    log_probs = torch.where(is_read, scores.log_probs_N.view_as(labels), 0)
    factors = torch.ones_like(log_probs)
    if rules.d_pace_floor is not None:
        factors = factors * d_pace_weights(log_probs, is_trained, rules.d_pace_floor)
    if rules.is_until_fail:
        factors = factors * mark_until_fail(scores.is_top_N.view_as(labels))
    return factors


def _confidence_loss(
    name: str, logits: torch.Tensor, rows: RowLosses, weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, tuple[float | torch.Tensor, float | torch.Tensor]]]:
    """
    Return the weighted sum of a confidence head's losses on the rows of a stream, and what it adds to the metrics.

    The loss of a row is the cross-entropy between the chance that its draft is kept, a constant, and the predicted
    one: least where they are equal. Its gradient reaches the layers too. Source:
    [DSpark](https://huggingface.co/papers/2607.05147).
    """
    assert rows.kept_N is not None, "asked for"
    logits = logits.to(rows.kept_N.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, rows.kept_N, reduction="none") * weights
    total = weights.sum(dtype=torch.float64)
    predicted = logits.detach().sigmoid()
    return losses.sum(), {
        f"confidence_loss/{name}": (losses.detach().sum(dtype=torch.float64), total),
        f"confidence/{name}": ((predicted * weights).sum(dtype=torch.float64), total),
        f"kept/{name}": ((rows.kept_N * weights).sum(dtype=torch.float64), total),
    }


def _stream_sums(
    name: str, rows: RowLosses, weights: torch.Tensor, drafter: Drafter
) -> dict[str, tuple[float | torch.Tensor, float | torch.Tensor]]:
    """Return what a stream adds to the metrics, without a wait for the device."""
    total = weights.sum(dtype=torch.float64)
    sums: dict[str, tuple[float | torch.Tensor, float | torch.Tensor]] = {
        f"loss/{name}": ((rows.rows_N * weights).sum(dtype=torch.float64), total),
        f"slots/{name}": ((weights > 0).sum(dtype=torch.float64), 1.0),
    }
    if rows.selector_N is not None and rows.is_found_N is not None:
        sums[f"selector_loss/{name}"] = ((rows.selector_N * weights).sum(dtype=torch.float64), total)
        sums[f"candidate_recall/{name}"] = ((rows.is_found_N * weights).sum(dtype=torch.float64), total)
    if drafter.draft_token_ids is not None:
        sums[f"lost_target_mass/{name}"] = ((rows.lost_mass_N * weights).sum(dtype=torch.float64), total)
    return sums
