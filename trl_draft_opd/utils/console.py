# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a person sees: output that never ends a run, notes of libraries that help nobody, our own warnings as sentences.
Loads no library, so that `--help` stays quick.
"""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO


# Logger and beginning of notes about parts that nobody asked for: they come because the package is installed.
_USELESS_NOTES = (
    # PEFT imports bitsandbytes, which looks for faster kernels of quantised layers.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    # accelerate imports DeepSpeed at every save, which then looks for a GPU of its own.
    ("DeepSpeed", "Setting accelerator to CPU"),
    ("DeepSpeed", "Setting ds_accelerator to"),
    # datasets looks for settings in the README of a folder, which needs none.
    ("huggingface_hub.repocard", "Repo card metadata block was not found"),
)
_PACKAGE = Path(__file__).parents[1]


class LastingStream:
    """
    A text stream that nothing written to it can break: what its encoding lacks is escaped, and what a closed pipe or a
    full disk refuses is lost. Each line is out when it is written, into a file too.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text and return its length."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._give_up(error)
        if "\n" in text:
            self.flush()
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts one after another."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Send what is buffered."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Let later writes, and Python's own flush at exit, go nowhere where nobody can ever read them."""
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            with suppress(OSError), open(os.devnull, "w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """
    Run the body, or the decorated function, with a standard output and error that it cannot fail at, and with this
    package's warnings as sentences.
    """
    with redirect_stdout(_lasting(sys.stdout)), redirect_stderr(_lasting(sys.stderr)), own_warnings_as_sentences():
        yield


def _lasting(stream: Any) -> Any:
    if stream is None:
        # It was closed when the process began. Opened, because libraries write to it without looking.
        stream = open(os.devnull, "w", encoding="utf-8")
    return stream if isinstance(stream, LastingStream) else LastingStream(stream)


def hide_useless_notes() -> None:
    """Drop the log lines listed above, and no others; a second call changes nothing."""
    for name in {name for name, _ in _USELESS_NOTES}:
        logging.getLogger(name).addFilter(_is_useful)


def _is_useful(record: logging.LogRecord) -> bool:
    # Of `record.msg`, in which arguments are not filled in.
    return not any(record.name == name and str(record.msg).startswith(start) for name, start in _USELESS_NOTES)


@contextmanager
def hiding_log_lines(name: str) -> Iterator[None]:
    """Run the body without what one logger says, where an error of our own says it better."""
    logger = logging.getLogger(name)
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


@contextmanager
def own_warnings_as_sentences(reword: Callable[[str], str] = str) -> Iterator[None]:
    """
    Run the body with this package's warnings shown as `note: ...`, in the words of `reword`, without the line of code
    that Python adds.
    """
    usual = warnings.formatwarning

    def formatted(message: Any, category: type[Warning], filename: str, *where: Any) -> str:
        is_ours = _PACKAGE in Path(filename).parents
        return f"note: {reword(str(message))}\n" if is_ours else usual(message, category, filename, *where)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual
