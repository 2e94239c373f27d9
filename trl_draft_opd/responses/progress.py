# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
That responses are coming, told to whoever waits: a bar on a terminal, a line every half minute elsewhere. And what to
do when told to stop.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .store import ResponseStore


logger = logging.getLogger(__name__)

# Seconds between two lines.
LINE_EVERY = 30.0


class ResponseProgress:
    """Counts responses and their tokens, and shows the counts on `console`."""

    def __init__(self, total: int, console: Console, bar: Progress, name: str = "Target responses"):
        self.total, self.console, self.bar, self.name = total, console, bar, name
        self.num_responses = self.num_tokens = 0
        # In the last line; `None` before the first.
        self._num_told: int | None = None
        self._began = self._last_line = time.monotonic()
        self._task = bar.add_task(name, total=total, rate="")

    def add(self, num_responses: int, num_tokens: int) -> None:
        """Count responses that are finished."""
        self.num_responses += num_responses
        self.num_tokens += num_tokens
        self.bar.update(self._task, completed=self.num_responses, rate=f"{self._rate(0):,.0f} tokens/s")
        self.tick()

    def tick(self, count_unfinished: Callable[[], int] = lambda: 0) -> None:
        """Print a line if it is time for one; `count_unfinished` tokens are in responses that are not finished."""
        now = time.monotonic()
        if self.console.is_terminal or now - self._last_line < LINE_EVERY:
            return
        self._last_line = now
        self._say(count_unfinished())

    def end(self) -> None:
        """Print how many there are in the end, if lines have told of fewer."""
        if not self.console.is_terminal and self._num_told is not None and self._num_told < self.num_responses:
            self._say(0)

    def _say(self, num_unfinished: int) -> None:
        self._num_told = self.num_responses
        line = f"{self.name}: {self.num_responses:,} of {self.total:,}"
        line += f", {self._rate(num_unfinished):,.0f} tokens/s"
        if 0 < self.num_responses < self.total:
            seconds = (time.monotonic() - self._began) / self.num_responses * (self.total - self.num_responses)
            line += f", about {timedelta(seconds=round(seconds))} left"
        self.console.print(line, soft_wrap=True, highlight=False)

    def _rate(self, num_unfinished: int) -> float:
        return (self.num_tokens + num_unfinished) / max(time.monotonic() - self._began, 1e-9)


@contextmanager
def showing_progress(total: int, *, is_shown: bool, name: str = "Target responses") -> Iterator[ResponseProgress]:
    """Show how many of `total` responses, or of what else `name` says, have come, on stderr."""
    console = Console(stderr=True, quiet=not is_shown)
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[rate]}"), TimeRemainingColumn()]
    is_hidden = not (is_shown and console.is_terminal)
    # Gone in the end: training writes responses before every update.
    with Progress(*columns, console=console, disable=is_hidden, transient=True) as bar:
        progress = ResponseProgress(total, console, bar, name)
        yield progress
        progress.end()


@contextmanager
def keeping_responses(store: ResponseStore, num_missing: int) -> Iterator[None]:
    """As [`stopping_cleanly`], for what fills a store of responses."""
    before = len(store)

    def describe() -> str:
        stored = f"{len(store) - before} of {num_missing} missing responses are stored in {store.path}"
        return f"{stored}. The same command asks for the others only."

    with stopping_cleanly(describe):
        yield


@contextmanager
def stopping_cleanly(describe_kept: Callable[[], str]) -> Iterator[None]:
    """
    Let SIGTERM end what fills a store as Ctrl-C does, after what has come in is written, and say what is kept.

    Raises:
        SystemExit: After SIGTERM, with 143, which schedulers expect of a job they stopped. Where SIGTERM is handled
            already, as in training, it stays so.
    """
    is_ours = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if is_ours:
        signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        logger.warning("Stopped: %s", describe_kept())
        raise
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    # A second one ends the process at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise SystemExit(128 + number)
