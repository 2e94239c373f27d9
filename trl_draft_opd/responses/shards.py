# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The files of stored responses: one parquet shard with a JSON sidecar next to it, each written whole or not at all.

Knows the columns, what a row may hold, and how a file is proven to be what was written. Refuses to know who reads it.
"""

import hashlib
import io
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..utils.atomic_files import write_file
from .origin import Origin


SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
    ]
)
FINISH_REASONS = ("stop", "length")
# Engines compute log-probabilities in their own precision: a certain token may come out a little above 0.
_LOGPROB_ROUNDOFF = 1e-3


class StoredResponse(NamedTuple):
    """
    One prompt and the target's response to it.

    Attributes:
        prompt_ids (`list[int]`), completion_ids (`list[int]`):
            Token ids; the response's end-of-sequence id included where one was written.
        logprobs (`list[float]` or `None`):
            Log-probability of each response token, as the engine gives it.
        finish_reason (`str`):
            `"stop"`: the response ends with an end-of-sequence id. `"length"`: it was cut.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


def prompt_key(prompt_ids: Sequence[int]) -> str:
    """
    Return the key a prompt is found by: the first 32 hex digits of the SHA-256 of its ids as little-endian int32.
    """
    return hashlib.sha256(np.asarray(prompt_ids, dtype="<i4").tobytes()).hexdigest()[:32]


def build_table(rows: Iterable[StoredResponse], origin: Origin) -> pa.Table:
    """
    Turn rows into a table of the stored columns.

    Raises:
        ValueError: If a row is not what this origin could have written; the message names it.
    """
    rows = list(rows)
    for index, row in enumerate(rows):
        wrong = [i for i in (*row[0], *row[1]) if not isinstance(i, Integral) or not 0 <= i < origin.vocab_size]
        if wrong:
            raise ValueError(_outside_vocabulary(index, wrong[0], origin))
    prompts, completions, logprobs, reasons = zip(*rows, strict=True) if rows else ((), (), (), ())
    columns = [[prompt_key(ids) for ids in prompts], prompts, completions, reasons, logprobs]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], SCHEMA)
    check_table(table, origin)
    return table


def check_table(table: pa.Table, origin: Origin) -> None:
    """
    Check that every row is a response this origin could have written.

    Raises:
        ValueError: Naming the first row that is not, and why.
    """
    for name in ("prompt_ids", "completion_ids"):
        column = table[name]
        if column.null_count or pc.list_flatten(column).null_count:
            raise ValueError(f"`{name}` holds rows or ids that are missing.")
    prompts, completions = _Lists(table["prompt_ids"]), _Lists(table["completion_ids"])
    for lists in (prompts, completions):
        _check_ids(lists, origin)
    _refuse_first(prompts.lengths == 0, lambda row: f"row {row} has an empty prompt. Fill it or drop the row.")
    _refuse_first(completions.lengths == 0, lambda row: f"row {row} has an empty response. Drop the row.")
    _refuse_first(
        completions.lengths > origin.max_new_tokens,
        lambda row: (
            f"row {row} has a response of {completions.lengths[row]} tokens, more than `max_new_tokens` "
            f"{origin.max_new_tokens}."
        ),
    )
    totals = prompts.lengths + completions.lengths
    if origin.max_positions is not None:
        _refuse_first(
            totals > origin.max_positions,
            lambda row: (
                f"row {row} has {totals[row]} tokens, but the target has {origin.max_positions} positions. Lower "
                "`max_prompt_length` or `max_new_tokens`."
            ),
        )
    _check_ends(completions, table["finish_reason"], origin)
    _check_logprobs(table["logprobs"], completions)


class _Lists:
    """A column of lists as flat values, and how many belong to each row."""

    def __init__(self, column: pa.ChunkedArray):
        self.values = pc.list_flatten(column).to_numpy()
        self.lengths = pc.list_value_length(column).fill_null(0).to_numpy()
        self.row_of_value = np.repeat(np.arange(len(self.lengths)), self.lengths)
        self.last = np.cumsum(self.lengths) - 1


def _refuse_first(is_wrong: np.ndarray, message: Any) -> None:
    rows = np.flatnonzero(is_wrong)
    if len(rows):
        raise ValueError(message(int(rows[0])))


def _outside_vocabulary(row: int, token_id: Any, origin: Origin) -> str:
    return (
        f"row {row} holds the token id {token_id!r}, outside the target's vocabulary of {origin.vocab_size} tokens. "
        "Use the target's own tokenizer."
    )


def _check_ids(lists: _Lists, origin: Origin) -> None:
    outside = np.flatnonzero((lists.values < 0) | (lists.values >= origin.vocab_size))
    if len(outside):
        raise ValueError(
            _outside_vocabulary(int(lists.row_of_value[outside[0]]), int(lists.values[outside[0]]), origin)
        )


