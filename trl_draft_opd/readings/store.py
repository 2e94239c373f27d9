# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The folder of stored readings: fetch those of one text by its token ids. Knows no engine, and reads no shard whole.

Shape letters:  L = text length, F = feature width (layers times H), H = hidden size
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..responses.shards import prompt_key
from ..target.frozen import FrozenTarget
from ..target.reading import TextStates
from ..utils.atomic_files import check_place, explaining_failure
from .manifest import MANIFEST, ReadingManifest, show_bytes
from .shards import (
    ShardReader,
    ShardWriter,
    check_shard,
    list_shards,
    read_list,
    sweep_leftovers,
)


# Shards that are held open: of each, only what is read comes into memory.
_OPEN_SHARDS = 64


class ReadingStore:
    """
    Readings of one target in a folder that several processes may write to and read at the same time.

    A manifest states whose they are; each shard is written whole or not at all. A text is found by its token ids; of
    one that writers gave twice, the reading in the first shard by name counts. What is held in memory is a list of 36
    bytes a text.

    Open with [`ReadingStore.open`] to write, with [`ReadingStore.open_for`] to train: there it is a [`Fetcher`].

    Attributes:
        path (`Path`), manifest ([`ReadingManifest`]): The folder, and what it holds.
        layer_ids (`tuple[int, ...]`): Layers that can be had, ascending.
        digest (`str`): The manifest's.

    Example:

    ```python
    >>> from trl_draft_opd import ReadingStore

    >>> store = ReadingStore.open_for(target, "readings", layer_ids=[1, 3])
    >>> features, last_hidden = store.fetch([1, 2, 3], layer_ids=[1, 3])
    ```
    """

    is_before_norm = False
    # Disks answer several at a time faster than one after another.
    concurrency = 4

    def __init__(self, path: Path, manifest: ReadingManifest) -> None:
        self.path, self.manifest = path, manifest
        self.layer_ids, self.digest = manifest.layer_ids, manifest.digest
        self._shards: list[str] = []
        self._rows: list[int] = []
        self._keys = np.empty((2, 0), dtype=np.uint64)
        self._places = np.empty((3, 0), dtype=np.uint32)
        self._checksums = np.empty(0, dtype=np.uint64)
        self._opened: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()
        self.refresh()

    @classmethod
    def open(cls, path: str | Path, manifest: ReadingManifest) -> "ReadingStore":
        """
        Open a store for writing, or make one. What killed writers left is removed.

        Args:
            path (`str` or `Path`): Its folder.
            manifest ([`ReadingManifest`]): What is about to be written.

        Raises:
            ValueError: If the folder holds readings of another manifest, a damaged shard, or other files.
        """
        folder = Path(path)
        check_place(folder, "The folder of readings")
        with explaining_failure(f"The folder of readings {str(folder)!r}", "Make room, or name another"):
            folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            names = list_shards(folder)
            held = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
            strangers = sorted(name for name in held if not name.startswith("shard-") or name.endswith(".parquet"))
            # Another writer may have made the manifest between the two looks.
            if strangers and not (folder / MANIFEST).exists():
                raise ValueError(
                    f"The folder {folder} holds {strangers[:3]} and no {MANIFEST}: it is no store of readings. Give "
                    "an empty or a new folder."
                )
            # Of a store that has lost its manifest: each shard names the one it was written under.
            for name in names:
                read_list(folder, name, manifest)
            manifest.write(folder)
        # Read back even after writing it: of two writers that make the same folder, the later one's manifest counts.
        stored = ReadingManifest.read(folder)
        # A first try that was refused or stopped leaves the manifest alone.
        note = "" if list_shards(folder) else ", which are none yet (delete the folder to begin anew),"
        manifest.check_same(stored, f"The readings in {folder}{note}")
        sweep_leftovers(folder)
        return cls(folder, stored)

    @classmethod
    def open_for(cls, target: FrozenTarget, path: str | Path, layer_ids: Sequence[int]) -> "ReadingStore":
        """
        Open a store to train with.

        Args:
            target ([`FrozenTarget`]): The run's target, with or without its body.
            path (`str` or `Path`): The store.
            layer_ids (`Sequence[int]`): Layers that the drafter taps.

        Raises:
            ValueError: If there is no store, it is of another target or lacks a layer, or it is damaged.
        """
        store = cls.read_only(path)
        store.manifest.check_usable(target, layer_ids, f"The readings in {store.path}")
        return store

    @classmethod
    def read_only(cls, path: str | Path) -> "ReadingStore":
        """
        Open a store to look at it, whoever wrote it.

        Raises:
            ValueError: If there is no store, or it is damaged.
        """
        return cls(Path(path), ReadingManifest.read(Path(path)))

    def __len__(self) -> int:
        return self._keys.shape[1]

    def __contains__(self, text: Sequence[int]) -> bool:
        return self._find(text) is not None

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return int((self._places[2].astype(np.int64) - self._places[1]).sum())

    def describe(self) -> str:
        """Return what the store holds, as a sentence."""
        manifest = self.manifest
        return (
            f"{self.path} holds the readings of {len(self):,} texts, {self.num_tokens:,} tokens, "
            f"{show_bytes(sum(self._rows) * manifest.bytes_per_token())}: layers "
            f"{' '.join(map(str, self.layer_ids))} and the input of the head, in {manifest.dtype}."
        )

    def missing(self, texts: Iterable[Sequence[int]]) -> list[list[int]]:
        """Return the texts that are not there, each once, in their order."""
        left: dict[str, list[int]] = {}
        for text in texts:
            if text not in self:
                left.setdefault(prompt_key(text), list(text))
        return list(left.values())

    def num_bytes(self, num_tokens: int, num_layers: int) -> int:
        """Return the bytes of a text's states on the host, as they are fetched."""
        return num_tokens * self.manifest.bytes_per_token(num_layers)

    def fetch(self, text: Sequence[int], layer_ids: Sequence[int]) -> TextStates:
        """
        Return the states of a text, which is its token ids, in the precision they are stored in. From any thread.

        Args:
            text (`Sequence[int]`): Token ids.
            layer_ids (`Sequence[int]`): Some of the store's layers, ascending; may be empty.

        Raises:
            ValueError: If the text is not there, or its states are damaged.
        """
        place = self._find(text)
        if place is None:
            raise ValueError(self.describe_missing(text))
        shard, start, end = (int(each) for each in self._places[:, place])
        states = self._open(shard).read(self._keys[:, place], start, end, int(self._checksums[place]))
        columns = [self.layer_ids.index(layer_id) for layer_id in layer_ids]
        # Copies, as indexing by a list makes: no later read touches the file.
        features = states[:, :-1].clone() if columns == list(range(len(self.layer_ids))) else states[:, columns]
        return TextStates(features.flatten(1), states[:, -1].clone())

    def describe_missing(self, text: Sequence[int]) -> str:
        """Return what is wrong where a text is not there, and what to do."""
        first = ", ".join(map(str, text[:6]))
        return (
            f"The store of readings {self.path} does not hold a text of {len(text)} tokens that begins with the ids "
            f"[{first}, ...]. A text is found by all its ids: another tokenizer, chat template, longest length or "
            "response gives others. Run `trl-draft-opd read` with the rows and settings of this run: it reads only "
            "what is missing."
        )

    def shards_of(self, texts: Iterable[Sequence[int]]) -> np.ndarray:
        """
        Return the number of the shard that each text is read from, as an array.

        Raises:
            ValueError: If a text is not there.
        """
        places = []
        for text in texts:
            place = self._find(text)
            if place is None:
                raise ValueError(self.describe_missing(text))
            places.append(place)
        return self._places[0, np.array(places, dtype=np.int64)]

    def order_by_shard(self, shards: np.ndarray, seed: int, epoch: int) -> list[int]:
        """
        Return an order, for one epoch, of texts that are read from `shards`, see [`shards_of`]: shards shuffled, and
        the texts inside each; equal for equal arguments.
        """
        # By name, so that a shard that is added later does not move the others.
        keys = [f"{seed} {epoch} {name}".encode() for name in self._shards]
        rank = np.array([xxhash.xxh3_64_intdigest(key) for key in keys], dtype=np.uint64)
        draws = np.random.default_rng([seed, epoch]).random(len(shards))
        return np.lexsort((draws, rank[shards])).tolist()

    @contextmanager
    def writing_shard(self, provenance: dict[str, Any]) -> Iterator[ShardWriter]:
        """
        Yield a writer of a new shard. Its whole texts count when the context ends, whatever ends it.

        Raises:
            OSError: If it cannot be written. What was written before stays.
        """
        writer = ShardWriter(self.path, self.manifest, provenance)
        try:
            yield writer
        finally:
            writer.finish()
            self.refresh()

    def refresh(self) -> int:
        """
        Take in the shards that have been added since.

        Returns:
            `int`: texts that are new.

        Raises:
            ValueError: If one of them is damaged, naming it.
        """
        known = set(self._shards)
        fresh = [name for name in list_shards(self.path) if name not in known]
        if not fresh:
            return 0
        lists = [read_list(self.path, name, self.manifest) for name in fresh]
        before = len(self)
        first = len(self._shards)
        shards = [np.full(len(each.starts), first + i, dtype=np.uint32) for i, each in enumerate(lists)]
        places = np.stack(
            [np.concatenate(parts) for parts in (shards, [e.starts for e in lists], [e.ends for e in lists])]
        )
        keys = np.concatenate([self._keys, *(each.keys.T for each in lists)], axis=1)
        places = np.concatenate([self._places, places], axis=1)
        checksums = np.concatenate([self._checksums, *(each.checksums for each in lists)])
        self._shards += fresh
        self._rows += [int(each.ends[-1]) for each in lists]
        # By name and not by arrival, so that every process settles on the same reading of a text that is there twice.
        rank = np.argsort(np.argsort(np.array(self._shards)))
        order = np.lexsort((rank[places[0]], keys[1], keys[0]))
        keys = keys[:, order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
        # Each row contiguous, or a search would copy it every time.
        self._keys = np.ascontiguousarray(keys[:, is_first])
        self._places = np.ascontiguousarray(places[:, order[is_first]])
        self._checksums = checksums[order[is_first]]
        return len(self) - before

    def verify(self) -> Iterator[str]:
        """
        Check every byte of every shard against its SHA-256, and every text against its checksum; yield what was found
        damaged, a sentence each.
        """
        for number, name in enumerate(self._shards):
            listed = read_list(self.path, name, self.manifest)
            try:
                check_shard(self.path, name, listed.sha256)
                shard = self._open(number)
                for key, *place in zip(listed.keys, listed.starts, listed.ends, listed.checksums, strict=True):
                    shard.read(key, *map(int, place))
            except (ValueError, OSError) as error:
                yield str(error)

    def close(self) -> None:
        """Let go of open files."""
        with self._lock:
            self._opened.clear()

    def _find(self, text: Sequence[int]) -> int | None:
        """Return the place of a text in the sorted list, or `None`."""
        key = prompt_key(text)
        high, low = (np.uint64(int(half, 16)) for half in (key[:16], key[16:]))
        begin = int(np.searchsorted(self._keys[0], high))
        while begin < len(self) and self._keys[0, begin] == high:
            if self._keys[1, begin] == low:
                return begin
            begin += 1
        return None

    def _open(self, number: int) -> ShardReader:
        with self._lock:
            shard = self._opened.get(number)
            if shard is None:
                shard = ShardReader(self.path, self._shards[number], self.manifest, self._rows[number])
                self._opened[number] = shard
            self._opened.move_to_end(number)
            if len(self._opened) > _OPEN_SHARDS:
                self._opened.popitem(last=False)
            return shard
