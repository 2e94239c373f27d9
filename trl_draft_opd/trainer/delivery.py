# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a trainer needs where the target's readings are delivered: the source opened, every text known to be there, rows
drawn an update ahead so that theirs can be fetched meanwhile, and rows in the order of a store's shards.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from ..readings.opening import open_readings
from ..readings.prefetch import PrefetchingSource
from ..readings.store import ReadingStore
from ..responses.store import ResponseStore
from ..target.frozen import FrozenTarget
from .common_config import DraftTrainingConfig
from .pair import Pair
from .texts import describe_unwritten


_ROWS_AT_A_TIME = 1000


def open_source(pair: Pair, args: DraftTrainingConfig) -> None:
    """
    Have the target read from what `readings` names; unset, from the source it has, if any.

    Raises:
        ValueError: If there is neither a source nor a body, or the source is not this target's; see [`open_readings`].
    """
    target = pair.target
    if args.readings is None:
        if target.source is None and not target.has_body:
            raise ValueError(
                "The target was loaded without its body, and `readings` names nothing to read from in its place. Give "
                "a folder or servers (`--readings`), or the whole target."
            )
        return
    config: Any = pair.drafter.config
    target.source = open_readings(
        target,
        args.readings,
        config.target_layer_ids,
        shared_folder=args.shared_folder,
        limit_bytes=args.prefetch_bytes,
    )


def store_of(target: FrozenTarget) -> ReadingStore | None:
    """Return the store that a target reads from, if it does."""
    fetcher = getattr(target.source, "fetcher", None)
    return fetcher if isinstance(fetcher, ReadingStore) else None


def stored_texts(rows: Dataset, responses: ResponseStore | None = None) -> Iterator[np.ndarray]:
    """Yield the token ids of each row of texts, or of each row of prompts with its response in a store."""
    column = "prompt_ids" if responses is not None else "input_ids"
    for table in rows.select_columns([column]).with_format("arrow").iter(_ROWS_AT_A_TIME):
        lists: Any = table
        lists = lists.column(column).combine_chunks()
        ids, ends = lists.flatten().to_numpy(), lists.value_lengths().to_numpy().cumsum()
        for row in np.split(ids, ends[:-1]):
            response = None if responses is None else responses.find(row.tolist())
            yield row if response is None else np.concatenate([row, response])


def check_texts(target: FrozenTarget, texts: Iterable[Any], sample_ids: Sequence[int], place: str) -> None:
    """
    Raise `ValueError` unless a store, if the target reads from one, holds every text; servers, unless they can read
    each. `texts` are lists or arrays of token ids; `sample_ids` are the rows of `place` that they are.
    """
    store, fetcher = store_of(target), getattr(target.source, "fetcher", None)
    if store is None:
        # A source of the user's own may check nothing.
        check: Any = getattr(fetcher, "require_lengths", list)
        check([len(text) for text in texts])
        return
    missing = [(row, text) for row, text in zip(sample_ids, texts, strict=True) if text not in store]
    if missing:
        row, text = missing[0]
        raise ValueError(
            f"{len(missing)} of {len(sample_ids)} texts of {place} are not in the store of readings, the first of "
            f"them row {row}. {store.describe_missing(text)}"
        )


def require_responses(target: FrozenTarget, store: ResponseStore, prompts: Dataset) -> None:
    """Raise `ValueError` unless a store has a response to every prompt."""
    rows = zip(prompts["prompt_ids"], prompts["sample_id"], strict=True)
    missing = [row for prompt, row in rows if store.find(prompt) is None]
    if missing:
        raise ValueError(describe_unwritten(target, store, len(missing), missing[0]))


class LookAhead:
    """
    An iterator over an epoch's batches that can draw some before they are asked for. What drawing them raises is
    raised where they are asked for.

    Args:
        batches (`Iterator`): The epoch's.
        is_at_end (`Callable`): Tells whether the batch drawn last is the epoch's last: behind it nothing is drawn.
    """

    def __init__(self, batches: Iterator, is_at_end: Callable[[], bool]):
        self.batches, self._is_at_end = batches, is_at_end
        self._drawn: deque[Any] = deque()
        self._error: Exception | None = None
        # Until the first is drawn, an epoch before this one may be at its end.
        self._is_begun = False

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self._drawn:
            return self._drawn.popleft()
        if self._error is not None:
            raise self._error
        return next(self.batches)

    def draw(self, count: int) -> list[Any]:
        """Return the next batches, at most `count`, which stay to be asked for."""
        while len(self._drawn) < count and self._error is None and not (self._is_begun and self._is_at_end()):
            self._is_begun = True
            try:
                self._drawn.append(next(self.batches))
            except Exception as error:  # noqa: BLE001  a row of the next update must not cost this one
                self._error = error
        return list(self._drawn)[:count]


class ShardOrder(Sampler[int]):
    """
    Rows in the order of a store's shards, see [`ReadingStore.order_by_shard`]; the same on every rank.

    Args:
        store ([`ReadingStore`]): The store.
        texts (`Iterable`): The text of each row; kept is the number of its shard.
        seed (`int`): Of the order.
        epoch (`Callable`): Returns the epoch that begins: a sampler that is wrapped several times is not always told.
    """

    def __init__(self, store: ReadingStore, texts: Iterable[np.ndarray], seed: int, epoch: Callable[[], int]):
        self.store, self.seed, self.epoch = store, seed, epoch
        known: Any = texts
        self.shards = store.shards_of(known)

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[int]:
        return iter(self.store.order_by_shard(self.shards, self.seed, self.epoch()))


class WaitMeter:
    """Which share of the steps' time went by waiting for readings."""

    def __init__(self, source: PrefetchingSource):
        self.source = source
        self._waited = self._seconds = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count what runs inside as part of a step."""
        begun, waited = time.perf_counter(), self.source.wait_seconds
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - begun
            self._waited += self.source.wait_seconds - waited

    def pop(self) -> float | None:
        """Return the share since it was last asked for, and count anew; `None` without a step."""
        share = self._waited / self._seconds if self._seconds else None
        self._waited = self._seconds = 0.0
        return share
