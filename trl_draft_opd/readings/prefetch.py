# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Fetches readings ahead of the steps that need them, in threads, within a budget of host memory."""

import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..responses.shards import prompt_key
from ..target.reading import TextStates
from .fetching import Fetcher


#: Host memory for what is fetched ahead unless told otherwise: in bfloat16 65,536 tokens of an 8B target for EAGLE-3.
PREFETCH_BYTES = 2 * 2**30
# What is under way when a source is closed ends within this many seconds, or is left behind.
_SECONDS_TO_END = 5.0


@dataclass(eq=False)
class _Expected:
    """A text that will be read `reads` times, and what was fetched of it: its states, or an error to raise there."""

    text: Sequence[int]
    layer_ids: tuple[int, ...]
    num_bytes: int
    reads: int
    is_begun: bool = False
    is_dropped: bool = False
    result: TextStates | BaseException | None = None


class _Shelf:
    """What the threads share: texts in the order they are wanted, and the bytes of those that are begun or fetched."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes, self.held_bytes, self.is_closed = limit_bytes, 0, False
        self.queue: deque[_Expected] = deque()
        # Guards everything here, and tells of every change.
        self.changed = threading.Condition()

    def begin_next(self) -> _Expected | None:
        """Wait until the first text in the queue fits, and hand it to the calling thread; `None` once closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_closed or (self.queue and self._fits(self.queue[0])))
            if self.is_closed:
                return None
            expected = self.queue.popleft()
            expected.is_begun = True
            self.held_bytes += expected.num_bytes
            return expected

    def _fits(self, expected: _Expected) -> bool:
        # A text above the limit waits until it is alone.
        return self.held_bytes == 0 or self.held_bytes + expected.num_bytes <= self.limit_bytes

    def put(self, expected: _Expected, result: TextStates | BaseException) -> None:
        with self.changed:
            expected.result = result
            if expected.is_dropped:
                self.held_bytes -= expected.num_bytes
            self.changed.notify_all()

    def drop(self, expected: _Expected) -> None:
        """Let go of a text, wherever it is; the caller holds `changed`."""
        expected.is_dropped = True
        if not expected.is_begun:
            self.queue.remove(expected)
        elif expected.result is not None:
            # Else its bytes are freed when the thread comes back with it.
            self.held_bytes -= expected.num_bytes
        self.changed.notify_all()


def _fetch_ahead(shelf: _Shelf, fetcher: Fetcher) -> None:
    """Fetch text after text: a thread, which must not hold the source, or that would never be collected."""
    while (expected := shelf.begin_next()) is not None:
        try:
            result: TextStates | BaseException = fetcher.fetch(expected.text, expected.layer_ids)
        except BaseException as error:  # noqa: BLE001  the read raises it, and must not wait for ever
            result = error
        shelf.put(expected, result)


def _close(shelf: _Shelf, fetcher: Fetcher, threads: list[threading.Thread], process: int) -> None:
    """End the threads. In a forked process there are none, and the lock may be held by one that was left behind."""
    if os.getpid() != process:
        return
    with shelf.changed:
        shelf.is_closed = True
        shelf.queue.clear()
        shelf.changed.notify_all()
    fetcher.close()
    deadline = time.monotonic() + _SECONDS_TO_END
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


