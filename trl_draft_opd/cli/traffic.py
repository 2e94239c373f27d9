# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The command that takes in what serving leaves behind: `import`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..drafters.auto import AutoDrafter
from ..target.lengths import TRAINING_LENGTHS
from ..traffic import import_traffic
from ..trainer.common_config import length_help
from ..trainer.pair import check_pair
from ..utils.atomic_files import check_place
from ..utils.settings import check_at_least, check_settings
from .arguments import (
    PromptArguments,
    SamplingArguments,
    TargetArguments,
    default_of,
    flag,
    parse,
    print_next,
    unless_default,
    write_json,
)


@dataclass(kw_only=True)
class ImportArguments(TargetArguments, PromptArguments, SamplingArguments):
    """Flags of `import`."""

    _argument_group_name = "traffic"

    log: list[str] = flag("Logs: JSON lines with `request` and `response` of the server's endpoints; .gz as well.")
    output: str = flag("Folder for the responses; those that it holds are kept.")
    drafter: str | None = flag(
        "The drafter that was served: the drafts it kept are compared with its own.", default=None
    )
    max_completion_length: int | None = flag(length_help(TRAINING_LENGTHS), default=None)
    generation_config: Literal["auto", "vllm"] = flag(
        "As the server's flag of that name: what fills in the sampling settings that requests leave open. `auto`: the "
        "target's generation config, `vllm`: neutral values.",
        default=default_of(import_traffic, "generation_config"),
    )
    served_model_name: str | None = flag(
        "The server's name for the target; other requests are left out.",
        default=default_of(import_traffic, "served_model_name"),
    )
    check_rows: int = flag(
        "Responses to check against the target, and to compare the drafter on; 0 checks nothing.",
        default=default_of(import_traffic, "num_checked"),
    )
    shard_size: int = flag("Responses per file.", default=default_of(import_traffic, "shard_size"))
    json: str | None = flag("File to write the numbers to.", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        check_at_least(self, 1, "max_completion_length", "shard_size")
        check_at_least(self, 0, "check_rows")
        if self.drafter is not None and not self.check_rows:
            raise ValueError(
                "`--drafter` is compared on the rows of `--check-rows`, which is 0. Leave one of them out."
            )


def run_import(argv: Sequence[str]) -> int:
    """Put a server's responses into a store; see [`import_traffic`]. Returns 1 if the server drafts otherwise."""
    (args,) = parse("import", [ImportArguments], argv)
    check_place(Path(args.output), "`--output`")
    for log in args.log:
        if not Path(log).is_file():
            raise FileNotFoundError(f"There is no log {log!r}.")
    target = args.load_target()
    drafter = None
    if args.drafter is not None:
        drafter = AutoDrafter.from_pretrained(args.drafter, num_target_layers=target.num_layers).eval()
        check_pair(drafter, target)
    target.place(torch.accelerator.current_accelerator(True) or torch.device("cpu"))
    lengths = args.fit_lengths(target, args.max_completion_length, num_drafts=0, defaults=TRAINING_LENGTHS)
    report = import_traffic(
        target,
        args.log,
        args.output,
        sampling=args.sampling_settings(),
        max_completion_length=lengths.completion,
        reader=target.text_reader(**args.reading(lengths.prompt)),
        generation_config=args.generation_config,
        served_model_name=args.served_model_name,
        drafter=None if drafter is None else drafter.to(target.device),
        num_checked=args.check_rows,
        shard_size=args.shard_size,
    )
    print("\n".join(report.lines()))
    write_json(args.json, report.to_dict())
    print_next(
        "opd",
        target=args.target,
        drafter=args.drafter or "DRAFTER",
        dataset=args.output,
        responses=args.output,
        chat_template=args.chat_template,
        chat_template_kwargs=args.chat_template_kwargs,
        temperature=unless_default(args, "temperature"),
        top_k=unless_default(args, "top_k"),
        top_p=unless_default(args, "top_p"),
        max_completion_length=unless_default(args, "max_completion_length"),
    )
    return int(report.served is not None and report.served.differs)
