# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Progress bars of the libraries below us: one switch for all of them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub import utils as hub
from transformers.utils import is_in_notebook  # pyright: ignore[reportPrivateImportUsage]
from transformers.utils import logging as transformers_logging


def can_draw_bars() -> bool:
    """Whether somebody watches: bars redraw a line, which fills a log file with garbage."""
    return is_in_notebook() or (sys.stderr is not None and sys.stderr.isatty())


@contextmanager
def library_bars(is_shown: bool) -> Iterator[None]:
    """Run the body, or the decorated function, with the bars of datasets, transformers and the Hub or without."""
    switches = (
        (datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars),
        # Before the Hub's, which it switches too.
        (
            not transformers_logging.is_progress_bar_enabled(),
            transformers_logging.disable_progress_bar,
            transformers_logging.enable_progress_bar,
        ),
        (hub.are_progress_bars_disabled(), hub.disable_progress_bars, hub.enable_progress_bars),
    )
    if not is_shown:
        for _, disable, _ in switches:
            disable()
    try:
        yield
    finally:
        for was_disabled, disable, enable in switches:
            disable() if was_disabled else enable()
