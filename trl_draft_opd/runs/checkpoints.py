# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Checkpoints as folders that prove themselves: filled in a temporary folder, listed with sizes and hashes, then renamed.

Knows files and nothing of what is in them: no model, no trainer, no process group.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.atomic_files import clear_leftovers, hash_file, making_folder, remove_folder, staging_folder, write_file
from ..utils.hashing import hash_json


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = "trl-draft-opd checkpoint"
VERSION = 1
_NAME = re.compile(r"checkpoint-(?P<step>\d+)")
_PROBE = "probe"
_OURS = re.compile(rf"{_NAME.pattern}|{_PROBE}")


class DamagedCheckpoint(ValueError):
    """A folder that is not what was written, or was not written by this package; the message states what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """
    A folder whose content is what was written: `is_resumable` if it holds more than the drafter; a resumed run keeps
    the `run_id`.
    """

    folder: Path
    step: int
    is_resumable: bool
    run_id: str


def checkpoint_name(step: int) -> str:
    """Return the folder name of a checkpoint after `step` optimizer steps."""
    return f"checkpoint-{step}"


@contextmanager
def writing_checkpoint(output_dir: Path, step: int, *, is_resumable: bool, run_id: str) -> Iterator[Path]:
    """
    Yield an empty folder to fill; on leaving, its files are listed in a manifest, forced to the disk and put in place.
    """
    with making_folder(output_dir / checkpoint_name(step)) as staged:
        yield staged
        files = sorted(path for path in staged.rglob("*") if path.is_file())
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "is_resumable": is_resumable,
            "run_id": run_id,
            "files": {
                path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
                for path in files
            },
        }
        write_file(staged / MANIFEST, _sign(content))


def signed(files: Mapping[str, Path | bytes]) -> dict[str, Path | bytes]:
    """
    Return a checkpoint's files by name, as they are to leave this machine, with a manifest that lists these.

    What is given as bytes was rewritten since the checkpoint was written; what is missing was left out.
    """
    content = _read_manifest(files[MANIFEST])
    content["files"] = {name: written for name, written in content["files"].items() if name in files}
    for name, data in files.items():
        if isinstance(data, bytes) and name != MANIFEST:
            content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {**files, MANIFEST: _sign(content)}


def read_checkpoint(folder: Path, *, check_content: bool = True) -> Checkpoint:
    """
    Return a folder as a checkpoint, or raise [`DamagedCheckpoint`]; without `check_content` only names and sizes are
    compared.
    """
    content = _read_manifest(folder / MANIFEST)
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {MANIFEST}
    if missing := sorted(set(content["files"]) - held):
        raise DamagedCheckpoint(f"{missing[0]} is missing")
    for name, written in content["files"].items():
        path = folder / name
        if path.is_symlink():
            # The Hub's cache is made of links.
            raise DamagedCheckpoint(
                f"{name} is a link, and a checkpoint holds its files itself (`hf download` with `--local-dir` does)"
            )
        size = path.stat().st_size
        if size != written["bytes"]:
            raise DamagedCheckpoint(f"{name} has {size} bytes, {written['bytes']} were written")
        if check_content and hash_file(path) != written["sha256"]:
            raise DamagedCheckpoint(f"the content of {name} has changed since it was written (SHA-256 differs)")
    return Checkpoint(folder, content["step"], content["is_resumable"], content["run_id"])


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Return steps and folders of everything that is called a checkpoint, in order of steps; links are left out."""
    if not output_dir.is_dir():
        return []
    matches = [(path, _NAME.fullmatch(path.name)) for path in output_dir.iterdir()]
    return sorted(
        (int(match["step"]), path) for path, match in matches if match and path.is_dir() and not path.is_symlink()
    )


def choose_checkpoint(output_dir: Path, asked: str | Path | bool | None) -> Checkpoint | None:
    """
    Return the checkpoint that `resume_from_checkpoint` asks for, `None` to start from the beginning.

    `True` or `"true"` is the newest valid one, `"auto"` the same or `None` if there are none, a path that one.
    """
    word = str(asked).lower()
    if asked in (None, False):
        return None
    if word == "auto" and not list_checkpoints(output_dir):
        logger.warning("There is no checkpoint in %r yet: a new run begins.", str(output_dir))
        return None
    if word in ("true", "auto"):
        return newest_valid(output_dir)
    folder = Path(str(asked))
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint {str(folder)!r} to resume from. Check the path, or give `True`.")
    try:
        return _read_resumable(folder)
    except ValueError as error:
        raise ValueError(
            f"{str(folder)!r} is not a checkpoint to resume from: {error}. Give `resume_from_checkpoint=True` for the "
            "newest valid one, or start a new run from its drafter: give the folder as `--drafter` (`model`)."
        ) from error


