# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Which context entries and which keys of blocks each query sees, worked out once per set of blocks and read by every
layer, every slot and the backward pass. No tensor of all pairs is made.

Shape letters:  B = sequences, L = context length, A = anchors per sequence, S = queries per block, Q = A S,
                T = keys per block of one piece, M = keys of context and pieces together
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


Result = TypeVar("Result")
# Queries of one tile: large enough to fill the kernel, small enough that tiles hug the diagonal.
TILE_QUERIES = 256
# Pairs that a tile may compute in vain, to spare a tile: what its launches would have cost.
WASTED_PAIRS = 4096


class Sight(NamedTuple):
    """
    What the queries of a layer see, the slots of blocks, of the entries that the plan leaves them.

    Attributes:
        window (`int` or `None`):
            Tokens that a query sees, itself and those right before it, as engines count; above the number of queries.
        is_causal (`bool`):
            Whether a query sees no key of its block behind its own; the block's keys are one piece, one per query.
    """

    window: int | None = None
    is_causal: bool = False


SEES_ALL = Sight()


class Tile(NamedTuple):
    """
    Anchors `start..stop-1`, and the context `first..end-1` that any of them sees; all of them see `clear_first..
    clear_end-1`.
    """

    start: int
    stop: int
    first: int
    end: int
    clear_first: int
    clear_end: int

    @property
    def has_hidden(self) -> bool:
        """Whether any anchor does not see all of the context."""
        return self.clear_first > self.first or self.clear_end < self.end

    @property
    def num_pairs(self) -> int:
        return (self.stop - self.start) * (self.end - self.first)

    def join(self, other: "Tile") -> "Tile":
        """Return one tile for the anchors of this one and of the next."""
        lows, highs = zip(self[2:], other[2:], strict=True), (self.stop, other.stop)
        (first, end, clear_first, clear_end) = lows
        return Tile(self.start, highs[1], min(first), max(end), max(clear_first), min(clear_end))


class AttentionPlan:
    """
    What blocks see of the context: the entries from their first one up to their anchor, less in layers with windows.

    Args:
        anchors (`torch.LongTensor` of shape `(B, A)`): Anchor of each block, above its first entry.
        firsts (`torch.LongTensor` of shape `(B, A)`, *optional*): First entry of each block; 0 if not given.

    Attributes:
        positions (`torch.LongTensor` of shape `(B, A)`): Position of each anchor in its text: the entries it sees.
    """

    def __init__(self, anchors: Tensor, firsts: Tensor | None = None):
        self.anchors, self.firsts = anchors, firsts
        self.positions = anchors if firsts is None else anchors - firsts
        self._known: dict[Hashable, Any] = {}

    def remember(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """Return what `make` gave when it was first asked for under `key`."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def tiles(self, num_queries: int, window: int | None = None) -> list[Tile]:
        """Cut the anchors into tiles, for blocks of `num_queries`; the first call waits once for the device."""
        bounds = self.remember("bounds", self._read_bounds)
        return self.remember(("tiles", num_queries, window), lambda: self._cut(bounds, num_queries, window))

    def first_entries(self, num_queries: int, window: int | None) -> Tensor | None:
        """
        Return the first context entry that each query sees, `(B, A, S)`, or `(B, A, 1)` if all of a block see the
        same; `None` if all see the row from its start.

        A window is that of the query and not of its anchor: it holds the query's own token and the `window - 1` before
        it, of which slot `s` finds `s` in its block, so that `window - 1 - s` entries of the context are left.
        """
        if window is None:
            return None if self.firsts is None else self.firsts[..., None]
        return self.remember(("first entries", num_queries, window), lambda: self._slide(num_queries, window))

    def _slide(self, num_queries: int, window: int) -> Tensor:
        slots = torch.arange(1 - window, num_queries + 1 - window, device=self.anchors.device)
        entries = self.anchors[..., None] + slots
        return entries.clamp_(min=0) if self.firsts is None else torch.maximum(entries, self.firsts[..., None])

    def _read_bounds(self) -> Tensor:
        """Return least and greatest firsts, greatest and least anchors of each column, on the host."""
        firsts = torch.zeros_like(self.anchors) if self.firsts is None else self.firsts
        bounds = [firsts.amin(dim=0), self.anchors.amax(dim=0), firsts.amax(dim=0), self.anchors.amin(dim=0)]
        return torch.stack(bounds).cpu()

    def _cut(self, bounds: Tensor, num_queries: int, window: int | None) -> list[Tile]:
        step, tiles = max(1, TILE_QUERIES // num_queries), []
        # Texts are cut apart, and put together again where that is cheaper.
        lengths, stop = torch.unique_consecutive(bounds[0], return_counts=True)[1].tolist(), 0
        if window is not None:
            # Of the first query of a block, and of its last.
            lows, clear = bounds[3] + 1 - window, bounds[1] + num_queries - window
            bounds = torch.stack([bounds[0].maximum(lows), bounds[1], bounds[2].maximum(clear), bounds[3]])

        def is_cheap(joined: Tile, *parts: Tile) -> bool:
            wasted = joined.num_pairs - sum(part.num_pairs for part in parts)
            return wasted * num_queries <= WASTED_PAIRS

        def over(start: int, stop: int) -> Tile:
            part = bounds[:, start:stop]
            lowest, highest = part.amin(dim=1).tolist(), part.amax(dim=1).tolist()
            return Tile(start, stop, lowest[0], highest[1], highest[2], lowest[3])

        def halved(tile: Tile) -> list[Tile]:
            """Cut a tile where anchors are so far apart that their windows hardly overlap."""
            count = tile.stop - tile.start
            if window is None or (tile.end - tile.first - window) * count * num_queries <= WASTED_PAIRS or count == 1:
                return [tile]
            middle = (tile.start + tile.stop) // 2
            halves = [over(tile.start, middle), over(middle, tile.stop)]
            return [tile] if is_cheap(tile, *halves) else [part for half in halves for part in halved(half)]

        for length in lengths:
            start, stop = stop, stop + length
            for begin in range(start, stop, step):
                for tile in halved(over(begin, min(begin + step, stop))):
                    if tiles and tile.stop - tiles[-1].start <= step:
                        joined = tiles[-1].join(tile)
                        if is_cheap(joined, tiles[-1], tile):
                            tile = joined
                            tiles.pop()
                    tiles.append(tile)
        return tiles

    def hide(self, scores: Tensor, tile: Tile, num_queries: int, window: int | None = None) -> Tensor:
        """Put -inf into scores `(B, heads, ..., entries of the tile)` of entries that a query does not see."""
        blocks = scores.view(scores.shape[0], -1, tile.stop - tile.start, num_queries, scores.shape[-1])

        def hide(first: int, end: int, limits: Tensor, is_end: bool) -> None:
            index = torch.arange(first, end, device=scores.device)
            limits = limits[:, None, tile.start : tile.stop, :, None]
            is_hidden = index >= limits if is_end else index < limits
            blocks[..., first - tile.first : end - tile.first].masked_fill_(is_hidden, float("-inf"))

        if tile.clear_end < tile.end:
            hide(tile.clear_end, tile.end, self.anchors[..., None], is_end=True)
        if tile.clear_first > tile.first and (firsts := self.first_entries(num_queries, window)) is not None:
            hide(tile.first, tile.clear_first, firsts, is_end=False)
        return scores
