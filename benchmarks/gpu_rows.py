# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What `benchmarks/gpu.py` writes and how it measures: one JSON row after every measurement, on the disk before the next
one begins; seconds by events of the device; items that fail or take too long and leave the others alone.
"""

import contextlib
import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch


SHOWN_CHARACTERS = 400


class OutOfTime(BaseException):
    """An item has used up its time. No error: what catches those must not catch it."""


@dataclass(frozen=True)
class Item:
    """
    One thing to measure.

    Attributes:
        name (`str`): Its rows are found again by it.
        part (`int`): Which half of the run it belongs to.
        seconds (`float`): After which it is stopped; what it measured until then stays.
        run (`Callable`): Does it, given the bench.
    """

    name: str
    part: int
    seconds: float
    run: Callable[[Any], None]


class Rows:
    """
    The file of rows; a run that is started again finds what it has and does not measure it twice.

    Args:
        path (`Path`): JSON lines.
        common (`dict`): What every row says too: card, versions.
    """

    def __init__(self, path: Path, common: dict[str, Any]):
        self.path, self.common = path, common
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # The last line of a run that was killed may be half a line.
        self.rows = [row for row in map(parse_row, lines) if row is not None]

    def find(self, job: str, stage: str, note: str = "") -> dict[str, Any] | None:
        """Return the last row of a measurement on this device, if there is one."""
        wanted = (job, stage, note, self.common.get("gpu"))
        found = [row for row in self.rows if (row["job"], row["stage"], row["note"], row.get("gpu")) == wanted]
        return found[-1] if found else None

    def add(self, job: str, stage: str, note: str = "", **values: Any) -> dict[str, Any]:
        """Write a row, and have it on the disk before anything else happens."""
        row = {"job": job, "stage": stage, "note": note} | self.common | values
        text = json.dumps(row) + "\n"
        is_broken = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + text if is_broken else text)
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
        print(f"  {job} {stage} {note}: {shown}"[:SHOWN_CHARACTERS], flush=True)
        return row


def parse_row(line: str) -> dict[str, Any] | None:
    """Return a row of the file, or `None` for a line that is none, such as half of one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"job", "stage", "note"} <= row.keys() else None


@dataclass
class Clock:
    """
    Seconds between points in the work of a device: by its events, where it is CUDA; by the host's clock elsewhere.

    Attributes:
        spans (`list[tuple]`): Name, begin and end of every stage, in order.
    """

    device: torch.device
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    def mark(self) -> Any:
        """Return a point in time of the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        begin = self.mark()
        yield
        self.spans.append((name, begin, self.mark()))

    def wrapped(self, function: Callable, name: str) -> Callable:
        """Return a function that is measured as a stage."""

        def timed(*args, **options):
            with self.stage(name):
                return function(*args, **options)

        return timed

    def seconds(self) -> dict[str, float]:
        """Wait for the device, and return the seconds of each stage; stages of one name together."""
        wait(self.device)
        total: dict[str, float] = {}
        for name, begin, end in self.spans:
            spent = begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin
            total[name] = total.get(name, 0.0) + spent
        self.spans.clear()
        return total


def wait(device: torch.device) -> None:
    """Wait until a device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_runs(
    run: Callable[[Clock], Any], device: torch.device, *, repeats: int, warmups: int = 2, seconds: float = 20.0
) -> dict[str, float]:
    """
    Run something a few times and return the median seconds of each stage, of all as `"step"`, and the peak bytes.

    Args:
        run (`Callable`): The work, given the clock.
        repeats (`int`), warmups (`int`): Timed runs, and runs before them, which compile.
        seconds (`float`): After which no further run is begun, once one was timed.
    """
    for _ in range(warmups):
        run(Clock(device))
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found: dict[str, list[float]] = {}
    begun = time.perf_counter()
    for _ in range(repeats):
        clock = Clock(device)
        with clock.stage("step"):
            run(clock)
        for name, spent in clock.seconds().items():
            found.setdefault(name, []).append(spent)
        if time.perf_counter() - begun > seconds:
            break
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {name: median(values) for name, values in found.items()} | {"peak_bytes": peak}


def run_items(items: Sequence[Item], bench: Any, rows: Rows, seconds: float) -> None:
    """Run every item that has not been done, each in its own time, while there is time left of all."""
    end = time.monotonic() + seconds
    for item in items:
        done = rows.find(item.name, "item")
        if done is not None and done["status"] == "done":
            print(f"-- {item.name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < 5:
            rows.add(item.name, "item", status="no time left")
            continue
        print(f"-- {item.name}, at most {min(item.seconds, left):.0f} s of {left:.0f}", flush=True)
        begun = time.monotonic()
        status, text = "done", ""
        try:
            with stopped_after(min(item.seconds, left)):
                item.run(bench)
        except OutOfTime:
            status = "stopped"
        except Exception as error:  # noqa: BLE001  one item that fails must not take the others along
            status = "failed"
            text = f"{type(error).__name__}: {error}"[:2000] + "\n" + traceback.format_exc()[-2000:]
        rows.add(item.name, "item", status=status, seconds=time.monotonic() - begun, error=text)
        bench.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` inside once the seconds are over."""

    def stop(*_args: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
