# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Where the time of a step goes: functions are wrapped for the length of a measurement and charged for what runs inside
of them and inside of no other wrapped function. Shares of one run, never times.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class StageClock:
    """
    Charges time to stages.

    Attributes:
        seconds (`Counter`): Time by stage, the innermost stage charged.
        total (`float`): Time between `start` and `stop`, over all pairs of them.
    """

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self.total = 0.0
        self._open: list[str] = []
        self._since = 0.0
        self._begun: float | None = None

    def start(self) -> None:
        """Begin to count the whole, if it is not counted yet."""
        if self._begun is None:
            self._begun = time.perf_counter()

    def stop(self) -> None:
        """End the whole."""
        if self._begun is not None:
            self.total += time.perf_counter() - self._begun
            self._begun = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge what runs inside to `name`, while the whole is counted."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrapped(self, function: Callable, name: str) -> Callable:
        """Return a function charged to `name`."""

        @wraps(function)
        def timed(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def watch(self, *places: tuple[Any, str, str]) -> Iterator[None]:
        """Wrap the attributes `(owner, attribute, stage)` until the end of the block."""
        before = [(owner, attribute, vars(owner).get(attribute, _ABSENT)) for owner, attribute, _ in places]
        for owner, attribute, stage in places:
            setattr(owner, attribute, self.wrapped(getattr(owner, attribute), stage))
        try:
            yield
        finally:
            for owner, attribute, value in reversed(before):
                if value is _ABSENT:
                    delattr(owner, attribute)
                else:
                    setattr(owner, attribute, value)

    def shares(self) -> dict[str, float]:
        """Return each stage's share of the whole, and what is left as `"other"`."""
        shares = {name: seconds / self.total for name, seconds in self.seconds.items()}
        return shares | {"other": 1 - sum(shares.values())}

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open and self._begun is not None:
            self.seconds[self._open[-1]] += now - max(self._since, self._begun)
        self._since = now


_ABSENT = object()
