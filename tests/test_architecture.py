# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Rules of the project that no linter knows: words, tests named as claims, no code out of data, no trace of the
workplace.

A rule is a function from a file's name and text to a list of offences. Each rule has two tests: one checks the project
against it, one (`test_the_rule_...`) shows that it catches an offence. All other rules are in pyproject.toml, kept by
`make lint`. Sizes are no rule: `python -m benchmarks.house` warns of files over 500 lines and functions over 60.
"""

import ast
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "trl_draft_opd"
CODE = (PACKAGE, "examples", "benchmarks")

MIN_TEST_NAME_WORDS = 4

BANNED_WORDS = re.compile(r"teacher|student|verifier|draft_?model|trajector|(?<![a-z])laws?(?![a-z])", re.IGNORECASE)
# Names that are not ours to choose, with the reason.
ALLOWED_NAMES = {
    "DFlashDraftModel": "architecture name in published checkpoints, read by serving engines",
    "DSparkDraftModel": "the same",
    "DFlash2DraftModel": "the same",
    "Eagle3DraftModel": "their counterpart, named alike",
}

# Code of a repository runs in one place, where `verify --trust-remote-code` asked for it.
TRUSTING_FILE = f"{PACKAGE}/parity/consumers.py"

# Where this project is built is nobody's business. Spelled in pieces so that this file does not match itself.
WORKPLACE = re.compile(r"(?<![\w.-])/" + r"work(?![\w-])|\bshared/" + r"design\b")
TEXT_SUFFIXES = {".cfg", ".in", ".ipynb", ".jinja", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
TEXT_NAMES = {"Makefile", "run"}
NOT_OURS = re.compile(r"\.git|\.gl|\.venv.*|\..*_cache|__pycache__|build|dist|outputs|.*\.egg-info")


# ---- reading the project --------------------------------------------------------------------------------------------


def _text_files() -> Iterator[str]:
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not NOT_OURS.fullmatch(name))
        for name in sorted(names):
            if name in TEXT_NAMES or Path(name).suffix in TEXT_SUFFIXES:
                yield (Path(folder) / name).relative_to(ROOT).as_posix()


def _python_files(*folders: str) -> list[str]:
    return [name for name in _text_files() if name.endswith(".py") and name.split("/")[0] in folders]


def _offences(rule: Callable[[str, str], list[str]], names: list[str]) -> list[str]:
    assert names, "no file to check against the rule"
    return [f"{name}: {offence}" for name in names for offence in rule(name, (ROOT / name).read_text("utf-8"))]


# ---- the rules ------------------------------------------------------------------------------------------------------


def _word_offences(name: str, source: str) -> list[str]:
    defined = [(0, name)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.append((node.lineno, node.name))
        elif isinstance(node, ast.arg):
            defined.append((node.lineno, node.arg))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.append((node.lineno, node.attr))
        elif isinstance(node, ast.alias) and node.asname:
            defined.append((node.lineno, node.asname))
    offences = []
    for line, identifier in defined:
        ours = identifier
        for allowed in ALLOWED_NAMES:
            ours = ours.replace(allowed, "")
        if BANNED_WORDS.search(ours):
            offences.append(f"line {line}: {identifier}; write the word of CONTRIBUTING")
    return offences


def _running_offences(name: str, source: str) -> list[str]:
    """Settings that let a file or a repository run its own code; ruff keeps the calls that always do."""
    offences = []
    for node in ast.walk(ast.parse(source)):
        for line, word in _switched_on(node):
            if word == "allow_pickle" or (word == "trust_remote_code" and name != TRUSTING_FILE):
                offences.append(f"line {line}: {word} is True, whoever asked")
    return offences


def _switched_on(node: ast.AST) -> Iterator[tuple[int, str]]:
    """
    Line and name of what is set to `True`: an argument, a default, a variable, an attribute, an entry of a dictionary.
    """
    if isinstance(node, ast.Call):
        pairs = [(keyword.arg or "", keyword.value) for keyword in node.keywords]
    elif isinstance(node, ast.Dict):
        pairs = [
            (ast.unparse(key).strip("'\"") if key else "", value)
            for key, value in zip(node.keys, node.values, strict=True)
        ]
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        pairs = [(ast.unparse(target).split(".")[-1], node.value) for target in targets]
    elif isinstance(node, ast.arguments):
        named = [*node.posonlyargs, *node.args]
        pairs = [(arg.arg, value) for arg, value in zip(reversed(named), reversed(node.defaults), strict=False)]
        pairs += [(arg.arg, value) for arg, value in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
    else:
        return
    yield from (
        (value.lineno, word) for word, value in pairs if isinstance(value, ast.Constant) and value.value is True
    )


def _test_name_offences(name: str, source: str) -> list[str]:
    offences = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            offences.append(f"line {node.lineno}: {node.name}; tests are plain functions")
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            words = [word for word in node.name.removeprefix("test").split("_") if word]
            if len(words) < MIN_TEST_NAME_WORDS:
                offences.append(
                    f"line {node.lineno}: {node.name} is not a claim; use {MIN_TEST_NAME_WORDS} words or more"
                )
    return offences


def _workplace_offences(name: str, text: str) -> list[str]:
    return [f"line {n}: {line.strip()[:80]}" for n, line in enumerate(text.splitlines(), 1) if WORKPLACE.search(line)]


# ---- the project keeps them -----------------------------------------------------------------------------------------


def test_names_say_target_and_drafter_only():
    assert _offences(_word_offences, _python_files(*CODE, "tests")) == []


def test_nothing_runs_code_out_of_data():
    assert _offences(_running_offences, _python_files(*CODE)) == []


def test_every_test_is_a_function_named_as_a_claim():
    names = [name for name in _python_files("tests") if name.split("/")[-1].startswith("test_")]
    assert _offences(_test_name_offences, names) == []


def test_no_text_mentions_where_the_project_was_built():
    assert _offences(_workplace_offences, list(_text_files())) == []


# ---- the rules catch offences ---------------------------------------------------------------------------------------


def test_the_rule_of_words_looks_at_every_defined_name():
    for source in (
        "teacher_logits = 1",
        "self.student = 1",
        "def f(verifier): pass",
        "class Student: pass",
        "import torch as teacher",
        "for draft_model in []: pass",
        "class MyDraftModel: pass",
    ):
        assert len(_word_offences("trl_draft_opd/losses.py", source)) == 1, source
    assert len(_word_offences("trl_draft_opd/teacher.py", "")) == 1
    # What others named may be used, and what engines read must be.
    assert _word_offences("trl_draft_opd/losses.py", "f(teacher_model=x.teacher)\nclass DFlashDraftModel: pass") == []


def test_the_rule_of_code_out_of_data_catches_every_way_to_turn_it_on():
    for source in (
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "def load(x, trust_remote_code=True): pass",
        "def load(*, trust_remote_code=True): pass",
        "class C:\n    trust_remote_code: bool = True",
        "options.trust_remote_code = True",
    ):
        assert len(_running_offences("", source)) == 1, source
        assert _running_offences(TRUSTING_FILE, source) == []
        assert _running_offences("", source.replace("True", "False")) == []
    assert _running_offences("", "load(x, trust_remote_code=options.trust_remote_code)\nnp.load(path)") == []
    assert len(_running_offences(TRUSTING_FILE, "np.load(path, allow_pickle=True)")) == 1


def test_the_rule_of_test_names_wants_a_claim():
    assert len(_test_name_offences("", "def test_the_loss(): pass")) == 1
    assert len(_test_name_offences("", "def test(): pass")) == 1
    assert len(_test_name_offences("", "class TestLoss:\n    def test_a_loss_is_never_negative(self): pass")) == 1
    assert _test_name_offences("", "def test_a_loss_is_never_negative(): pass") == []


def test_the_rule_of_the_workplace_spares_other_paths():
    for line in ("see /" + "work/main", "`/" + "work`", "file:///" + "work/x", "read ../shared/" + "design/x.md"):
        assert len(_workplace_offences("", line)) == 1, line
    assert _workplace_offences("", ".github/workflows\nframe/work\n/workers\n--shared ../shared\ndesign/shared") == []
