# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Fill a store of readings, by the target in this process or by whatever fetches them: only what is missing, and only
what fits.

Shape letters:  L = text length, F = feature width (layers times H), H = hidden size
"""

import shutil
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from ..responses.audit import read_texts
from ..responses.progress import ResponseProgress, showing_progress, stopping_cleanly
from ..responses.shards import prompt_key
from ..target.checks import NotFiniteError
from ..target.frozen import FrozenTarget
from ..target.reading import TextStates
from .fetching import Fetcher
from .manifest import MANIFEST, ReadingManifest, show_bytes
from .shards import list_shards
from .store import ReadingStore


# A text's line in the list of its shard.
_LIST_BYTES = 128
# Texts in a row that cannot be fetched, after which no more are tried.
_GIVE_UP_AFTER = 8
_SHOWN_FAILURES = 3
# Texts that were read together, with their states `(L, taps + 1, H)`.
_Batch = list[tuple[Sequence[int], torch.Tensor]]


@dataclass(frozen=True)
class ReadingPlan:
    """
    What a call of [`write_readings`] comes to.

    Attributes:
        path (`Path`), manifest ([`ReadingManifest`]): Where, and what is kept.
        texts (`dict[int, Sequence[int]]`): Texts to read, by their row; each once, those that are there left out.
        num_stored (`int`): Texts that the store holds already.
        stored_bytes (`int`): Their bytes.
    """

    path: Path
    manifest: ReadingManifest
    texts: dict[int, Sequence[int]] = field(repr=False)
    num_stored: int
    stored_bytes: int

    @classmethod
    def of(
        cls,
        target: FrozenTarget,
        texts: Sequence[Sequence[int]],
        path: str | Path,
        layer_ids: Sequence[int],
        dtype: str,
    ) -> "ReadingPlan":
        """
        Look at what is there and what is missing; writes nothing where there is no store.

        Raises:
            ValueError: If a text is none of the target's, or the folder is another store's.
        """
        _check_texts(texts, target)
        manifest, folder = ReadingManifest.of(target, layer_ids, dtype), Path(path)
        # With shards alone, it gets its manifest back.
        is_there = (folder / MANIFEST).exists() or bool(list_shards(folder))
        store = ReadingStore.open(folder, manifest) if is_there else None
        fresh: dict[str, int] = {}
        for row, text in enumerate(texts):
            if store is None or text not in store:
                fresh.setdefault(prompt_key(text), row)
        stored = (0, 0) if store is None else (len(store), _size(manifest, store.num_tokens, len(store)))
        return cls(folder, manifest, {row: texts[row] for row in fresh.values()}, *stored)

    @property
    def num_tokens(self) -> int:
        """Tokens to read."""
        return sum(map(len, self.texts.values()))

    @property
    def num_bytes(self) -> int:
        """Bytes to write."""
        return _size(self.manifest, self.num_tokens, len(self.texts))

    def describe(self) -> str:
        """Return what is about to be read and written, as a sentence."""
        layers = f"layers {' '.join(map(str, self.manifest.layer_ids))} and the input of the head"
        kept = f"{self.path} holds {self.num_stored:,} texts. " if self.num_stored else ""
        return (
            f"{kept}To read: {len(self.texts):,} texts, {self.num_tokens:,} tokens; to write: "
            f"{show_bytes(self.num_bytes)} of {layers} in {self.manifest.dtype}, "
            f"{self.manifest.bytes_per_token():,} bytes a token."
        )

    def check_room(self, max_bytes: int | None) -> None:
        """
        Refuse to begin what the disk, or `max_bytes` for the whole store, has no room for.

        Raises:
            ValueError: With the numbers, and what would fit.
        """
        place = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(place).free
        if self.num_bytes > free:
            limit, room = f"the disk of {str(place)!r} has {show_bytes(free)} free", free
        elif max_bytes is not None and self.stored_bytes + self.num_bytes > max_bytes:
            limit, room = f"`max_bytes` is {show_bytes(max_bytes)}", max(0, max_bytes - self.stored_bytes)
        else:
            return
        held = f", beside {show_bytes(self.stored_bytes)} that it holds" if self.stored_bytes else ""
        raise ValueError(
            f"The readings of {len(self.texts):,} texts, {self.num_tokens:,} tokens, take {show_bytes(self.num_bytes)}"
            f"{held}, but {limit}. Nothing was read. {self._what_fits(room)}"
        )

    def _what_fits(self, room: int) -> str:
        offers = []
        # What is stored already decides on precision and layers.
        if not self.num_stored and self.manifest.dtype == "float32" and self.num_bytes // 2 <= room:
            offers.append(f"bfloat16 ({show_bytes(self.num_bytes // 2)})")
        a_layer = self.num_tokens * self.manifest.bytes_per_token(0)
        num_layers = min(room // max(a_layer, 1) - 1, len(self.manifest.layer_ids) - 1)
        if not self.num_stored and num_layers > 0:
            offers.append(f"{num_layers} of the {len(self.manifest.layer_ids)} layers")
        used = num_fitting = 0
        for text in self.texts.values():
            used += _size(self.manifest, len(text), 1)
            if used > room:
                break
            num_fitting += 1
        if num_fitting:
            offers.append(f"the first {num_fitting:,} of the texts")
        fits = "It would fit: " + ", or ".join(offers) + "." if offers else "Make room."
        return f"{fits} A server's readings are used and dropped, and need no room."


def write_readings(
    target: FrozenTarget,
    texts: Sequence[Sequence[int]],
    path: str | Path,
    *,
    layer_ids: Sequence[int],
    dtype: str = "auto",
    source: Fetcher | None = None,
    provenance: dict[str, Any] | None = None,
    batch_size: int = 8,
    max_bytes: int | None = None,
    show_progress: bool = True,
) -> ReadingStore:
    """
    Write the target's readings of texts into a folder, once. What is there already is kept.

    Args:
        target ([`FrozenTarget`]):
            The target; with a `source`, its body is not needed.
        texts (`Sequence[Sequence[int]]`):
            Token ids, prompt and response in one, as lists or arrays. A text that comes twice is read once.
        path (`str` or `Path`):
            Folder of the store; made, or resumed.
        layer_ids (`Sequence[int]`):
            Layers to keep, ascending; the input of the head is always kept.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision to keep them in, `"bfloat16"` or `"float32"`; `"auto"` is the target's own.
        source ([`Fetcher`], *optional*):
            What reads the texts; by default the target in this process. The caller closes it.
        provenance (`dict`, *optional*):
            Engine and version behind the `source`, as JSON; kept per shard.
        batch_size (`int`, *optional*, defaults to `8`):
            Texts that the target in this process reads together, in the given order.
        max_bytes (`int`, *optional*):
            Largest size of the store.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show on stderr how far it has come.

    Returns:
        [`ReadingStore`].

    Raises:
        ValueError: If there is no room, a text is none of the target's, or the folder is another store's, before
            anything is read; or if some texts could not be read, after all others were.
        OSError: If the disk is full or fails. What was written stays, and the same call reads the rest.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if source is None:
        target.require_body("Reading texts in this process")
    plan = ReadingPlan.of(target, texts, path, layer_ids, dtype)
    plan.check_room(max_bytes)
    store = ReadingStore.open(path, plan.manifest)
    failures: dict[int, Exception] = {}
    if source is None:
        provenance = {"engine": "transformers", "engine_version": transformers.__version__, "batch_size": batch_size}
        stream = _read_in_process(target, plan, batch_size, failures)
    else:
        stream = _fetch(source, target, plan, failures)
    before = len(store)

    def describe_kept() -> str:
        kept = f"{len(store) - before} of {len(plan.texts)} missing texts are read and stored in {store.path}"
        return f"{kept}. The same command reads the others only."

    with (
        stopping_cleanly(describe_kept),
        showing_progress(len(plan.texts), is_shown=show_progress, name="Texts read") as progress,
        closing(stream),
    ):
        _write_stream(store, stream, provenance or {}, progress)
    if failures:
        raise ValueError(_describe_failures(failures, plan, store))
    return store


