# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Arms of a comparison: proven equal first, then timed in turns (A B C, A B C, ...), and compared by paired ratios.

Knows clocks, medians, JSON and plots; knows nothing of what an arm computes. A time of one arm alone says more about
the machine than about the arm, so only ratios are printed.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers


# An interleaved pair of the same work scatters by some 20 % on a busy machine; beyond this a ratio says little.
NOISY_SPREAD = 2.0


@dataclass(frozen=True)
class Arm:
    """
    One way of doing the same work.

    Args:
        name (`str`): As it stands in tables.
        run (`Callable`): Does the timed work and returns what must be equal: tensors, or lists of them, by name.
    """

    name: str
    run: Callable[[], Mapping[str, torch.Tensor | Sequence[torch.Tensor]]]


@dataclass(frozen=True)
class Ratio:
    """
    How many times longer `slower` took than `faster`: the median over pairs, with the 10th and 90th percentile.

    Attributes:
        slower (`str`), faster (`str`): Names of the arms.
        median (`float`), p10 (`float`), p90 (`float`): Of the paired ratios.
        pairs (`int`): Number of pairs.
    """

    slower: str
    faster: str
    median: float
    p10: float
    p90: float
    pairs: int

    @property
    def is_noisy(self) -> bool:
        """Whether the pairs scatter too much to be trusted."""
        return self.p90 > NOISY_SPREAD * self.p10

    def __str__(self) -> str:
        noise = "  NOISY" if self.is_noisy else ""
        return f"{self.slower} / {self.faster}: {self.median:.2f} [{self.p10:.2f}, {self.p90:.2f}]{noise}"


@dataclass(frozen=True)
class Figure:
    """
    One line of the table: what was asked, what came out.

    Args:
        name (`str`): What is measured.
        measured (`float`): The value.
        reach (`float` or `None`): The bound; `None` for a value that is only reported.
        is_upper (`bool`): Whether `reach` is an upper bound.
        detail (`str`): Anything a reader needs to judge it.
    """

    name: str
    measured: float
    reach: float | None
    is_upper: bool = True
    detail: str = ""

    @property
    def is_reached(self) -> bool | None:
        """Whether the bound is kept; `None` without a bound."""
        if self.reach is None:
            return None
        return self.measured <= self.reach if self.is_upper else self.measured >= self.reach

    def __str__(self) -> str:
        asked = "" if self.reach is None else f" (asked {'<=' if self.is_upper else '>='} {self.reach:g})"
        verdict = {True: "  reached", False: "  NOT REACHED", None: ""}[self.is_reached]
        detail = f"  {self.detail}" if self.detail else ""
        return f"{self.name}: {self.measured:.4g}{asked}{verdict}{detail}"


@dataclass(frozen=True)
class Curve:
    """
    Cost against size on a log-log plane.

    Args:
        name (`str`): What grows with what.
        x_label (`str`), y_label (`str`): Axes.
        x (`list[float]`), y (`list[float]`): Points.
    """

    name: str
    x_label: str
    y_label: str
    x: list[float]
    y: list[float]

    @property
    def exponent(self) -> float:
        """Slope of the least-squares line through the logarithms."""
        return fitted_exponent(self.x, self.y)


