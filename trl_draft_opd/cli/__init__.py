# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The command `trl-draft-opd`: reads flags and files, calls the library, prints, and turns user errors into one line.

Holds no default that a config or the library already has. Heavy imports stand inside the commands, so that help is quick.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from .measuring import run_evaluate, run_generate
from .publishing import run_export, run_push, run_verify
from .reading import (
    FAMILY_OPTIONS,
    command_parser,
    given,
    load_rows,
    make_drafter,
    parse_flags,
    read_prompts,
)
from .training import run_init, run_opd, run_sft


__all__ = ["load_rows", "main", "make_drafter", "read_prompts"]

USAGE = "trl-draft-opd [--debug] COMMAND [FLAGS]"


def run_demo(argv: Sequence[str]) -> int:
    """Run the whole method in minutes on a CPU: a tiny target, a drafter by SFT, Draft-OPD, tau before and after."""
    integers = "num-prompts max-new-tokens sft-epochs opd-epochs seed"
    parser = command_parser(run_demo, "", integers)
    parser.add_argument("--family", choices=FAMILY_OPTIONS)
    parser.add_argument("--target", help="a real target's Hub id or path in place of the tiny one; needs --dataset")
    parser.add_argument("--dataset", help="rows with a prompt or messages, for --target")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    options = parse_flags(parser, argv)
    if (options.target is None) != (options.dataset is None):
        raise ValueError("`--target` and `--dataset` go together: the demo's own chats suit its own target only.")
    # Where it is installed, PEFT imports it, and on a CPU it asks for a package that only quantised targets would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from ..demo.run import DemoSettings
    from ..demo.run import run_demo as run

    names = (
        "family",
        "target",
        "dataset",
        "num_prompts",
        "max_new_tokens",
        "sft_epochs",
        "opd_epochs",
        "seed",
        "output",
    )
    settings = DemoSettings(**given(options, names))
    rows = None if options.dataset is None else load_rows(options.dataset, options.dataset_config, options.split)
    run(settings, rows)
    return 0


COMMANDS = {
    "demo": run_demo,
    "generate": run_generate,
    "init": run_init,
    "sft": run_sft,
    "opd": run_opd,
    "evaluate": run_evaluate,
    "export": run_export,
    "verify": run_verify,
    "push": run_push,
}


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*): Words behind the program's name; those of the process by default.

    Returns:
        `int`: 0, or 1 when `evaluate` or `verify` finds what must not be, or 2 after a user's error.
    """
    lines = [f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="trl-draft-opd",
        usage=USAGE,
        epilog="commands:\n" + "\n".join(lines) + "\n\n`trl-draft-opd COMMAND --help` lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user's error")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        return COMMANDS[options.command](options.flags)
    except (ValueError, OSError, FloatingPointError) as error:
        if options.debug:
            raise
        print(f"trl-draft-opd {options.command}: {error}", file=sys.stderr)
        return 2
