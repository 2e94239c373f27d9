# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One shard of a store of readings: a safetensors file with one tensor, `states [rows, taps + 1, H]`, the texts one after
another, and beside it a JSON file that lists them. The shard counts once that list is there.

Shape letters:  L = text length, H = hidden size
"""

import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open

from ..responses.shards import refuse_link
from ..utils.atomic_files import explaining_failure, hash_file, sync_entry, write_file
from .manifest import ReadingManifest


TENSOR = "states"
_LIST = ".json"
_STATES = ".safetensors"
# What a safetensors file begins with, padded with the spaces that the format allows: the number of rows is filled in
# when they are all there, so that states go to the disk as they come.
_HEAD_BYTES = 512
_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float32": "F32"}
# Seconds after which a shard is closed, however small: what a killed process loses.
_CLOSE_AFTER = 600.0
_SHARD_BYTES = 2**30
# The file of a shard that is being written, and of one that is.
_NAMES = re.compile(r"\.?shard-\d{20}-[0-9a-f]{12}\.safetensors")


class ShardList(NamedTuple):
    """
    The texts of a shard, in its order.

    Attributes:
        keys (`np.ndarray` of shape `(texts, 2)`, uint64): Halves of the keys.
        starts (`np.ndarray` of shape `(texts,)`, uint32), ends: First row of each text, and the one after its last.
        checksums (`np.ndarray` of shape `(texts,)`, uint64): xxh3 of each text's bytes, seeded by its key.
        sha256 (`str`), provenance (`dict`): Of the file of states, and how they were made.
    """

    keys: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    checksums: np.ndarray
    sha256: str
    provenance: dict[str, Any]


class ShardWriter:
    """
    Writes one shard: texts go to a file with a dot before its name as they come, and [`finish`] makes it count.

    The file is locked while this process writes it, so that others tell it from what a killed one left.

    Args:
        folder (`Path`): The store.
        manifest ([`ReadingManifest`]): Its manifest.
        provenance (`dict`): How the readings are made, as JSON: engine, its version.
    """

    def __init__(self, folder: Path, manifest: ReadingManifest, provenance: dict[str, Any]):
        self._manifest, self._provenance = manifest, provenance
        self._folder = folder
        self._texts: list[tuple[str, int, int, str]] = []
        self._opened_at = time.monotonic()
        with self._explaining():
            while True:
                # The time in front keeps shards of one writer in order; what follows keeps writers apart.
                self.name = f"shard-{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
                self._path = folder / f".{self.name}{_STATES}"
                # Unbuffered: what `write` returns from is in the file, or it raised.
                self._file = self._path.open("xb", buffering=0)
                _lock(self._file.fileno(), wait=True)
                if self._path.exists():
                    break
                # Another writer swept it away before it was locked.
                self._file.close()

    @property
    def is_full(self) -> bool:
        """Whether what comes next belongs into another shard."""
        return self.num_bytes >= _SHARD_BYTES or time.monotonic() - self._opened_at > _CLOSE_AFTER

    @property
    def _num_rows(self) -> int:
        return self._texts[-1][2] if self._texts else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the texts that are whole."""
        return self._num_rows * self._manifest.bytes_per_token()

    def add(self, texts: Iterable[tuple[str, torch.Tensor]]) -> None:
        """
        Write texts that were read together, all or none of them: key and states `(L, taps + 1, H)`, in the precision
        of the store. So a call that resumes reads the others in the same company, and with the same rounding.

        Raises:
            OSError: If the disk is full or fails; the texts before these are as they were.
        """
        added, num_rows = [], self._num_rows
        with self._explaining():
            self._file.seek(_HEAD_BYTES + self.num_bytes)
            for key, states in texts:
                view = data = _bytes_of(states)
                while view:
                    view = view[self._file.write(view) :]
                added.append((key, num_rows, num_rows + len(states), f"{_checksum(data, _halves([key])[0]):016x}"))
                num_rows += len(states)
        self._texts += added

    def finish(self) -> None:
        """
        Make the shard count, with the texts that are whole; without any, nothing is left.

        Raises:
            OSError: If it cannot be written: nothing is left then.
        """
        try:
            if self._texts:
                try:
                    self._seal()
                except OSError:
                    # On a full disk the last text makes room for the list of the others.
                    self._texts.pop()
                    if not self._texts:
                        raise
                    with self._explaining():
                        self._seal()
        finally:
            self.discard()

    def discard(self) -> None:
        """Let go of the file, and remove it if it does not count."""
        self._path.unlink(missing_ok=True)
        self._file.close()

    def _explaining(self) -> AbstractContextManager[None]:
        fix = f"{str(self._folder)!r} keeps the shards before it. Make room and run the same again"
        return explaining_failure(f"A shard of readings in {str(self._folder)!r}", f"{fix}: it reads what is missing")

    def _seal(self) -> None:
        shape = [self._num_rows, len(self._manifest.layer_ids) + 1, self._manifest.hidden_size]
        dtype = _SAFETENSORS_NAMES[self._manifest.dtype]
        head = json.dumps({TENSOR: {"dtype": dtype, "shape": shape, "data_offsets": [0, self.num_bytes]}})
        # What failed may have left half a text behind the last whole one.
        self._file.truncate(_HEAD_BYTES + self.num_bytes)
        self._file.seek(0)
        self._file.write((_HEAD_BYTES - 8).to_bytes(8, "little") + head.encode().ljust(_HEAD_BYTES - 8))
        os.fsync(self._file.fileno())
        content = {
            "shard": self.name,
            "manifest": self._manifest.digest,
            "bytes": _HEAD_BYTES + self.num_bytes,
            "sha256": hash_file(self._path),
            "provenance": self._provenance,
            "texts": self._texts,
        }
        place = self._path.with_name(self.name + _STATES)
        os.rename(self._path, place)
        try:
            sync_entry(place.parent)
            write_file(place.with_suffix(_LIST), json.dumps(content).encode())
        except OSError:
            os.rename(place, self._path)
            raise