def _write_stream(
    store: ReadingStore,
    stream: Iterator[_Batch],
    provenance: dict[str, Any],
    progress: ResponseProgress,
) -> None:
    is_over = False
    while not is_over:
        # What ends this early, a signal too, closes the shard with the texts that are whole.
        with store.writing_shard(provenance) as writer:
            is_over = True
            for batch in stream:
                writer.add((prompt_key(text), states) for text, states in batch)
                progress.add(len(batch), sum(len(text) for text, _ in batch))
                if writer.is_full:
                    is_over = False
                    break


def _read_in_process(
    target: FrozenTarget, plan: ReadingPlan, batch_size: int, failures: dict[int, Exception]
) -> Generator[_Batch, None, None]:
    """Yield the batches that the target reads, and note what it cannot."""
    manifest, todo = plan.manifest, list(plan.texts)
    for begin in range(0, len(todo), batch_size):
        rows = todo[begin : begin + batch_size]
        try:
            reading = read_texts(target, [plan.texts[row] for row in rows], manifest.layer_ids)
        except NotFiniteError as error:
            failures |= {rows[place]: error for place in error.rows}
            rows = [row for row in rows if row not in failures]
            if not rows:
                continue
            reading = read_texts(target, [plan.texts[row] for row in rows], manifest.layer_ids)
        lengths = reading.packing.lengths
        parts = (reading.features.split(lengths), reading.last_hidden.split(lengths))
        batch: _Batch = []
        for row, states in zip(rows, map(TextStates, *parts), strict=True):
            try:
                stacked = _stack(states, manifest, len(plan.texts[row]))
            except ValueError as error:
                failures[row] = error
                continue
            batch.append((plan.texts[row], stacked))
        yield batch


