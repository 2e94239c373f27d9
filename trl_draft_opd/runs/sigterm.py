# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
SIGTERM, as schedulers send it before they take a machine away: finish the step, save, leave.
"""

import signal
import threading
from types import FrameType


#: What a shell reports for a process that SIGTERM ended: schedulers start such a job again.
EXIT_CODE = 128 + signal.SIGTERM


class StopRequest:
    """
    Whether SIGTERM came, for as long as the context lasts; a second one ends the process as usual.

    Outside of the main thread, where Python lets nobody handle signals, it never comes.
    """

    def __init__(self):
        self.has_come = False
        self._earlier = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)
            self._earlier = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.has_come = True
        self.__exit__()
