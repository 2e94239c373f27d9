# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The target's responses by transformers' own `generate`, in batches of similar length. Knows no drafter and no server.
"""

from collections.abc import Iterator, Sequence

import torch
import transformers
from rich.progress import Progress
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..data.collators import left_pad_prompts
from ..rollout.acceptance import SamplingSettings, choose_tokens, token_probs
from ..rollout.keyed_random import PLAIN_TOKEN, DrawKeys
from ..target.checks import naming_rows
from ..target.frozen import FrozenTarget
from .audit import score_responses
from .shards import StoredResponse, prompt_key
from .store import ResponseStore, ShardBuffer


@torch.no_grad()
def generate_responses(
    target: FrozenTarget,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
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
        max_new_tokens (`int`): Longest response.
        sampling ([`SamplingSettings`]): Temperature 0 decodes greedily.
        batch_size (`int`): Prompts decoded together.
        seed (`int`):
            The draws of a response depend on it and on the prompt's place among `prompts`, not on the batch; unused at
            temperature 0.
        show_progress (`bool`): Whether to draw a progress bar.

    Returns:
        `list[list[int]]`: response ids in the order of the prompts, the end-of-sequence id included where one was
        written.

    Raises:
        ValueError: If a prompt is empty.
    """
    empty = [row for row, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"Prompts must hold at least one token; rows {empty[:10]} are empty. Drop them.")
    responses: list[list[int]] = [[] for _ in prompts]
    with Progress(disable=not show_progress) as progress:
        task = progress.add_task("Target responses", total=len(prompts))
        for rows in _batches(prompts, batch_size):
            batch = [prompts[row] for row in rows]
            written = _generate_batch(target, batch, max_new_tokens, sampling, DrawKeys(seed, 0, rows))
            for row, response in zip(rows, written, strict=True):
                responses[row] = response
            progress.advance(task, len(rows))
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

    Every `shard_size` responses are written at once, so a killed process loses at most as many, and the next one goes
    on from there. Sampled responses come with their tokens' log-probabilities under the distribution, from one forward
    pass per batch; greedy ones have none: under a greedy distribution they are 0.

    Args:
        store ([`ResponseStore`]): Where responses go; its origin names distribution and longest response.
        target ([`FrozenTarget`]): The target of that origin.
        prompts (`Sequence[Sequence[int]]`): Token ids, at least one each. Repeated prompts get one response.
        batch_size (`int`): Prompts decoded together.
        seed (`int`):
            The draws of a response depend only on it and on the prompt, so neither the batch, the rank nor a
            resumption changes them; unused at temperature 0.
        shard_size (`int`): Responses per shard.
        show_progress (`bool`): Whether to draw a progress bar.

    Returns:
        `int`: responses written.

    Raises:
        ValueError: If a prompt is empty or leaves no room for a response in the target's positions.
        NotFiniteError: If the target reads the first batch as NaN, whose argmax is a token, too.
    """
    missing = store.missing(prompts)
    if not missing:
        return 0
    origin = store.origin
    provenance = {
        "engine": "transformers",
        "engine_version": transformers.__version__,
        "dtype": str(target.causal_lm.dtype).removeprefix("torch."),
        "seed": seed,
        "logprobs": None if origin.sampling.is_greedy else "distribution",
    }
    with (
        ShardBuffer(store, shard_size=shard_size, provenance=provenance) as buffer,
        Progress(disable=not show_progress) as progress,
    ):
        task = progress.add_task("Target responses", total=len(missing))
        for number, rows in enumerate(_batches(missing, batch_size)):
            batch = [missing[row] for row in rows]
            if number == 0:
                with naming_rows(rows, "the prompts without a response"):
                    _read(target, batch)
            # By prompt and not by number: a resumed run draws as the uninterrupted one.
            keys = DrawKeys(seed, 0, [int(prompt_key(prompt)[:15], 16) for prompt in batch])
            responses = _generate_batch(target, batch, origin.max_new_tokens, origin.sampling, keys)
            buffer.add(_as_stored(target, batch, responses, origin.sampling))
            progress.advance(task, len(rows))
    return buffer.num_written


def _batches(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Group rows of similar length."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _read(target: FrozenTarget, prompts: list[Sequence[int]]) -> None:
    """Read prompts for the sake of the check in [`FrozenTarget.read_text`]."""
    ids = [torch.tensor(prompt, device=target.device) for prompt in prompts]
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    target.read_text(pad_sequence(ids, batch_first=True, padding_value=target.pad_token_id), mask, ())


def _as_stored(
    target: FrozenTarget, prompts: list[list[int]], responses: list[list[int]], sampling: SamplingSettings
) -> list[StoredResponse]:
    logprobs: list[list[float] | None] = [None] * len(responses)
    if not sampling.is_greedy:
        for row, scores in score_responses(target, list(zip(prompts, responses, strict=True)), sampling):
            # Decoding and scoring round differently: a token at the edge of a filter may fall outside now.
            if scores.logprobs.isfinite().all():
                logprobs[row] = scores.logprobs.clamp(max=0).tolist()
    eos = set(target.eos_token_ids)
    return [
        StoredResponse(list(prompt), response, values, "stop" if response[-1] in eos else "length")
        for prompt, response, values in zip(prompts, responses, logprobs, strict=True)
    ]


def _generate_batch(
    target: FrozenTarget,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingSettings,
    keys: DrawKeys,
) -> list[list[int]]:
    """Decode one left-padded batch with `generate` and cut each row after its end of sequence."""
    input_ids, mask = left_pad_prompts(prompts, target.pad_token_id, target.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=target.eos_token_ids or None,
        pad_token_id=target.pad_token_id,
        do_sample=False,
    )
    # `generate` draws from one global state for the whole batch, so it is handed rows whose argmax is drawn already.
    draw = LogitsProcessorList([] if sampling.is_greedy else [_KeyedDraw(sampling, keys, input_ids.shape[1])])
    own_config = target.causal_lm.generation_config
    # `generate` fills what is unset from the model's own config: a repetition penalty there is not part of the
    # distribution.
    target.causal_lm.generation_config = config
    try:
        # Ranks read different prompts; a sharded target keeps them in step itself, a whole one needs none of it.
        output = target.causal_lm.generate(
            input_ids=input_ids, attention_mask=mask, logits_processor=draw, synced_gpus=False
        )
    finally:
        target.causal_lm.generation_config = own_config
    eos = set(target.eos_token_ids)
    responses = []
    for row in output[:, input_ids.shape[1] :].tolist():
        end = next((index + 1 for index, token in enumerate(row) if token in eos), len(row))
        responses.append(row[:end])
    return responses


class _KeyedDraw(LogitsProcessor):
    """
    Draws each row's next token by its own key and leaves that one possible; prompts are `width` tokens wide, padding
    included.
    """

    def __init__(self, sampling: SamplingSettings, keys: DrawKeys, width: int):
        self.sampling, self.keys, self.width = sampling, keys, width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        steps = input_ids.new_full((len(scores),), input_ids.shape[1] - self.width)
        uniforms = self.keys.uniforms(range(len(scores)), steps, 0, PLAIN_TOKEN)
        tokens = choose_tokens(token_probs(scores, self.sampling), uniforms)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)
