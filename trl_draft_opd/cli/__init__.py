# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The command `trl-draft-opd`: flags and files in, calls of the library, lines out. Refuses to hold a default that the library has.

One module per group of commands is imported when one of them runs, so that help is quick.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from .. import __version__


# Command -> the module that has its `run_...` function, and what it does.
COMMANDS = {
    "demo": ("demo", "Run the whole method on a CPU in minutes: a tiny target, SFT, Draft-OPD, tau before and after."),
    "generate": ("decoding", "Write the target's responses to prompts once; the same command resumes."),
    "init": ("training", "Make a fresh drafter for a target and save it."),
    "sft": ("training", "Train a drafter on text its target wrote."),
    "opd": ("training", "Improve a trained drafter by on-policy distillation."),
    "evaluate": ("decoding", "Measure a drafter; exit code 1 when a greedy float32 output is not the target's own."),
    "export": ("publishing", "Write a trained drafter in the layouts that engines load, with a card."),
    "verify": (
        "publishing",
        "Compare an export with its training in every reader that is installed; exit code 1 on a gap.",
    ),
    "push": ("publishing", "Upload an export to the Hub as one commit, with the account of `hf auth login`."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*): Words after the program's name; those of the process by default.

    Returns:
        `int`: 0, or 1 when `evaluate` or `verify` finds a difference, or 2 after a user's error.
    """
    lines = [f"  {name:10} {description}" for name, (_, description) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="trl-draft-opd",
        usage="trl-draft-opd [--debug] COMMAND [FLAGS]",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`trl-draft-opd COMMAND --help` lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's error")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    # Where it is installed, PEFT imports it, and on a CPU it asks for a package that only quantised targets would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    module = importlib.import_module(f".{COMMANDS[options.command][0]}", __name__)
    try:
        return getattr(module, f"run_{options.command}")(options.flags)
    except (ValueError, OSError, FloatingPointError) as error:
        if options.debug:
            raise
        print(f"trl-draft-opd {options.command}: {error}", file=sys.stderr)
        return 2
