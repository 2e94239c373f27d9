# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Prints the metrics of a run for a person: a table of the updates, a sentence for an evaluation and for the end. Display
only: `state.log_history` and the reporters of `report_to` get every metric, unrounded.
"""

from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

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
}
# Amounts, of interest over time, in a plot.
_UNPRINTED = {"rounds", "response_length", "slots/accepted", "slots/rejected", "slots/supervised", "total_flos"}
# What a sentence says in other words.
_UNSAID = {"epoch", "steps_per_second"}
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
        self._first_step = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note where training begins, which a resumed run does behind its start."""
        self._first_step = state.global_step

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the lines of one log, but no sum of a training that had ended before."""
        if "train_runtime" in (logs or {}) and state.global_step == self._first_step:
            return
        if logs and state.is_world_process_zero:
            tqdm.write("\n".join(self.lines(logs, state.global_step, state.max_steps)))

    def lines(self, logs: Mapping[str, Any], step: int, max_steps: int) -> list[str]:
        """Return a sentence, or a row of the table, below the titles if its columns are new."""
        prefix = next((name.removesuffix("runtime") for name in logs if name.endswith("_runtime")), "")
        metrics = _readable(logs, prefix)
        if prefix:
            what = {"train_": "trained", "eval_": "evaluation"}.get(prefix, prefix.removeprefix("eval_").rstrip("_"))
            when = f", step {step}/{max_steps}" if max_steps else ""
            return [f"{what}{when}: {_sentence(metrics)}"]
        cells = {"step": f"{step}/{max_steps}".rjust(2 * len(str(max_steps)) + 1)}
        cells |= {title: _text(metrics.pop(name), form) for name, (title, form) in _COLUMNS.items() if name in metrics}
        titles = "  ".join(title.rjust(len(cell)) for title, cell in cells.items())
        row = "  ".join(cell.rjust(len(title)) for title, cell in cells.items())
        is_new, self._titles = titles != self._titles, titles
        row = "  ".join([row, *(f"{name} {_text(value)}" for name, value in metrics.items())])
        return [titles, row] if is_new else [row]


class Bar(ProgressCallback):
    """The progress bar, which leaves the metrics to [`LogPrinter`]."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


def print_logs_readably(trainer: Any) -> None:
    """Replace transformers' printing of dictionaries; a notebook keeps its own table."""
    has_bar = trainer.pop_callback(ProgressCallback) is not None
    if has_bar:
        trainer.add_callback(Bar)
    if has_bar or trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(LogPrinter)


def _readable(logs: Mapping[str, Any], prefix: str) -> dict[str, Any]:
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
    return format(value, form) if isinstance(value, (int, float)) else str(value)
