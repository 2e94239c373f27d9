# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Text that the target wrote, in padded rows. Data only.

Shape letters:  B = sequences, L = text length
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


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


def join_responses(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    sample_ids: Sequence[int],
    pad_token_id: int,
    device: torch.device,
) -> TargetText:
    """Return prompts and their responses as right-padded text on `device`."""
    rows = [
        (torch.tensor([*prompt, *response]), torch.arange(len(prompt) + len(response)) >= len(prompt), sample_id)
        for prompt, response, sample_id in zip(prompts, responses, sample_ids, strict=True)
    ]
    return pad_rows(rows, pad_token_id, device)


def pad_rows(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor, int]], pad_token_id: int, device: torch.device
) -> TargetText:
    """Pad rows of ids, marks and a sample id on the right."""
    ids = [row[0] for row in rows]
    attention = [torch.ones_like(row) for row in ids]
    return TargetText(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad_token_id).to(device),
        attention_mask=pad_sequence(attention, batch_first=True).to(device),
        completion_mask=pad_sequence([row[1] for row in rows], batch_first=True).to(device),
        sample_ids=[row[2] for row in rows],
    )
