# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Replay: the blocks the current drafter would draft along text the target already wrote. No generation.

Given the text, the chain of anchors is a function of the drafter (and, where drafts are drawn, of draws keyed by
anchor and slot). So every response is cut into segments that are walked in parallel: two walks that meet at an anchor
are the same from there on, and the chain is read off the finished table. Knows nothing of losses or trainers.

The rows lie end to end, and a block is named by its place: the index of its anchor among all tokens. Where to draft
next is decided on the host, which reads the device once per group of judged slots and at no other time.

Shape letters:  B = sequences, L = text length, T = tokens of all texts, A = blocks per sequence, K = drafts per block,
                N = blocks drafted together, M = slots judged together, H = hidden size
"""

import torch
from torch import Tensor

from ..drafters.base import Drafter, DraftState
from ..target.branches import score_branches
from ..target.frozen import FrozenTarget
from ..target.reading import TextReading
from .acceptance import draw_tokens, sample_posterior, settle_blocks, token_probs
from .drafting import DraftingSettings, mark_verified, read_confidences
from .keyed_random import REPLAY_ACCEPT, REPLAY_DRAFT, DrawKeys
from .replay_table import ReplayTable
from .texts import TargetText
from .types import Rollout


# A card reads the head's weight once per product, which takes it as long as some 230 rows (its FLOPs over its bytes a
# second); launches and the host's wait are another 70. Up to twice that, rows in vain cost less than one more wait.
ROWS_AT_ONCE = 640
# For the same reason a card drafts this many blocks in little more time than one.
BLOCKS_AT_ONCE = 32
# Tokens of the blocks that are drafted in one forward, so that its activations are bounded.
TOKENS_AT_ONCE = 2**15


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
        chunk_bytes (`int`): Bytes of logits, and of what is made of them, alive at a time.
        reading ([`TextReading`], *optional*):
            The text as read at the drafter's layers, with its cache if branches are kept; made here if not given.
    """
    with drafter.evaluating():
        walk = ReplayWalk(target, drafter, text, settings, keys, chunk_bytes, reading)
        walk.run(segment_length)
        return walk.rollout(walk.chain())


