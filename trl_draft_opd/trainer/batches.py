# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The micro-batches of one optimiser step as text: prompts joined to responses, rows regrouped by length. Pure tensors.

Shape letters:  B = sequences, L = text length
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from ..rollout.replay import TargetText
from ..rollout.types import Rollout, response_ends


def text_of(batch: dict[str, torch.Tensor]) -> TargetText:
    """Return a batch of [`TextCollator`] as text."""
    return TargetText(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], batch["sample_ids"].tolist()
    )


def text_of_rollout(rollout: Rollout, sample_ids: Sequence[int]) -> TargetText:
    """Return the text of a rollout."""
    return TargetText(rollout.input_ids, rollout.attention_mask, rollout.completion_mask, sample_ids)


def prompt_rows(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """Return the prompts of a batch of [`PromptCollator`], without padding."""
    lengths = batch["prompt_mask"].sum(dim=1).tolist()
    return [row[:length] for row, length in zip(batch["prompt_ids"].tolist(), lengths, strict=True)]


def join_responses(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    sample_ids: Sequence[int],
    pad_token_id: int,
    device: torch.device,
) -> TargetText:
    """Return prompts and their responses as right-padded text on `device`."""
    rows = [
        (torch.tensor([*prompt, *response]), torch.arange(len(prompt) + len(response)) >= len(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return _pad_rows(rows, sample_ids, pad_token_id, device)


def response_pairs(text: TargetText) -> list[tuple[list[int], list[int]]]:
    """Return every response of a text with all that stands before it, as token ids."""
    pairs = []
    ends = response_ends(text.completion_mask)
    is_start = text.completion_mask.clone()
    is_start[:, 1:] &= ~text.completion_mask[:, :-1]
    for row, start in is_start.nonzero().tolist():
        ids = text.input_ids[row, : int(ends[row, start]) + 1].tolist()
        pairs.append((ids[:start], ids[start:]))
    return pairs


def regroup_by_length(texts: Sequence[TargetText], pad_token_id: int) -> list[TargetText]:
    """
    Deal the rows of an optimiser step's micro-batches out again, rows of similar length together.

    The update is a sum over all rows of the step, so only the padding changes.

    Args:
        texts (`Sequence[TargetText]`): Micro-batches.
        pad_token_id (`int`): Id to pad with.

    Returns:
        `list[TargetText]`: as many micro-batches of as many rows.
    """
    if len(texts) < 2:
        return list(texts)
    rows, sample_ids = [], []
    for text in texts:
        for index, length in enumerate(text.attention_mask.sum(dim=1).tolist()):
            rows.append((text.input_ids[index, :length], text.completion_mask[index, :length]))
            sample_ids.append(text.sample_ids[index])
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    regrouped, start = [], 0
    for text in texts:
        part = order[start : start + len(text.input_ids)]
        start += len(part)
        device = text.input_ids.device
        regrouped.append(
            _pad_rows([rows[row] for row in part], [sample_ids[row] for row in part], pad_token_id, device)
        )
    return regrouped


def _pad_rows(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    sample_ids: Sequence[int],
    pad_token_id: int,
    device: torch.device,
) -> TargetText:
    """Pad ids and marks of each row on the right."""
    ids, marks = zip(*rows, strict=True)
    attention = [torch.ones_like(row) for row in ids]
    return TargetText(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad_token_id).to(device),
        attention_mask=pad_sequence(attention, batch_first=True).to(device),
        completion_mask=pad_sequence(marks, batch_first=True).to(device),
        sample_ids=list(sample_ids),
    )
