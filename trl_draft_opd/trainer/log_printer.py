# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Prints the metrics of a run for a person: a table of the updates, a sentence for an evaluation and for the end. Display
only: `state.log_history` and the reporters of `report_to` get every metric, unrounded.
"""

import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ProgressCallback

from ..rollout.counts import describe_tau


# The table's columns from left to right: metric -> title, and format of a cell.
_COLUMNS = {
    "epoch": ("epoch", "6.2f"),
    "loss": ("loss", "7.4f"),
    "loss/accepted": ("accepted", "7.4f"),
    "loss/rejected": ("rejected", "7.4f"),
    "loss/supervised": ("supervised", "7.4f"),
    "tau": ("tau", "5.3f"),
    "acceptance": ("kept per slot, %", ""),
    "grad_norm": ("grad norm", "#6.3g"),
    "learning_rate": ("rate", "7.1e"),
    "reading_wait": ("waiting", "6.1%"),
    "tokens_per_second": ("tokens/s", "8,.0f"),
    "time_left": ("left", ">8"),
}
# Columns that a narrow terminal does without, the first first.
_SPARED = ("grad norm", "rate", "epoch", "waiting", "supervised", "tokens/s", "accepted", "rejected")
# Amounts, of interest over time, in a plot.
_UNPRINTED = {"rounds", "response_length", "slots/accepted", "slots/rejected", "slots/supervised", "total_flos"}
# What a sentence says in other words.
_UNSAID = {"epoch", "steps_per_second", "tokens_per_second", "time_left"}
# Shares of what went wrong, printed when there are any, and what they are called.
_TROUBLES = {
    "refused_responses": "refused",
    "empty_responses": "empty",
    "truncated_responses": "cut short",
    "response_mismatch": "not the target's own",
}


class LogPrinter(TrainerCallback):
    """Prints what is logged, above the progress bar where there is one."""

    def __init__(self) -> None:
        self._titles = ""
        self._spared: set[str] = set()
        self._first_step, self._begun = 0, 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note where and when training begins, which a resumed run does behind its start."""
        self._first_step, self._begun = state.global_step, time.perf_counter()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the lines of one log, but no sum of a training that had ended before."""
        if "train_runtime" in (logs or {}) and state.global_step == self._first_step:
            return
        if logs and state.is_world_process_zero:
            self.show(logs | self.time_left(state), state)

    def show(self, logs: Mapping[str, Any], state: TrainerState) -> None:
        """Print the lines of one log."""
        tqdm.write("\n".join(self.lines(logs, state.global_step, state.max_steps, _terminal_width())))

    def time_left(self, state: TrainerState) -> dict[str, str]:
        """Return how long training will go on if it goes on as it did, evaluations included; nothing at its end."""
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        if done <= 0 or left < 0:
            return {}
        minutes, seconds = divmod(round((time.perf_counter() - self._begun) / done * left), 60)
        return {"time_left": f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"}

    def lines(self, logs: Mapping[str, Any], step: int, max_steps: int, width: int | None = None) -> list[str]:
        """
        Return a sentence, or a row of the table, below the titles if its columns are new. Where a terminal's `width`
        cannot hold a row, those that matter least are left out, and stay away.
        """
        prefix = next((name.removesuffix("runtime") for name in logs if name.endswith("_runtime")), "")
        metrics = readable(logs, prefix)
        if prefix:
            what = {"train_": "trained", "eval_": "evaluation"}.get(prefix, prefix.removeprefix("eval_").rstrip("_"))
            when = f", step {step}/{max_steps}" if max_steps else ""
            return [f"{what}{when}: {_sentence(metrics)}"]
        cells, rest = self.cells(metrics, step, max_steps)
        tail = "".join(f"  {name} {_text(value)}" for name, value in rest.items())
        for title in _SPARED:
            is_wide = width is not None and _width(cells) + len(tail) > width
            if title in cells and (is_wide or title in self._spared):
                del cells[title]
                self._spared.add(title)
        titles = "  ".join(title.rjust(len(cell)) for title, cell in cells.items())
        row = "  ".join(cell.rjust(len(title)) for title, cell in cells.items())
        is_new, self._titles = titles != self._titles, titles
        return [titles, row + tail] if is_new else [row + tail]

    def cells(self, metrics: Mapping[str, Any], step: int, max_steps: int) -> tuple[dict[str, str], dict[str, Any]]:
        """Return the cells of an update's row by title, and the metrics that have no column."""
        rest = dict(metrics)
        cells = {"step": f"{step}/{max_steps}".rjust(2 * len(str(max_steps)) + 1)}
        cells |= {title: _text(rest.pop(name), form) for name, (title, form) in _COLUMNS.items() if name in rest}
        return cells, rest


class Bar(ProgressCallback):
    """The progress bar, which leaves the metrics to [`LogPrinter`]."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


def readable(logs: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what is printed of metrics, without their prefix; acceptance of all slots as one text of percentages."""
    metrics = {name.removeprefix(prefix): value for name, value in logs.items()}
    if prefix == "train_":
        # Reckoned from whole epochs, whatever rows there were.
        metrics.pop("samples_per_second", None)
        if "loss" in metrics:
            metrics["mean loss"] = metrics.pop("loss")
    slots = [metrics.pop(name) for name in list(metrics) if name.startswith("acceptance/slot_")]
    if slots:
        metrics["acceptance"] = " ".join(f"{100 * share:2.0f}" for share in slots)
    if not {"loss/rejected", "loss/supervised"} & set(metrics):
        # The only part of the loss is the loss.
        metrics.pop("loss/accepted", None)
    return {
        _TROUBLES.get(name, name): _percent(value) if name in _TROUBLES else value
        for name, value in metrics.items()
        if name not in _UNPRINTED and not name.startswith("rejection/") and (value or name not in _TROUBLES)
    }


def _terminal_width() -> int | None:
    """Return the columns of the terminal that is printed to, `None` where it is a file, or closed."""
    try:
        is_terminal = sys.stdout is not None and sys.stdout.isatty()
    except ValueError:
        return None
    return shutil.get_terminal_size().columns if is_terminal else None


def _width(cells: Mapping[str, str]) -> int:
    """Return how wide a row of the table is, in characters."""
    return sum(max(len(title), len(cell)) + 2 for title, cell in cells.items()) - 2


def _sentence(metrics: dict[str, Any]) -> str:
    """Return metrics in a row, what matters most first."""
    seconds, speed = metrics.pop("runtime"), metrics.pop("samples_per_second", None)
    parts = [_duration(seconds) + ("" if speed is None else f" ({_text(speed)} rows per second)")]
    low, high = metrics.pop("tau_low", None), metrics.pop("tau_high", None)
    if "tau" in metrics:
        parts.append(f"tau {describe_tau(metrics.pop('tau'), low, high)}")
    if "acceptance" in metrics:
        parts.append(f"kept per slot {' '.join(metrics.pop('acceptance').split())} %")
    return ", ".join([*parts, *(f"{name} {_text(value)}" for name, value in metrics.items() if name not in _UNSAID)])


def _percent(share: Any) -> Any:
    """Return a share of responses, or tokens, for print; any other value as it is."""
    return f"{100 * share:.3g} %" if isinstance(share, (int, float)) else share


def _duration(seconds: float) -> str:
    """Return a time in the two units that matter."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"


def _text(value: Any, form: str = ".4g") -> str:
    """Return a value for print; whatever a callback logged, it has a text."""
    if isinstance(value, str) and form.startswith(">"):
        return format(value, form)
    return format(value, form) if isinstance(value, (int, float)) else str(value)
