# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Files and folders that exist whole or not at all, whenever the process or the machine stops. Knows no format.

Everything is made in a temporary sibling whose name begins with a dot, forced to the disk, then renamed.
"""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


# What a stopped process can leave behind: a folder being made, one being replaced, one being deleted.
_LEFTOVER = re.compile(r"\.(?P<kind>making|replaced|deleting)-(?P<name>.+)-[0-9a-f]{12}")


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: to a temporary sibling, to the disk, then under its name."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_entry(path.parent)


def check_place(folder: Path, name: str) -> None:
    """
    Raise where no folder can be, or be written to, at a path that a user named as `name`; nothing is made.

    Raises:
        ValueError: If a file, or a link that leads nowhere, lies there or on the way to it.
        PermissionError: If the nearest folder on the way does not let anything be written.
    """
    for path in (folder, *folder.parents):
        # Asked first: another process may make the folder in between.
        is_there = path.is_symlink() or path.exists()
        if path.is_dir():
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(
                    f"{name} {str(folder)!r}: nothing can be written in {str(path)!r}. Name another."
                )
            return
        if is_there:
            what = "a link that leads nowhere" if path.is_symlink() else "a file"
            raise ValueError(f"{name} {str(folder)!r} cannot be a folder: {str(path)!r} is {what}. Name another one.")


@contextmanager
def leaving_no_empty_folder(folder: Path) -> Iterator[None]:
    """Run the body; where it fails, remove the folder if it was not there before and nothing is in it."""
    was_there = folder.exists()
    try:
        yield
    except BaseException:
        if not was_there:
            with suppress(OSError):
                folder.rmdir()
        raise


def check_replaceable(folder: Path) -> None:
    """Raise `ValueError` at a folder that cannot give way to another in one step; a link stands for where it leads."""
    place = folder.resolve()
    if place.exists() and os.path.ismount(place):
        raise ValueError(f"{str(folder)!r} is a mount point, which no folder can replace. Name a folder inside it.")
    if Path.cwd().is_relative_to(place):
        raise ValueError(f"{str(folder)!r} holds the working directory, which would be gone. Name a folder inside it.")


@contextmanager
def explaining_failure(what: str, fix: str) -> Iterator[None]:
    """Turn a failing write, ours or of safetensors, into an `OSError` that states `what`, why, and the `fix`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number, reason = _system_error(error)
        raise OSError(number, f"{what} could not be written ({reason}). {fix}") from error


def _system_error(error: OSError | SafetensorError) -> tuple[int, str]:
    """Return number and reason of a failing write; safetensors states the system's number in its text alone."""
    stated = re.search(r"os error (\d+)", str(error))
    if isinstance(error, SafetensorError) and stated:
        return int(stated[1]), os.strerror(int(stated[1]))
    return getattr(error, "errno", None) or errno.EIO, getattr(error, "strerror", None) or str(error)


def sync_entry(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staging_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder in `parent`, deleted afterwards, or by [`clear_leftovers`] if the process was stopped."""
    staged = _sibling(parent / name, "making")
    staged.mkdir()
    try:
        yield staged
    finally:
        if staged.exists():
            shutil.rmtree(staged)


@contextmanager
def making_folder(folder: Path) -> Iterator[Path]:
    """
    Yield an empty folder to fill; on leaving it takes the place of `folder`, and on any error it is removed.

    A folder that was there before is kept until the new one is in place. If the process is stopped between the two
    renames, [`clear_leftovers`] puts the earlier one back. A link stays, and where it leads is replaced.

    Raises:
        ValueError: If the folder cannot be replaced, see [`check_replaceable`].
    """
    check_replaceable(folder)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder.parent, folder.name) as staged:
        yield staged
        _follow_umask(staged)
        for path in [*staged.rglob("*"), staged]:
            sync_entry(path)
        replaced = None
        if folder.exists():
            replaced = _sibling(folder, "replaced")
            os.rename(folder, replaced)
        try:
            os.rename(staged, folder)
        except OSError:
            if replaced is not None:
                os.rename(replaced, folder)
            raise
        sync_entry(folder.parent)
        if replaced is not None:
            shutil.rmtree(replaced)


@contextmanager
def writing_files(folder: Path, name: str) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving it [`move_files`] puts its files into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder, name) as staged:
        yield staged
        move_files(staged, folder)


def move_files(staged: Path, folder: Path) -> None:
    """Put every file of `staged` into `folder`, each in one step; other files there stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    _follow_umask(staged)
    for path in sorted(staged.iterdir()):
        sync_entry(path)
        os.replace(path, folder / path.name)
    sync_entry(folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder; it is renamed first, so that nobody reads half of it."""
    doomed = _sibling(folder, "deleting")
    os.rename(folder, doomed)
    # Or a loss of power could leave half of it under its old name.
    sync_entry(folder.parent)
    shutil.rmtree(doomed)


def clear_leftovers(parent: Path, is_ours: "re.Pattern[str]") -> None:
    """Put back folders whose names match `is_ours` and that were being replaced; delete what else was left of them."""
    if not parent.is_dir():
        return
    for path in sorted(parent.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not is_ours.fullmatch(match["name"]) or path.is_symlink() or not path.is_dir():
            continue
        place = parent / match["name"]
        if match["kind"] == "replaced" and not place.exists():
            os.rename(path, place)
        else:
            shutil.rmtree(path)


def _follow_umask(staged: Path) -> None:
    """Give files the mode that the umask gives to new ones; safetensors lets nobody but their owner read its own."""
    # The folder was made under the same umask, which cannot be asked for without changing it.
    mode = staged.stat().st_mode & 0o666
    for path in staged.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{kind}-{folder.name}-{uuid.uuid4().hex[:12]}")