def list_shards(folder: Path) -> list[str]:
    """Return the names of the shards that count, those of one writer in its order."""
    return sorted(path.stem for path in folder.glob(f"shard-*{_LIST}"))


def sweep_leftovers(folder: Path) -> None:
    """Remove what killed writers left: files of states without a list that no process is writing."""
    for path in [*folder.glob(f".shard-*{_STATES}"), *folder.glob(f"shard-*{_STATES}")]:
        place = path.with_name(path.name.removeprefix("."))
        if not _NAMES.fullmatch(path.name) or path.is_symlink() or place.with_suffix(_LIST).exists():
            continue
        with suppress(FileNotFoundError), path.open("rb") as file:
            # Looked for again under the lock: its writer may have been about to write the list.
            if _lock(file.fileno()) and path.exists() and not place.with_suffix(_LIST).exists():
                path.unlink()


def _lock(descriptor: int, wait: bool = False) -> bool:
    """Lock a file that is being written, and return whether that was possible."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        # Another process writes it, or the file system has no locks: then nothing is ever taken for a leftover.
        return False
    return True


def read_list(folder: Path, name: str, manifest: ReadingManifest) -> ShardList:
    """
    Read the list of a shard, and compare it with the size of its states, which are not read.

    Raises:
        ValueError: If it is not what was written, naming the file, the reason and the fix.
    """
    path = folder / f"{name}{_LIST}"
    try:
        content = json.loads(refuse_link(path).read_text("utf-8"))
        if content["shard"] != name:
            raise ValueError(f"it is the list of another shard, {content['shard']!r}")
        if content["manifest"] != manifest.digest:
            raise ValueError("it is of another store (target, layers or precision)")
        keys, starts, ends, checksums = zip(*content["texts"], strict=True)
        listed = ShardList(
            _halves(keys),
            np.array(starts, dtype=np.uint32),
            np.array(ends, dtype=np.uint32),
            np.array([int(each, 16) for each in checksums], dtype=np.uint64),
            str(content["sha256"]),
            dict(content["provenance"]),
        )
        if listed.starts[0] != 0 or (listed.starts[1:] != listed.ends[:-1]).any() or (starts >= listed.ends).any():
            raise ValueError("its texts do not lie one after another")
        num_bytes = _HEAD_BYTES + int(listed.ends[-1]) * manifest.bytes_per_token()
        there = refuse_link(path.with_suffix(_STATES)).stat().st_size
        if content["bytes"] != num_bytes or there != num_bytes:
            raise ValueError(f"its states have {there:,} bytes, not the {num_bytes:,} of its texts")
        return listed
    except (ValueError, TypeError, KeyError, OverflowError, AttributeError, OSError) as error:
        raise _unusable(path, error) from error


class ShardReader:
    """
    Reads texts of one shard; from any thread.

    Raises:
        ValueError: If the file is not what its list and the manifest say, naming the reason and the fix.
    """

    def __init__(self, folder: Path, name: str, manifest: ReadingManifest, num_rows: int):
        self._path, self._row_bytes = folder / f"{name}{_STATES}", manifest.bytes_per_token()
        shape = [num_rows, len(manifest.layer_ids) + 1, manifest.hidden_size]
        expected = (_SAFETENSORS_NAMES[manifest.dtype], shape)
        try:
            self._states = safe_open(refuse_link(self._path), "pt").get_slice(TENSOR)
            found = (self._states.get_dtype(), self._states.get_shape())
            if found != expected:
                raise ValueError(f"it holds {found}, not {expected}")
            self._file = self._path.open("rb", buffering=0)
        except (ValueError, OSError, SafetensorError) as error:
            raise _unusable(self._path, error) from error

    def read(self, key: np.ndarray, start: int, end: int, checksum: int) -> torch.Tensor:
        """
        Return the states `(L, taps + 1, H)` of a text, as a view of the file; the rows of others are not read. `key`
        is its two halves.

        Raises:
            ValueError: If they are not those that were written.
        """
        # In one request to the disk, where touching the mapped file makes one per few pages.
        if hasattr(os, "posix_fadvise"):  # Not everywhere.
            span = (_HEAD_BYTES + start * self._row_bytes, (end - start) * self._row_bytes)
            os.posix_fadvise(self._file.fileno(), *span, os.POSIX_FADV_WILLNEED)
        states = self._states[start:end]
        if _checksum(_bytes_of(states), key) != checksum:
            raise _unusable(self._path, "its content has changed since it was written (xxh3 differs)")
        return states


def check_shard(folder: Path, name: str, sha256: str) -> None:
    """Raise `ValueError` if the file of a shard's states is not what was written, to the last byte."""
    path = folder / f"{name}{_STATES}"
    if hash_file(refuse_link(path)) != sha256:
        raise _unusable(path, "its content has changed since it was written (SHA-256 differs)")


def _unusable(path: Path, reason: Exception | str) -> ValueError:
    what = f"the field {reason} is missing" if isinstance(reason, KeyError) else str(reason).rstrip(".")
    return ValueError(
        f"The shard of readings {path} is not usable: {what}. Delete {path.stem}.* there; the same "
        "`trl-draft-opd read` then reads its texts again."
    )


def _halves(keys: Iterable[str]) -> np.ndarray:
    """Return keys of 32 hex digits as `(texts, 2)` numbers."""
    keys = list(keys)
    if any(len(key) != 32 for key in keys):
        raise ValueError("a key has not 32 hex digits")
    return np.frombuffer(bytes.fromhex("".join(keys)), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _checksum(data: memoryview, key: np.ndarray) -> int:
    """Return the xxh3 of a text's states, which differs for each text: a key that was moved is found out."""
    return xxhash.xxh3_64_intdigest(data, seed=int(key[1]))


def _bytes_of(states: torch.Tensor) -> memoryview:
    return states.contiguous().view(torch.uint8).numpy().reshape(-1).data
