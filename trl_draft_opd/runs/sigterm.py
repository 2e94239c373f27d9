# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
SIGTERM, as schedulers send it before they take a machine away: finish the step, save, leave.
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


class StopOnSigterm(TrainerCallback):
    """
    Ends training with a checkpoint after the step in which SIGTERM came to any rank; a second one kills as usual.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.has_come = False
        self.stopped_at: int | None = None
        self._earlier: Any = None

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handle SIGTERM while the context lasts, and leave with `SystemExit` if one came. Collective."""
        self.has_come, self.stopped_at = False, None
        # Python allows no handlers in other threads.
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
            is_stopped = any_rank(self.accelerator, self.has_come)
        finally:
            self._restore()
        if is_stopped:
            when = "after the last step" if self.stopped_at is None else f"saved after step {self.stopped_at}"
            logger.warning("SIGTERM came: %s, leaving.", when)
            raise SystemExit(EXIT_CODE)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of training; the time that is left is for the checkpoint. Collective."""
        if any_rank(self.accelerator, self.has_come):
            self.stopped_at = state.global_step
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop what the end of an epoch asks for; the last step asked for all that is needed. Collective."""
        if any_rank(self.accelerator, self.has_come):
            control.should_save = control.should_evaluate = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.has_come = True
        self._restore()

    def _restore(self) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)
            self._earlier = None
