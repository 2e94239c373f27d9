# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The folder through which a server hands over its files: waits for them, takes them, and sweeps what nobody took.

Only plain files directly inside the folder are opened, and only those that this package's requests gave their names.
Who is at work holds a lock on a file of its own there; what is left of others who no longer do can be swept.
"""

import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..responses.client import ServerError
from ..responses.protocols import WrongReply
from .protocol import FILE_START, NoStates


_NAME = "draft-readings-"
_ALIVE = ".alive"
# Until a file that was made on another machine is seen on this one.
_SEEN_SECONDS = 2.0


class SharedFolder:
    """
    This process' part of a shared folder.

    Args:
        path (`str` or `Path`): The servers' `shared_storage_path`, as this machine sees it.

    Raises:
        ValueError: If it is no folder, files cannot be made or locked in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(
                f"The servers' shared folder {str(path)!r} is no folder on this machine. It must be the one of their "
                "`shared_storage_path`, mounted here."
            )
        # The beginning of all our requests' numbers, and so of the files for them.
        self.prefix = f"{_NAME}{secrets.token_hex(8)}-"
        try:
            self._alive = _lock_new(self._alive_path(self.prefix))
        except OSError as error:
            raise ValueError(
                f"No file can be made and locked in the servers' shared folder {str(path)!r} ({error}). It must be "
                "writable here, because states are deleted once they were read, and lie on a file system with locks."
            ) from error
        self._lock = threading.Lock()
        self._last = 0
        # Numbers of requests that were given up: the server may still write their files.
        self._given_up: list[str] = []

    def new_request_id(self) -> str:
        """Return a number for a request that no other has."""
        with self._lock:
            self._last += 1
            # A forked process goes on counting from the same number.
            return f"{self.prefix}{os.getpid()}-{self._last:08d}"

    def take(
        self, name: str, *, max_bytes: int, timeout: float, is_stopped: threading.Event
    ) -> dict[str, torch.Tensor]:
        """
        Wait until a file is written, read it, and delete it with its lock. After an error, [`give_up`] its request.

        Raises:
            NoStates: If it did not come within `timeout` seconds, or is damaged.
            WrongReply: If it is no plain file, or longer than `max_bytes`.
            ServerError: If it cannot be deleted.
        """
        path, lock_path = self.path / name, self.path / f"{name}.lock"
        self._wait(path, lock_path, timeout, is_stopped)
        content = _read_plain(path, max_bytes)
        _delete(path, lock_path)
        try:
            return load(content)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            # A server that is killed while it writes lets go of the lock of half a file.
            raise NoStates(f"the file of states {name} is damaged ({error})") from error

    def _wait(self, path: Path, lock_path: Path, timeout: float, is_stopped: threading.Event) -> None:
        """Return once the writer has let go of the lock, which it takes before it replies."""
        start, pause = time.monotonic(), 0.001
        while True:
            try:
                descriptor = os.open(lock_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                if time.monotonic() - start > min(_SEEN_SECONDS, timeout):
                    raise NoStates(
                        f"the server says that it writes {path.name}, and {self.path} has no lock of that name here. "
                        "Is it the server's `shared_storage_path`, with `use_synchronization_lock` as by default?"
                    ) from None
                is_done = False
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise WrongReply(f"{lock_path.name} is a link, and only plain files are read") from None
                raise
            else:
                try:
                    is_done = _try_lock(descriptor, fcntl.LOCK_SH)
                finally:
                    os.close(descriptor)
            if is_done:
                return
            if time.monotonic() - start > timeout:
                raise NoStates(f"the server did not finish writing {path.name} within {timeout:g} seconds")
            if is_stopped.wait(pause):
                raise NoStates("the readings were closed")
            pause = min(pause * 1.5, 0.05)

    def give_up(self, request_id: str) -> None:
        """Nobody waits for this request any more: sweep what it and those given up before have left so far."""
        with self._lock:
            self._given_up.append(request_id)
            starts = tuple(FILE_START + each for each in self._given_up)
        for path in self.path.glob(f"{FILE_START}{self.prefix}*"):
            if path.name.startswith(starts):
                _sweep_one(path)

    def sweep(self, prefix: str | None = None) -> int:
        """
        Delete what was written for requests that nobody waits for: those whose numbers begin with `prefix`, by default
        those of processes that have ended. What is being written is left. Return the number of files.
        """
        if prefix is not None:
            return sum(_sweep_one(path) for path in self.path.glob(f"{FILE_START}{prefix}*"))
        alive: dict[str, bool] = {}
        for path in self.path.glob(f"{_NAME}*{_ALIVE}"):
            alive[path.name.removesuffix(_ALIVE)] = _is_held(path)
        num_swept = 0
        for path in self.path.glob(f"{FILE_START}{_NAME}*"):
            owner = path.name.removeprefix(FILE_START)[: len(self.prefix)]
            # One that has come since the list was made is held by somebody.
            if not alive.get(owner, self._alive_path(owner).exists()):
                num_swept += _sweep_one(path)
        for owner, is_held in alive.items():
            if not is_held:
                _unlink(self._alive_path(owner))
        return num_swept

    def close(self) -> None:
        """Sweep what is ours; what comes later is swept by the next who starts."""
        if self._alive is not None:
            self.sweep(self.prefix)
            _unlink(self._alive_path(self.prefix))
            os.close(self._alive)
            self._alive = None

    def _alive_path(self, prefix: str) -> Path:
        return self.path / f"{prefix}{_ALIVE}"


def _lock_new(path: Path) -> int:
    """Make a file and lock it; return its descriptor."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Another's sweep may have deleted it between the two.
            if path.exists() and os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_held(path: Path) -> bool:
    """Whether somebody holds an exclusive lock on a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        # A link is nobody's lock; another user's file may be held.
        return error.errno != errno.ELOOP
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _sweep_one(path: Path) -> int:
    lock_path = path if path.name.endswith(".lock") else path.with_name(f"{path.name}.lock")
    return 0 if _is_held(lock_path) else _unlink(path)


def _unlink(path: Path) -> int:
    # Another user's files in a folder such as /tmp are left to them.
    with suppress(FileNotFoundError, PermissionError, IsADirectoryError):
        path.unlink()
        return 1
    return 0


def _delete(*paths: Path) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ServerError(
                f"{path} cannot be deleted after it was read ({error}), and states would fill the folder. Run the "
                "server and this program as the same user"
            ) from error


def _read_plain(path: Path, max_bytes: int) -> bytes:
    """Return what is in a plain file, of known size before it is read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NoStates(
            f"the server let go of the lock of {path.name} without having written it; its log tells why (a full "
            "folder?)"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise WrongReply(f"{path.name} is a link, and only plain files are read") from None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise WrongReply(f"{path.name} is no plain file")
        if found.st_size > max_bytes:
            raise WrongReply(
                f"{path.name} has {found.st_size} bytes, and the states of this text at the layers asked for at most "
                f"{max_bytes}. The server was started for more layers, or serves another model"
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes)
    finally:
        os.close(descriptor)
