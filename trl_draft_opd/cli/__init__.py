# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The command `trl-draft-opd`: reads flags and files, calls the library, prints lines; repeats no default of the library.
The module of a command is imported when the command runs, so that `--help` and `--version` are quick.
"""

import argparse
import difflib
import importlib
import logging
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..utils.secrets import without_users


# Command -> the module of its `run_...` function, and what the command does.
COMMANDS = {
    "demo": ("demo", "Run the whole method on a CPU in minutes: a tiny target, SFT, Draft-OPD, tau before and after."),
    "generate": ("decoding", "Write the target's responses to prompts once; run it again to resume."),
    "init": ("training", "Make a fresh drafter for a target and save it."),
    "sft": ("training", "Train a drafter on its target's responses."),
    "opd": ("training", "Improve a trained drafter by on-policy distillation."),
    "evaluate": (
        "decoding",
        "Measure a drafter; exit code 1 if a greedy float32 output differs from the target's own.",
    ),
    "export": ("publishing", "Write a trained drafter in the layouts that engines load, with a model card."),
    "verify": (
        "publishing",
        "Compare an export with its training in every engine that is installed; exit code 1 on a difference.",
    ),
    "push": ("publishing", "Upload an export to the Hub in one commit, as the user of `hf auth login`."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*): Words after the program's name; by default those of this process.

    Returns:
        `int`: 0; 1 if `evaluate` or `verify` finds a difference; 2 after a user's error; 3 after any other error, with
        its traceback, for which Python's own code would be 1.
    """
    lines = [f"  {name:10} {description}" for name, (_, description) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="trl-draft-opd",
        usage="trl-draft-opd [--debug] COMMAND [FLAGS]",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`trl-draft-opd COMMAND --help` lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if options.command not in COMMANDS:
        near = difflib.get_close_matches(options.command, COMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(COMMANDS)}."
        parser.error(f"Unknown command {options.command!r}. {hint}")
    # PEFT imports it where it is installed; on a CPU it then asks for a package that only quantised targets need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    module = importlib.import_module(f".{COMMANDS[options.command][0]}", __name__)  # noqa: TID251
    try:
        return getattr(module, f"run_{options.command}")(options.flags)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"trl-draft-opd {options.command}: {without_users(str(error))}", file=sys.stderr)
        return 2
    except Exception:  # noqa: BLE001  nothing is hidden: it is printed whole, under a code that no verdict has
        traceback.print_exc()
        print(f"trl-draft-opd {options.command}: stopped by the error above, without a verdict.", file=sys.stderr)
        return 3