def _fetch(
    source: Fetcher, target: FrozenTarget, plan: ReadingPlan, failures: dict[int, Exception]
) -> Generator[_Batch, None, None]:
    """Yield the texts that are fetched, in order, one at a time, and note what cannot be."""

    def fetch(text: Sequence[int]) -> TextStates:
        return source.fetch(text, plan.manifest.layer_ids)

    waiting: deque[tuple[int, AsyncResult[TextStates]]] = deque()
    todo, num_failed_in_a_row = iter(plan.texts.items()), 0
    # Its threads are daemons: Ctrl-C ends the program without waiting for what is under way.
    pool = ThreadPool(source.concurrency)
    try:
        while True:
            # A few more than are fetched at a time, so that none of them waits for the disk.
            while len(waiting) < source.concurrency + 2 and (item := next(todo, None)) is not None:
                waiting.append((item[0], pool.apply_async(fetch, (item[1],))))
            if not waiting:
                return
            row, future = waiting.popleft()
            try:
                states = future.get()
                if source.is_before_norm:
                    last = states.last_hidden.to(target.device, target.causal_lm.dtype)
                    states = states._replace(last_hidden=target.norm(last).to(states.features.device))
                stacked = _stack(states, plan.manifest, len(plan.texts[row]))
            except (ValueError, OSError, FloatingPointError) as error:
                failures[row] = error
                num_failed_in_a_row += 1
                if num_failed_in_a_row >= _GIVE_UP_AFTER:
                    return
                continue
            num_failed_in_a_row = 0
            yield [(plan.texts[row], stacked)]
    finally:
        pool.terminate()


def _stack(states: TextStates, manifest: ReadingManifest, num_tokens: int) -> torch.Tensor:
    """Return the states of a text as `(L, taps + 1, H)` in the store's precision, or refuse what they cannot be."""
    num_layers, size = len(manifest.layer_ids), manifest.hidden_size
    shapes = [tuple(each.shape) for each in states]
    if shapes != [(num_tokens, num_layers * size), (num_tokens, size)]:
        raise ValueError(
            f"its states have the shapes {shapes}, not those of {num_tokens} tokens at {num_layers} layers"
        )
    columns = [states.features.unflatten(1, (num_layers, size)), states.last_hidden[:, None]]
    stacked = torch.cat(columns, dim=1).to("cpu", manifest.torch_dtype)
    if not stacked.isfinite().all():
        raise ValueError(f"its states are not all finite in {manifest.dtype}")
    return stacked


def _size(manifest: ReadingManifest, num_tokens: int, num_texts: int) -> int:
    """Return the bytes on the disk of so many tokens and texts."""
    return num_tokens * manifest.bytes_per_token() + num_texts * _LIST_BYTES


def _check_texts(texts: Sequence[Sequence[int]], target: FrozenTarget) -> None:
    """Raise `ValueError` at the first text that the target cannot read."""
    for row, text in enumerate(texts):
        if not len(text):
            raise ValueError(f"Text {row} is empty: the target has nothing to read. Drop it.")
        ids = np.asarray(text)
        if ids.min() < 0 or ids.max() >= target.vocab_size:
            raise ValueError(
                f"Text {row} holds a token id outside the target's vocabulary of {target.vocab_size} tokens: it is "
                "another model's or another tokenizer's."
            )
        if target.num_positions is not None and len(text) > target.num_positions:
            raise ValueError(
                f"Text {row} has {len(text)} tokens, but the target has {target.num_positions} positions. Cut it with "
                "`max_length`."
            )


def _describe_failures(failures: dict[int, Exception], plan: ReadingPlan, store: ReadingStore) -> str:
    num_untried = len(plan.texts) - len(failures) - (len(store) - plan.num_stored)
    shown = "".join(
        f"\n  text {row} ({len(plan.texts[row])} tokens): {error}"
        for row, error in list(failures.items())[:_SHOWN_FAILURES]
    )
    stopped = (
        f" {_GIVE_UP_AFTER} in a row failed, so the last {num_untried:,} were not tried." if num_untried > 0 else ""
    )
    return (
        f"{len(failures):,} of {len(plan.texts):,} texts could not be read and are not in {store.path}, which keeps "
        f"the others; the same command reads what is missing.{stopped} First of them:{shown}"
    )
