# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Derives `cli/flags.json` from the parsers of all commands: `make flags` runs it as a script."""

import importlib
import json
from typing import Any
from unittest import mock

from trl_draft_opd.cli import COMMANDS, flag_table
from trl_draft_opd.cli.arguments import _Parser


def parser_of(command: str) -> _Parser:
    """Return the parser that a command prints its help with."""
    module = importlib.import_module(f"trl_draft_opd.cli.{COMMANDS[command][0]}")
    with mock.patch.object(_Parser, "print_help", autospec=True) as print_help:
        try:
            getattr(module, f"run_{command}")(["--help"])
        except SystemExit:
            pass
    return print_help.call_args.args[0]


def groups_of(parser: _Parser) -> list[dict[str, Any]]:
    """Return the groups of a parser's flags, each flag as help shows it: its words, and its text with the default."""
    formatter, groups = parser._get_formatter(), []
    for group in parser._action_groups:
        flags = [
            [formatter._format_action_invocation(action), formatter._expand_help(action)]
            for action in group._group_actions
            if action.dest != "help"
        ]
        groups += [{"title": group.title, "flags": flags}] if flags else []
    return groups


def derive_table() -> dict[str, Any]:
    """Return the table of every command."""
    commands = {command: groups_of(parser_of(command)) for command in COMMANDS}
    return {"versions": flag_table.installed_versions(), "commands": commands}


if __name__ == "__main__":
    text = json.dumps(derive_table(), indent=1, ensure_ascii=False) + "\n"
    flag_table.TABLE.write_text(text, encoding="utf-8")
