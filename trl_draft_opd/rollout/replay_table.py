# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What replay decides on the host: the table of blocks, where to draft next, and the chains. Knows no model.

Shape letters:  B = sequences, T = tokens of all texts, A = blocks per sequence
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .types import response_ends


class ReplayTable:
    """
    What became of every block that was drafted so far, by place: `accepted` (-1 where none was drafted), the first
    refused draft, and whether the block ended there because no more was verified, all on the host.

    Args:
        lengths (`Sequence[int]`): Tokens of each row of text, padding left out.
        completion_mask (`torch.BoolTensor` of shape `(B, L)`): Which tokens the target wrote.
        num_drafts (`int`): Drafts per block.
    """

    def __init__(self, lengths: Sequence[int], completion_mask: Tensor, num_drafts: int):
        self.num_drafts = num_drafts
        # By row (B,) and by place (T,).
        num_tokens = torch.tensor(lengths)
        self.starts = num_tokens.cumsum(dim=0) - num_tokens
        self.rows = torch.arange(len(num_tokens)).repeat_interleave(num_tokens)
        self.positions = torch.arange(len(self.rows)) - self.starts[self.rows]
        self.is_written = completion_mask[self.rows, self.positions]
        self.ends = response_ends(completion_mask)[self.rows, self.positions] + self.starts[self.rows]
        self.accepted = torch.full_like(self.ends, -1)
        self.refused_drafts = torch.zeros_like(self.ends)
        self.is_cut = torch.zeros_like(self.is_written)
        self.is_refused_row = torch.zeros(len(self.starts), dtype=torch.bool)

    def _is_start(self) -> Tensor:
        """Return whether a token is the first of a response, `(T,)`."""
        is_start = self.is_written.clone()
        is_start[1:] &= ~self.is_written[:-1] | (self.positions[1:] == 0)
        return is_start

    def _round(self, walkers: Tensor, num_ahead: int) -> Tensor:
        """
        Return where to draft for walkers at open anchors: there, and where they may come next if that is free,
        `num_ahead` places for each in all.
        """
        places = walkers[:, None] + torch.arange(num_ahead)
        places = places[places < self.ends[walkers, None]].unique()
        return places[self.accepted[places] < 0]

    def _follow(self, walkers: Tensor, is_passed: Tensor) -> Tensor:
        """Move walkers on to anchors that were not drafted from, and return those; mark what they pass, `(T,)`."""
        found = []
        while len(walkers):
            following = walkers + self.accepted[walkers] + 1
            following = following[following < self.ends[walkers]].unique()
            # Two walks that meet continue as one.
            following = following[~is_passed[following]]
            is_passed[following] = True
            is_open = self.accepted[following] < 0
            found.append(following[is_open])
            walkers = following[~is_open]
        return torch.cat(found).sort().values

    def chain(self) -> Tensor:
        """Read each response's chain off the table, `(B, A)` positions with -1 for padding, on the host."""
        accepted, ends, positions = self.accepted.tolist(), self.ends.tolist(), self.positions.tolist()
        chains: list[list[int]] = [[] for _ in self.starts]
        is_start = self._is_start() & ~self.is_refused_row[self.rows]
        for start in is_start.nonzero()[:, 0].tolist():
            place, chain = start, chains[self.rows[start]]
            while place < ends[start]:
                assert accepted[place] >= 0, "a walk covers every anchor of the chain"
                chain.append(positions[place])
                place += accepted[place] + 1
        padded = torch.full((len(chains), max(1, *map(len, chains))), -1)
        for row, chain in enumerate(chains):
            padded[row, : len(chain)] = torch.tensor(chain, dtype=torch.long)
        return padded

    def _num_known(self, places: Tensor) -> Tensor:
        """Return the slots that were decided: accepted drafts, which equal the text, and the first refused one."""
        accepted = self.accepted[places]
        return torch.where(places + accepted == self.ends[places], accepted, accepted + 1).clamp(max=self.num_drafts)
