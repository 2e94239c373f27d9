# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The table of faults is complete, and every test it names exists.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest


TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "faults.md"
ROWS = [line for line in TABLE.read_text("utf-8").splitlines() if re.match(r"\| \d+ \|", line)]


@cache
def named_tests(name: str) -> set[str]:
    path = TESTS / name
    if not path.is_file():
        return set()
    return {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_forty_faults_stand_in_the_table_in_order():
    assert [int(row.split("|")[1]) for row in ROWS] == list(range(1, 41))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[2].strip()[:30])
def test_every_fault_names_what_happens_and_a_test(row):
    assert row.split("|")[3].strip() and "::test_" in row.split("|")[-2]


def test_every_test_in_the_table_exists():
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", TABLE.read_text("utf-8"))
    assert len(named) > 80
    assert [f"{name}::{test}" for name, test in named if test not in named_tests(name)] == []
