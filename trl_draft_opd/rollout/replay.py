# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Replay: the blocks the current drafter would draft along text the target already wrote. No generation.

Given the text, the chain of anchors is a function of the drafter (and, where drafts are drawn, of draws keyed by
anchor and slot). So every response is cut into segments that are walked in parallel: two walks that meet at an anchor
are the same from there on, and the chain is read off the finished table. Knows nothing of losses or trainers.

Shape letters:  B = sequences, L = text length, A = blocks per sequence, K = drafts per block, N = hidden rows
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..drafters.base import Drafter
from ..target.branches import score_branches
from ..target.frozen import FrozenTarget
from ..target.reading import TextReading
from .acceptance import sample_posterior, settle_blocks, token_probs
from .drafting import DraftingSettings, choose_drafts
from .keyed_random import REPLAY_ACCEPT, REPLAY_DRAFT, DrawKeys
from .types import Rollout, pack_columns, response_ends


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


@torch.no_grad()
def rollout_replay(
    target: FrozenTarget,
    drafter: Drafter,
    text: TargetText,
    settings: DraftingSettings,
    keys: DrawKeys,
    *,
    segment_length: int,
    chunk_bytes: int,
    reading: TextReading | None = None,
) -> Rollout:
    """
    Find the chain of blocks the drafter makes along each response of the text.

    Equal to [`rollout_live`] at temperature 0 on the same text. At a temperature above 0 the blocks are drawn from
    their exact distribution given the text, see `sample_posterior`; rows that hold a token of probability 0 then have
    no blocks and are counted in `num_refused`.

    Args:
        segment_length (`int`): Tokens per segment walked in parallel; 1 drafts at every position in one pass.
        chunk_bytes (`int`): Bytes of float32 logits alive at a time.
        reading ([`TextReading`], *optional*):
            The text as read at the drafter's layers, with its cache if branches are kept; made here if not given.
    """
    with drafter.evaluating():
        walk = ReplayWalk(target, drafter, text, settings, keys, chunk_bytes, reading)
        walk.run(segment_length)
        return walk.rollout(walk.chain())


