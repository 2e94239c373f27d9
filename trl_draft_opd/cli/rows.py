# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Loads rows from files, a folder or the Hub. Of a damaged file, the error names the line."""

import bz2
import difflib
import gzip
import json
import lzma
import warnings
from collections.abc import Sequence
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Json, List, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pyarrow import ArrowInvalid

from ..export import hub_id_of
from ..responses.store import ResponseStore, is_store
from ..utils.console import hiding_log_lines


# What reads a file, by its ending in small letters, and how.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".arrow": ("arrow", {}),
}
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
# Those that the standard library opens, to look for a damaged line.
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def load_rows(name: str, config: str | None, split: str) -> Dataset:
    """
    Load one split of files (a path or a pattern; their split is `train`), of a folder, or of a Hub dataset; or all of
    a folder of responses, which stays in memory: no copy of it is left in a cache.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If its kind is not known, it is damaged, or has no such split.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _load_files(name, [path], split)
    if path.is_dir() and is_store(path):
        return ResponseStore.read_only(path).to_dataset()
    if path.is_dir():
        return _load_folder(name, path, config, split)
    if has_magic(name):
        files = sorted(file for file in map(Path, glob(str(path), recursive=True)) if file.is_file())
        if not files:
            raise FileNotFoundError(f"No dataset file matches {name!r}.")
        return _load_files(name, files, split)
    is_known = _find_reader(path) is not None
    if is_known or hub_id_of(name) is None or (path.parent != Path() and path.parent.is_dir()):
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {str(path.with_name(near[0]))!r}?" if near else ""
        raise FileNotFoundError(f"There is no dataset file {name!r}.{hint}")
    try:
        return _load(name, [], name, split, name=config)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"There is no file or folder {name!r} here, and as a Hub dataset it cannot be loaded: {error}"
        ) from error


def _find_reader(path: Path) -> tuple[str, dict[str, Any]] | None:
    """Return what reads a file with this name, compressed or not."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in _COMPRESSIONS:
        endings.pop()
    return _READERS.get(endings[-1]) if endings else None


def _load_files(name: str, files: Sequence[Path], split: str) -> Dataset:
    readers = {str(file): _find_reader(file) for file in files}
    kinds = {None if reader is None else reader[0] for reader in readers.values()}
    if len(kinds) > 1:
        raise ValueError(f"{name!r} holds files of several kinds: {sorted(readers)}. Name one kind, like '*.jsonl'.")
    reader = readers[str(files[0])]
    if reader is None:
        endings = " or ".join(_READERS)
        raise ValueError(
            f"The dataset file {name!r} is of no known kind: its name must end with {endings}, then "
            f"{', '.join(_COMPRESSIONS)} if compressed. Rename it."
        )
    kind, options = reader
    return _load(name, files, kind, split, data_files=[escape(str(file)) for file in files], **options)


def _load_folder(name: str, path: Path, config: str | None, split: str) -> Dataset:
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _find_reader(file) is not None)
        if any(ending != ending.lower() for file in files for ending in file.suffixes):
            # `datasets` passes over endings in capitals when it looks for the files of a folder.
            return _load_files(name, files, split)
        rows = _load(name, [], str(path), split, name=config)
        _note_left_out(name, path, files, config, split)
        return rows
    saved = load_from_disk(path)
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:
        raise ValueError(f"The folder {name!r} holds the splits {sorted(splits)}, not {split!r}.")
    return splits[split]


def _note_left_out(name: str, path: Path, files: Sequence[Path], config: str | None, split: str) -> None:
    """Say which files of a folder a split was read from, where others are left out: `datasets` goes by their names."""
    of_split = load_dataset_builder(str(path), name=config).config.data_files or {}
    # A split may be a slice, or a sum of several.
    names = [part.partition("[")[0] for part in split.split("+")]
    taken = {Path(file).resolve() for part in names for file in of_split.get(part, [])}
    seen = [file for file in files if not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)]
    left_out = [file for file in seen if file.resolve() not in taken]
    if taken and left_out:
        used, others = (
            _shorten([str(file.relative_to(path)) for file in each])
            for each in ([file for file in seen if file not in left_out], left_out)
        )
        warnings.warn(
            f"Of the folder {name!r}, the split {split!r} is {used}. Left out: {others}. To read others, name them: "
            f"a file, or a pattern like {str(path / '*.jsonl')!r}."
        )


def _shorten(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _load(shown: str, files: Sequence[Path], path: str, split: str, **options: Any) -> Dataset:
    """Call `load_dataset`, whose own errors about damaged files name neither file nor line."""
    try:
        # Its line about a damaged file comes before the error below, which says where.
        with hiding_log_lines("datasets.packaged_modules.json.json"):
            rows = load_dataset(path, split=split, **options)
        lifted = _lift_json(rows.features) if rows.builder_name == "json" else None
        if lifted is not None:
            rows = load_dataset(path, split=split, features=lifted, **options)
        if files:
            # Arrow does not check that text is UTF-8: reading the row would fail later, without its number.
            rows.data.validate(full=True)
        return rows
    except (DatasetGenerationError, ValueError, StopIteration, EOFError, ImportError) as error:
        fault = _find_fault(files) if path == "json" else None
        if (
            fault is None
            and isinstance(error, ValueError)
            and not isinstance(error, UnicodeDecodeError | ArrowInvalid)
        ):
            raise  # `datasets` says what is wrong, such as a split that is not there.
        reason = fault or str(error.__cause__ or error) or "it has no rows"
        raise ValueError(f"The dataset {shown!r} cannot be read: {reason.rstrip('.')}. Fix or replace it.") from error


def _lift_json(features: Features) -> Features | None:
    """
    Return features that keep whole messages as JSON where parts of them are of mixed types; `None` if none are.

    A text of mixed type that is JSON itself, like "8", is stored as it is and would come back as a number.
    """
    lifted = {
        name: List(Json()) if isinstance(feature, List) else Json() if isinstance(feature, dict) else feature
        for name, feature in features.items()
        if _holds_json(feature)
    }
    return Features({**features, **lifted}) if lifted else None


def _holds_json(feature: Any) -> bool:
    """Whether an entry of a dictionary, at any depth, is JSON."""
    if isinstance(feature, List):
        return _holds_json(feature.feature)
    return isinstance(feature, dict) and any(isinstance(e, Json) or _holds_json(e) for e in feature.values())


def _find_fault(files: Sequence[Path]) -> str | None:
    """Return which line of which file of JSON rows is damaged and how, or `None`."""
    for file in files:
        fault = find_json_fault(file)
        if fault is not None:
            return fault if len(files) == 1 else f"{file.name}, {fault}"
    return None


def find_json_fault(path: Path) -> str | None:
    """Return which line of a file of JSON rows is damaged and how, or `None`."""
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            lines = file.read().splitlines(keepends=True)
    except (OSError, EOFError, lzma.LZMAError):
        return None  # It is compressed, and the damage is there.
    if ".json" in (ending.lower() for ending in path.suffixes) and lines and not lines[0].strip().endswith(b"}"):
        lines = [b"".join(lines)]  # one value over many lines, not one row per line
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            # Without its end, behind which an error would be on the next line.
            row = json.loads(line.decode("utf-8-sig").rstrip())
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
