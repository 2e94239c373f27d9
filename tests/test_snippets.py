# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Every snippet of the documentation is dry-run: the real parser of a command reads its flags, and of Python the names
that are imported and the arguments that are given must exist. What needs neither a GPU nor the Hub runs elsewhere: the
README in tests/conformance/test_readme.py, the quickstart below.
"""

import argparse
import ast
import importlib
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_docs import PAGES, ROOT, name_of
from transformers import HfArgumentParser
from trl import TrlParser

from helpers.tiny import make_target, make_tokenizer
from trl_draft_opd.cli import COMMANDS, arguments, main


# Programs that are not ours: their flags are not known here.
FOREIGN = {"cd", "git", "head", "hf", "jq", "pip", "pre-commit"}
# Servers, whose settings in JSON are read.
SERVERS = ("vllm serve", "python -m vllm.", "python -m sglang.")
# What `...` behind a command stands for: the flags it needs, which the page has shown.
NEEDED = {
    "bench": "--base-url http://127.0.0.1:8000 --target target --dataset rows.jsonl",
    "opd": "--drafter drafter --target target --dataset rows.jsonl",
    "read": "--drafter drafter --target target --dataset rows.jsonl --responses responses",
}
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


class Parsed(Exception):
    """A command's flags were read."""


def snippets(page: Path) -> list[tuple[int, str, str]]:
    """Return line, language and text of each fenced block of a page; of longer fences, which quote pages, none."""
    found, lines = [], page.read_text("utf-8").splitlines()
    start, fence, language = None, "", ""
    for number, line in enumerate(lines, start=1):
        mark = re.match(r"(\s*)(`{3,}|~{3,})\s*(\w*)", line)
        if mark and start is None:
            start, fence, language, indent = number, mark[2], mark[3], mark[1]
        elif mark and start is not None and mark[2].startswith(fence):
            if len(fence) == 3:
                text = "\n".join(line.removeprefix(indent) for line in lines[start : number - 1])
                found.append((start, language, text))
            start = None
    return found


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of a block of shell, with its variables in their places."""
    text = re.sub(r"\[(--[^\]]+)\]", r"\1", text.replace("\\\n", " "))  # what stands in brackets can be added
    text = re.sub(r"(^|\s)#.*$", "", text, flags=re.MULTILINE)
    variables: dict[str, str] = {}
    found: list[list[str]] = [[]]
    for statement in re.split(r"\n(?=\w|--)", text):
        for name, value in sorted(variables.items(), reverse=True):
            statement = statement.replace(f"${name}", value)
        if assigned := re.fullmatch(r"\s*([A-Z]+)=(.*)", statement.rstrip(), re.DOTALL):
            variables[assigned[1]] = shlex.split(assigned[2])[0]
            continue
        lexer = shlex.shlex(statement, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split, lexer.commenters = True, ""
        found.append([])
        for word in lexer:
            if set(word) <= set("();|&"):
                found.append([])
            elif word == "...":
                found[-1] += NEEDED[found[-1][1]].split()
            else:
                found[-1].append(word)
    return [command[: command.index(">")] if ">" in command else command for command in found if command]


def commands_of_program(text: str) -> list[list[str]]:
    """Return the words of the package's own commands in a script, whose syntax bash has checked."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, capture_output=True)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [command for line in lines if line.startswith("trl-draft-opd") for command in commands(line)]


