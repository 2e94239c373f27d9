# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Rows have different numbers of tokens and of blocks. Texts lie end to end; layers that read one token at a time skip
the padding of blocks, and only attention sees their padded shape. Pure tensor math.

Shape letters:  B = sequences, L = text length, T = tokens of all texts, A = anchors per sequence,
                N = blocks that are there
"""

from functools import cached_property

import torch


class RowPacking:
    """
    The texts of right-padded rows, end to end and without their padding.

    Args:
        lengths (`torch.LongTensor` of shape `(B,)`): Tokens of each row's text.
        width (`int`): Tokens of a padded row, L.

    Attributes:
        lengths (`tuple[int, ...]`): Tokens of each row's text, on the host.
        starts (`torch.LongTensor` of shape `(B,)`): Packed index of each row's first token.
        num_tokens (`int`): Tokens of all texts, T.
    """

    def __init__(self, lengths: torch.Tensor, width: int):
        # The only read from the device; every size below follows from it.
        self.lengths: tuple[int, ...] = tuple(lengths.tolist())
        self.width, self.num_tokens = width, sum(self.lengths)
        self.starts = lengths.cumsum(dim=0) - lengths
        self._lengths = lengths

    @classmethod
    def of(cls, attention_mask: torch.Tensor) -> "RowPacking":
        """Pack the rows of a right-padded mask `(B, L)`, 1 for text and 0 for padding."""
        return cls(attention_mask.sum(dim=1, dtype=torch.long), attention_mask.shape[1])

    @cached_property
    def rows(self) -> torch.Tensor:
        """The row of each packed token, `(T,)`."""
        index = torch.arange(len(self.lengths), device=self.starts.device)
        return index.repeat_interleave(self._lengths, output_size=self.num_tokens)

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """The position of each packed token within its own text, `(T,)`."""
        return torch.arange(self.num_tokens, device=self.starts.device) - self.starts[self.rows]

    @cached_property
    def _places(self) -> torch.Tensor | None:
        """Where each packed token is among the flattened padded rows, `(T,)`; `None` where there is no padding."""
        is_full = self.num_tokens == len(self.lengths) * self.width
        return None if is_full else self.rows * self.width + self.position_ids

    def index(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the packed indices of tokens given by row and position within the row, of any shape."""
        return self.starts[rows] + positions

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Turn `(B, L, ...)` into `(T, ...)`."""
        flat = padded.flatten(0, 1)
        return flat if self._places is None else flat.index_select(0, self._places.to(flat.device))

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Turn `(T, ...)` into `(B, L, ...)`, zero in the padding."""
        if self._places is not None:
            flat = packed.new_zeros(len(self.lengths) * self.width, *packed.shape[1:])
            packed = flat.index_copy(0, self._places.to(packed.device), packed)
        return packed.unflatten(0, (len(self.lengths), self.width))


class BlockPacking:
    """
    The blocks of a batch without its padding, in order of row and column.

    Args:
        is_block (`torch.BoolTensor` of shape `(B, A)`): Whether an entry is a block.
        is_whole (`bool`): Whether all are known to be blocks; else they are counted, which waits for the device.
    """

    def __init__(self, is_block: torch.Tensor, is_whole: bool = False):
        self.shape = tuple(is_block.shape)
        self.index = None
        if not is_whole:
            index = is_block.flatten().nonzero()[:, 0]
            self.index = None if len(index) == is_block.numel() else index

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Turn `(B, A, ...)` into `(N, ...)`."""
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Turn `(N, ...)` into `(B, A, ...)`, zero where there is no block."""
        if self.index is not None:
            flat = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
            packed = flat.index_copy(0, self.index, packed)
        return packed.unflatten(0, self.shape)
