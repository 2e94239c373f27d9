# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The target's responses to prompts, written once by the target itself. Knows no drafter.
"""

from collections.abc import Sequence

import torch
from rich.progress import track
from transformers import GenerationConfig

from .data import left_pad_prompts
from .target import FrozenTarget
from .verification import SamplingSettings


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
    Have the target answer prompts by plain decoding, in batches of similar length.

    Args:
        target ([`FrozenTarget`]): The target.
        prompts (`Sequence[Sequence[int]]`): Token ids, at least one each.
        max_new_tokens (`int`): Longest response.
        sampling ([`SamplingSettings`]): Temperature 0 decodes greedily.
        batch_size (`int`): Prompts decoded together.
        seed (`int`): Seeds the draws of each batch; unused at temperature 0.
        show_progress (`bool`): Whether to draw a progress bar.

    Returns:
        `list[list[int]]`: response ids in the order of the prompts, the end-of-sequence id included where one was written.

    Raises:
        ValueError: If a prompt is empty.
    """
    empty = [row for row, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty:
        raise ValueError(f"Prompts must hold at least one token; rows {empty[:10]} are empty. Drop them.")
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    responses: list[list[int]] = [[] for _ in prompts]
    for number, rows in enumerate(track(batches, description="Target responses", disable=not show_progress)):
        # Global state, because `generate` takes no generator; forked so that training draws stay untouched.
        with torch.random.fork_rng(enabled=not sampling.is_greedy):
            if not sampling.is_greedy:
                torch.manual_seed(seed + number)
            answers = _generate_batch(target, [prompts[row] for row in rows], max_new_tokens, sampling)
        for row, answer in zip(rows, answers, strict=True):
            responses[row] = answer
    return responses


def _generate_batch(
    target: FrozenTarget, prompts: list[Sequence[int]], max_new_tokens: int, sampling: SamplingSettings
) -> list[list[int]]:
    """Decode one left-padded batch with `generate` and cut each row behind its end of sequence."""
    input_ids, mask = left_pad_prompts(prompts, target.pad_token_id, target.device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=target.eos_token_ids or None,
        pad_token_id=target.pad_token_id,
        do_sample=not sampling.is_greedy,
    )
    if not sampling.is_greedy:
        config.update(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    own_config = target.causal_lm.generation_config
    # `generate` fills what is unset from the model's own config: a repetition penalty there is not part of the law.
    target.causal_lm.generation_config = config
    try:
        output = target.causal_lm.generate(input_ids=input_ids, attention_mask=mask)
    finally:
        target.causal_lm.generation_config = own_config
    eos = set(target.eos_token_ids)
    answers = []
    for row in output[:, input_ids.shape[1] :].tolist():
        end = next((index + 1 for index, token in enumerate(row) if token in eos), len(row))
        answers.append(row[:end])
    return answers
