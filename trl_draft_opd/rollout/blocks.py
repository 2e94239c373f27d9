# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Where drafting is trained, the core of the method: supervised training samples anchors along the text
(`sample_anchors`), Draft-OPD replays the anchors the drafter's own decoding exposed (`mark_slots`). Both return one
`BlockBatch`; `join_blocks` puts two of them side by side.

Shape letters:  B = sequences, L = text length, A = anchors per sequence, K = drafts per block
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .keyed_random import ANCHOR, DrawKeys, keyed_uniforms
from .types import Rollout, pack_columns


REJECTED_SCOPES = ("suffix", "first")


@dataclass(frozen=True)
class BlockBatch:
    """
    Blocks to train on.

    Attributes:
        anchors (`torch.LongTensor` of shape `(B, A)`): Anchor of each block, -1 for padding.
        drafts (`torch.LongTensor` of shape `(B, A, K)`): Tokens that later slots of the block read.
        labels (`torch.LongTensor` of shape `(B, A, K)`):
            Committed token each slot stands for; -1 where the slot's state is not a prefix of the text.
        is_accepted (`torch.BoolTensor` of shape `(B, A, K)`): Slots of the accepted stream.
        is_rejected (`torch.BoolTensor` of shape `(B, A, K)`): Slots of the rejected stream.
        is_branch (`torch.BoolTensor` of shape `(B, A, K)`):
            Slots behind the first rejection: only a branch of the target, not the committed text, supervises them.
        is_supervised (`torch.BoolTensor` of shape `(B, A, K)` or `None`):
            Slots of the supervised stream, whose blocks draft the committed tokens; `None` where there are none.
    """

    anchors: torch.Tensor
    drafts: torch.Tensor
    labels: torch.Tensor
    is_accepted: torch.Tensor
    is_rejected: torch.Tensor
    is_branch: torch.Tensor
    is_supervised: torch.Tensor | None = None

    def to(self, device: torch.device) -> "BlockBatch":
        """Return the batch on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items() if tensor is not None})

    def as_supervised(self) -> "BlockBatch":
        """Return blocks of [`sample_anchors`] or [`draft_text`] with their accepted slots as the supervised stream."""
        return replace(self, is_accepted=torch.zeros_like(self.is_accepted), is_supervised=self.is_accepted)


def sample_anchors(
    input_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    sample_ids: Sequence[int],
    *,
    num_anchors: int | None,
    num_drafts: int,
    seed: int,
    epoch: int,
) -> BlockBatch:
    """
    Sample anchors along text the target wrote; the drafts are the committed tokens, all accepted.

    A position is an anchor iff it and its next token are response tokens: those are the anchors decoding meets. A
    slot is trained while every token up to its own belongs to the same response.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, L)`): Right-padded text.
        completion_mask (`torch.BoolTensor` of shape `(B, L)`): Tokens the target wrote.
        sample_ids (`Sequence[int]`):
            One id per row; with `seed` and `epoch` it keys the draw, so batches, ranks and order change nothing.
        num_anchors (`int` or `None`): Anchors per row, uniform without replacement; `None` takes every one.
        num_drafts (`int`): K.
        seed (`int`), epoch (`int`): Keys of the draw.

    Returns:
        [`BlockBatch`] whose rejected stream is empty.
    """
    is_completion = completion_mask.bool()
    is_eligible = is_completion[:, :-1] & is_completion[:, 1:]
    # Features exist before the anchor only, so the first token of a text cannot be one.
    is_eligible[:, 0] = False
    if num_anchors is not None:
        is_eligible = draw_positions(is_eligible, num_anchors, DrawKeys(seed, epoch, sample_ids))
    columns, is_anchor = pack_columns(is_eligible)
    anchors = torch.where(is_anchor, columns, -1)
    if anchors.shape[1] == 0:
        anchors = input_ids.new_full((len(input_ids), 1), -1)
    return draft_text(anchors, input_ids, completion_mask, num_drafts=num_drafts)


def draw_positions(is_eligible: torch.Tensor, num_positions: int | torch.Tensor, keys: DrawKeys) -> torch.Tensor:
    """
    Draw eligible positions of each row, uniform without replacement.

    Args:
        is_eligible (`torch.BoolTensor` of shape `(B, L)`): Positions to draw from.
        num_positions (`int` or `torch.LongTensor` of shape `(B, 1)`): How many to draw; all of a row that has no more.
        keys ([`DrawKeys`]): What the draws depend on.

    Returns:
        `torch.BoolTensor` of shape `(B, L)`: the drawn positions.
    """
    keys.check_rows(len(is_eligible))
    index = torch.arange(is_eligible.shape[1], device=is_eligible.device)
    sample_ids = torch.tensor(list(keys.sample_ids)).to(index.device, non_blocking=True)[:, None]
    # The positions with the smallest numbers: one number per position, whatever else is eligible.
    numbers = keyed_uniforms(keys.seed, keys.epoch, sample_ids, index, 0, ANCHOR).masked_fill(~is_eligible, 2.0)
    rank = numbers.argsort(dim=1).argsort(dim=1)
    return is_eligible & (rank < num_positions)


def draft_text(
    anchors: torch.Tensor, input_ids: torch.Tensor, completion_mask: torch.Tensor, *, num_drafts: int
) -> BlockBatch:
    """
    Take the committed tokens behind given anchors as accepted drafts, as far as they belong to one response.

    Args:
        anchors (`torch.LongTensor` of shape `(B, A)`): Anchor of each block, -1 for padding.
        input_ids (`torch.LongTensor` of shape `(B, L)`): Right-padded text.
        completion_mask (`torch.BoolTensor` of shape `(B, L)`): Tokens the target wrote.
        num_drafts (`int`): K.

    Returns:
        [`BlockBatch`] whose rejected stream is empty.
    """
    is_completion = completion_mask.bool()
    positions, is_inside = _slot_positions(anchors, num_drafts, input_ids.shape[1])
    flat = positions.flatten(1)
    drafts = input_ids.gather(1, flat).view_as(positions)
    is_written = is_completion.gather(1, flat).view_as(positions) & is_inside
    # A running product: a slot behind a token of another speaker is another text.
    is_accepted = is_written.long().cumprod(dim=-1).bool()
    return BlockBatch(
        anchors=anchors,
        drafts=drafts,
        labels=torch.where(is_accepted, drafts, -1),
        is_accepted=is_accepted,
        is_rejected=torch.zeros_like(is_accepted),
        is_branch=torch.zeros_like(is_accepted),
    )


def mark_slots(rollout: Rollout, *, rejected_scope: str, eos_token_ids: Sequence[int]) -> BlockBatch:
    """
    Replay every block of a rollout: the accepted slots, and those the target rejected.

    A censored block trains its accepted slots only. With `rejected_scope="suffix"` every slot from the first rejection
    on is rejected, up to and including the first drafted end-of-sequence token; with `"first"`, only the first.

    Source: [Draft-OPD](https://huggingface.co/papers/2605.29343), section 3.

    Args:
        rollout ([`Rollout`]): Blocks drafted by the current drafter.
        rejected_scope (`str`): `"suffix"` or `"first"`.
        eos_token_ids (`Sequence[int]`): Ids that end a response.

    Raises:
        ValueError: If `rejected_scope` is unknown, or `"suffix"` is given with a rollout without suffixes.
    """
    if rejected_scope == "suffix" and not rollout.has_suffix:
        raise ValueError(
            "The rollout holds no drafts behind its first rejections. Roll out with `keep_branch_hidden=True`."
        )
    if rejected_scope not in REJECTED_SCOPES:
        raise ValueError(f"`rejected_scope` must be one of {REJECTED_SCOPES}, got {rejected_scope!r}.")
    num_drafts = rollout.drafts.shape[-1]
    slots = torch.arange(1, num_drafts + 1, device=rollout.drafts.device)
    accepted = rollout.accepted[..., None]
    is_block = rollout.is_block[..., None]
    is_accepted = (slots <= accepted) & is_block
    is_rejected = (slots > accepted) & is_block & ~rollout.is_censored[..., None]
    if rollout.verified is not None:
        is_rejected &= slots <= rollout.verified[..., None]
    if rejected_scope == "first":
        is_rejected &= slots == accepted + 1
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=slots.device)
    drafted_eos = (torch.isin(rollout.drafts, eos) & is_rejected).long()
    # Behind a drafted end of sequence there is no text to draft; the slot that drafted it still counts.
    is_rejected &= (drafted_eos.cumsum(dim=-1) - drafted_eos) == 0
    positions, _ = _slot_positions(rollout.anchors, num_drafts, rollout.input_ids.shape[1])
    on_text = (
        (slots <= accepted + 1) & (rollout.anchors[..., None] + slots <= rollout.block_ends[..., None]) & is_block
    )
    committed = rollout.input_ids.gather(1, positions.flatten(1)).view_as(positions)
    return BlockBatch(
        anchors=rollout.anchors,
        drafts=rollout.drafts,
        labels=torch.where(on_text, committed, -1),
        is_accepted=is_accepted,
        is_rejected=is_rejected,
        is_branch=is_rejected & (slots > accepted + 1),
    )


def join_blocks(first: BlockBatch, second: BlockBatch) -> BlockBatch:
    """
    Put the blocks of two batches of the same rows side by side.

    Args:
        first ([`BlockBatch`]): `A` blocks per row. Branch states of the target are indexed by its blocks.
        second ([`BlockBatch`]): `A'` blocks per row, none of whose slots lies on a branch.

    Returns:
        [`BlockBatch`] of `A + A'` blocks per row.
    """
    assert not second.is_branch.any(), "branch states belong to the first blocks"
    parts = [
        batch if batch.is_supervised is not None else replace(batch, is_supervised=torch.zeros_like(batch.is_accepted))
        for batch in (first, second)
    ]
    return BlockBatch(**{name: torch.cat([getattr(part, name) for part in parts], dim=1) for name in vars(first)})


def _slot_positions(anchors: torch.Tensor, num_drafts: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text position of every slot, clamped into the text, and whether it lies inside, `(B, A, K)` each."""
    slots = torch.arange(1, num_drafts + 1, device=anchors.device)
    positions = anchors[..., None] + slots
    is_inside = (positions < length) & (anchors[..., None] >= 0)
    return positions.clamp(0, length - 1), is_inside
