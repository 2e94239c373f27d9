# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The command `demo`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..demo.run import FAMILIES, DemoSettings
from ..demo.run import run_demo as run_phases
from .arguments import flag, parse
from .rows import load_rows


@dataclass(kw_only=True)
class DemoArguments:
    """Flags of `demo`."""

    _argument_group_name = "demo"

    family: str = flag("Family of the drafter.", choices=FAMILIES, default=DemoSettings.family)
    target: str | None = flag(
        "Hub id or path of a real target, in place of the tiny one; needs --dataset.", default=None
    )
    dataset: str | None = flag("Prompts for --target: Hub id, folder, or file.", default=None)
    dataset_config: str | None = flag("Name of the dataset's configuration.", default=None)
    split: str = flag("Split of the dataset.", default="train")
    output: Path = flag("Folder; everything is written below it.", default=DemoSettings.output)
    num_prompts: int = flag("Prompts to train on.", default=DemoSettings.num_prompts)
    max_completion_length: int = flag("Longest response.", default=DemoSettings.max_completion_length)
    sft_epochs: int = flag("Epochs of supervised training.", default=DemoSettings.sft_epochs)
    opd_epochs: int = flag("Epochs of Draft-OPD.", default=DemoSettings.opd_epochs)
    seed: int = flag("Seed of everything.", default=DemoSettings.seed)


def run_demo(argv: Sequence[str]) -> int:
    """Run the whole method in minutes; see [`DemoSettings`]."""
    (args,) = parse("demo", [DemoArguments], argv)
    if (args.target is None) != (args.dataset is None):
        raise ValueError("`--target` and `--dataset` go together: the demo's own chats suit its tiny target only.")
    rows = None if args.dataset is None else load_rows(args.dataset, args.dataset_config, args.split)
    settings = {name: value for name, value in vars(args).items() if name not in ("dataset_config", "split")}
    run_phases(DemoSettings(**settings), rows)
    return 0
