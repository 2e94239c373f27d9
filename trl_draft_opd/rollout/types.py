# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a rollout hands on: the text, and every block that was drafted along it. Data only.

Shape letters:  B = sequences, L = text length, A = blocks per sequence, K = drafts per block, H = the target's hidden size
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rollout:
    """
    Committed text and the chain of blocks drafted along it, from either rollout engine.

    All positions are indices into right-padded rows, prompt included.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(B, L)`): Prompt and response, right-padded.
        attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for text, 0 for padding.
        prompt_lengths (`torch.LongTensor` of shape `(B,)`): Tokens of each prompt; the response starts there.
        lengths (`torch.LongTensor` of shape `(B,)`): Tokens of each row; its last token is at `lengths - 1`.
        anchors (`torch.LongTensor` of shape `(B, A)`): Anchor of each block; -1 where a row has fewer blocks.
        drafts (`torch.LongTensor` of shape `(B, A, K)`): Drafted tokens; slot `k` stands at index `k - 1`.
        accepted (`torch.LongTensor` of shape `(B, A)`): Accepted drafts inside the text, 0..K.
        is_censored (`torch.BoolTensor` of shape `(B, A)`): The text ended before the block's fate was known.
        is_counted (`torch.BoolTensor` of shape `(B, A)`): The block lies inside the text by geometry alone; tau counts these.
        branch_hidden (`torch.Tensor` of shape `(B, A, K, H)` or `None`):
            Input of the target's head at the draft-induced state of each slot; `None` when not recorded.
        num_target_forwards (`int`): Forward passes of the target for the whole batch, the prefill included.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    anchors: torch.Tensor
    drafts: torch.Tensor
    accepted: torch.Tensor
    is_censored: torch.Tensor
    is_counted: torch.Tensor
    branch_hidden: torch.Tensor | None
    num_target_forwards: int

    @property
    def is_block(self) -> torch.Tensor:
        """Whether an entry is a block at all, `(B, A)`."""
        return self.anchors >= 0

    @property
    def num_rounds(self) -> torch.Tensor:
        """Verification rounds of each row, `(B,)`."""
        return self.is_block.sum(dim=1)

    def responses(self) -> list[list[int]]:
        """Return the response token ids of each row."""
        ids, starts, ends = self.input_ids.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist()
        return [row[start:end] for row, start, end in zip(ids, starts, ends, strict=True)]

    def rows(self, start: int, stop: int) -> "Rollout":
        """Return rows `start..stop-1`, cut to their own longest text and chain."""
        length = int(self.lengths[start:stop].max())
        num_blocks = max(int(self.num_rounds[start:stop].max()), 1)
        hidden = self.branch_hidden
        return Rollout(
            input_ids=self.input_ids[start:stop, :length],
            attention_mask=self.attention_mask[start:stop, :length],
            prompt_lengths=self.prompt_lengths[start:stop],
            lengths=self.lengths[start:stop],
            anchors=self.anchors[start:stop, :num_blocks],
            drafts=self.drafts[start:stop, :num_blocks],
            accepted=self.accepted[start:stop, :num_blocks],
            is_censored=self.is_censored[start:stop, :num_blocks],
            is_counted=self.is_counted[start:stop, :num_blocks],
            branch_hidden=None if hidden is None else hidden[start:stop, :num_blocks],
            num_target_forwards=self.num_target_forwards,
        )