class PrefetchingSource:
    """
    A [`ReadingSource`] that fetches announced texts in the background, in the order they were announced, while those
    that are under way or wait to be read hold at most `limit_bytes` (or are a single text). A text that a read needs
    and no thread has begun is fetched by the reading thread itself, so a read never waits for memory. Announced texts
    and their states are forgotten when they are read, as often as they were announced.

    For one reading thread. A forked process starts its own threads when it reads.

    Args:
        fetcher ([`Fetcher`]): Fetches single texts; closed with this source.
        layer_ids (`Sequence[int]`): Layers that announced texts are fetched at, ascending.
        limit_bytes (`int`): Host memory for texts under way and texts fetched, at least 1.

    Attributes:
        wait_seconds (`float`): Time that reads took so far.
        delivered_bytes (`int`): Bytes that they returned.
    """

    def __init__(self, fetcher: Fetcher, layer_ids: Sequence[int], limit_bytes: int):
        if limit_bytes < 1:
            raise ValueError(f"`limit_bytes` must be at least 1, got {limit_bytes}.")
        self.fetcher, self.layer_ids, self.limit_bytes = fetcher, tuple(layer_ids), limit_bytes
        self.is_before_norm, self.digest = fetcher.is_before_norm, fetcher.digest
        self.wait_seconds, self.delivered_bytes, self._is_closed = 0.0, 0, False
        self._begin()

    def _begin(self) -> None:
        """Make what belongs to this process; threads start at the first text."""
        self._process, self._shelf = os.getpid(), _Shelf(self.limit_bytes)
        self._expected: dict[str, _Expected] = {}
        self._threads: list[threading.Thread] = []
        # When the source is collected, and before the interpreter goes.
        self._finalizer = weakref.finalize(self, _close, self._shelf, self.fetcher, self._threads, self._process)

    @property
    def held_bytes(self) -> int:
        """Bytes of texts that are under way or fetched."""
        return self._shelf.held_bytes

    def expect(self, texts: Sequence[Sequence[int]]) -> None:
        """Announce texts that will be read soon at `layer_ids`, in this order; a text as often as it will be read."""
        self._announce(texts, self.layer_ids)

    def forget(self) -> None:
        """Let go of everything that was announced and not read."""
        with self._ready().changed:
            for expected in self._expected.values():
                self._shelf.drop(expected)
            self._expected.clear()

    def read(self, texts: Sequence[Sequence[int]], layer_ids: Sequence[int]) -> list[TextStates]:
        """
        Return the states of texts at `layer_ids`, ascending; of a text that was announced, a subset of its layers is
        cut out, and it stays for the read that it was announced for.

        Raises:
            ValueError, OSError: As [`ReadingSource.read`], of a text fetched in the background here too.
        """
        begun, wanted, shelf = time.perf_counter(), tuple(layer_ids), self._ready()
        by_key = {prompt_key(text): text for text in texts}
        keys = [prompt_key(text) for text in texts]
        counts = Counter(keys)
        # Now, and before what is only to come.
        added = {key: text for key, text in by_key.items() if key not in self._expected}
        self._announce(list(added.values()), wanted, counts)
        try:
            states = {key: self._take(key, wanted, counts[key]) for key in by_key}
        finally:
            with shelf.changed:
                # What an error left behind.
                for left in [self._expected.pop(key) for key in added if key in self._expected]:
                    shelf.drop(left)
            self.wait_seconds += time.perf_counter() - begun
        found = [states[key] for key in keys]
        self.delivered_bytes += sum(part.nbytes for each in states.values() for part in each)
        return found

    def close(self) -> None:
        """End the threads and close the fetcher; reads are refused from now on."""
        self._is_closed = True
        self._finalizer()

    def _ready(self) -> _Shelf:
        if self._is_closed:
            raise ValueError("This source of readings is closed. Open another one.")
        if os.getpid() != self._process:
            self._begin()
        return self._shelf

    def _announce(
        self, texts: Sequence[Sequence[int]], layer_ids: tuple[int, ...], urgent: Counter[str] | None = None
    ) -> None:
        """Queue texts behind all others; in front of them where `urgent` tells how often each is read at once."""
        shelf, new = self._ready(), []
        for text in texts:
            key = prompt_key(text)
            if key in self._expected:
                self._expected[key].reads += 1
                continue
            num_bytes = self.fetcher.num_bytes(len(text), len(layer_ids))
            self._expected[key] = _Expected(text, layer_ids, num_bytes, 1 if urgent is None else urgent[key])
            new.append(self._expected[key])
        with shelf.changed:
            if urgent is None:
                shelf.queue.extend(new)
            else:
                shelf.queue.extendleft(reversed(new))
            shelf.changed.notify_all()
        while self._expected and len(self._threads) < self.fetcher.concurrency:
            thread = threading.Thread(target=_fetch_ahead, args=(shelf, self.fetcher), name="readings", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _take(self, key: str, layer_ids: tuple[int, ...], count: int) -> TextStates:
        """Return the states of an expected text, and let go of them if `count` reads were all it was expected for."""
        shelf, expected = self._shelf, self._expected[key]
        if expected.layer_ids != layer_ids:
            return self._look(expected, layer_ids)
        with shelf.changed:
            expected.reads -= count
            is_own = not expected.is_begun
            if is_own:
                # No thread shall begin it meanwhile.
                shelf.queue.remove(expected)
            shelf.changed.wait_for(lambda: is_own or expected.result is not None)
        if is_own:
            is_over = True
            try:
                states = self.fetcher.fetch(expected.text, layer_ids)
                is_over = expected.reads <= 0
            finally:
                with shelf.changed:
                    if is_over:
                        del self._expected[key]
                    else:
                        shelf.queue.append(expected)
                        shelf.changed.notify_all()
            return states
        result = expected.result
        if expected.reads <= 0 or isinstance(result, BaseException):
            with shelf.changed:
                shelf.drop(expected)
                del self._expected[key]
        return _delivered(result)

    def _look(self, expected: _Expected, layer_ids: tuple[int, ...]) -> TextStates:
        """Return the states of a text at other layers than it is expected at, and leave it as it is."""
        if not (expected.is_begun and set(layer_ids) <= set(expected.layer_ids)):
            return self.fetcher.fetch(expected.text, layer_ids)
        with self._shelf.changed:
            self._shelf.changed.wait_for(lambda: expected.result is not None)
        states = _delivered(expected.result)
        size = states.last_hidden.shape[-1]
        places = [expected.layer_ids.index(layer_id) for layer_id in layer_ids]
        by_layer = states.features.unflatten(-1, (len(expected.layer_ids), size))
        return TextStates(by_layer[:, places].flatten(1), states.last_hidden)


def _delivered(result: TextStates | BaseException | None) -> TextStates:
    """Return what a thread fetched, or raise what it met."""
    assert result is not None, "it was waited for"
    if isinstance(result, BaseException):
        raise result
    return result
