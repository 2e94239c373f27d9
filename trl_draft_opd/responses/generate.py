# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The target's responses by transformers' own `generate`, in batches of similar length. Knows no drafter and no server.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..data.collators import left_pad_prompts
from ..rollout.acceptance import SamplingSettings, choose_tokens, token_probs
from ..rollout.keyed_random import PLAIN_TOKEN, DrawKeys
from ..target.checks import naming_rows
from ..target.frozen import FrozenTarget
from ..target.lengths import Lengths, check_lengths
from .audit import read_texts, score_responses
from .progress import ResponseProgress, keeping_responses, showing_progress
from .shards import StoredResponse, prompt_key
from .store import ResponseStore


@torch.no_grad()
def generate_responses(
    target: FrozenTarget,
    prompts: Sequence[Sequence[int]],
    *,
    max_completion_length: int,
    sampling: SamplingSettings,
    batch_size: int,
    seed: int,
    show_progress: bool,
) -> list[list[int]]:
    """
    Have the target respond to prompts by plain decoding, in batches of similar length, and keep nothing on disk.

    Args:
        target ([`FrozenTarget`]): The target.
        prompts (`Sequence[Sequence[int]]`): Token ids, at least one each.
        max_completion_length (`int`): Longest response.
        sampling ([`SamplingSettings`]): Temperature 0 decodes greedily.
        batch_size (`int`): Prompts decoded together.
        seed (`int`):
            The draws of a response depend on it and on the prompt's place among `prompts`, not on the batch; unused at
            temperature 0.
        show_progress (`bool`): Whether to show on stderr how far it has come.

    Returns:
        `list[list[int]]`: response ids in the order of the prompts, the end-of-sequence id included where one was
        written.

    Raises:
        ValueError: If a prompt is empty, or leaves no room for a response in the target's positions.
    """
    empty = [row for row, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"Prompts must hold at least one token; rows {empty[:10]} are empty. Drop them.")
    if not prompts:
        return []
    check_lengths(target.num_positions, Lengths(max(map(len, prompts)), max_completion_length), num_drafts=0)
    responses: list[list[int]] = [[] for _ in prompts]
    keys = DrawKeys(seed, 0, range(len(prompts)))
    for rows, written in _decode(target, prompts, max_completion_length, sampling, keys, batch_size, show_progress):
        for row, response in zip(rows, written, strict=True):
            responses[row] = response
    return responses


@torch.no_grad()
def generate_missing(
    store: ResponseStore,
    target: FrozenTarget,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    seed: int,
    shard_size: int,
    show_progress: bool,
) -> int:
    """
    Have the target respond to the prompts that the store has no response for, under the store's distribution.

    Draws depend on the seed and the prompt alone, so neither the batch, the rank nor a resumption changes them.
    Sampled responses come with their log-probabilities, from one forward pass per batch; greedy ones would have 0.

    Returns:
        `int`: responses written.

    Raises:
        ValueError: If a prompt is empty or leaves no room for a response in the target's positions.
        NotFiniteError: If the target reads the first batch as NaN, whose argmax is a token, too.
    """
    missing = store.missing(prompts)
    if not missing:
        return 0
    target.require_body(f"Writing {len(missing)} responses that are not stored")
    origin, sampling = store.origin, store.origin.sampling
    first = _by_length(missing)[:batch_size]
    with naming_rows(first, "the prompts without a response"):
        read_texts(target, [missing[row] for row in first])
    keys = DrawKeys(seed, 0, [int(prompt_key(prompt)[:15], 16) for prompt in missing])

    def responses() -> Iterator[StoredResponse]:
        batches = _decode(target, missing, origin.max_completion_length, sampling, keys, batch_size, show_progress)
        for rows, written in batches:
            logprobs: list[list[float] | None] = [None] * len(rows)
            if not sampling.is_greedy:
                texts = [(missing[row], response) for row, response in zip(rows, written, strict=True)]
                for index, scores in score_responses(target, texts, sampling):
                    # Decoding and scoring round differently: a token at the edge of a filter may fall outside now.
                    if scores.logprobs.isfinite().all():
                        logprobs[index] = scores.logprobs.clamp(max=0).tolist()
            for row, response, values in zip(rows, written, logprobs, strict=True):
                yield StoredResponse(missing[row], response, values, origin.finish_reason(response))

    provenance = {
        "engine": "transformers",
        "engine_version": transformers.__version__,
        "dtype": str(target.causal_lm.dtype).removeprefix("torch."),
        "seed": seed,
        "logprobs": None if sampling.is_greedy else "distribution",
    }
    with keeping_responses(store, len(missing)):
        return store.add_in_shards(responses(), shard_size=shard_size, provenance=provenance)


