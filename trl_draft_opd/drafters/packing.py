# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Rows have different numbers of blocks. Layers that read one token at a time skip the padding; only attention sees the
padded shape. Pure tensor math.

Shape letters:  B = sequences, A = anchors per sequence, N = blocks that are there
"""

import torch


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