def parse_ours(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the flags of a command of the package as it does itself, and stop there."""
    real = arguments.parse

    def parse(*given):
        real(*given)
        raise Parsed

    for name in {module for module, _ in COMMANDS.values()}:
        monkeypatch.setattr(importlib.import_module(f"trl_draft_opd.cli.{name}"), "parse", parse)
    monkeypatch.setattr("traceback.print_exc", lambda: None)
    assert main(words) == 3, "its flags were not read"  # `Parsed` is an error that no user made


def parse_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a script or a module, and stop where it has read its flags."""

    def reading(real):
        def read(self, *args, **kwargs):
            real(self, *args, **kwargs)
            raise Parsed

        return read

    for owner, name in (
        (argparse.ArgumentParser, "parse_args"),
        (HfArgumentParser, "parse_args_into_dataclasses"),
        (TrlParser, "parse_args_and_config"),
    ):
        monkeypatch.setattr(owner, name, reading(getattr(owner, name)))
    is_module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[is_module:])
    with pytest.raises(Parsed):
        if is_module:
            runpy.run_module(words[1], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def dry_run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check one command."""
    line = " ".join(words)
    if words[0].startswith("--"):
        words = ["trl-draft-opd", "opd", *NEEDED["opd"].split(), *words]  # flags alone, to be added to a training
    if words[:2] == ["accelerate", "launch"]:
        at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        words = ["python", *words[at:]]
    if words[0] == "trl-draft-opd":
        parse_ours(words[1:], monkeypatch)
    elif words[:3] == ["python", "-m", "trl_draft_opd"]:
        parse_ours(words[3:], monkeypatch)
    elif line.startswith(SERVERS):
        for flag, value in zip(words, words[1:], strict=False):
            if flag in {"--speculative-config", "--kv-transfer-config"}:
                json.loads(value)
    elif words[0] == "mkdir":
        # A file can only be named in a folder that is there. Nothing is made outside of the test's own.
        if not Path(words[-1]).is_absolute():
            Path(words[-1]).mkdir(parents=True, exist_ok=True)
    elif words[0] == "make":
        assert [word for word in words[1:] if "=" not in word and word not in MAKE_TARGETS] == []
    elif words[0] == "python":
        parse_python(words[1:], monkeypatch)
    elif words[0] == "bash":
        # What it runs is read in test_examples.py.
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in FOREIGN, f"{words[0]} is no command that is known here"


def check_python(text: str) -> None:
    """Check that the names that a block imports exist, and that what it calls of ours takes its arguments."""
    tree, names = ast.parse(text), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        function = call.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            called = getattr(names.get(function.value.id), function.attr, None)
        else:
            called = names.get(getattr(function, "id", ""))
        if called is None or not getattr(called, "__module__", "").startswith("trl_draft_opd"):
            continue
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        arguments = [None for argument in call.args if not isinstance(argument, ast.Starred)]
        # Partly: a snippet may leave out, with `...`, what does not matter there.
        inspect.signature(called).bind_partial(*arguments, **keywords)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=name_of)
def test_every_snippet_can_be_run(page, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-4B-EAGLE3").mkdir()  # an export that is there already, where a measurement is recorded
    wrong = []
    for number, language, text in snippets(page):
        try:
            if language == "bash":
                for words in commands_of_program(text) if text.startswith("#!") else commands(text):
                    with monkeypatch.context() as patches:
                        dry_run(words, patches)
            elif language == "python":
                check_python(text)
            elif language == "json":
                json.loads(text)
            elif language == "yaml":
                yaml.safe_load(text)
        except (Exception, SystemExit) as error:
            wrong.append(f"line {number}: {type(error).__name__}: {error}: {capsys.readouterr().err[-300:]}")
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    [
        "trl-draft-opd sft --target t --dataset d --familly eagle3",
        "trl-draft-opd trane --target t",
        "python examples/quickstart.py --target t --datset d",
        "python -m benchmarks.roofline --no-such-flag",
        "make no-such-target",
        """vllm serve t --speculative-config '{"method": "eagle3"'""",
        "some-program --flag",
    ],
)
def test_a_snippet_that_cannot_be_run_is_found(text, monkeypatch):
    with pytest.raises((Exception, SystemExit)):
        for words in commands(text):
            dry_run(words, monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "from trl_draft_opd import NoSuchName",
        "from trl_draft_opd import DraftSFTConfig\nDraftSFTConfig('x', regenarate=True)",
        "from trl_draft_opd import Eagle3DraftModel\nEagle3DraftModel.from_target(t, widht=3)",
    ],
)
def test_python_that_cannot_be_run_is_found(text):
    with pytest.raises((AttributeError, ImportError, TypeError)):
        check_python(text)


@pytest.mark.slow
def test_the_commands_of_the_quickstart_go_from_rows_to_a_verified_export(monkeypatch, tmp_path, capsys):
    """Those that try it small, then export and check, with a tiny target in place of the page's."""
    pytest.importorskip("matplotlib")
    make_target().causal_lm.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    rows = "".join(json.dumps({"question": f"w{i} w{i + 1}"}) + "\n" for i in range(7, 15))
    for name in ("few.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(rows, "utf-8")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "learn" / "quickstart.md").read_text("utf-8").replace("Qwen/Qwen3-0.6B", "target")
    (tmp_path / "page.md").write_text(text, "utf-8")
    _, small, _, serve = [block for _, language, block in snippets(tmp_path / "page.md") if language == "bash"]
    ran = []
    for words in commands(small) + commands(serve.replace("drafter-opd", "try/drafter-opd")):
        if words[0] == "trl-draft-opd":
            on_cpu = ["--use-cpu"] if words[1] in {"sft", "opd"} else []
            assert main([*words[1:], *on_cpu]) == 0, f"{words}: {capsys.readouterr().err}"
            ran.append(words[1])
    assert ran == ["generate", "sft", "opd", "evaluate", "export", "verify"]
    assert (tmp_path / "try" / "report.html").is_file()
