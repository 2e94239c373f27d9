# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What every command's flags are, without importing what they are read into: torch and transformers take seconds.
`flags.json` is derived from the parsers by `make flags`, and a test compares both; nobody edits it.
"""

import argparse
import ast
import json
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import COMMANDS


TABLE = Path(__file__).with_name("flags.json")
# Title of the flags that `sft` and `opd` inherit, which differ between versions of these libraries.
INHERITED = "settings of TrainingArguments"
LIBRARIES = ("transformers", "trl")


@cache
def read_table() -> dict[str, Any]:
    """Return the table: `versions` it was derived with, and by command the groups of flags."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def installed_versions() -> dict[str, str]:
    """Return the versions of the libraries that flags are inherited from; without one that is not installed."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def words_of(command: str) -> dict[str, Any]:
    """Return what a parser of a command is made with."""
    return {
        "prog": f"trl-draft-opd {command}",
        "usage": f"trl-draft-opd {command} [--config FILE.yaml] [FLAGS]",
        "description": f"{COMMANDS[command][1]} Flags can also be written with underscores, or as keys in the YAML "
        "file given to --config.",
    }


class _Formatter(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        # As the parser wrote it; `-h` has none.
        return str(action.metavar) if action.metavar else super()._format_action_invocation(action)


def find_help(command: str) -> str | None:
    """
    Return a command's help for the terminal's width; `None` of a command that the table lacks. Where flags are
    inherited from another version than the table was derived with, its last lines say so.
    """
    table = read_table()
    groups = table["commands"].get(command)
    if groups is None:
        return None
    is_inheriting = any(group["title"] == INHERITED for group in groups)
    derived, installed = (
        " and ".join(f"{library} {release}" for library, release in versions.items())
        for versions in (table["versions"], installed_versions())
    )
    note = f"Settings of TrainingArguments are listed as in {derived}. What is read are those of {installed}."
    parser = argparse.ArgumentParser(
        **words_of(command),
        formatter_class=_Formatter,
        epilog=note if is_inheriting and derived != installed else None,
    )
    for group in groups:
        shown = parser.add_argument_group(group["title"])
        for invocation, text in group["flags"]:
            # The first word alone is the flag: a parser of names, which parses nothing.
            shown.add_argument(invocation.split()[0], metavar=invocation, help=text.replace("%", "%%"))
    return parser.format_help()


def with_flags(text: str, command: str) -> str:
    """
    Return a message of the library, which names settings as Python has them, with the flags of a command instead:
    `` `base_url` `` becomes `` `--base-url` ``, and `` `top_k=5` `` becomes `` `--top-k 5` ``.
    """
    groups = read_table()["commands"].get(command, [])
    # Flag -> whether it may stand without a value.
    known = {words.split()[0]: " " not in words or "[" in words for group in groups for words, _ in group["flags"]}

    def flag(found: re.Match[str]) -> str:
        name, value = "--" + found[1].replace("_", "-"), found[3]
        if name not in known:
            return found[0]
        if value is None or (value == "True" and known[name]):
            return f"`{name}`"
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            pass
        if value is None:
            return f"no `{name}`"
        return f"`{name} {str(value).lower() if isinstance(value, bool) else value}`"

    text = re.sub(r"`([a-z]\w*)(=([^`]+))?`", flag, text)
    # Where the message named the flag beside the setting, once is enough.
    return re.sub(r"(`(--[\w-]+)[^`]*`) \(`\2`\)", r"\1", text)
