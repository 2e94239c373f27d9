# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One training step over a few texts, one text at a time: supervised, and Draft-OPD.

Every slot has logits of its own from the drafter and from the target, all at once, for all rows whether they count or
not.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .drafting import draft_states, read_text
from .loss import full_choice_loss, full_loss
from .rollout import branch_states, replay


# The families it can draft with.
FAMILIES = ("eagle3", "dflash")


@dataclass(frozen=True)
class Stream:
    """
    How one stream is weighed.

    Attributes:
        loss_type (`str`): Divergence.
        weight (`float`): Its share of the loss.
        decay (`float`): Weight decay per slot.
    """

    loss_type: str
    weight: float
    decay: float


@dataclass(frozen=True)
class _Rows:
    """The slots of one text's blocks: states of both models, labels, and which slots each stream holds."""

    hidden: Tensor
    target_hidden: Tensor
    labels: Tensor
    masks: dict[str, Tensor]


def sft_step(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    texts: Sequence[tuple[Sequence[int], Sequence[bool]]],
    anchors: Sequence[Sequence[int]],
    num_drafts: int,
    stream: Stream,
) -> Tensor:
    """
    Return the supervised loss: each block reads the text, and a slot counts while every token up to its own is the
    target's.

    Args:
        target, drafter (`PreTrainedModel`): The pair.
        texts (`Sequence` of `(token_ids, is_completion)`), anchors (`Sequence[Sequence[int]]`): The batch.
        num_drafts (`int`), stream ([`Stream`]): Drafts per block, and how slots are weighed.
    """
    rows = []
    for (token_ids, is_completion), places in zip(texts, anchors, strict=True):
        if not places:
            continue
        drafts = torch.zeros(len(places), num_drafts, dtype=torch.long)
        mask = torch.zeros(len(places), num_drafts, dtype=torch.bool)
        for row, anchor in enumerate(places):
            for slot in range(1, num_drafts + 1):
                if anchor + slot == len(token_ids) or not is_completion[anchor + slot]:
                    break
                mask[row, slot - 1] = True
            for slot in range(1, num_drafts + 1):
                drafts[row, slot - 1] = token_ids[min(anchor + slot, len(token_ids) - 1)]
        reading = read_text(target, token_ids, drafter.config.target_layer_ids)
        drafts, mask = drafts.to(target.device), mask.to(target.device)
        hidden, _ = draft_states(drafter, target, reading.features, token_ids, places, num_drafts, drafts)
        index = torch.tensor(places)[:, None] + torch.arange(num_drafts)
        states = reading.hidden[index.clamp(max=len(token_ids) - 1).to(target.device)]
        rows.append(_Rows(hidden, states, torch.where(mask, drafts, -1), {"accepted": mask}))
    return _combine(target, drafter, rows, {"accepted": stream})


def opd_step(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    texts: Sequence[tuple[Sequence[int], int]],
    num_drafts: int,
    streams: dict[str, Stream],
    *,
    rejected_scope: str,
    eos_token_ids: Collection[int],
) -> Tensor:
    """
    Return the Draft-OPD loss of the drafter's own chain along each text.

    Args:
        target, drafter (`PreTrainedModel`): The pair.
        texts (`Sequence` of `(token_ids, prompt_length)`): Texts the target wrote.
        num_drafts (`int`): Drafts per block.
        streams (`dict[str, Stream]`): `"accepted"` and `"rejected"`.
        rejected_scope (`str`), eos_token_ids (`Collection[int]`):
            `"suffix"` or `"first"`; no slot behind a drafted end of sequence counts.
    """
    rows = []
    for token_ids, prompt_length in texts:
        blocks = replay(target, drafter, token_ids, prompt_length, num_drafts)
        if not blocks:
            continue
        reading = read_text(target, token_ids, drafter.config.target_layer_ids)
        accepted, rejected = (torch.zeros(len(blocks), num_drafts, dtype=torch.bool) for _ in range(2))
        labels = torch.full((len(blocks), num_drafts), -1)
        for row, block in enumerate(blocks):
            for slot, draft in enumerate(block.drafts, start=1):
                place = block.anchor + slot
                if slot <= block.accepted + 1 and place < len(token_ids):
                    labels[row, slot - 1] = token_ids[place]
                if slot <= block.accepted:
                    accepted[row, slot - 1] = True
                    continue
                if block.is_censored or (rejected_scope == "first" and slot > block.accepted + 1):
                    break
                rejected[row, slot - 1] = True
                if draft in eos_token_ids:
                    break
        drafts = torch.tensor([block.drafts for block in blocks], device=target.device)
        places = [block.anchor for block in blocks]
        hidden, _ = draft_states(drafter, target, reading.features, token_ids, places, num_drafts, drafts)
        states = torch.stack([branch_states(target, token_ids, block) for block in blocks])
        masks = {"accepted": accepted.to(target.device), "rejected": rejected.to(target.device)}
        rows.append(_Rows(hidden, states, labels.to(target.device), masks))
    return _combine(target, drafter, rows, streams)


def _combine(
    target: PreTrainedModel, drafter: PreTrainedModel, rows: list[_Rows], streams: dict[str, Stream]
) -> Tensor:
    """Return each stream's weighted mean over all rows, averaged by the streams' shares."""
    target_head = target.get_output_embeddings().weight
    head = drafter.lm_head.weight if hasattr(drafter, "lm_head") else target_head
    if hasattr(drafter, "markov_head"):
        head = torch.cat([head, drafter.markov_head.markov_w2.weight], dim=1)
    selector = getattr(drafter, "candidate_selector", None)
    token_ids = drafter.draft_token_ids
    total = rows[0].hidden.new_zeros(())
    for name, stream in streams.items():
        weights = []
        for part in rows:
            slots = torch.arange(part.hidden.shape[1], device=part.hidden.device)
            weight = part.masks[name] * stream.decay**slots
            if stream.loss_type == "ce" and token_ids is not None:
                weight = weight * (torch.isin(part.labels, token_ids) | (part.labels < 0))
            weights.append(weight)
        weight_sum = sum(float(weight.sum()) for weight in weights)
        if weight_sum == 0 or stream.weight == 0:
            continue
        for part, weight in zip(rows, weights, strict=True):
            # Slot by slot, as a TTT would be written: each with logits of the target of its own.
            for slot in range(weight.shape[1]):
                hidden, states = part.hidden[:, slot], part.target_hidden[:, slot]
                given = {
                    "labels": part.labels[:, slot].masked_fill(weight[:, slot] == 0, -1),
                    "weights": weight[:, slot],
                    "loss_type": stream.loss_type,
                }
                read = hidden[:, : head.shape[1]]
                loss = full_loss(read, head, states, target_head, draft_token_ids=token_ids, **given)
                if selector is not None:
                    # With the published weight of the choice, 1.
                    choice = (head, selector.successor_codebook, drafter.config.selector_top_k)
                    loss = loss + full_choice_loss(hidden, *choice, states, target_head, **given)
                total = total + stream.weight * loss / weight_sum
    return total / sum(stream.weight for stream in streams.values())