def _by_length(prompts: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(prompts)), key=lambda row: len(prompts[row]))


def _decode(
    target: FrozenTarget,
    prompts: Sequence[Sequence[int]],
    max_completion_length: int,
    sampling: SamplingSettings,
    keys: DrawKeys,
    batch_size: int,
    show_progress: bool,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield the rows of each batch of prompts of similar length, and the responses to them."""
    order = _by_length(prompts)
    with showing_progress(len(prompts), is_shown=show_progress) as progress:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            keys_of_rows = DrawKeys(keys.seed, keys.epoch, [keys.sample_ids[row] for row in rows])
            batch = [prompts[row] for row in rows]
            written = _decode_batch(target, batch, max_completion_length, sampling, keys_of_rows, progress)
            progress.add(len(rows), sum(map(len, written)))
            yield rows, written


def _decode_batch(
    target: FrozenTarget,
    prompts: Sequence[Sequence[int]],
    max_completion_length: int,
    sampling: SamplingSettings,
    keys: DrawKeys,
    progress: ResponseProgress,
) -> list[list[int]]:
    """Decode one left-padded batch with `generate` and cut each row after its end of sequence."""
    input_ids, mask = left_pad_prompts(prompts, target.pad_token_id, target.device)
    # Of any type, because transformers' own annotation of `generate` fits no model class.
    model: Any = target.causal_lm
    # `generate` draws from one global state for the whole batch, so it is handed rows whose argmax is drawn already.
    draw = LogitsProcessorList([] if sampling.is_greedy else [_KeyedDraw(sampling, keys, input_ids.shape[1])])
    draw.append(_Tick(progress, input_ids.shape[1], target.eos_token_ids))
    own_config = model.generation_config
    # `generate` fills what is unset from the model's own config: a repetition penalty there is not part of the
    # distribution.
    model.generation_config = GenerationConfig(
        max_new_tokens=max_completion_length,
        eos_token_id=target.eos_token_ids or None,
        pad_token_id=target.pad_token_id,
        do_sample=False,
    )
    try:
        # Ranks read different prompts; a sharded target keeps them in step itself, a whole one needs none of it.
        output = model.generate(input_ids=input_ids, attention_mask=mask, logits_processor=draw, synced_gpus=False)
    finally:
        model.generation_config = own_config
    eos, responses = set(target.eos_token_ids), []
    for row in output[:, input_ids.shape[1] :].tolist():
        end = next((index + 1 for index, token in enumerate(row) if token in eos), len(row))
        responses.append(row[:end])
    return responses


class _KeyedDraw(LogitsProcessor):
    """
    Draws each row's next token by its own key and leaves that one possible; prompts are `width` tokens wide, padding
    included.
    """

    def __init__(self, sampling: SamplingSettings, keys: DrawKeys, width: int) -> None:
        self.sampling, self.keys, self.width = sampling, keys, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        steps = input_ids.new_full((len(scores),), input_ids.shape[1] - self.width)
        uniforms = self.keys.uniforms(range(len(scores)), steps, 0, PLAIN_TOKEN)
        tokens = choose_tokens(token_probs(scores, self.sampling), uniforms)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


class _Tick(LogitsProcessor):
    """Changes nothing: reports between two tokens that a batch is under way, which may take minutes."""

    def __init__(self, progress: ResponseProgress, width: int, eos_token_ids: Sequence[int]) -> None:
        self.progress, self.width, self.eos_token_ids = progress, width, list(eos_token_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.progress.tick(lambda: self._count(input_ids[:, self.width :]))
        return scores

    def _count(self, written: torch.Tensor) -> int:
        is_end = torch.isin(written, written.new_tensor(self.eos_token_ids)).long()
        # Padding follows a row's end of sequence.
        return int((is_end.cumsum(dim=1) - is_end == 0).sum())
