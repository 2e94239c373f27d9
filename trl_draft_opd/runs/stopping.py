# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
SIGTERM, as schedulers send it before they take a machine away, and Ctrl-C: finish the step, save, leave.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState

from .distributed.ranks import any_rank


logger = logging.getLogger(__name__)

#: What a shell reports for a process that SIGTERM ended: schedulers start such a job again.
EXIT_CODE = 128 + signal.SIGTERM


class StopOnSignal(TrainerCallback):
    """
    Ends training with a checkpoint after the step in which SIGTERM or Ctrl-C came to any rank; a second one of the
    same kind acts as usual.

    Args:
        accelerator (`Accelerator`): Of the trainer.
        handles_interrupt (`bool`):
            Whether Ctrl-C is one of them. Not with workers that load data: a terminal interrupts them too.
    """

    def __init__(self, accelerator: Accelerator, *, handles_interrupt: bool):
        self.accelerator, self.handles_interrupt = accelerator, handles_interrupt
        self.came: signal.Signals | None = None
        self.stopped_at: int | None = None
        self._earlier: dict[int, Any] = {}

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handle the signals while the context lasts, and leave as they would if one came. Collective."""
        self.came, self.stopped_at = None, None
        # Python allows no handlers in other threads.
        if threading.current_thread() is threading.main_thread():
            self._earlier[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
            # Where somebody else answers Ctrl-C, it stays so.
            if self.handles_interrupt and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._earlier[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
        try:
            yield
            is_stopped = any_rank(self.accelerator, self.came is not None)
        finally:
            for number in list(self._earlier):
                self._restore(number)
        if is_stopped:
            name = "Ctrl-C" if self.came == signal.SIGINT else "SIGTERM"
            when = "after the last step" if self.stopped_at is None else f"saved after step {self.stopped_at}"
            logger.warning("%s came: %s, leaving.", name, when)
            if self.came == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(EXIT_CODE)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of training; the time that is left is for the checkpoint. Collective."""
        if any_rank(self.accelerator, self.came is not None):
            self.stopped_at = state.global_step
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop what the end of an epoch asks for; the last step asked for all that is needed. Collective."""
        if any_rank(self.accelerator, self.came is not None):
            control.should_save = control.should_evaluate = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = signal.Signals(number)
        self._restore(number)
        if number == signal.SIGINT:
            logger.warning("Ctrl-C: this step is finished and saved first. Once more ends at once, without a save.")

    def _restore(self, number: int) -> None:
        if number in self._earlier:
            signal.signal(number, self._earlier.pop(number))
