# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The commands that publish: `export`, `verify` and `push`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .reading import READING, command_parser, given, load_rows, parse_flags, read_prompts


def run_export(argv: Sequence[str]) -> int:
    """Write a trained drafter in the layouts that engines load as they are, with settings to serve it and a card."""
    parser = command_parser(run_export, "output", "", reads_rows=False)
    parser.add_argument("path", metavar="PATH", help="folder or Hub id of a drafter, or folder of a LoRA adapter")
    parser.add_argument("--to", choices=("flat", "speculators", "transformers", "all"))
    parser.add_argument("--target", help="folder or Hub id of the target; by default the one the drafter names")
    parser.add_argument("--target-id", metavar="ORG/NAME", help="the target's Hub id, where --target is a folder")
    parser.add_argument("--target-revision", metavar="REVISION")
    parser.add_argument("--repo-id", metavar="ORG/NAME", help="where the export will be pushed to")
    parser.add_argument("--license", metavar="NAME", help="licence of the drafter, for the card")
    parser.add_argument("--base", metavar="PATH", help="the drafter under a LoRA adapter")
    options = parse_flags(parser, argv)
    from ..drafters.auto import AutoDrafter
    from ..export import TargetOfExport, export_drafter, hub_id_of, read_target
    from ..export.hub import validate_repo_id
    from ..export.record import read_record

    if options.repo_id is not None:
        validate_repo_id(options.repo_id)
    if options.target_id is not None and hub_id_of(options.target_id) is None:
        raise ValueError(f"`--target-id` must be the target's Hub id, ORG/NAME, got {options.target_id!r}.")
    drafter = AutoDrafter.from_pretrained(options.path, base=options.base)
    name = options.target or drafter.config.target_model_name_or_path
    target = TargetOfExport(options.target_id)
    if name is not None:
        target = read_target(name, target_id=options.target_id, revision=options.target_revision)
    result = export_drafter(
        drafter,
        options.output,
        record=read_record(options.path) if Path(options.path).is_dir() else None,
        target=target,
        **given(options, ("to", "repo_id", "license")),
    )
    for layout, folder in result.layouts.items():
        print(f"{layout:12} {folder}")
    for layout, reason in result.refused.items():
        print(f"{layout:12} not written: {reason}.")
    return 0


def run_verify(argv: Sequence[str]) -> int:
    """Hold an export to its training: every reader that is installed, plain decoding, tau per slot; exit code 1 on a gap."""
    integers = "num-prompts max-new-tokens num-drafts"
    parser = command_parser(run_verify, "target prompts", integers)
    parser.add_argument("path", metavar="PATH", help="folder or Hub id of an exported drafter")
    parser.add_argument("--checkpoint", metavar="PATH", help="the training checkpoint it was made from")
    parser.add_argument(
        "--consumers", nargs="+", metavar="NAME", help="readers to run; all that are installed by default"
    )
    parser.add_argument("--chat-template-kwargs", type=json.loads, metavar="JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the export's own custom_generate, too")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    options = parse_flags(parser, argv)
    from rich.console import Console

    from ..parity import verify_drafter
    from ..target.frozen import FrozenTarget
    from ..trainer.draft_opd_config import DraftOPDConfig

    rows = load_rows(options.prompts, options.dataset_config, options.split)
    if options.num_prompts is not None:
        rows = rows.select(range(min(options.num_prompts, len(rows))))
    # Outputs are compared to the last token.
    target = FrozenTarget.load(options.target, dtype="float32")
    reading = dict.fromkeys(READING) | {"max_prompt_length": DraftOPDConfig.max_prompt_length}
    prompts = read_prompts(target, rows, reading | given(options, ["chat_template_kwargs"]))
    names = ("checkpoint", "consumers", "num_drafts", "max_new_tokens", "trust_remote_code")
    report = verify_drafter(options.path, target, prompts, target_name=options.target, **given(options, names))
    Console().print(report.table(f"{options.path} for {options.target}"))
    for problem in report.problems:
        print(f"PROBLEM  {problem}")
    for name, reason in report.skipped.items():
        print(f"not run  {name}: {reason}")
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
    return int(not report.ok)


def run_push(argv: Sequence[str]) -> int:
    """Upload an exported folder to the Hub as one commit, with the account that `hf auth login` stored."""
    parser = command_parser(run_push, "", "", reads_rows=False)
    parser.add_argument("path", metavar="PATH", help="folder that `export` wrote")
    parser.add_argument("repo_id", metavar="ORG/NAME")
    parser.add_argument("--private", action="store_true", default=None)
    parser.add_argument("--revision", metavar="BRANCH")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    options = parse_flags(parser, argv)
    from ..export.hub import push_folder

    flags = given(options, ("private", "revision"))
    if options.message is not None:
        flags["commit_message"] = options.message
    print(push_folder(options.path, options.repo_id, **flags))
    return 0
