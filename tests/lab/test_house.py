# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The measure of the package's shape counts what it should, and its walks name functions that exist.
"""

import ast
import json
from pathlib import Path

import pytest

from benchmarks import house


pytestmark = pytest.mark.lab


def make_file(name: str, text: str) -> house.File:
    return house.File(name, text, ast.parse(text))


def test_every_step_of_every_walk_is_a_function_of_the_package():
    every = house.all_functions(house.read_files(Path(house.__file__).parents[1]))
    walks = json.loads(house.WALKS.read_text("utf-8"))
    assert [name for walk in walks.values() for name in walk if name not in every] == []


def test_circles_are_found_and_chains_are_none():
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    found = house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}})
    assert found == [["a", "b", "c"], ["e", "f"]]


@pytest.mark.parametrize(
    "line", ["from ..target.frozen import x", "from ..target import frozen", "def f(): from ..target import frozen"]
)
def test_relative_imports_are_resolved_to_modules(line):
    modules = {"trl_draft_opd.target", "trl_draft_opd.target.frozen", "trl_draft_opd.rollout.live"}
    assert house.imports(make_file("rollout/live.py", line), modules) == {"trl_draft_opd.target.frozen"}
    assert house.imports(make_file("rollout/__init__.py", line), modules) == {"trl_draft_opd.target.frozen"}


def test_lines_of_code_leave_out_blanks_comments_and_docstrings():
    text = '"""One\n\ntwo."""\n\n# why\nx = """a\nb"""\n\n\ndef f(a, *, b=1):\n    """Three."""\n    return a\n'
    file = make_file("x.py", text)
    assert house.count_code(file) == 4
    ((name, function),) = house.functions(file.tree)
    assert (name, house.length(function), [arg.arg for arg in house.parameters(function)]) == ("f", 2, ["a", "b"])
    assert not house.is_annotated(function)
