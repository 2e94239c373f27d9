# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The commands that publish: `export`, `verify` and `push`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from ..drafters.auto import AutoDrafter
from ..export import TargetOfExport, export_drafter, hub_id_of, read_target
from ..export.hub import push_folder, validate_repo_id
from ..export.record import read_record
from ..export.serving import SERVING_FILE
from ..export.write import check_export_folder
from ..parity import verify_drafter
from ..parity.consumers import CONSUMERS
from ..parity.gate import VERIFICATION_LENGTHS
from ..target.frozen import FrozenTarget
from ..trainer.common_config import length_help
from ..utils.settings import check_at_least
from .arguments import HELD_OUT, RowsArguments, default_of, flag, parse, print_next, write_json


# Positions kept free behind responses: prompts are read before the drafter's blocks are known.
_ROOM_TO_VERIFY = 32


@dataclass(kw_only=True)
class ExportArguments:
    """Flags of `export`."""

    _argument_group_name = "export"

    drafter: str = flag("Hub id or path of the drafter, or path of a LoRA adapter.")
    output: str = flag("Folder to write to: new, empty, or an earlier export.")
    to: Literal["all", "flat", "speculators", "transformers"] = flag(
        "Layout to write; `all`: the flat one, with the others in subfolders.",
        default=default_of(export_drafter, "to"),
    )
    target: str | None = flag(
        "Hub id or path of the target; if unset, the one that the drafter's config names.", default=None
    )
    target_id: str | None = flag("The target's Hub id, if --target is a folder.", default=None)
    target_revision: str | None = flag("Revision of the target.", default=None)
    repo_id: str | None = flag("Repository that the export will be pushed to, ORG/NAME.", default=None)
    license: str | None = flag("Licence of the drafter, for the model card.", default=None)
    base: str | None = flag(
        "The drafter that a LoRA adapter belongs to; if unset, the one that the adapter names.", default=None
    )


def run_export(argv: Sequence[str]) -> int:
    """Write a trained drafter for engines; see [`export_drafter`]."""
    (args,) = parse("export", [ExportArguments], argv)
    if args.repo_id is not None:
        validate_repo_id(args.repo_id)
        if "/" not in args.repo_id:
            raise ValueError(f"`--repo-id` must name the owner too, ORG/NAME, got {args.repo_id!r}: files name it so.")
    if args.target_id is not None and (hub_id_of(args.target_id) is None or "/" not in args.target_id):
        raise ValueError(f"`--target-id` must be the target's Hub id, ORG/NAME, got {args.target_id!r}.")
    check_export_folder(Path(args.output))
    drafter = AutoDrafter.from_pretrained(args.drafter, base=args.base)
    if args.repo_id is not None:
        validate_repo_id(args.repo_id, drafter.config.family)
    name = drafter.config.target_model_name_or_path if args.target is None else args.target
    target = TargetOfExport(args.target_id)
    if name is not None:
        try:
            target = read_target(name, target_id=args.target_id, revision=args.target_revision)
        except FileNotFoundError as error:
            if args.target is not None:
                raise
            raise FileNotFoundError(
                f"The drafter was trained for {name!r}, which cannot be read: {error} Give the target as `--target`."
            ) from error
    result = export_drafter(
        drafter,
        args.output,
        to=args.to,
        target=target,
        repo_id=args.repo_id,
        record=read_record(args.drafter) if Path(args.drafter).is_dir() else None,
        license=args.license,
    )
    for layout, folder in result.layouts.items():
        print(f"{layout:12} {folder}")
    for layout, reason in result.refused.items():
        print(f"{layout:12} not written: {reason}.")
    checkpoint = args.drafter if Path(args.drafter).is_dir() else None
    print_next("verify", drafter=args.output, target=name, dataset=HELD_OUT, checkpoint=checkpoint)
    return 0


@dataclass(kw_only=True)
class VerifyArguments(RowsArguments):
    """Flags of `verify`."""

    _argument_group_name = "verification"

    drafter: str = flag("Path or Hub id of an exported drafter.")
    target: str = flag(
        "Hub id or path of the target; loaded in float32, because outputs are compared to the last token."
    )
    checkpoint: str | None = flag("The checkpoint that the export was made from.", default=None)
    consumers: list[str] | None = flag("Engines to run; all that are installed if unset.", default=None)
    num_drafts: int | None = flag("Drafts per block; the drafter's own number if unset.", default=None)
    max_completion_length: int | None = flag(length_help(VERIFICATION_LENGTHS), default=None)
    trust_remote_code: bool = flag("Also run the export's own custom_generate.", default=False)
    json: str | None = flag("File to write the numbers to.", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "num_drafts")
        check_at_least(self, 2, "max_completion_length")


def run_verify(argv: Sequence[str]) -> int:
    """Compare an export with its training in every engine; see [`verify_drafter`]."""
    (args,) = parse("verify", [VerifyArguments], argv)
    target = FrozenTarget.load(args.target, dtype="float32")
    lengths = args.fit_lengths(
        target, args.max_completion_length, num_drafts=_ROOM_TO_VERIFY, defaults=VERIFICATION_LENGTHS
    )
    report = verify_drafter(
        args.drafter,
        target,
        args.read_prompts(target, lengths.prompt),
        target_name=args.target,
        checkpoint=args.checkpoint,
        consumers=args.consumers,
        num_drafts=args.num_drafts,
        max_completion_length=lengths.completion,
        trust_remote_code=args.trust_remote_code,
    )
    Console().print(report.table(f"{args.drafter} for {args.target}"))
    for problem in report.problems:
        print(f"PROBLEM  {problem}")
    for name, reason in report.skipped.items():
        print(f"not run  {name}: {reason}")
    write_json(args.json, report.to_dict())
    readers = [name for name in CONSUMERS if name not in report.skipped]
    if report.ok and readers:
        print(f"Passed: what was compared of {', '.join(readers)} is as it was trained.")
    elif report.ok:
        print("Passed, but no other reader was run: only our own loop was compared.")
    if report.ok and Path(args.drafter).is_dir():
        settings = Path(args.drafter) / SERVING_FILE
        if settings.is_file():
            repo_id = json.loads(settings.read_text("utf-8")).get("repository")
            print_next("push", drafter=args.drafter, repo_id=repo_id or "ORG/NAME")
        else:
            print_next("export", drafter=args.drafter, target=args.target, output="EXPORT")
    return int(not report.ok)


@dataclass(kw_only=True)
class PushArguments:
    """Flags of `push`."""

    _argument_group_name = "push"

    drafter: str = flag("Folder that `export` wrote.")
    repo_id: str = flag("Repository to push to, ORG/NAME (NAME alone: your own); created if it does not exist.")
    private: bool | None = flag("Make a new repository private; the account's default if unset.", default=None)
    revision: str | None = flag("Branch to push to; the main one if unset.", default=None)
    commit_message: str = flag("Message of the commit.", default=default_of(push_folder, "commit_message"))


def run_push(argv: Sequence[str]) -> int:
    """Upload an exported folder to the Hub; see [`push_folder`]."""
    (args,) = parse("push", [PushArguments], argv)
    options = {name: value for name, value in vars(args).items() if name not in ("drafter", "repo_id")}
    print(push_folder(args.drafter, args.repo_id, **options))
    return 0
