# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The command `trl-draft-opd`: reads flags and files, calls the library, prints lines; repeats no default of the library.
The module of a command is imported when the command runs, and `--help` reads a table, so that both are quick.
"""

import argparse
import difflib
import importlib
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..utils.console import lasting_output, own_warnings_as_sentences
from ..utils.secrets import without_users


# Command -> the module of its `run_...` function, and what the command does.
COMMANDS = {
    "demo": ("demo", "Run the whole method on a CPU in minutes: a tiny target, SFT, Draft-OPD, tau before and after."),
    "plan": ("plan", "Say what a run would take and which commands make it, from the target's config alone."),
    "generate": ("decoding", "Write the target's responses to prompts once; run it again to resume."),
    "import": ("traffic", "Take in a server's logs as the target's responses, so that a drafter follows its traffic."),
    "read": ("reading", "Write what the target makes of texts, once, so that training needs no body of it."),
    "init": ("training", "Make a fresh drafter for a target and save it."),
    "sft": ("training", "Train a drafter on its target's responses."),
    "opd": ("training", "Improve a trained drafter by on-policy distillation."),
    "evaluate": (
        "decoding",
        "Measure a drafter; exit code 1 if a greedy float32 output differs from the target's own.",
    ),
    "report": ("reporting", "Write what a training run and its evaluation measured as one HTML page."),
    "bench": ("bench", "Measure the speed of a server under load, with a drafter against plain decoding if both run."),
    "export": ("publishing", "Write a trained drafter in the layouts that engines load, with a model card."),
    "verify": (
        "publishing",
        "Compare an export with its training in every engine that is installed; exit code 1 on a difference.",
    ),
    "push": ("publishing", "Upload an export to the Hub in one commit, as the user of `hf auth login`."),
}


# What an error that is not the user's says below its traceback.
_REPORT = (
    f"\nThis looks like a fault of trl-draft-opd {__version__}, not of yours. Please report it where you got the "
    "package, with the command and all of the above."
)


@lasting_output()
def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv (`Sequence[str]`, *optional*): Words after the program's name; by default those of this process.

    Returns:
        `int`: 0; 1 if `verify` or `import` finds a gap, or `evaluate` in float32 a difference; 2 after a user's error;
        3 after any other error, with its traceback, for which Python's own code would be 1; 130 after Ctrl-C.
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
    # Here, because it reads the commands of this module.
    from .flag_table import find_help, with_flags

    text = find_help(options.command) if {"-h", "--help"} & set(options.flags) else None
    if text is not None:
        print(text, end="")
        parser.exit(0)
    try:
        module = importlib.import_module(f".{COMMANDS[options.command][0]}", __name__)  # noqa: TID251
        from ..utils.bars import can_draw_bars, library_bars  # here, because it imports what is slow

        with (
            library_bars(can_draw_bars()),
            own_warnings_as_sentences(lambda text: with_flags(text, options.command)),
        ):
            return getattr(module, f"run_{options.command}")(options.flags)
    except KeyboardInterrupt:
        print(f"trl-draft-opd {options.command}: stopped by Ctrl-C.", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001  nothing is hidden
        # An import error of Python's own names the module: that is a broken installation.
        is_users = isinstance(error, (ValueError, OSError, FloatingPointError))
        is_users |= isinstance(error, ImportError) and error.name is None
        if not is_users:
            # Printed whole, under a code that no verdict has; Python's own would be 1.
            error.add_note(_REPORT)
            traceback.print_exc()
            return 3
        if options.debug:
            traceback.print_exc()
        text = with_flags(without_users(str(error)), options.command)
        print(f"trl-draft-opd {options.command}: {text}", file=sys.stderr)
        return 2
