# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Live rollout: the pair decodes together. One forward of the target per round verifies a block of every unfinished row.

Rejected drafts stay in the target's cache as masked slots until a compaction drops them; in the drafter's context,
which is indexed by position, they are overwritten. Knows nothing of losses or trainers.

Shape letters:  B = unfinished rows, P = longest prompt, K = drafts per block, C = cached slots, V = vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from ..drafters.base import DraftContext, Drafter
from ..target.frozen import FrozenTarget
from ..target.lengths import Lengths, check_lengths
from ..target.reading import TargetReading
from .acceptance import choose_tokens, settle_blocks, token_probs, verify_greedy, verify_sampled
from .drafting import DraftedBlocks, DraftingSettings, draft_blocks, mark_verified
from .keyed_random import LIVE_ACCEPT, LIVE_DRAFT, LIVE_TOKEN, DrawKeys
from .types import Rollout


class _Round(NamedTuple):
    """One block of every unfinished row: their numbers, `(B,)`, and their blocks as in [`Rollout`]."""

    rows: torch.Tensor
    anchors: torch.Tensor
    drafts: torch.Tensor
    accepted: torch.Tensor
    branch_hidden: torch.Tensor | None
    verified: torch.Tensor | None
    confidences: torch.Tensor | None


@torch.no_grad()
def rollout_live(
    target: FrozenTarget,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    settings: DraftingSettings,
    keys: DrawKeys,
    *,
    max_completion_length: int,
    eos_token_ids: Sequence[int],
    on_finished: Callable[[int], object] | None = None,
) -> Rollout:
    """
    Decode a batch of prompts speculatively until every row ends.

    The text is the target's own: its greedy continuation at temperature 0, a draw from its distribution otherwise,
    whatever the drafter is. Source: Leviathan et al., [Fast Inference from Transformers via Speculative
    Decoding](https://huggingface.co/papers/2211.17192), section 2.3. A row decodes the same alone, in any batch and on
    any rank, up to ties that rounding breaks. `on_finished` is called with the number of rows that ended since the
    last call; without EOS ids every row is decoded to the limit.
    """
    _check(target, drafter, prompts, settings.num_drafts, max_completion_length)
    settings.check_drafter(drafter)
    keys.check_rows(len(prompts))
    with drafter.evaluating():
        batch = _LiveBatch(target, drafter, prompts, settings, keys, max_completion_length, eos_token_ids)
        num_open = len(prompts)
        while True:
            if on_finished is not None and len(batch.active) < num_open:
                on_finished(num_open - len(batch.active))
            num_open = len(batch.active)
            if not num_open:
                return batch.finish()
            batch.run_round()


def _check(
    target: FrozenTarget,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    num_drafts: int,
    max_completion_length: int,
) -> None:
    target.require_rollback()
    empty = [row for row, prompt in enumerate(prompts) if len(prompt) == 0]
    if not len(prompts) or empty:
        raise ValueError(
            f"Every prompt needs at least one token; {len(prompts)} prompts given, empty rows: {empty[:10]}."
        )
    if num_drafts < 1 or max_completion_length < 1:
        raise ValueError(
            f"`num_drafts` and `max_completion_length` must be at least 1, got {num_drafts} and "
            f"{max_completion_length}."
        )
    if drafter.max_drafts is not None and num_drafts > drafter.max_drafts:
        raise ValueError(
            f"`num_drafts` {num_drafts} exceeds the {drafter.max_drafts} drafts this drafter's blocks hold. Lower it, "
            "or train a drafter with a larger `block_size`."
        )
    longest = Lengths(max(len(prompt) for prompt in prompts), max_completion_length)
    check_lengths(target.num_positions, longest, num_drafts)