def _check_ends(completions: _Lists, finish_reasons: pa.ChunkedArray, origin: Origin) -> None:
    """Check that a response ends with its first end-of-sequence id, and that `finish_reason` agrees."""
    is_eos = np.isin(completions.values, origin.eos_token_ids)
    ends_with_eos = is_eos[completions.last]
    is_last = np.zeros_like(is_eos)
    is_last[completions.last] = True
    too_early = np.zeros(len(completions.lengths), dtype=bool)
    too_early[completions.row_of_value[is_eos & ~is_last]] = True
    _refuse_first(
        too_early,
        lambda row: (
            f"row {row} continues after an end-of-sequence id ({list(origin.eos_token_ids)}). Cut the response there."
        ),
    )
    reasons = np.array(finish_reasons.to_pylist(), dtype=object)
    _refuse_first(
        ~np.isin(reasons.astype(str), FINISH_REASONS),
        lambda row: f"row {row} has the finish_reason {reasons[row]!r}, must be one of {FINISH_REASONS}.",
    )
    _refuse_first(
        (reasons == "stop") != ends_with_eos,
        lambda row: (
            f"row {row} has the finish_reason {reasons[row]!r}, but its last token is "
            f"{'an' if ends_with_eos[row] else 'no'} end-of-sequence id ({list(origin.eos_token_ids)})."
        ),
    )


def _check_logprobs(column: pa.ChunkedArray, completions: _Lists) -> None:
    logprobs = _Lists(column)
    has_none = np.array(column.is_null().to_pylist(), dtype=bool)
    _refuse_first(
        ~has_none & (logprobs.lengths != completions.lengths),
        lambda row: f"row {row} has {logprobs.lengths[row]} log-probabilities for {completions.lengths[row]} tokens.",
    )
    # Written so that NaN, and the NaN that a missing value turns into, are refused too.
    wrong = np.flatnonzero(~(logprobs.values <= _LOGPROB_ROUNDOFF) | np.isinf(logprobs.values))
    if len(wrong):
        raise ValueError(
            f"row {logprobs.row_of_value[wrong[0]]} holds the log-probability {logprobs.values[wrong[0]]}; it must be "
            "finite and not above 0."
        )


# ---- files ----------------------------------------------------------------------------------------------------------


def write_shard(folder: Path, table: pa.Table, origin: Origin, provenance: dict[str, Any]) -> str:
    """
    Write one shard and return its name. It counts from the moment its sidecar is there, which comes last.

    Args:
        folder (`Path`): The store.
        table (`pa.Table`): Checked rows of [`build_table`].
        origin ([`Origin`]): Origin of the rows.
        provenance (`dict`): How they were made: engine, its version, precision.
    """
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    data = buffer.getvalue()
    # Unique among writers without any agreement between them; the time in front keeps shards of one writer in order.
    name = f"shard-{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
    sidecar = {
        "origin": origin.digest,
        "rows": len(table),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "provenance": provenance,
    }
    write_file(folder / f"{name}.parquet", data)
    write_file(folder / f"{name}.json", (json.dumps(sidecar, indent=2) + "\n").encode())
    return name


def list_shards(folder: Path) -> list[str]:
    """Return the names of all whole shards, in order."""
    return sorted(path.stem for path in folder.glob("shard-*.json"))


def read_shard(folder: Path, name: str, origin: Origin, columns: Sequence[str]) -> pa.Table:
    """
    Read one shard and prove that it is what was written.

    Raises:
        ValueError: If it is truncated, changed, of another origin, or holds rows that this origin cannot have written;
            the message names the file, the reason and the fix.
    """
    path = folder / f"{name}.parquet"
    try:
        return _read_proven(folder, name, origin).select(list(columns))
    except (ValueError, KeyError, TypeError, OSError) as error:
        # Parquet's own errors, a missing field of the sidecar and a missing file are one thing to a user.
        reason = f"the sidecar {name}.json lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"Shard {path} is not usable: {reason.rstrip('.')}. Delete {name}.parquet and {name}.json; "
            "`trl-draft-opd generate` then writes their responses again."
        ) from error


def refuse_link(path: Path) -> Path:
    """Return the path of a store's file, or raise `ValueError` if it is a link out of the store."""
    if path.resolve().parent != path.parent.resolve():
        raise ValueError(f"{path.name} is a link to {str(path.resolve())!r}, outside of its folder.")
    return path


def _read_proven(folder: Path, name: str, origin: Origin) -> pa.Table:
    sidecar = json.loads(refuse_link(folder / f"{name}.json").read_text("utf-8"))
    if sidecar["origin"] != origin.digest:
        raise ValueError("it is of another origin (target, tokenizer, template or sampling settings) than its folder")
    data = refuse_link(folder / f"{name}.parquet").read_bytes()
    if len(data) != sidecar["bytes"]:
        raise ValueError(f"it has {len(data)} bytes, {sidecar['bytes']} were written")
    if hashlib.sha256(data).hexdigest() != sidecar["sha256"]:
        raise ValueError("its content has changed since it was written (SHA-256 differs)")
    table = pq.read_table(pa.BufferReader(data))
    if not table.schema.equals(SCHEMA) or len(table) != sidecar["rows"]:
        raise ValueError(
            f"it holds {len(table)} rows of {table.schema.names}, not {sidecar['rows']} of {SCHEMA.names}"
        )
    check_table(table, origin)
    for row, (key, prompt_ids) in enumerate(zip(table["key"], table["prompt_ids"], strict=True)):
        if key.as_py() != prompt_key(prompt_ids.values.to_numpy()):
            raise ValueError(f"row {row} stands under another prompt's key")
    return table
