# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The folder of stored responses: find one by its prompt, add more, see what others added. Knows no model and no engine.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from ..utils.atomic_files import check_place, explaining_failure, write_file
from .origin import Origin
from .shards import SCHEMA, StoredResponse, check_rows, prompt_key, read_shard, refuse_link, write_shard


MANIFEST = "manifest.json"
_FORMAT_NAME = "trl-draft-opd responses"
_FORMAT = f"{_FORMAT_NAME} 1"
# What is kept in memory: training reads ids, and log-probabilities stay on disk.
_COLUMNS = ["prompt_ids", "completion_ids"]
# Seconds that a response waits for its shard to fill up.
_WRITE_EVERY = 60.0

_SHARDS = "shard-*.parquet"


class _OtherStore(ValueError):
    """A folder of this package that holds something else, which needs no mending."""


class ResponseStore:
    """
    Responses of one target under one distribution, in a folder that several processes may write to and read at the
    same time.

    A manifest states who wrote the responses. Each shard is written whole or not at all and proven by the hash in its
    name, so there is no list that writers share. One response is kept per prompt; where writers gave several, the one
    in the first shard by name.

    Open with [`ResponseStore.open`] to write, with [`ResponseStore.read_only`] to look.

    Example:

    ```python
    >>> from trl_draft_opd import Origin, ResponseStore

    >>> origin = Origin.of(target, sampling=sampling, max_completion_length=512)
    >>> store = ResponseStore.open("responses", origin)
    >>> store.find([1, 2, 3])
    ```
    """

    def __init__(self, path: Path, origin: Origin, *, is_read_only: bool) -> None:
        self.path = path
        self.origin = origin
        self.is_read_only = is_read_only
        self._tables: dict[str, pa.Table] = {}
        # Key of a prompt -> name of the shard and row in it.
        self._places: dict[str, tuple[str, int]] = {}
        self.refresh()

    @classmethod
    def open(cls, path: str | Path, origin: Origin) -> "ResponseStore":
        """
        Open a store for writing, or make one.

        Args:
            path (`str` or `Path`): Its folder.
            origin ([`Origin`]): Who is about to read or write the responses.

        Raises:
            ValueError: If the folder holds responses of another origin, another release's layout, a damaged shard, or
                other files.
        """
        folder = Path(path)
        check_place(folder, "The folder of responses")
        with explaining_failure(f"The folder of responses {str(folder)!r}", "Make room, or name another"):
            folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            shards = sorted(folder.glob(_SHARDS))
            held = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
            strangers = sorted(held - {shard.name for shard in shards})
            # Another writer may have made the manifest between the two looks.
            if strangers and not (folder / MANIFEST).exists():
                raise ValueError(
                    f"The folder {folder} holds {strangers[:3]} and no {MANIFEST}: it is no response store. Give an "
                    "empty or a new folder."
                )
            # Of a store that has lost its manifest: each proves what it is, before a new one is written.
            try:
                for shard in shards:
                    read_shard(shard, origin)
            except ValueError as error:
                raise ValueError(
                    f"The folder {folder} has lost its {MANIFEST}, and gets a new one under the target and settings "
                    f"that its responses were written with alone. {error}"
                ) from error
            content = {"format": _FORMAT, "digest": origin.digest, "origin": asdict(origin)}
            with explaining_failure(f"The manifest of {str(folder)!r}", "Make room, or name another folder"):
                write_file(folder / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())
        # Read back even after writing it: of two writers that make the same folder, the later one's manifest counts.
        stored = _read_manifest(folder)
        # A first try that was refused or stopped leaves the manifest alone.
        is_empty = not any(folder.glob(_SHARDS))
        note = ", which are none yet (delete the folder to begin anew)," if is_empty else ""
        origin.check_same(stored, f"The responses in {folder}{note}")
        return cls(folder, stored, is_read_only=False)

    @classmethod
    def read_only(cls, path: str | Path) -> "ResponseStore":
        """
        Open a store to look at it, whoever wrote it.

        Raises:
            ValueError: If there is no store, or it is damaged.
        """
        folder = Path(path)
        return cls(folder, _read_manifest(folder), is_read_only=True)

    def __len__(self) -> int:
        return len(self._places)

    def find(self, prompt_ids: Sequence[int]) -> list[int] | None:
        """Return the response to a prompt, or `None`. It is complete iff its last id is an end-of-sequence id."""
        place = self._places.get(prompt_key(prompt_ids))
        return None if place is None else self._tables[place[0]]["completion_ids"][place[1]].as_py()

    def read(self, prompt_ids: Sequence[int]) -> StoredResponse | None:
        """Return the response to a prompt with its log-probabilities, read from its file, or `None`."""
        place = self._places.get(prompt_key(prompt_ids))
        if place is None:
            return None
        table = read_shard(self.path / place[0], self.origin)
        return StoredResponse(*(table[name][place[1]].as_py() for name in StoredResponse._fields))

    def add(self, rows: Iterable[StoredResponse | tuple], provenance: dict[str, Any] | None = None) -> int:
        """
        Write responses as one shard.

        Args:
            rows (`Iterable[StoredResponse]`):
                `(prompt_ids, completion_ids, logprobs or None, finish_reason)`; token ids as plain lists.
            provenance (`dict`, *optional*):
                How they were made, as JSON: engine, its version, precision. Kept in the shard's metadata.

        Returns:
            `int`: rows written. Prompts that have a response already are left out.

        Raises:
            ValueError: If a row is not what the target could have written, naming it, or the store is read-only.
                Nothing is written then.
            OSError: If the shard cannot be written. Those before it stay.
        """
        if self.is_read_only:
            raise ValueError(f"The store {self.path} is open for reading only. Open it with `ResponseStore.open`.")
        rows = [StoredResponse._make(row) for row in rows]
        try:
            check_rows(rows, self.origin)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Responses for {self.path} are not usable: {error}") from error
        fresh: dict[str, dict[str, Any]] = {}
        for row in rows:
            if (key := prompt_key(row.prompt_ids)) not in self._places:
                fresh.setdefault(key, row._asdict())
        if not fresh:
            return 0
        table = pa.Table.from_pylist(list(fresh.values()), SCHEMA)
        fix = (
            f"{str(self.path)!r} keeps the {len(self)} that it holds. Make room and run the same again: only missing "
            "ones are written"
        )
        with explaining_failure(f"{len(table)} responses", fix):
            name = write_shard(self.path, table, self.origin, provenance or {})
        self._take_in(name, table)
        return len(table)

    def add_in_shards(
        self, rows: Iterable[StoredResponse | None], *, shard_size: int, provenance: dict[str, Any] | None = None
    ) -> int:
        """
        Write responses while they come in: each `shard_size` of them as one shard, what has come in after a minute,
        and what is left when they end or fail. A row that is `None` says that time has passed.

        Returns:
            `int`: rows written, see [`ResponseStore.add`].

        Raises:
            ValueError: If `shard_size` is below 1, or as for [`ResponseStore.add`].
        """
        if shard_size < 1:
            raise ValueError(f"`shard_size` must be at least 1, got {shard_size}.")
        num_written, waiting, written_at = 0, [], time.monotonic()
        try:
            for row in rows:
                waiting += [] if row is None else [row]
                if len(waiting) >= shard_size or time.monotonic() - written_at > _WRITE_EVERY:
                    num_written += self.add(waiting, provenance)
                    # Only now: what a signal interrupted is written below.
                    waiting, written_at = [], time.monotonic()
        finally:
            num_written += self.add(waiting, provenance)
        return num_written

    def refresh(self) -> int:
        """
        Take in the shards that other writers have added.

        Returns:
            `int`: prompts that are new.

        Raises:
            ValueError: If one of them is truncated, changed or foreign, naming it.
        """
        before = len(self)
        for path in sorted(self.path.glob(_SHARDS)):
            if path.name not in self._tables:
                self._take_in(path.name, read_shard(path, self.origin))
        return len(self) - before

    def _take_in(self, name: str, table: pa.Table) -> None:
        self._tables[name] = table.select(_COLUMNS).combine_chunks()
        for row, prompt_ids in enumerate(table["prompt_ids"]):
            key = prompt_key(prompt_ids.values.to_numpy())
            # By name and not by arrival, so that every process settles on the same response.
            self._places[key] = min(self._places.get(key, (name, row)), (name, row))

    def to_dataset(self) -> Dataset:
        """Return all responses as a `Dataset` with `prompt_ids` and `completion_ids`, in the order of the shards."""
        rows_of: dict[str, list[int]] = {}
        for name, row in sorted(self._places.values()):
            rows_of.setdefault(name, []).append(row)
        parts = [self._tables[name].take(rows) for name, rows in rows_of.items()]
        empty = SCHEMA.empty_table().select(_COLUMNS)
        return Dataset(InMemoryTable(pa.concat_tables([empty, *parts]).combine_chunks()))

    def texts(self, *, max_rows: int | None) -> list[tuple[list[int], list[int]]]:
        """Return pairs of prompt ids and response ids: all of them, or up to `max_rows` evenly spaced ones."""
        rows = self.to_dataset()
        if max_rows is not None and len(rows) > max_rows:
            rows = rows.select([index * len(rows) // max_rows for index in range(max_rows)])
        return list(zip(rows["prompt_ids"], rows["completion_ids"], strict=True))

    def missing(self, prompts: Iterable[Sequence[int]]) -> list[list[int]]:
        """
        Return the prompts without a response, each once, in their order.

        Raises:
            ValueError: If a prompt is empty, or leaves no room for `max_completion_length` in the target's positions.
        """
        left: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            length = len(prompt) + self.origin.max_completion_length
            if not len(prompt):
                raise ValueError(f"Prompt {row} is empty: the target has nothing to respond to. Fill it or drop it.")
            if self.origin.max_positions is not None and length > self.origin.max_positions:
                raise ValueError(
                    f"Prompt {row} has {len(prompt)} tokens; with `max_completion_length` "
                    f"{self.origin.max_completion_length} that exceeds the target's {self.origin.max_positions} "
                    "positions. Lower `max_completion_length`, or drop long prompts with `max_prompt_length`."
                )
            key = prompt_key(prompt)
            if key not in self._places:
                left.setdefault(key, list(prompt))
        return list(left.values())


def is_store(folder: Path) -> bool:
    """Whether a folder holds responses, in whatever state."""
    path = folder / MANIFEST
    return path.is_file() and f'"format": "{_FORMAT_NAME}' in path.read_text("utf-8", errors="replace")


def describe_filling(store: ResponseStore, num_missing: int | None) -> str:
    """
    Return what is about to be added to a store: `num_missing` responses, or those that training comes to (`None`). Of
    a new one, it names the folder beside it that may have been meant.
    """
    added = "responses as training comes to them" if num_missing is None else f"{num_missing:,} responses"
    if len(store):
        return f"{store.path} holds {len(store):,} responses; the target adds {added}."
    siblings = [folder.name for folder in store.path.resolve().parent.iterdir() if is_store(folder)]
    near = get_close_matches(store.path.name, [name for name in siblings if name != store.path.name], n=1)
    hint = f" If you meant {str(store.path.with_name(near[0]))!r}, which holds responses, stop now." if near else ""
    return f"{store.path} is new: the target writes {added} there.{hint}"


def _read_manifest(folder: Path) -> Origin:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"There is no response store in {folder}: it has no {MANIFEST}. Write one with `trl-draft-opd generate`."
        )
    try:
        content = json.loads(refuse_link(path).read_text("utf-8"))
        found = content.get("format") if isinstance(content, dict) else None
        if str(found).startswith("trl-draft-opd ") and not str(found).startswith(_FORMAT_NAME):
            raise _OtherStore(
                f"{str(folder)!r} holds {str(found).split()[1]}, and no responses. Name the folder that "
                "`trl-draft-opd generate` wrote, or a new one."
            )
        if found != _FORMAT:
            raise ValueError(f"its format is {found!r}, this release reads {_FORMAT!r}")
        fields = {**content["origin"], "eos_token_ids": tuple(content["origin"]["eos_token_ids"])}
        origin = Origin(**fields)
        if content["digest"] != origin.digest:
            raise ValueError("its fields were changed after it was written")
    except _OtherStore:
        raise
    except (ValueError, TypeError, KeyError) as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"The manifest {path} is not usable: {reason}. The responses beside it are as they were: restore this "
            "file, or delete it alone and run the same command again, which takes in the shards that its target and "
            "settings wrote. Or give another folder."
        ) from error
    return origin