class ReplayWalk:
    """By position, the accepted drafts and the first refused draft of each block that was drafted so far."""

    def __init__(
        self,
        target: FrozenTarget,
        drafter: Drafter,
        text: TargetText,
        settings: DraftingSettings,
        keys: DrawKeys,
        chunk_bytes: int,
        reading: TextReading | None,
    ):
        self.target, self.drafter, self.text, self.settings, self.keys = target, drafter, text, settings, keys
        self.chunk_bytes = chunk_bytes
        ids = text.input_ids
        keys.check_rows(len(ids))
        if settings.keep_branch_hidden:
            target.require_rollback()  # Before the work, not after it.
        if reading is None:
            reading = target.read_text(
                ids, text.attention_mask, drafter.config.target_layer_ids, keep_cache=settings.keep_branch_hidden
            )
        self.reading, self.states = reading, reading.padded()
        self.context = drafter.encode_text(self.states.features.to(drafter.device), ids, target.embed)
        self.ends = response_ends(text.completion_mask)
        self.accepted = torch.full_like(ids, -1)
        self.refused_drafts = torch.zeros_like(ids)
        self.is_refused_row = self._find_impossible_rows()
        # Where a slot reads no draft, a block's suffix needs only the head once its fate is known.
        self.suffixes = None
        if settings.keep_branch_hidden and not drafter.reads_drafts:
            self.suffixes = ids.new_zeros(*ids.shape, settings.num_drafts)

    def _find_impossible_rows(self) -> Tensor:
        """Return the rows holding a token of probability 0 under the distribution of the text, `(B,)`."""
        ids, is_written = self.text.input_ids, self.text.completion_mask
        is_refused = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if not self.settings.draws_drafts:
            return is_refused  # Argmax drafts are compared with the text; no probability is needed.
        rows, positions = is_written.nonzero(as_tuple=True)
        for part in self._parts(rows):
            states = self.states.last_hidden[rows[part], positions[part] - 1]
            distribution = token_probs(self.target.project(states), self.settings.sampling)
            is_possible = distribution.gather(1, ids[rows[part], positions[part]][:, None])[:, 0] > 0
            is_refused[rows[part][~is_possible]] = True
        return is_refused

    def run(self, segment_length: int) -> None:
        """Draft from the start of every segment on, each walk until it meets an anchor that was drafted from."""
        mask = self.text.completion_mask
        index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        is_start = mask.clone()
        is_start[:, 1:] &= ~mask[:, :-1]
        start_of = torch.where(is_start, index, 0).cummax(dim=1).values
        is_walker = (
            mask & ~self.is_refused_row[:, None] & (index < self.ends) & ((index - start_of) % segment_length == 0)
        )
        columns, is_open = pack_columns(is_walker)
        anchors = torch.where(is_open, columns, -1)
        while anchors.numel():
            self.draft(anchors)
            safe = anchors.clamp(min=0)
            following = torch.where(anchors >= 0, anchors + self.accepted.gather(1, safe) + 1, -1)
            # Two walks that meet continue as one.
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

    def draft(self, anchors: Tensor) -> None:
        """Draft at `anchors` (`(B, A)`, -1 for padding) along the text up to each first refusal; fill the table."""
        ids, num_drafts = self.text.input_ids, self.settings.num_drafts
        columns, is_running = pack_columns((anchors >= 0) & ~self.is_refused_row[:, None])
        current = torch.where(is_running, anchors.gather(1, columns), -1)
        if not current.numel():
            return
        row_index = torch.arange(len(ids), device=ids.device)[:, None]
        tokens = ids.gather(1, current.clamp(min=0))
        state = self.drafter.begin(self.context, current, tokens, num_drafts, self.target.embed)
        for slot in range(1, num_drafts + 1):
            safe = current.clamp(min=0)
            ends = self.ends.gather(1, safe)
            # A block whose text has ended is censored: what it drafts from here on decides nothing.
            is_running = is_running & (current + slot <= ends)
            rows, places = row_index.expand_as(current)[is_running], safe[is_running]
            drafts, is_kept = self._judge(state.hidden[is_running], rows, places, slot)
            self.accepted[rows, places] = slot - 1 + is_kept.long()
            self.refused_drafts[rows, places] = drafts
            is_matched = torch.zeros_like(is_running).masked_scatter_(is_running, is_kept)
            if self.suffixes is None:
                is_continued = is_matched & (current + slot < ends)
            else:
                is_continued = current >= 0
                is_free = is_continued & ~is_running
                rows, places = row_index.expand_as(current)[is_free], safe[is_free]
                self.suffixes[rows, places, slot - 1] = self._choose(state.hidden[is_free], rows, places, slot)
            if slot == num_drafts or not is_continued.any():
                return
            columns, is_block = pack_columns(is_continued)
            tokens = ids.gather(1, (safe + slot).clamp(max=ids.shape[1] - 1)).gather(1, columns)
            state = self.drafter.advance(state, tokens, torch.where(is_block, columns, -1))
            current = torch.where(is_block, current.gather(1, columns), -1)
            is_running = is_matched.gather(1, columns) & is_block

    def _judge(self, hidden: Tensor, rows: Tensor, anchors: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Return the draft of `slot` at N blocks whose earlier drafts equal the text, and whether it is kept."""
        committed = self.text.input_ids[rows, anchors + slot]
        drafts, is_kept = torch.zeros_like(committed), torch.zeros_like(committed, dtype=torch.bool)
        for part in self._parts(rows):
            logits = self.drafter.draft_logits(hidden[part], self.target.project)
            if not self.settings.draws_drafts:
                drafts[part] = self.drafter.to_target_ids(logits.argmax(dim=-1))
                is_kept[part] = drafts[part] == committed[part]
                continue
            draft_distribution = self.drafter.to_target_probs(token_probs(logits, self.settings.sampling))
            states = self.states.last_hidden[rows[part], anchors[part] + slot - 1]
            target_distribution = token_probs(self.target.project(states), self.settings.sampling).to(
                draft_distribution
            )
            chosen, accepted = sample_posterior(
                committed[part, None],
                draft_distribution[:, None],
                target_distribution[:, None],
                self.keys.uniforms(rows[part], anchors[part], slot, REPLAY_ACCEPT)[:, None],
                self.keys.uniforms(rows[part], anchors[part], slot, REPLAY_DRAFT)[:, None],
                torch.ones_like(committed[part, None], dtype=torch.bool),
            )
            drafts[part], is_kept[part] = chosen[:, 0], accepted == 1
        return drafts, is_kept

    def _choose(self, hidden: Tensor, rows: Tensor, anchors: Tensor, slot: int) -> Tensor:
        """Return the draft of `slot` at each of N blocks from the drafter's own distribution."""
        chosen, uniforms = torch.zeros_like(rows), None
        for part in self._parts(rows):
            logits = self.drafter.draft_logits(hidden[part], self.target.project)
            if self.settings.draws_drafts:
                uniforms = self.keys.uniforms(rows[part], anchors[part], slot, REPLAY_DRAFT)
            draft_ids, _ = choose_drafts(logits, self.settings.sampling, uniforms)
            chosen[part] = self.drafter.to_target_ids(draft_ids)
        return chosen

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return indices into `rows`, as many at a time as have logits that fit the budget."""
        # Where drafts are drawn, a distribution and its cumulative sum live beside the logits.
        row_bytes = (16 if self.settings.draws_drafts else 4) * self.target.vocab_size
        return torch.arange(len(rows), device=rows.device).split(max(1, self.chunk_bytes // row_bytes))

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
                drafts = self._draft_suffixes(anchors, drafts, num_known)
            else:
                suffixes = self.suffixes[torch.arange(len(ids), device=ids.device)[:, None], safe]
                drafts = torch.where(slots > num_known[..., None], suffixes, drafts)
            is_branch = (slots > accepted[..., None] + 1) & (is_block & ~is_censored)[..., None]
            hidden = score_branches(self.target, self.reading, anchors, drafts, is_branch)
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

    def _draft_suffixes(self, anchors: Tensor, drafts: Tensor, num_known: Tensor) -> Tensor:
        """Return `drafts` with what each block drafts behind its `num_known` decided slots."""
        num_drafts, drafts = drafts.shape[-1], drafts.clone()
        columns, is_open = pack_columns((anchors >= 0) & (num_known < num_drafts))
        if not columns.numel():
            return drafts
        row_index = torch.arange(len(anchors), device=anchors.device)[:, None].expand_as(columns)
        current = torch.where(is_open, anchors.gather(1, columns), -1)
        known = num_known.gather(1, columns)
        tokens = self.text.input_ids.gather(1, current.clamp(min=0))
        state = self.drafter.begin(self.context, current, tokens, num_drafts, self.target.embed)
        for slot in range(1, num_drafts + 1):
            if slot > 1:
                state = self.drafter.advance(state, drafts[row_index, columns, slot - 2])
            is_free = is_open & (slot > known)
            if is_free.any():
                rows, blocks = row_index[is_free], columns[is_free]
                drafts[rows, blocks, slot - 1] = self._choose(state.hidden[is_free], rows, current[is_free], slot)
        return drafts
