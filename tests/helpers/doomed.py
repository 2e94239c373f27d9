# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A training run in a child process that meets its end at a chosen file operation, and what is left of it.

The child is forked, so it costs no import. Every operation on a file below its output folder is an event; the end
comes right before the chosen one, and what was written but not forced to the disk by then is torn, as after a loss of
power. So may be a new name: a rename whose folder was not forced to the disk is undone where that is asked for.
"""

import errno
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback

from helpers.tiny import TINY_RUN
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer


STEPS = 3
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class Progress(TrainerCallback):
    """
    Notes every finished step, and the step a run began with, in a file outside of the output folder; where asked to,
    it sends its own process SIGTERM, or other signals, once so many steps are done and the next has begun.
    """

    def __init__(self, path, sigterm_after=None, signals=(signal.SIGTERM,)):
        self.path, self.sigterm_after, self.signals = path, sigterm_after, signals

    def on_train_begin(self, args, state, control, **kwargs):
        self._note(f"begin {state.global_step}")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.sigterm_after:
            for number in self.signals:
                os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        self._note(f"end {state.global_step}")

    def _note(self, line):
        with self.path.open("a") as file:
            file.write(line + "\n")

    def steps(self, word):
        lines = [line.split() for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return [int(step) for kind, step in lines if kind == word]


def train(kind, output_dir, drafter, target, rows, progress, resume=None, **changes):
    """Train for three updates with a checkpoint after each, of which two are kept."""
    options = {
        "output_dir": str(output_dir),
        **TINY_RUN,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 2,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_completion_length": 10,
    }
    trainer_class, config = (DraftSFTTrainer, DraftSFTConfig) if kind == "sft" else (DraftOPDTrainer, DraftOPDConfig)
    trainer = trainer_class(drafter, target, config(**options | changes), rows, callbacks=[progress])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def in_child(work: Callable[[], object], log: Path, wait: bool = True) -> int:
    """
    Run `work` in a forked child with its output in `log`; return its exit code as a shell tells it, or its id if not
    waited for.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = log.open("a", buffering=1)
            logging.basicConfig(stream=sys.stderr, force=True)
            # A shell starts jobs in the background with Ctrl-C ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return wait_for(child) if wait else child


def wait_for(child: int) -> int:
    """Return the exit code of a child as a shell tells it."""
    _, status = os.waitpid(child, 0)
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class Events:
    """
    Counts file operations below a folder in this process, from the first step on, and brings the end at one of them.

    Args:
        folder (`Path`): The folder.
        at (`int` or `None`): Number of the event; `None` only counts.
        end (`str`):
            `"kill"`, `"lost"` (the same, and renames are lost with it), `"full"` (the operation fails as on a full
            disk) or `"interrupt"` (Ctrl-C).
        counter (`Path`): Where the number of events is left, and the numbers of those with a rename to lose.
    """

    def __init__(self, folder: Path, at: int | None, end: str, counter: Path):
        self.folder, self.at, self.end, self.counter = str(folder), at, end, counter
        self.count, self.synced, self.began = 0, set(), time.time()
        # Renames that the disk may not know of: old and new name, and what stood under the new one.
        self.renames, self.losable = [], []
        self.is_over = False
        self._fsync = os.fsync
        os.fsync = self._note_fsync
        sys.addaudithook(self._note)

    def _note_fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if self._is_inside(str(path)):
            self._happen(f"fsync {descriptor}")
            self.synced.add(os.fstat(descriptor).st_ino)
            self.renames = [rename for rename in self.renames if rename[1].parent != path]
        self._fsync(descriptor)

    def _note(self, event: str, args: tuple) -> None:
        is_write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if is_write or event in _CHANGES:
            path = str(args[0])
            # `rmtree` names what it removes relative to an open folder.
            if event in ("os.remove", "os.rmdir") and args[1] >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
            if self._is_inside(path):
                self._happen(f"{event} {path}")
                if event == "os.rename" and not self.is_over:
                    new = Path(args[1])
                    self.renames.append((Path(path), new, new.read_bytes() if new.is_file() else None))

    def _is_inside(self, path: str) -> bool:
        return path == self.folder or path.startswith(self.folder + "/")

    def _happen(self, what: str) -> None:
        if self.is_over:
            return
        self.count += 1
        self.losable += [self.count] if self.renames else []
        self.counter.write_text(f"{self.count} {' '.join(map(str, self.losable))}")
        if self.count != self.at:
            return
        self.is_over = True
        if self.end == "full":
            raise OSError(errno.ENOSPC, "No space left on device", what)
        if self.end == "interrupt":
            raise KeyboardInterrupt
        self._tear()
        if self.end == "lost":
            self._lose()
        os.kill(os.getpid(), signal.SIGKILL)

    def _tear(self) -> None:
        for path in Path(self.folder).rglob("*"):
            if path.is_file() and path.stat().st_mtime >= self.began and path.stat().st_ino not in self.synced:
                os.truncate(path, path.stat().st_size // 2)

    def _lose(self) -> None:
        for old, new, replaced in reversed(self.renames):
            os.rename(new, old)
            if replaced is not None:
                new.write_bytes(replaced)