def newest_valid(output_dir: Path) -> Checkpoint:
    """Return the newest checkpoint that a run can resume from, and report why newer ones were passed over."""
    clear_leftovers(output_dir, _OURS)
    skipped = []
    for _, folder in reversed(list_checkpoints(output_dir)):
        try:
            found = _read_resumable(folder)
        except ValueError as error:
            skipped.append(f"{folder.name}: {error}")
            continue
        if skipped:
            logger.warning("Resuming from %s. Passed over %s", folder.name, "; ".join(skipped))
        return found
    reasons = "; ".join(skipped) or "there is no folder called checkpoint-N"
    raise ValueError(
        f"No valid checkpoint found in {str(output_dir)!r}: {reasons}. Start afresh with "
        "`resume_from_checkpoint=None` and another `output_dir`, or give a drafter's folder as `--drafter` (`model`)."
    )


def _read_resumable(folder: Path) -> Checkpoint:
    found = read_checkpoint(folder)
    if not found.is_resumable:
        raise ValueError("it holds the drafter alone (`save_only_model=True`)")
    return found


def keep_newest(output_dir: Path, limit: int | None, *, protected: Path | None) -> None:
    """
    Delete the oldest checkpoints beyond `limit`, never `protected`; what is damaged or foreign is neither counted nor
    deleted.
    """
    if limit is None or limit <= 0:
        return
    valid = []
    for _, folder in list_checkpoints(output_dir):
        try:
            read_checkpoint(folder, check_content=False)
        except DamagedCheckpoint as error:
            logger.warning("%s is not counted by `save_total_limit`, and kept: %s", folder, error)
            continue
        valid.append(folder)
    kept = set(valid[-limit:])
    if protected is not None and protected in valid:
        # The best takes the place of an old one, never of the newest, from which training resumes.
        kept = {protected, *[folder for folder in valid if folder != protected][-max(limit - 1, 1) :]}
    for folder in valid:
        if folder not in kept:
            remove_folder(folder)


def check_output_dir(output_dir: Path, run_id: str | None) -> None:
    """Refuse a folder that holds checkpoints of another run than `run_id`, or where no file can be written."""
    output_dir.mkdir(parents=True, exist_ok=True)
    clear_leftovers(output_dir, _OURS)
    try:
        with staging_folder(output_dir, _PROBE) as probe:
            write_file(probe / "file", b"1")
    except OSError as error:
        raise OSError(
            error.errno,
            f"No checkpoint can be written ({error.strerror}), so training was not started. Repair the folder, or "
            "name another `output_dir`",
            str(output_dir),
        ) from error
    others = []
    for _, folder in list_checkpoints(output_dir):
        try:
            if read_checkpoint(folder, check_content=False).run_id == run_id:
                continue
        except DamagedCheckpoint:
            if run_id is not None:
                continue  # most likely this run's own, and the reason to resume from an earlier one
        others.append(folder.name)
    if others:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds {', '.join(others)} of another run. Resume that run with "
            "`resume_from_checkpoint=True`, or give this one another `output_dir`; nothing there was touched."
        )


def _read_manifest(path: Path | bytes) -> dict[str, Any]:
    if isinstance(path, Path) and not path.is_file():
        raise DamagedCheckpoint(f"it has no {MANIFEST}, so it was not finished or not written by this package")
    try:
        content = json.loads(path.read_text("utf-8") if isinstance(path, Path) else path)
        written = content.pop("sha256")
        is_whole = written == hash_json(content) and content["format"] == FORMAT
        version, files = content["version"], content["files"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} cannot be read ({error})") from error
    if not is_whole:
        raise DamagedCheckpoint(f"the content of {MANIFEST} has changed since it was written")
    if version != VERSION:
        raise DamagedCheckpoint(f"{MANIFEST} is of version {version}, this release reads version {VERSION}")
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedCheckpoint(f"{MANIFEST} names {name!r}, which lies outside of the folder")
    return content


def _sign(content: dict[str, Any]) -> bytes:
    return (json.dumps(content | {"sha256": hash_json(content)}, indent=2) + "\n").encode()
