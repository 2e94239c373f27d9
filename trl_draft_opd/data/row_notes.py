# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Encodes rows one by one, and says which were left out, read in part or repeated, and why. Knows no tokenizer.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError


# Ends of sentences that begin with a number of rows.
_REPEATED_PROMPT = "repeat an earlier row's prompt: the target responds once, and each row trains on that response."
_REPEATED_ROW = "repeat an earlier row token by token, and are trained on again. Drop them if that is not meant."


class Skip(Exception):
    """Leaves a row out; its one argument is the reason that is counted."""


def encode_row(
    row: dict,
    index: int,
    *,
    encode: Callable[[dict], dict],
    columns: tuple[str, ...],
    convert: Callable[[dict], dict],
) -> dict[str, Any]:
    """Encode one row; a skipped one stays, empty and marked, so that it can be counted."""
    try:
        encoded = encode(convert(row))
        # Of what tells rows apart, as text: a set of the ids themselves would be as large as the dataset.
        key = hashlib.sha256(repr([encoded[column] for column in columns]).encode()).hexdigest()
        return {**encoded, "sample_id": index, "skipped": "", "key": key}
    except Skip as skip:
        return {**dict.fromkeys(columns, []), "notes": [], "sample_id": index, "skipped": skip.args[0], "key": None}
    except (ValueError, TemplateError) as error:
        raise ValueError(f"Row {index} of the dataset: {error}") from error


class StreamNotes:
    """Keeps the rows of a stream that were not skipped, and warns of the first one of each kind."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, row: dict) -> bool:
        for reason in {row["skipped"], *row["notes"]} - self._seen - {""}:
            self._seen.add(reason)
            start = "Rows are skipped that" if reason == row["skipped"] else "Rows of the stream"
            warnings.warn(f"{start} {reason.rstrip('.')}. The first is row {row['sample_id']}; others are not named.")
        return not row["skipped"]


def _count(reason: str, count: int) -> str:
    """Return a reason with the number of rows that it holds of."""
    return f"1 {reason.replace('have ', 'has ', 1)}" if count == 1 else f"{count} {reason}"


def drop_skipped(encoded: Dataset, columns: tuple[str, ...]) -> Dataset:
    """Return the rows that were not skipped, and warn of those that were and of what was noted."""
    skipped, noted = encoded["skipped"][:], encoded["notes"][:]
    notes = Counter(chain.from_iterable(noted))
    first = {note: row for row, found in reversed([*enumerate(noted)]) for note in found}
    kept, reasons = [i for i, reason in enumerate(skipped) if not reason], Counter(filter(None, skipped))
    if not kept:
        raise ValueError(f"No row is left: {'; '.join(_count(*each) for each in reasons.most_common())}.")
    if reasons:
        counted = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        warnings.warn(f"Skipped {reasons.total()} of {len(encoded)} rows: {counted}.")
    for note, count in notes.items():
        warnings.warn(f"{count} of {len(encoded)} rows {note} The first is row {first[note]}.")
    repeated = len(kept) - len({key for key in encoded["key"][:] if key is not None})
    if repeated:
        note = _REPEATED_PROMPT if columns == ("prompt_ids",) else _REPEATED_ROW
        warnings.warn(f"{repeated} of {len(encoded)} rows {note}")
    encoded = encoded.remove_columns(["skipped", "notes", "key"])
    return encoded.select(kept) if reasons else encoded