class ReplayWalk(ReplayTable):
    """The table of blocks, and the drafter and target that fill it."""

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
        keys.check_rows(len(text.input_ids))
        settings.check_drafter(drafter)
        if settings.keep_branch_hidden:
            target.require_rollback()  # Before the work, not after it.
        if reading is None:
            layer_ids = drafter.config.target_layer_ids
            reading = target.read_text(
                text.input_ids, text.attention_mask, layer_ids, keep_cache=settings.keep_branch_hidden
            )
        self.reading, packing = reading, reading.packing
        self.ids = packing.pack(text.input_ids)
        features, starts = reading.features.to(drafter.device), packing.starts[packing.rows]
        self.context = drafter.encode_text(features[None], self.ids[None], target.embed, starts[None])
        super().__init__(packing.lengths, text.completion_mask.cpu(), settings.num_drafts)
        self.is_refused_row = self._find_impossible_rows()
        # How many drafts are verified depends on all of them.
        self.has_suffix = settings.keep_branch_hidden or settings.min_confidence is not None
        # Where a slot reads no draft, a block's suffix needs only the head once its fate is known.
        self.suffixes = None
        if self.has_suffix and not drafter.reads_drafts:
            self.suffixes = self.ids.new_zeros(len(self.ids), settings.num_drafts)

    def _find_impossible_rows(self) -> Tensor:
        """Return the rows holding a token of probability 0 under the distribution of the text, `(B,)`."""
        is_refused = torch.zeros(len(self.starts), dtype=torch.bool)
        places = self.is_written.nonzero()[:, 0]
        if not self.settings.draws_drafts or not len(places):
            return is_refused  # Argmax drafts are compared with the text; no probability is needed.
        index, is_impossible = self._send(places), []
        for part in self._parts(len(places)):
            distribution = self._text_probs(index[part])
            is_impossible.append(~(distribution.gather(1, self.ids[index[part], None])[:, 0] > 0))
            del distribution  # Or it would be alive beside the next one.
        is_refused[self.rows[places[torch.cat(is_impossible).cpu()]]] = True
        return is_refused

    def _text_probs(self, places: Tensor) -> Tensor:
        """Return the distribution that the text's tokens at `places` were drawn from, `(N, V)`."""
        return token_probs(self.target.project(self.reading.last_hidden[places - 1]), self.settings.sampling)

    def run(self, segment_length: int) -> None:
        """Draft from the start of every segment on, each walk until it meets an anchor that was drafted from."""
        index = torch.arange(len(self.ends))
        start_of = torch.where(self._is_start(), index, 0).cummax(dim=0).values
        is_walker = self.is_written & (index < self.ends) & ~self.is_refused_row[self.rows]
        walkers = (is_walker & ((index - start_of) % segment_length == 0)).nonzero()[:, 0]
        is_passed = torch.zeros_like(is_walker)
        is_passed[walkers] = True
        while len(walkers):
            self.draft(self._round(walkers, blocks_ahead(len(walkers), self.ids.device.type)))
            walkers = self._follow(walkers, is_passed)

    # -- drafting -----------------------------------------------------------------------------------------------------

    def draft_at(self, anchors: Tensor) -> Rollout:
        """Draft at `anchors` (`(B, A)` positions of written tokens, -1 for padding) and return these blocks."""
        anchors = anchors.cpu()
        self.draft((self.starts[:, None] + anchors)[anchors >= 0])
        return self.rollout(anchors)

    def draft(self, places: Tensor) -> None:
        """Draft at `places` (`(N,)`, on the host) along the text up to each first refusal; fill the table."""
        for part in self._slices(places[~self.is_refused_row[self.rows[places]]]):
            self._draft(part)

    def _draft(self, places: Tensor) -> None:
        num_drafts, rooms = self.settings.num_drafts, self.ends[places] - places
        anchors, room = self._send(torch.stack([places, rooms]))
        state, draws = self._begin(places, anchors)
        uniforms = draws
        # The blocks that are judged further: among `places` on the host, and on the device.
        running, columns, slot = torch.arange(len(places)), None, 0
        reach, least = None, self.settings.min_confidence
        if least is not None:
            reach = torch.ones(len(places), 1, dtype=torch.float64, device=anchors.device)
        while True:
            size = slots_at_once(len(running), num_drafts - slot, self.ids.device.type)
            if state.block_hidden is None:
                state, hidden = self._run_slots(state, anchors, size)
            else:
                hidden = state.block_hidden[0, :, slot : slot + size]
                hidden = hidden if columns is None else hidden.index_select(0, columns)
            is_verified = None
            if reach is not None and least is not None:
                # The product of all slots from the first on, in the order of live decoding.
                reach = torch.cat([reach, read_confidences(self.drafter, hidden)], dim=1).cumprod(dim=1)[:, 1:]
                is_verified = mark_verified(reach, least, slot + 1)
            drafts, is_kept = self._judge(hidden, anchors, room, slot, uniforms, is_verified)
            kept = is_kept.long().cumprod(dim=1).sum(dim=1)
            last = kept.clamp(max=size - 1)[:, None]
            found = [kept, drafts.gather(1, last)[:, 0]]
            if is_verified is not None:
                found.append((~is_verified.gather(1, last)[:, 0]).long())
            kept, refused, *is_cut = torch.stack(found).cpu()
            self._check_drawn(refused < 0, places[running])
            if is_cut:
                self.is_cut[places[running]] = is_cut[0].bool()
            self.accepted[places[running]] = slot + kept
            self.refused_drafts[places[running]] = refused
            slot += size
            # A block whose text has ended is censored: what it drafts from here on decides nothing.
            following = ((kept == size) & (slot < rooms[running])).nonzero()[:, 0]
            if slot == num_drafts or not len(following):
                break
            running, picked = running[following], self._send(following)
            anchors, room = anchors[picked], room[picked]
            reach = None if reach is None else reach[picked, -1:]
            uniforms = None if uniforms is None else (uniforms[0][picked], uniforms[1][picked])
            columns = picked if columns is None else columns[picked]
            if state.block_hidden is None:
                state = self.drafter.advance(state, self._tokens(anchors + slot), picked[None])
        if self.suffixes is not None:
            self._choose_suffixes(state, places, draws)

    def _begin(self, places: Tensor, anchors: Tensor) -> tuple[DraftState, tuple[Tensor, Tensor] | None]:
        """Begin a block at every anchor (on the host, and on the device) and return the uniforms of its slots too."""
        num_drafts, tokens = self.settings.num_drafts, self.ids[anchors][None]
        state = self.drafter.begin(self.context, anchors[None], tokens, num_drafts, self.target.embed)
        if not self.settings.draws_drafts:
            return state, None
        slots = torch.arange(1, num_drafts + 1, device=anchors.device)
        where = (self.rows[places], self._send(self.positions[places]), slots)
        return state, (self.keys.uniforms(*where, REPLAY_ACCEPT), self.keys.uniforms(*where, REPLAY_DRAFT))

    def _run_slots(self, state: DraftState, anchors: Tensor, size: int) -> tuple[DraftState, Tensor]:
        """Run blocks along the text from the slot of `state` on; return states of `size` slots, `(N, M, W)`."""
        slots = torch.arange(state.slot, state.slot + size - 1, device=anchors.device)
        state, hidden = self.drafter.run_along(state, self._tokens(anchors[:, None] + slots))
        return state, hidden[0]

    def _tokens(self, places: Tensor) -> Tensor:
        """Return the text's tokens at places, in a row of their own; any token behind all texts."""
        return self.ids[places.clamp(max=len(self.ids) - 1)][None]

    def _judge(
        self,
        hidden: Tensor,
        anchors: Tensor,
        room: Tensor,
        slot: int,
        uniforms: tuple[Tensor, Tensor] | None,
        is_verified: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Draft the slots behind `slot` of N blocks whose drafts up to there equal the text. Those that are not verified
        are drafted as behind the end of the text: nothing is known of their fate.

        Returns:
            `tuple` of drafts `(N, M)`, which are right up to the first that is not kept, and of whether each equals a
            token of the block's text, which is `room` tokens long.
        """
        shape = hidden.shape[:2]
        slots = torch.arange(slot + 1, slot + 1 + shape[1], device=anchors.device)
        is_in_text = slots <= room[:, None]
        is_in_text = (is_in_text if is_verified is None else is_in_text & is_verified).flatten()
        places = (anchors[:, None] + slots).clamp(max=len(self.ids) - 1).flatten()
        committed, hidden = self.ids[places], hidden.flatten(0, 1)
        drafts, is_kept = torch.empty_like(committed), torch.empty_like(is_in_text)
        if uniforms is not None:
            accept_uniforms, draft_uniforms = (draws[:, slot : slot + shape[1]].flatten() for draws in uniforms)
        for part in self._parts(len(places)):
            if uniforms is None:
                drafts[part] = self._likeliest(hidden[part])
                is_kept[part] = (drafts[part] == committed[part]) & is_in_text[part]
                continue
            draft_probs = self.drafter.to_target_probs(self._draft_probs(hidden[part]))
            target_probs = self._text_probs(places[part]).to(draft_probs)
            chosen, accepted = sample_posterior(
                committed[part, None],
                draft_probs[:, None],
                target_probs[:, None],
                accept_uniforms[part, None],
                draft_uniforms[part, None],
                is_in_text[part, None],
            )
            drafts[part], is_kept[part] = chosen[:, 0], accepted == 1
            del draft_probs, target_probs  # Or they would be alive beside the next part's.
        return drafts.view(shape), is_kept.view(shape)

    def _likeliest(self, hidden: Tensor) -> Tensor:
        """Return the drafter's argmax at each of N states."""
        return self.drafter.to_target_ids(self.drafter.draft_logits(hidden, self.target.project).argmax(dim=-1))

    def _draft_probs(self, hidden: Tensor) -> Tensor:
        """Return the distribution of drafts at each of N states, `(N, DV)` over the drafter's vocabulary."""
        return token_probs(self.drafter.draft_logits(hidden, self.target.project), self.settings.sampling)

    def _check_drawn(self, is_missing: Tensor, places: Tensor) -> None:
        """Raise `ValueError` if a block misses a draft, which could not be drawn (-1)."""
        if is_missing.any():
            place = places[is_missing.cpu()][0]
            raise ValueError(
                f"No draft can be drawn for {int(is_missing.sum())} of {len(places)} blocks, the first of them at "
                f"token {int(self.positions[place])} of row {int(self.rows[place])}: the drafter's logits are NaN, or "
                "the text's token has probability 0. Check the drafter's weights, or leave this response out."
            )

    # -- drafts behind the first refusal ------------------------------------------------------------------------------

    def _choose_suffixes(self, state: DraftState, places: Tensor, uniforms: tuple[Tensor, Tensor] | None) -> None:
        """Choose the drafts that were not decided of blocks whose states are all there."""
        num_drafts = self.settings.num_drafts
        is_free = torch.arange(1, num_drafts + 1) > self._num_known(places)[:, None]
        index = is_free.flatten().nonzero()[:, 0]
        here, there = self._send(torch.stack([index, places[index // num_drafts] * num_drafts + index % num_drafts]))
        draws = None if uniforms is None else uniforms[1].flatten()
        assert state.block_hidden is not None and self.suffixes is not None
        self.suffixes.view(-1)[there] = self._choose(state.block_hidden[0].flatten(0, 1), here, draws)

    def _draft_suffixes(self, places: Tensor, drafts: Tensor) -> None:
        """Write what each block drafts behind its decided slots into `drafts` (`(N, K)`), slot by slot."""
        num_known, num_drafts = self._num_known(places), self.settings.num_drafts
        for part in self._slices((num_known < num_drafts).nonzero()[:, 0]):
            index = self._send(part)
            own, known = drafts[index], num_known[part]
            state, uniforms = self._begin(places[part], self._send(places[part]))
            for slot in range(1, num_drafts + 1):
                if slot > 1:
                    state = self.drafter.advance(state, own[None, :, slot - 2])
                free = (known < slot).nonzero()[:, 0]
                if len(free):
                    free = self._send(free)
                    draws = None if uniforms is None else uniforms[1][:, slot - 1]
                    own[free, slot - 1] = self._choose(state.hidden[0], free, draws)
            drafts[index] = own

    def _choose(self, hidden: Tensor, index: Tensor, uniforms: Tensor | None) -> Tensor:
        """Return a draft for each of the states (rows of `hidden`) in `index` from the drafter's own distribution."""
        chosen = torch.empty_like(index)
        for part in self._parts(len(index)):
            if uniforms is None:
                chosen[part] = self._likeliest(hidden[index[part]])
                continue
            draft_ids = draw_tokens(self._draft_probs(hidden[index[part]]), uniforms[index[part]])
            chosen[part] = self.drafter.to_target_ids(draft_ids.clamp(min=0)).where(draft_ids >= 0, -1)
        return chosen

    # -- results ------------------------------------------------------------------------------------------------------

    def rollout(self, anchors: Tensor) -> Rollout:
        """Return the blocks at `anchors` (`(B, A)`, on the host), which have been drafted from, as a rollout."""
        num_drafts = self.settings.num_drafts
        anchors = anchors.masked_fill(self.is_refused_row[:, None], -1)
        is_block = anchors >= 0
        index = self._send(is_block.flatten().nonzero()[:, 0])
        places = (self.starts[:, None] + anchors)[is_block]
        outcome = settle_blocks(self.accepted[places], places, self.ends[places], num_drafts)
        drafts = self._drafts(places, outcome.accepted)
        verified = confidences = None
        if self.settings.reads_confidences:
            confidences = self._confidences(places, drafts)
            if self.settings.min_confidence is not None:
                verified = self._count_verified(places, confidences, self.settings.min_confidence)
                verified = verified.new_zeros(anchors.numel()).index_copy_(0, index, verified).view(anchors.shape)
            padded = confidences.new_zeros(anchors.numel(), num_drafts)
            confidences = padded.index_copy_(0, index, confidences).view(*anchors.shape, num_drafts)

        # What was decided on the host, `(B, A)` each, in one upload.
        table = torch.zeros(4, *anchors.shape, dtype=torch.long)
        table[0] = anchors
        table[1:, is_block] = torch.stack([outcome.accepted, outcome.is_censored, outcome.is_counted])
        anchors, accepted, is_censored, is_counted = self._send(table)
        padded = drafts.new_zeros(anchors.numel(), num_drafts)
        drafts = padded.index_copy_(0, index, drafts).view(*anchors.shape, num_drafts)
        hidden, forwards_before = None, self.target.num_forwards
        if self.settings.keep_branch_hidden:
            slots = torch.arange(1, num_drafts + 1, device=anchors.device)
            is_branch = (slots > accepted[..., None] + 1) & ((anchors >= 0) & (is_censored == 0))[..., None]
            hidden = score_branches(self.target, self.reading, anchors, drafts, is_branch)
        return Rollout(
            input_ids=self.text.input_ids,
            attention_mask=self.text.attention_mask,
            completion_mask=self.text.completion_mask,
            anchors=anchors,
            drafts=drafts,
            accepted=accepted,
            is_censored=is_censored.bool(),
            is_counted=is_counted.bool(),
            branch_hidden=hidden,
            has_suffix=self.has_suffix,
            num_refused=int(self.is_refused_row.sum()),
            num_target_forwards=1 + self.target.num_forwards - forwards_before,
            verified=verified,
            confidences=confidences if self.settings.keep_confidences else None,
        )

    def _drafts(self, places: Tensor, accepted: Tensor) -> Tensor:
        """Return the drafts of blocks at `places`, `(N, K)`: decided ones, and behind them those of the suffixes."""
        num_drafts = self.settings.num_drafts
        anchors, accepted, refused, known = self._send(
            torch.stack([places, accepted, self.refused_drafts[places], self._num_known(places)])
        )
        slots = torch.arange(1, num_drafts + 1, device=anchors.device)
        # Accepted drafts equal the text, and a censored block knows no other.
        drafts = self.ids[(anchors[:, None] + slots).clamp(max=len(self.ids) - 1)]
        is_refused = (slots == known[:, None]) & (known > accepted)[:, None]
        drafts = torch.where(is_refused, refused[:, None], drafts)
        if self.suffixes is not None:
            drafts = torch.where(slots > known[:, None], self.suffixes[anchors], drafts)
        elif self.has_suffix:
            self._draft_suffixes(places, drafts)
        if self.settings.draws_drafts and self.has_suffix:
            self._check_drawn((drafts < 0).any(dim=1), places)
        return drafts

    def _confidences(self, places: Tensor, drafts: Tensor) -> Tensor:
        """Return the drafter's confidence at all slots of blocks along their drafts, `(N, K)`."""
        found = []
        for part in self._slices(torch.arange(len(places))):
            state, _ = self._begin(places[part], self._send(places[part]))
            hidden = state.block_hidden
            if hidden is None:
                hidden = self.drafter.run_along(state, drafts[self._send(part)][None, :, :-1])[1]
            found.append(read_confidences(self.drafter, hidden[0]))
        return torch.cat(found) if found else drafts.new_zeros(drafts.shape, dtype=torch.float64)

    def _count_verified(self, places: Tensor, confidences: Tensor, min_confidence: float) -> Tensor:
        """Return how many drafts of each block are verified, `(N,)`, of the confidences along its drafts."""
        accepted, known, is_cut = self._send(
            torch.stack([self.accepted[places], self._num_known(places), self.is_cut[places].long()])
        )
        num_verified = mark_verified(confidences.cumprod(dim=1), min_confidence).sum(dim=1)
        # What decided a block's fate was computed among other blocks, and may differ by round-off.
        return torch.where(is_cut.bool(), accepted, num_verified.maximum(known))

    # -- sizes --------------------------------------------------------------------------------------------------------

    def _send(self, values: Tensor) -> Tensor:
        """Copy values of the host to the device of the text, without waiting for it."""
        return values.to(self.ids.device, non_blocking=True)

    def _slices(self, values: Tensor) -> list[Tensor]:
        """Split a list of blocks into parts that are drafted one after the other."""
        tokens_at_once = self.settings.num_drafts + 1 if self.drafter.config.drafts_whole_blocks else 1
        return [part for part in values.split(max(1, TOKENS_AT_ONCE // tokens_at_once)) if len(part)]

    def _parts(self, num_rows: int) -> list[slice]:
        """Return slices of rows, as many at a time as have logits that fit the budget."""
        # Bytes of one token of the vocabulary, counted by `tests/test_replay_memory.py`.
        if not self.settings.draws_drafts:
            token_bytes = 4 * self.drafter.num_logit_buffers + (8 if self.target.scales_logits else 0)
        elif self.settings.sampling.top_p < 1:
            token_bytes = 36  # Both distributions, the second among its sorted logits and their indices.
        else:
            token_bytes = 22  # Both distributions, their difference, and its cumulative sum in float64.
        size = max(1, self.chunk_bytes // (token_bytes * self.target.vocab_size))
        return [slice(start, start + size) for start in range(0, num_rows, size)]


def slots_at_once(num_blocks: int, num_slots: int, device_type: str) -> int:
    """
    Return how many of the next `num_slots` slots of `num_blocks` blocks to judge before the host reads how many blocks
    go on; on a CPU, one: no slot behind a refusal is then turned into logits.
    """
    return 1 if device_type == "cpu" else max(1, min(num_slots, ROWS_AT_ONCE // num_blocks))


def blocks_ahead(num_walkers: int, device_type: str) -> int:
    """Return how many positions to draft from for each walker, its own included; on a CPU, that one."""
    return 1 if device_type == "cpu" else max(1, BLOCKS_AT_ONCE // num_walkers)
