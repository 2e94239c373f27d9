# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Every arm of every suite runs, speculators' among them, and gives what ours gives before it is timed: a comparison that
was published once can be made again.
"""

import importlib
import re

import pytest

from benchmarks import arms
from benchmarks.run import SUITES, parse_arguments


pytestmark = pytest.mark.conformance

PEERS_ARE_IN = ("loss", "ttt", "step")
# Timed for a curve or as a lower bound: nothing else does the same work, or it gives less than an arm does.
NOT_COMPARED = re.compile(r"bare, |V=|R=|ours S=|\d steps")


class Watched:
    """Names of one suite's arms, by what happened to them."""

    def __init__(self, monkeypatch, module):
        self.equal, self.timed = set(), set()
        monkeypatch.setattr(module, "assert_equal", self.assert_equal)
        monkeypatch.setattr(module, "time_in_turns", self.time_in_turns)

    def assert_equal(self, given, **tolerances):
        arms.assert_equal(given, **tolerances)
        self.equal |= {arm.name for arm in given}

    def time_in_turns(self, given, *, pairs):
        self.timed |= {arm.name for arm in given}
        return arms.time_in_turns(given, pairs=pairs)


@pytest.mark.parametrize("suite", [suite for suite in SUITES if suite != "long"])
def test_every_arm_of_a_suite_runs_and_is_found_equal_before_it_is_timed(suite, shared_dir, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.suites.{suite}")
    watched = Watched(monkeypatch, module)
    args = parse_arguments(
        ["--suite", suite, "--quick", "--pairs", "1", "--prompts", "8", "--shared", str(shared_dir)]
    )
    report = arms.Report(suite, vars(args))
    module.run(args, report)
    assert "left out" not in capsys.readouterr().out
    assert report.figures and watched.timed
    assert not [name for name in watched.timed - watched.equal if not NOT_COMPARED.match(name)]
    if suite in PEERS_ARE_IN:
        assert "speculators" in watched.timed
        assert any(figure.name.startswith("speculators / ours, time") for figure in report.figures)


def test_a_step_of_dspark_and_dflash_2_gives_the_losses_and_gradients_of_speculators(shared_dir, capsys):
    module = importlib.import_module("benchmarks.suites.step")
    families = ["--only", "real", "--family", "dspark", "dflash2", "--pairs", "1"]
    report = arms.Report("step", {})
    # Held against each other before they are timed.
    module.run(parse_arguments(["--suite", "step", "--quick", *families, "--shared", str(shared_dir)]), report)
    assert "left out" not in capsys.readouterr().out
    timed = [figure.name for figure in report.figures if figure.name.startswith("speculators / ours, time")]
    assert len(timed) == 8


def test_the_memory_of_a_step_grows_no_faster_than_a_row_gets_longer():
    module = importlib.import_module("benchmarks.suites.long")
    report = arms.Report("long", {})
    module.run(parse_arguments(["--suite", "long", "--quick"]), report)
    of_memory = [figure for figure in report.figures if "peak bytes" in figure.name]
    assert len(of_memory) == 4 and all(figure.is_reached for figure in of_memory)