class _LiveBatch:
    """State of one batch. Lists cover all prompts; tensors cover the unfinished rows only, named by `self.active`."""

    def __init__(
        self,
        target: FrozenTarget,
        drafter: Drafter,
        prompts: Sequence[Sequence[int]],
        settings: DraftingSettings,
        keys: DrawKeys,
        max_completion_length: int,
        eos_token_ids: Sequence[int],
    ):
        self.target, self.drafter, self.settings, self.keys = target, drafter, settings, keys
        self.max_completion_length = max_completion_length
        self.layer_ids = drafter.config.target_layer_ids
        self.device = target.device
        self.slots = torch.arange(1, settings.num_drafts + 1, device=self.device)
        self.eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=self.device)
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.rounds: list[_Round] = []
        self.texts: dict[int, torch.Tensor] = {}
        self.active = list(range(len(prompts)))
        self.num_target_forwards = 0
        self._prefill(prompts)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the left-padded prompts, commit the first token of each and encode the drafter's context."""
        K = self.settings.num_drafts
        lengths = torch.tensor(self.prompt_lengths, device=self.device)
        right = pad_sequence([torch.tensor(list(p), dtype=torch.long) for p in prompts], batch_first=True).to(
            self.device
        )
        width = right.shape[1]
        shift = (width - lengths)[:, None]
        index = torch.arange(width, device=self.device)[None]
        is_token = index >= shift
        left = right.gather(1, (index - shift).clamp(min=0))
        self.cache = DynamicCache(config=self.target.config)
        self.cache_mask = is_token.long()
        reading = self._step(left, (index - shift).clamp(min=0))
        logits, sampling = self.target.project(reading.last_hidden[:, -1]), self.settings.sampling
        if sampling.is_greedy:
            first = logits.argmax(dim=-1)
        else:
            # As if the prompt's last token were an anchor without drafts.
            first = choose_tokens(token_probs(logits, sampling), self._uniforms(lengths - 1, 0, LIVE_TOKEN))
        capacity = width + self.max_completion_length + K + 1
        self.text = right.new_zeros(len(prompts), capacity)
        self.text[:, :width] = right
        self.text.scatter_(1, lengths[:, None], first[:, None])
        self.limit = lengths + self.max_completion_length
        self.length = lengths + 1
        # From left padding to positions: entry p of a row lies `shift` slots to the right.
        source = (index + shift).clamp(max=width - 1)
        features = reading.features.gather(1, source[..., None].expand_as(reading.features))
        self.context = self._encode(features, torch.arange(width, device=self.device).expand(len(prompts), -1))
        self.context = self.context.extended(capacity)
        self._retire(torch.isin(first, self.eos) | (self.length >= self.limit))

    def _encode(self, features: torch.Tensor, position_ids: torch.Tensor) -> DraftContext:
        next_ids = self.text.gather(1, position_ids + 1)
        features = features.to(self.drafter.device)
        return self.drafter.encode_context(features, next_ids, position_ids, self.target.embed)

    def run_round(self) -> None:
        """Draft a block for every unfinished row, verify all of them in one target forward, and commit."""
        anchors = self.length - 1
        drafted = self._draft(anchors)
        drafts, draft_probs, num_verified = drafted.ids, drafted.probs, self._count_verified(drafted)
        if num_verified is not None:
            # As many as the longest block of the batch: what is not verified is not read.
            longest = int(num_verified.max())
            drafts, draft_probs = drafts[:, :longest], None if draft_probs is None else draft_probs[:, :longest]
        block = torch.cat([self.text.gather(1, anchors[:, None]), drafts], dim=1)
        positions = anchors[:, None] + torch.arange(block.shape[1], device=self.device)
        self.cache_mask = torch.cat([self.cache_mask, torch.ones_like(block)], dim=1)
        reading = self._step(block, positions)
        logits = self.target.project(reading.last_hidden)
        accepted, next_tokens = self._verify(anchors, drafts, draft_probs, logits, num_verified)
        # A clone, so that the state behind the last draft is not kept alive.
        hidden = reading.last_hidden[:, :-1].clone() if self.settings.keep_branch_hidden else None
        rows = torch.tensor(self.active, device=self.device)
        confidences = drafted.confidences if self.settings.keep_confidences else None
        self.rounds.append(_Round(rows, anchors, drafted.ids, accepted, hidden, num_verified, confidences))
        self._commit(anchors, drafts, accepted, next_tokens, reading.features, positions)

    def _draft(self, anchors: torch.Tensor) -> DraftedBlocks:
        """Return a block of drafts per row, `(B, K)`, and what else is known of it."""
        uniforms = None
        if self.settings.draws_drafts:
            uniforms = self._uniforms(anchors, self.slots, LIVE_DRAFT)[:, None]
        context = self.context.prefix(int(anchors.max()))
        tokens = self.text.gather(1, anchors[:, None])
        drafted = draft_blocks(self.target, self.drafter, context, anchors[:, None], tokens, self.settings, uniforms)
        probs, confidences = (None if each is None else each[:, 0] for each in drafted[1:])
        return DraftedBlocks(drafted.ids[:, 0], probs, confidences)

    def _count_verified(self, drafted: DraftedBlocks) -> torch.Tensor | None:
        """Return how many drafts of each row are verified, `(B,)`; `None` where all are."""
        if self.settings.min_confidence is None:
            return None
        assert drafted.confidences is not None, "read where they are needed"
        return mark_verified(drafted.confidences.cumprod(dim=-1), self.settings.min_confidence).sum(dim=-1)

    def _verify(
        self,
        anchors: torch.Tensor,
        drafts: torch.Tensor,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        num_verified: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return accepted drafts and the bonus or correction token of every row."""
        if self.settings.sampling.is_greedy:
            return verify_greedy(drafts, logits.argmax(dim=-1), num_verified)
        target_probs = token_probs(logits, self.settings.sampling)
        accept_uniforms = self._uniforms(anchors, self.slots[: drafts.shape[1]], LIVE_ACCEPT)
        next_uniforms = self._uniforms(anchors, 0, LIVE_TOKEN)
        return verify_sampled(drafts, draft_probs, target_probs, accept_uniforms, next_uniforms, num_verified)

    def _commit(
        self,
        anchors: torch.Tensor,
        drafts: torch.Tensor,
        accepted: torch.Tensor,
        next_tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Write accepted drafts and the next token, roll both caches back to them, and retire rows that ended."""
        K = drafts.shape[1]
        slots = torch.arange(K + 1, device=self.device)
        candidates = torch.cat([drafts, next_tokens[:, None]], dim=1).scatter(
            1, accepted[:, None], next_tokens[:, None]
        )
        self.text.scatter_(1, positions + 1, candidates)
        is_committed = slots <= accepted[:, None]
        is_eos = torch.isin(candidates, self.eos) & is_committed
        first_eos = torch.where(is_eos, slots, K + 1).amin(dim=1)
        self.length = torch.minimum(anchors + 2 + torch.minimum(accepted, first_eos), self.limit)
        # The anchor and the accepted drafts are text; every other new slot of the cache is masked out.
        self.cache_mask[:, -(K + 1) :] = is_committed.long()
        self.context.write(self._encode(features, positions), positions)
        self._retire((first_eos <= accepted) | (self.length >= self.limit))

    @property
    def _layers(self) -> list[Any]:
        return self.cache.layers

    def _step(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> TargetReading:
        self.num_target_forwards += 1
        return self.target.step(input_ids, self.cache_mask, position_ids, self.cache, self.layer_ids)

    def _uniforms(self, anchors: torch.Tensor, slots: int | torch.Tensor, purpose: int) -> torch.Tensor:
        return self.keys.uniforms(self.active, anchors, slots, purpose)

    def _retire(self, ended: torch.Tensor) -> None:
        """Take finished rows out of the batch, and drop masked slots when they outgrow the live ones."""
        if ended.any():
            for index in ended.nonzero()[:, 0].tolist():
                self.texts[self.active[index]] = self.text[index, : int(self.length[index])].clone()
            keep = (~ended).nonzero()[:, 0]
            self.active = [self.active[index] for index in keep.tolist()]
            if not self.active:
                return
            self.text, self.length, self.limit = self.text[keep], self.length[keep], self.limit[keep]
            self.context = self.context.rows(keep)
            for layer in self._layers:
                layer.batch_select_indices(keep.to(layer.keys.device))
            self.cache_mask = self.cache_mask[keep]
        live = int(self.cache_mask.sum(dim=1).max())
        # A quarter of waste costs less attention than a copy of the cache in every round.
        if self.cache_mask.shape[1] > 1.25 * live + 4 * (self.settings.num_drafts + 1):
            self._compact(live)

    def _compact(self, live: int) -> None:
        """Move every row's live slots together, keeping their order, and drop the rest of the cache."""
        order = self.cache_mask.argsort(dim=1, stable=True)[:, -live:]
        self.cache_mask = self.cache_mask.gather(1, order)
        for layer in self._layers:
            index = order.to(layer.keys.device)[:, None, :, None].expand(
                -1, layer.keys.shape[1], -1, layer.keys.shape[3]
            )
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)

    def finish(self) -> Rollout:
        """Pad texts and blocks of all rows and apply the rules for blocks at the end of a text."""
        texts = [self.texts[row] for row in range(len(self.prompt_lengths))]
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        input_ids = pad_sequence(texts, batch_first=True, padding_value=self.target.pad_token_id)
        index = torch.arange(input_ids.shape[1], device=self.device)
        mask = (index < lengths[:, None]).long()
        K, hidden, verified, confidences = self.settings.num_drafts, None, None, None
        anchors = input_ids.new_full((len(input_ids), max(1, len(self.rounds))), -1)
        raw_accepted = torch.zeros_like(anchors)
        drafts = input_ids.new_zeros(*anchors.shape, K)
        if self.settings.keep_branch_hidden:
            shape = (*anchors.shape, K, self.target.config.hidden_size)
            hidden = torch.zeros(shape, dtype=self.target.causal_lm.dtype, device=self.device)
        if self.settings.min_confidence is not None:
            verified = torch.zeros_like(anchors)
        if self.settings.keep_confidences:
            confidences = torch.zeros(drafts.shape, dtype=torch.float64, device=self.device)
        # A row has a block in every round until it ends, so rounds and blocks have the same numbers.
        for number, block in enumerate(self.rounds):
            anchors[block.rows, number], raw_accepted[block.rows, number] = block.anchors, block.accepted
            drafts[block.rows, number] = block.drafts
            if hidden is not None and block.branch_hidden is not None:
                hidden[block.rows, number] = block.branch_hidden.to(hidden)
            if verified is not None and block.verified is not None:
                verified[block.rows, number] = block.verified
            if confidences is not None and block.confidences is not None:
                confidences[block.rows, number] = block.confidences
        outcome = settle_blocks(raw_accepted, anchors, (lengths - 1)[:, None], K)
        is_block = anchors >= 0
        return Rollout(
            input_ids=input_ids,
            attention_mask=mask,
            completion_mask=mask.bool() & (index >= torch.tensor(self.prompt_lengths, device=self.device)[:, None]),
            anchors=anchors,
            drafts=drafts,
            accepted=outcome.accepted * is_block,
            is_censored=outcome.is_censored & is_block,
            is_counted=outcome.is_counted & is_block,
            branch_hidden=hidden,
            has_suffix=True,
            num_refused=0,
            num_target_forwards=self.num_target_forwards,
            verified=verified,
            confidences=confidences,
        )
