# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One process per output folder: a lock of the operating system's, which ends with the process, however that ends.
"""

import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# What file systems without locks answer.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# Locks of this process. A forked child, such as a data worker, must not hold them on when this process is killed.
_held: set[int] = set()


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Hold a run's output folder while the context lasts, and make it if it is not there.

    Raises:
        ValueError: If another run, in this process or another, holds it.
        OSError: If nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(folder / LOCK_FILE, folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Nothing can be written there ({error.strerror}), so nothing was started. Repair the folder, or name "
            "another `output_dir`",
            str(folder),
        ) from error
    _held.add(descriptor)
    try:
        yield
    finally:
        # While it is still held. One that cannot be removed locks nobody out.
        with suppress(OSError):
            os.unlink(folder / LOCK_FILE)
        _held.discard(descriptor)
        os.close(descriptor)


def _open_locked(path: Path, folder: Path) -> int:
    """Return the lock file, open and locked, with this process's name in it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ValueError(
                    f"`output_dir` {str(folder)!r} is in use by {holder}. Wait for its end, stop it, or give this run "
                    "another `output_dir`; nothing there was touched."
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s lies on a file system without locks (%s): see to it that no second process trains into it.",
                folder,
                error.strerror,
            )
            return os.open(path, os.O_RDWR)
        if _is_current(path, descriptor):
            break
        # Its holder removed it between our two looks.
        os.close(descriptor)
    # For the message above; the lock holds without it.
    with suppress(OSError):
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    return descriptor


def _is_current(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one under its name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
