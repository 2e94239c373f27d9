# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Loads rows from the Hub, a folder or a file. Of a damaged file, the error names the line."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid


_FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(name: str, config: str | None, split: str) -> Dataset:
    """Load one split of a Hub dataset, of a folder, or of a file, whose split is `train`."""
    path = Path(name)
    kind = _FILE_KINDS.get(path.suffix)
    if kind is not None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no dataset file {name!r}.")
        return _load(name, kind, split, data_files=str(path))
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        return _load(name, name, split, name=config)
    saved = load_from_disk(name)
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"The folder {name!r} holds the splits {sorted(splits)}, not {split!r}.")
    return splits[split]


def _load(shown: str, path: str, split: str, **options: Any) -> Dataset:
    """Call `load_dataset`, whose own errors about damaged files name neither file nor line."""
    try:
        rows = load_dataset(path, split=split, **options)
        if path in _FILE_KINDS.values():
            # Arrow does not check that text is UTF-8: reading the row would fail later, without its number.
            rows.data.validate(full=True)
        return rows
    except (DatasetGenerationError, UnicodeDecodeError, ArrowInvalid, StopIteration) as error:
        reason = str(error.__cause__ or error) or "it has no rows"
        if path == "json":
            reason = find_json_fault(Path(shown)) or reason
        raise ValueError(f"The dataset {shown!r} cannot be read: {reason.rstrip('.')}. Fix or replace it.") from error


def find_json_fault(path: Path) -> str | None:
    """Return which line of a file of JSON rows is damaged and how, or `None`."""
    lines = path.read_bytes().splitlines(keepends=True)
    if path.suffix == ".json" and lines and not lines[0].strip().endswith(b"}"):
        lines = [b"".join(lines)]  # one value over many lines, not one row per line
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            return f"line {number} is not UTF-8 (byte {line[error.start]:#04x} at {error.start})"
        except UnicodeEncodeError:
            return f"line {number} holds half of a surrogate pair"
        except json.JSONDecodeError as error:
            number += error.lineno - 1
            if line is lines[-1] and not line.endswith(b"\n"):
                return f"line {number}, its last, ends in the middle: its writer was interrupted ({error.msg})"
            return f"line {number} is not JSON ({error.msg} at column {error.colno})"
        if not isinstance(row, dict) and line is not lines[0]:
            return f"line {number} is not a row but a {type(row).__name__}"
    return None