@dataclass
class Report:
    """
    Everything one suite measured.

    Attributes:
        suite (`str`): Its name.
        settings (`dict`): Command-line arguments.
        figures (`list[Figure]`), ratios (`list[dict]`), counters (`dict`), curves (`list[Curve]`): Results.
    """

    suite: str
    settings: dict
    figures: list[Figure] = field(default_factory=list)
    ratios: list[dict] = field(default_factory=list)
    counters: dict[str, dict] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Print a line at once: suites take minutes."""
        print(text, flush=True)

    def figure(self, name: str, measured: float, reach: float | None = None, **options) -> None:
        """Keep and print a figure."""
        self.figures.append(Figure(name, float(measured), reach, **options))
        self.say(f"  * {self.figures[-1]}")

    def ratio(self, label: str, ratio: Ratio) -> Ratio:
        """Keep and print a ratio, with the load it was measured under."""
        self.ratios.append({"label": label, **asdict(ratio), "load": os.getloadavg()[0]})
        self.say(f"  {label}: {ratio}  (load {os.getloadavg()[0]:.1f})")
        return ratio

    def count(self, label: str, **values) -> None:
        """Keep and print deterministic counters."""
        self.counters.setdefault(label, {}).update(values)
        cells = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value:,}"
            for name, value in values.items()
        )
        self.say(f"  {label}: {cells}")

    def curve(self, curve: Curve) -> Curve:
        """Keep and print a curve with its exponent."""
        self.curves.append(curve)
        self.say(f"  {curve.name}: exponent {curve.exponent:.2f} over {curve.x_label} {[round(x) for x in curve.x]}")
        return curve

    def to_dict(self) -> dict:
        """Return plain numbers and lists, ready for JSON."""
        return {
            "suite": self.suite,
            "settings": {
                name: str(value) if isinstance(value, Path) else value for name, value in self.settings.items()
            },
            "machine": machine(),
            "figures": [asdict(figure) | {"is_reached": figure.is_reached} for figure in self.figures],
            "ratios": self.ratios,
            "counters": self.counters,
            "curves": [asdict(curve) | {"exponent": curve.exponent} for curve in self.curves],
        }


def machine() -> dict:
    """Return what a reader must know of the machine to compare two reports."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def assert_equal(arms: Sequence[Arm], *, rtol: float, atol: float) -> None:
    """
    Run every arm once and hold all results to those of the first.

    Args:
        arms (`Sequence[Arm]`): At least one.
        rtol (`float`), atol (`float`): Tolerances, the latter as a share of the largest expected value of each tensor.

    Raises:
        AssertionError: Naming the arm and the result that differs. An arm that is not equal is no arm.
    """
    expected = arms[0].run()
    for arm in arms[1:]:
        actual = arm.run()
        assert set(actual) == set(expected), f"{arm.name} returns {sorted(actual)}, {arms[0].name} {sorted(expected)}"
        for name, value in expected.items():
            values, found = ([part] if isinstance(part, torch.Tensor) else part for part in (value, actual[name]))
            assert len(values) == len(found), f"{name} of {arm.name} has {len(found)} parts, not {len(values)}"
            for want, got in zip(values, found, strict=True):
                largest = float(want.abs().max()) if want.numel() else 0.0
                torch.testing.assert_close(
                    got,
                    want,
                    rtol=rtol,
                    atol=atol * largest,
                    msg=lambda text, a=arm, n=name: f"{n} of {a.name} differs from {arms[0].name}: {text}",
                )


def time_in_turns(arms: Sequence[Arm], *, pairs: int) -> dict[str, list[float]]:
    """Run all arms in turns, `pairs` times after one untimed turn, and return the seconds of each run."""
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(pairs + 1):
        for arm in arms:
            _wait_for_device()
            begun = time.perf_counter()
            arm.run()
            _wait_for_device()
            if turn:
                seconds[arm.name].append(time.perf_counter() - begun)
    return seconds


def paired_ratio(seconds: Mapping[str, Sequence[float]], slower: str, faster: str) -> Ratio:
    """Compare two arms turn by turn."""
    ratios = torch.tensor(seconds[slower], dtype=torch.float64) / torch.tensor(seconds[faster], dtype=torch.float64)
    p10, median, p90 = ratios.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Ratio(slower, faster, median, p10, p90, len(ratios))


def median_seconds(seconds: Mapping[str, Sequence[float]], name: str) -> float:
    """Return the median of an arm's times, for curves within one run."""
    return float(torch.tensor(seconds[name], dtype=torch.float64).median())


def fitted_exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the least-squares line through `(log x, log y)`."""
    log_x, log_y = (torch.tensor(list(values), dtype=torch.float64).log() for values in (x, y))
    log_x, log_y = log_x - log_x.mean(), log_y - log_y.mean()
    return float((log_x @ log_y) / (log_x @ log_x))


def save_json(path: Path, reports: Sequence[Report]) -> None:
    """Write reports as one JSON list."""
    path.write_text(json.dumps([report.to_dict() for report in reports], indent=1) + "\n", encoding="utf-8")


def save_plot(path: Path, reports: Sequence[Report]) -> None:
    """Draw every curve of the reports and every paired ratio with its range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = [curve for report in reports for curve in report.curves]
    ratios = [ratio for report in reports for ratio in report.ratios]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 1.5 + max(4.0, 0.28 * len(ratios))))
    for curve in curves:
        scaled = [y / curve.y[0] for y in curve.y]
        left.loglog([x / curve.x[0] for x in curve.x], scaled, "o-", label=f"{curve.name} ({curve.exponent:.2f})")
    left.set_xlabel("size / smallest size")
    left.set_ylabel("cost / smallest cost")
    if curves:
        left.legend(fontsize=7)
    for row, ratio in enumerate(ratios):
        right.plot([ratio["p10"], ratio["p90"]], [row, row], color="grey")
        right.plot([ratio["median"]], [row], "o", color="black")
    right.set_yticks(range(len(ratios)), [f"{r['label']}: {r['slower']} / {r['faster']}" for r in ratios], fontsize=7)
    right.axvline(1.0, linestyle=":", color="grey")
    right.set_xlabel("paired time ratio, median with 10th to 90th percentile")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
