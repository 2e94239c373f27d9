# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The result of a rollout: the text, and every block that was drafted along it. Data only.

Shape letters:  B = sequences, L = text length, A = blocks per sequence, K = drafts per block, H = hidden size
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Rollout:
    """
    Committed text and the chain of blocks drafted along it, from either rollout engine. All positions are indices into
    right-padded rows, prompt included.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(B, L)`): Prompt and response, right-padded.
        attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for text, 0 for padding.
        completion_mask (`torch.BoolTensor` of shape `(B, L)`):
            Tokens the target wrote. Each run of them is one response with a chain of its own.
        anchors (`torch.LongTensor` of shape `(B, A)`): Anchor of each block; -1 where a row has fewer blocks.
        drafts (`torch.LongTensor` of shape `(B, A, K)`):
            Drafted tokens; slot `k` is at index `k - 1`. Behind the first rejection there are drafts only if
            `has_suffix`; else these entries hold any id.
        accepted (`torch.LongTensor` of shape `(B, A)`): Accepted drafts inside the text, 0..K.
        is_censored (`torch.BoolTensor` of shape `(B, A)`): The text ended before the block's fate was known.
        is_counted (`torch.BoolTensor` of shape `(B, A)`):
            The block lies inside the text by geometry alone; tau counts these.
        branch_hidden (`torch.Tensor` of shape `(B, A, K, H)` or `None`):
            Input of the target's head at the draft-induced state of each slot; `None` when not recorded.
        has_suffix (`bool`): Whether the slots behind the first rejection were drafted.
        num_refused (`int`): Rows left without blocks because their text is impossible under the sampling settings.
        num_target_forwards (`int`): Forward passes of the target for the whole batch, the prefill included.
        verified (`torch.LongTensor` of shape `(B, A)` or `None`):
            Drafts of each block that were verified, 1..K; `None` where whole blocks are.
        confidences (`torch.DoubleTensor` of shape `(B, A, K)` or `None`):
            The drafter's confidence at each slot up to the first rejection; anything behind it unless `has_suffix`.
            `None` when not kept.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    anchors: torch.Tensor
    drafts: torch.Tensor
    accepted: torch.Tensor
    is_censored: torch.Tensor
    is_counted: torch.Tensor
    branch_hidden: torch.Tensor | None
    has_suffix: bool
    num_refused: int
    num_target_forwards: int
    verified: torch.Tensor | None = None
    confidences: torch.Tensor | None = None

    @property
    def is_block(self) -> torch.Tensor:
        """Whether an entry is a block at all, `(B, A)`."""
        return self.anchors >= 0

    @property
    def num_rounds(self) -> torch.Tensor:
        """Verification rounds of each row, `(B,)`."""
        return self.is_block.sum(dim=1)

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each row, `(B,)`."""
        return self.attention_mask.sum(dim=1)

    @property
    def prompt_lengths(self) -> torch.Tensor:
        """Tokens before the first response of each row, `(B,)`."""
        return self.completion_mask.to(torch.uint8).argmax(dim=1)

    @property
    def block_ends(self) -> torch.Tensor:
        """Index of the last token of the response each block lies in, `(B, A)`; anything for padding."""
        return response_ends(self.completion_mask).gather(1, self.anchors.clamp(min=0))

    def responses(self) -> list[list[int]]:
        """Return the token ids the target wrote, row by row."""
        pairs = zip(self.input_ids, self.completion_mask, strict=True)
        return [ids[is_written].tolist() for ids, is_written in pairs]

    def rows(self, start: int, stop: int) -> "Rollout":
        """Return rows `start..stop-1`, cut to their own longest text and chain."""
        length = int(self.lengths[start:stop].max())
        num_blocks = max(int(self.num_rounds[start:stop].max()), 1)
        cuts = {"input_ids": length, "attention_mask": length, "completion_mask": length}
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(
            self, **{name: tensor[start:stop, : cuts.get(name, num_blocks)] for name, tensor in tensors.items()}
        )


def response_ends(completion_mask: torch.Tensor) -> torch.Tensor:
    """
    Return, for each token the target wrote, the index of the last token of its run, `(B, L)`; the index of a later
    run's end, or `L`, at tokens it did not write.
    """
    length = completion_mask.shape[1]
    is_end = completion_mask.clone()
    is_end[:, :-1] &= ~completion_mask[:, 1:]
    index = torch.arange(length, device=completion_mask.device).expand_as(completion_mask)
    return torch.where(is_end, index, length).flip(1).cummin(dim=1).values.flip(1)


def pack_columns(is_kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Move the kept entries of each row to the front, in order.

    Returns:
        `tuple`: the columns they stood in, `(B, A')` with `A'` the largest count (padding names any column), and
        whether an entry of the result is one, `(B, A')`.
    """
    counts = is_kept.sum(dim=1)
    width = int(counts.max())
    columns = is_kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return columns, torch.arange(width, device=counts.device) < counts[:, None]
