# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Shows the metrics of a run in a notebook: one table that grows below the cell, with tau, and sentences below it."""

from collections.abc import Mapping
from html import escape
from typing import Any

from transformers import TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import is_in_notebook  # pyright: ignore[reportPrivateImportUsage]

from .log_printer import Bar, LogPrinter, readable


# Rows shown; of more, the newest.
_NUM_ROWS = 20


class NotebookTable(LogPrinter):
    """[`LogPrinter`] for notebooks; what it shows is replaced in place, so that an output stays one table."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[dict[str, str]] = []
        self._sentences: list[str] = []
        self._display: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin a new table."""
        super().on_train_begin(args, state, control, **kwargs)
        self._rows, self._sentences, self._display = [], [], None

    def show(self, logs: Mapping[str, Any], state: TrainerState) -> None:
        """Show the table with one log more."""
        # Here, because only notebooks have it.
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

        self.add(logs, state)
        shown = HTML(self.html())
        if self._display is None:
            self._display = display(shown, display_id=True)
        else:
            self._display.update(shown)

    def add(self, logs: Mapping[str, Any], state: TrainerState) -> None:
        """Take in one log: a row, or a sentence."""
        if any(name.endswith("_runtime") for name in logs):
            self._sentences += self.lines(logs, state.global_step, state.max_steps)
            return
        cells, rest = self.cells(readable(logs, ""), state.global_step, state.max_steps)
        self._rows.append(cells | {name: str(value) for name, value in rest.items()})

    def html(self) -> str:
        """Return the table and the sentences."""
        rows = self._rows[-_NUM_ROWS:]
        titles = list(dict.fromkeys(title for row in rows for title in row))
        lines = [[f"<td>{escape(row.get(title, '').strip())}</td>" for title in titles] for row in rows]
        head = "".join(f"<th>{escape(title)}</th>" for title in titles)
        body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
        return table + "".join(f"<p>{escape(sentence)}</p>" for sentence in self._sentences)


def print_logs_readably(trainer: Any) -> None:
    """Replace transformers' printing of dictionaries, and in a notebook its table, which has no tau."""
    if is_in_notebook():
        from transformers.utils.notebook import NotebookProgressCallback  # here, because it needs IPython

        if any(trainer.pop_callback(each) is not None for each in (NotebookProgressCallback, PrinterCallback)):
            trainer.add_callback(NotebookTable)
        return
    has_bar = trainer.pop_callback(ProgressCallback) is not None
    if has_bar:
        trainer.add_callback(Bar)
    if has_bar or trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(LogPrinter)
