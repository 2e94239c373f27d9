# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Which rows the target reads together, and what its branch tokens may see. Pure tensors and lists: knows no model.

Shape letters:  B = sequences, L = text length, R = rows of a group, n = branch tokens
"""

from collections.abc import Sequence

import torch


# Rows are read together down to this share of the widest one's tokens, and in any case within this many tokens of it:
# beyond, padding costs more than another forward.
SIMILAR_WIDTH, SIMILAR_TOKENS = 0.6, 64


def pad_rows(parts: Sequence[tuple[torch.Tensor, int, torch.Tensor]], shape: tuple[int, int]) -> torch.Tensor:
    """Put the parts, `(rows, length, (R, length, ...) tensor)` each, into one `(B, L, ...)` tensor."""
    rows, length, first = parts[0]
    if len(rows) == shape[0] and length == shape[1]:
        return first
    padded = first.new_zeros(*shape, first.shape[-1])
    for rows, length, part in parts:
        padded[rows, :length] = part
    return padded


def rows_of_similar_width(widths: torch.Tensor) -> list[list[int]]:
    """
    Group rows of similar width, see `SIMILAR_WIDTH`, widest first; rows without any tokens are left out.

    Args:
        widths (`torch.LongTensor` of shape `(B,)`): Tokens of each row, of its text or of its branches.
    """
    counts = widths.tolist()
    groups: list[list[int]] = []
    for row in sorted(range(len(counts)), key=lambda row: -counts[row]):
        if counts[row] == 0:
            continue
        widest = counts[groups[-1][0]] if groups else None
        if widest is None or counts[row] < min(SIMILAR_WIDTH * widest, widest - SIMILAR_TOKENS):
            groups.append([])
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def branch_mask(
    prefix_ends: torch.Tensor, block: torch.Tensor, slot: torch.Tensor, is_token: torch.Tensor, length: int
) -> torch.Tensor:
    """
    Return `(B, n, length + n)`, true where a branch token may see a key: a text position before `prefix_ends` (its branch's
    first token), or a token of its own branch up to itself.
    """
    index = torch.arange(length, device=block.device)
    # Position 0 is text in every row, so that no query is left without a key.
    sees_text = (index < prefix_ends[..., None]) | (index == 0)
    sees_branch = (block[:, :, None] == block[:, None]) & (slot[:, :, None] >= slot[:, None]) & is_token[:, None]
    return torch.cat([sees_text, sees_branch], dim=2)
