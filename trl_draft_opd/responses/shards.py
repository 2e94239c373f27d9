# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One file of stored responses: what a row may hold, and how a file is proven to be what was written. Knows no reader.
"""

import hashlib
import io
import json
import time
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..utils.atomic_files import write_file
from .origin import Origin


SCHEMA = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
    ]
)
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

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    logprobs: Sequence[float] | None
    finish_reason: str


def prompt_key(prompt_ids: Sequence[int] | np.ndarray) -> str:
    """Return the key a prompt is found by: 32 hex digits of the SHA-256 of its ids as little-endian int32."""
    return _digest(np.asarray(prompt_ids, dtype="<i4").tobytes())


def why_impossible(row: StoredResponse, origin: Origin) -> str | None:
    """Return why the target of an origin cannot have written a response, as the end of a sentence, or `None`."""
    prompt, completion, logprobs, finish_reason = row
    for ids in (prompt, completion):
        array = np.asarray(ids)
        if array.dtype.kind == "i":
            outside = array[(array < 0) | (array >= origin.vocab_size)]
        else:
            outside = [i for i in ids if not isinstance(i, Integral) or not 0 <= i < origin.vocab_size]
        if len(outside):
            return (
                f"holds the token id {outside[0]}, outside the target's vocabulary of {origin.vocab_size} tokens: it "
                "is another model's or another tokenizer's."
            )
    if not len(prompt):
        return "has an empty prompt. Fill it or drop the row."
    if not len(completion):
        return "has an empty response. Drop the row."
    if len(completion) > origin.max_completion_length:
        return (
            f"has a response of {len(completion)} tokens, more than `max_completion_length` "
            f"{origin.max_completion_length}."
        )
    total = len(prompt) + len(completion)
    if origin.max_positions is not None and total > origin.max_positions:
        return (
            f"has {total} tokens, but the target has {origin.max_positions} positions. Lower `max_prompt_length` or "
            "`max_completion_length`."
        )
    if np.isin(completion[:-1], origin.eos_token_ids).any():
        return f"continues after an end-of-sequence id ({list(origin.eos_token_ids)}). Cut the response there."
    if finish_reason != (expected := origin.finish_reason(completion)):
        return f"has the finish_reason {finish_reason!r}, but its last token {completion[-1]} means {expected!r}."
    if logprobs is None:
        return None
    if len(logprobs) != len(completion):
        return f"has {len(logprobs)} log-probabilities for {len(completion)} tokens."
    values = np.asarray(logprobs, dtype=np.float64)
    wrong = values[~(np.isfinite(values) & (values <= _LOGPROB_ROUNDOFF))]
    return f"holds the log-probability {wrong[0]}; it must be finite and not above 0." if len(wrong) else None


def check_rows(rows: Iterable[StoredResponse], origin: Origin) -> None:
    """Raise `ValueError` naming the first row that the target of an origin cannot have written."""
    for number, row in enumerate(rows):
        reason = why_impossible(row, origin)
        if reason is not None:
            raise ValueError(f"row {number} {reason}")


def write_shard(folder: Path, table: pa.Table, origin: Origin, provenance: dict[str, Any]) -> str:
    """Write checked rows as one shard, which proves itself: its name holds its hash. Return the name."""
    metadata = {"origin": origin.digest, "provenance": json.dumps(provenance)}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
    data = buffer.getvalue()
    # The time in front keeps shards of one writer in order.
    name = f"shard-{time.time_ns():020d}-{_digest(data)}.parquet"
    write_file(folder / name, data)
    return name


def read_shard(path: Path, origin: Origin) -> pa.Table:
    """Read one shard; raise `ValueError` with its path, the reason and the fix if it is not what was written."""
    try:
        data = refuse_link(path).read_bytes()
        if not path.stem.endswith(f"-{_digest(data)}"):
            raise ValueError("its content has changed since it was written (SHA-256 differs)")
        table = pq.read_table(pa.BufferReader(data))
        if not table.schema.equals(SCHEMA):
            raise ValueError(f"it has the columns {table.schema.names}, not {SCHEMA.names}")
        if (table.schema.metadata or {}).get(b"origin") != origin.digest.encode():
            raise ValueError("it is of another origin (target, tokenizer, template or sampling settings)")
        columns = [_arrays(table[column]) for column in SCHEMA.names[:3]]
        check_rows(map(StoredResponse, *columns, table["finish_reason"].to_pylist()), origin)
        return table
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"Shard {path} is not usable: {str(error).rstrip('.')}. Delete it; `trl-draft-opd generate` then writes "
            "its responses again."
        ) from error


def _arrays(column: pa.ChunkedArray) -> list[Any]:
    """Return each list of a column as an array that shares its memory, or `None`."""
    return [None if row.values is None else row.values.to_numpy(zero_copy_only=False) for row in column]


def refuse_link(path: Path) -> Path:
    """Return the path of a store's file, or raise `ValueError` if it is a link out of the store."""
    if path.resolve().parent != path.parent.resolve():
        raise ValueError(f"{path.name} is a link to {str(path.resolve())!r}, outside of its folder.")
    return path


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
