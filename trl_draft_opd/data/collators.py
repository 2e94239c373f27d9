# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Rows of token ids to padded batches. Knows no tokenizer and no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


def _pad(sequences: Sequence[Sequence[int]], pad_token_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the padded sequences and their mask. It follows lengths, so the pad id may be a token of the text."""
    ids = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_token_id, padding_side=side)
    return padded, pad_sequence([torch.ones_like(i) for i in ids], batch_first=True, padding_side=side)


def left_pad_prompts(
    prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left, as `generate` reads them; return `input_ids` and `attention_mask`, `(B, P)` each."""
    input_ids, attention_mask = _pad(prompts, pad_token_id, "left")
    return input_ids.to(device), attention_mask.to(device)


@dataclass(frozen=True)
class RowCollator:
    """
    Pad rows of [`TextReader`], prompts or whole texts, on the right.

    Returns `input_ids`, `attention_mask` (`torch.LongTensor` of shape `(B, L)`), `sample_ids` (`torch.LongTensor` of
    shape `(B,)`), and of texts `completion_mask` (`torch.BoolTensor` of shape `(B, L)`).
    """

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        column = "input_ids" if "input_ids" in rows[0] else "prompt_ids"
        input_ids, attention_mask = _pad([row[column] for row in rows], self.pad_token_id, "right")
        sample_ids = torch.tensor([row["sample_id"] for row in rows], dtype=torch.long)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "sample_ids": sample_ids}
        if column == "input_ids":
            marks, _ = _pad([row["completion_mask"] for row in rows], 0, "right")
            batch["completion_mask"] = marks.bool()
        return batch
