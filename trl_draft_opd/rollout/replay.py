# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Replay: the blocks the current drafter would draft along text the target already wrote. No generation.

Given the text, the chain of anchors is a function of the drafter (and, where drafts are drawn, of draws keyed by anchor and
slot). So every response is cut into segments that are walked in parallel: two walks that meet at an anchor coincide for ever,
and the chain is read off the finished table. Knows nothing of losses or trainers.

Shape letters:  B = sequences, L = text length, A = blocks per sequence, K = drafts per block, N = hidden rows, H = hidden size,
                V = vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..drafters.base import DraftContext, Drafter
from ..target.frozen import FrozenTarget, TargetReading
from .acceptance import (
    SamplingSettings,
    choose_tokens,
    sample_posterior,
    settle_blocks,
    token_probs,
)
from .keyed_random import REPLAY_ACCEPT, REPLAY_DRAFT, keyed_uniforms
from .sampler import draws_drafts
from .types import Rollout, response_ends


@dataclass(frozen=True)
class TargetText:
    """
    Text the target wrote.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(B, L)`): Prompts and responses, right-padded.
        attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for text, 0 for padding.
        completion_mask (`torch.BoolTensor` of shape `(B, L)`): Tokens the target wrote, never the first of a row.
        sample_ids (`Sequence[int]`): One id per row, which keys its draws.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    sample_ids: Sequence[int]


@dataclass(frozen=True)
class ReplaySettings:
    """
    How a text is replayed.

    Attributes:
        num_drafts (`int`): Drafts per block, K.
        sampling ([`SamplingSettings`]): The distribution the text was sampled from; temperature 0 for greedy text.
        draft_sampling (`str`): `"greedy"` (drafts are argmax) or `"sample"` (drafts are drawn from the drafter's distribution).
        keep_branch_hidden (`bool`): Also draft behind first rejections, and score those branches with the target.
        seed (`int`), epoch (`int`): Keys of the draws; unused where drafts are argmax.
        segment_length (`int`): Tokens per segment walked in parallel; 1 drafts at every position in one pass.
        chunk_bytes (`int`): Bytes of float32 logits alive at a time.
    """

    num_drafts: int
    sampling: SamplingSettings
    draft_sampling: str
    keep_branch_hidden: bool
    seed: int
    epoch: int
    segment_length: int
    chunk_bytes: int


@torch.no_grad()
def rollout_replay(
    target: FrozenTarget,
    drafter: Drafter,
    text: TargetText,
    settings: ReplaySettings,
    reading: TargetReading | None = None,
) -> Rollout:
    """
    Find the chain of blocks the drafter makes along each response of the text.

    Equal to [`rollout_live`] at temperature 0 on the same text. At a temperature above 0 the blocks are drawn from their
    exact distribution given the text, see `sample_posterior`.

    Args:
        target ([`FrozenTarget`]): Writer of the text.
        drafter ([`Drafter`]): Put in evaluation mode for the call and back afterwards.
        text ([`TargetText`]): Prompts and responses.
        settings ([`ReplaySettings`]): How to replay.
        reading ([`TargetReading`], *optional*):
            The target's reading of the text at the drafter's layers, made here if not given; with its cache if branches are kept.

    Returns:
        [`Rollout`]. Where drafts are drawn, rows that hold a token of probability 0 under `settings.sampling` have no blocks and are
        counted in `num_refused`.

    Raises:
        ValueError: If branches are asked of a target that cannot branch.
    """
    was_training = drafter.training
    drafter.eval()
    try:
        walk = _Walk(target, drafter, text, settings, reading)
        walk.run()
        return walk.rollout(walk.chain())
    finally:
        drafter.train(was_training)


@torch.no_grad()
def redraft(
    target: FrozenTarget,
    drafter: Drafter,
    text: TargetText,
    anchors: Tensor,
    settings: ReplaySettings,
    reading: TargetReading | None = None,
) -> Rollout:
    """
    Draft at given anchors of the text, as the chain's own blocks are drafted.

    Args:
        anchors (`torch.LongTensor` of shape `(B, A)`):
            Positions of tokens the target wrote, behind each of which it wrote another; -1 for padding.
        target, drafter, text, settings, reading: As for [`rollout_replay`].
    """
    was_training = drafter.training
    drafter.eval()
    try:
        walk = _Walk(target, drafter, text, settings, reading)
        walk.draft(anchors)
        return walk.rollout(anchors)
    finally:
        drafter.train(was_training)


def pack_columns(is_kept: Tensor) -> tuple[Tensor, Tensor]:
    """
    Move the kept entries of each row to the front, in order.

    Returns:
        `tuple`: the columns they stood in, `(B, A')` with `A'` the largest count (padding names any column), and whether
        an entry of the result is one, `(B, A')`.
    """
    counts = is_kept.sum(dim=1)
    width = int(counts.max())
    columns = is_kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return columns, torch.arange(width, device=counts.device) < counts[:, None]


class _Walk:
    """
    What has been drafted so far, by position: a block's accepted drafts and its first refused draft, once its anchor was drafted from.
    """

    def __init__(
        self,
        target: FrozenTarget,
        drafter: Drafter,
        text: TargetText,
        settings: ReplaySettings,
        reading: TargetReading | None,
    ):
        self.target, self.drafter, self.text, self.settings = target, drafter, text, settings
        ids = text.input_ids
        if settings.keep_branch_hidden:
            target.require_rollback()  # Before the work, not after it.
        if reading is None:
            reading = target.read_text(
                ids, text.attention_mask, drafter.config.target_layer_ids, keep_cache=settings.keep_branch_hidden
            )
        self.reading = reading
        self.context = self._encode_text()
        self.ends = response_ends(text.completion_mask)
        self.sample_ids = torch.tensor(list(text.sample_ids), device=ids.device)[:, None]
        self.draws = draws_drafts(settings.sampling, settings.draft_sampling)
        self.accepted = torch.full_like(ids, -1)
        self.refused_drafts = torch.zeros_like(ids)
        self.is_refused_row = self._find_impossible_rows()
        # Where a slot reads no draft, a block's suffix is at hand as soon as its fate is known: only the head is left to run.
        self.suffixes = None
        if settings.keep_branch_hidden and not drafter.reads_drafts:
            self.suffixes = ids.new_zeros(*ids.shape, settings.num_drafts)

    def _find_impossible_rows(self) -> Tensor:
        """Return the rows holding a token of probability 0 under the distribution they are said to be drawn from, `(B,)`."""
        ids, is_written = self.text.input_ids, self.text.completion_mask
        is_refused = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if not self.draws:
            return is_refused  # Argmax drafts are compared with the text; no probability is asked for.
        rows, positions = is_written.nonzero(as_tuple=True)
        for part in torch.arange(len(rows), device=ids.device).split(self._chunk_rows()):
            states = self.reading.last_hidden[rows[part], positions[part] - 1]
            distribution = token_probs(self.target.project(states), self.settings.sampling)
            is_possible = distribution.gather(1, ids[rows[part], positions[part]][:, None])[:, 0] > 0
            is_refused[rows[part][~is_possible]] = True
        return is_refused

    def _encode_text(self) -> DraftContext:
        ids = self.text.input_ids
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        next_ids = torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
        features = self.reading.features.to(self.drafter.device)
        return self.drafter.encode_context(features, self.target.embed(next_ids), positions)

    # -- the walk ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Draft from the start of every segment on, each walk until it meets an anchor that was drafted from before."""
        mask = self.text.completion_mask
        index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        is_start = mask.clone()
        is_start[:, 1:] &= ~mask[:, :-1]
        start_of = torch.where(is_start, index, 0).cummax(dim=1).values
        is_walker = (
            mask
            & ~self.is_refused_row[:, None]
            & (index < self.ends)
            & ((index - start_of) % self.settings.segment_length == 0)
        )
        columns, is_open = pack_columns(is_walker)
        anchors = torch.where(is_open, columns, -1)
        while anchors.numel():
            self.draft(anchors)
            safe = anchors.clamp(min=0)
            following = torch.where(anchors >= 0, anchors + self.accepted.gather(1, safe) + 1, -1)
            # Two walks that meet go on as one.
            following = following.sort(dim=1).values
            following[:, 1:].masked_fill_(following[:, 1:] == following[:, :-1], -1)
            place = following.clamp(0, mask.shape[1] - 1)
            is_open = (following >= 0) & (following < self.ends.gather(1, place)) & mask.gather(1, place)
            is_open &= self.accepted.gather(1, place) < 0
            columns, is_open = pack_columns(is_open)
            anchors = torch.where(is_open, following.gather(1, columns), -1)

    def chain(self) -> Tensor:
        """Read each response's chain off the table, `(B, A)` with -1 for padding."""
        mask, ends = self.text.completion_mask.tolist(), self.ends.tolist()
        accepted, is_refused = self.accepted.tolist(), self.is_refused_row.tolist()
        chains = []
        for row, is_written in enumerate(mask):
            anchors: list[int] = []
            for start in range(1, len(is_written)):
                if is_written[start] and not is_written[start - 1] and not is_refused[row]:
                    anchor, end = start, ends[row][start]
                    while anchor < end:
                        assert accepted[row][anchor] >= 0, "a walk covers every anchor of the chain"
                        anchors.append(anchor)
                        anchor += accepted[row][anchor] + 1
            chains.append(torch.tensor(anchors, dtype=torch.long))
        padded = torch.nn.utils.rnn.pad_sequence(chains, batch_first=True, padding_value=-1)
        if padded.shape[1] == 0:
            padded = torch.full((len(mask), 1), -1)
        return padded.to(self.text.input_ids.device)

    # -- one round -----------------------------------------------------------------------------------------------------

    def draft(self, anchors: Tensor) -> None:
        """Draft at `anchors` (`(B, A)`, -1 for padding) along the text, each block until its first refusal, and fill the table."""
        num_drafts = self.settings.num_drafts
        ids = self.text.input_ids
        columns, is_open = pack_columns((anchors >= 0) & ~self.is_refused_row[:, None])
        current = torch.where(is_open, anchors.gather(1, columns), -1)
        if not current.numel():
            return
        row_index = torch.arange(len(ids), device=ids.device)[:, None]

        is_running = is_open

        def decide(hidden: Tensor, slot: int) -> tuple[Tensor, Tensor] | None:
            nonlocal current, is_running
            safe = current.clamp(min=0)
            ends = self.ends.gather(1, safe)
            # A block whose text has ended is censored: it runs on as one that was refused does.
            is_running &= current + slot <= ends
            rows, anchors = row_index.expand_as(current)[is_running], safe[is_running]
            drafts, is_kept = self._judge(hidden[is_running], rows, anchors, slot)
            self.accepted[rows, anchors] = slot - 1 + is_kept.long()
            self.refused_drafts[rows, anchors] = drafts
            goes_on = current >= 0
            if self.suffixes is None:
                goes_on = torch.zeros_like(is_running).masked_scatter_(is_running, is_kept) & (current + slot < ends)
            else:
                is_free = goes_on & ~is_running
                rows, anchors = row_index.expand_as(current)[is_free], safe[is_free]
                self.suffixes[rows, anchors, slot - 1] = self._choose(hidden[is_free], rows, anchors, slot)
            is_running = torch.zeros_like(is_running).masked_scatter_(is_running, is_kept)
            if slot == num_drafts or not goes_on.any():
                return None
            keep, is_block = pack_columns(goes_on)
            committed = ids.gather(1, (safe + slot).clamp(max=ids.shape[1] - 1)).gather(1, keep)
            current = torch.where(is_block, current.gather(1, keep), -1)
            is_running = is_running.gather(1, keep) & is_block
            return committed, torch.where(is_block, keep, -1)

        tokens = ids.gather(1, current.clamp(min=0))
        self.drafter.draft_along(self.context, current, tokens, num_drafts, self.target.embed, decide)

    def _judge(self, hidden: Tensor, rows: Tensor, anchors: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Return the draft of `slot` at each of N blocks whose earlier drafts equal the text, and whether it is kept."""
        committed = self.text.input_ids[rows, anchors + slot]
        drafts, is_kept = torch.zeros_like(committed), torch.zeros_like(committed, dtype=torch.bool)
        for part in torch.arange(len(rows), device=rows.device).split(self._chunk_rows()):
            logits = self.drafter.draft_logits(hidden[part], self.target.project)
            if not self.draws:
                drafts[part] = self.drafter.to_target_ids(logits.argmax(dim=-1))
                is_kept[part] = drafts[part] == committed[part]
                continue
            draft_distribution = self.drafter.to_target_probs(token_probs(logits, self.settings.sampling))
            states = self.reading.last_hidden[rows[part], anchors[part] + slot - 1]
            target_distribution = token_probs(self.target.project(states), self.settings.sampling).to(
                draft_distribution
            )
            chosen, accepted = sample_posterior(
                committed[part, None],
                None,
                draft_distribution[:, None],
                target_distribution[:, None],
                self._uniforms(rows[part], anchors[part], slot, REPLAY_ACCEPT)[:, None],
                self._uniforms(rows[part], anchors[part], slot, REPLAY_DRAFT)[:, None],
                torch.ones_like(committed[part, None], dtype=torch.bool),
            )
            drafts[part], is_kept[part] = chosen[:, 0], accepted == 1
        return drafts, is_kept

    def _uniforms(self, rows: Tensor, anchors: Tensor, slot: int, purpose: int) -> Tensor:
        settings = self.settings
        return keyed_uniforms(settings.seed, settings.epoch, self.sample_ids[rows, 0], anchors, slot, purpose)

    def _chunk_rows(self) -> int:
        """Rows of logits that fit the budget; a distribution and its cumulative sum stand beside them where drafts are drawn."""
        return max(1, self.settings.chunk_bytes // ((16 if self.draws else 4) * self.target.vocab_size))

    # -- what it hands on ----------------------------------------------------------------------------------------------

    def rollout(self, anchors: Tensor) -> Rollout:
        """Return the blocks at `anchors` (`(B, A)`), which have been drafted from, as a rollout."""
        ids, num_drafts = self.text.input_ids, self.settings.num_drafts
        anchors = anchors.masked_fill(self.is_refused_row[:, None], -1)
        is_block, safe = anchors >= 0, anchors.clamp(min=0)
        ends = torch.where(is_block, self.ends.gather(1, safe), safe)
        raw_accepted = self.accepted.gather(1, safe).masked_fill(~is_block, 0)
        outcome = settle_blocks(raw_accepted, safe, ends, num_drafts)
        accepted, is_censored = outcome.accepted * is_block, outcome.is_censored & is_block
        slots = torch.arange(1, num_drafts + 1, device=ids.device)
        positions = (safe[..., None] + slots).clamp(max=ids.shape[1] - 1)
        drafts = ids.gather(1, positions.flatten(1)).view_as(positions)
        # What was decided in the walk: accepted drafts, which equal the text, and the first refused one.
        num_known = torch.where(is_block, accepted + 1 - is_censored.long(), num_drafts).clamp(max=num_drafts)
        refused = self.refused_drafts.gather(1, safe)[..., None]
        drafts = torch.where(slots == accepted[..., None] + 1, refused, drafts)
        hidden, forwards_before = None, self.target.num_forwards
        if self.settings.keep_branch_hidden:
            if self.suffixes is None:
                self._draft_suffixes(anchors, drafts, num_known)
            else:
                suffixes = self.suffixes[torch.arange(len(ids), device=ids.device)[:, None], safe]
                drafts = torch.where(slots > num_known[..., None], suffixes, drafts)
            is_branch = (slots > accepted[..., None] + 1) & (is_block & ~is_censored)[..., None]
            hidden = self.target.score_branches(self.reading, anchors, drafts, is_branch)
        return Rollout(
            input_ids=ids,
            attention_mask=self.text.attention_mask,
            completion_mask=self.text.completion_mask,
            anchors=anchors,
            drafts=drafts * is_block[..., None],
            accepted=accepted,
            is_censored=is_censored,
            is_counted=outcome.is_counted & is_block,
            branch_hidden=hidden,
            has_suffix=self.settings.keep_branch_hidden,
            num_refused=int(self.is_refused_row.sum()),
            num_target_forwards=1 + self.target.num_forwards - forwards_before,
        )

    def _draft_suffixes(self, anchors: Tensor, drafts: Tensor, num_known: Tensor) -> None:
        """Let each block draft on behind its `num_known` decided slots, and write what it drafts into `drafts`."""
        num_drafts = drafts.shape[-1]
        columns, is_open = pack_columns((anchors >= 0) & (num_known < num_drafts))
        if not columns.numel():
            return
        row_index = torch.arange(len(anchors), device=anchors.device)[:, None].expand_as(columns)
        current = torch.where(is_open, anchors.gather(1, columns), -1)
        known = num_known.gather(1, columns)

        def decide(hidden: Tensor, slot: int) -> tuple[Tensor, None]:
            is_free = is_open & (slot > known)
            if is_free.any():
                rows, blocks = row_index[is_free], columns[is_free]
                drafts[rows, blocks, slot - 1] = self._choose(hidden[is_free], rows, current[is_free], slot)
            return drafts[row_index, columns, slot - 1], None

        tokens = self.text.input_ids.gather(1, current.clamp(min=0))
        self.drafter.draft_along(self.context, current, tokens, num_drafts, self.target.embed, decide)

    def _choose(self, hidden: Tensor, rows: Tensor, anchors: Tensor, slot: int) -> Tensor:
        """Return the draft of `slot` at each of N blocks from the drafter's own distribution."""
        chosen = torch.zeros_like(rows)
        for part in torch.arange(len(rows), device=rows.device).split(self._chunk_rows()):
            logits = self.drafter.draft_logits(hidden[part], self.target.project)
            if self.draws:
                distribution = token_probs(logits, self.settings.sampling)
                draft_ids = choose_tokens(distribution, self._uniforms(rows[part], anchors[part], slot, REPLAY_DRAFT))
            else:
                draft_ids = logits.argmax(dim=-1)
            chosen[part] = self.drafter.to_target_ids(draft_ids)
        return chosen
