# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Publish a drafter: write it as engines load it, prove it against its training, and push it.

    python examples/publish_drafter.py --target Qwen/Qwen3-4B --drafter drafter-opd --dataset held_out.jsonl \
        --output export --repo-id me/Qwen3-4B-EAGLE3

Expect the layouts that were written, a verdict for every engine that is installed, and, with `--repo-id` and after
`hf auth login`, one commit on the Hub. Without it nothing leaves the machine.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import TrlParser

from trl_draft_opd import AutoDrafter, FrozenTarget, export_drafter, read_target, verify_drafter
from trl_draft_opd.export.hub import push_folder


@dataclass
class ExampleArguments:
    """Flags of this script."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    drafter: str = field(metadata={"help": "Path of the trained drafter."})
    dataset: str = field(metadata={"help": "JSON lines with `question`, `prompt` or `messages`, not trained on."})
    output: str = field(default="export", metadata={"help": "Folder of the export: new, or an earlier export."})
    target_id: str | None = field(default=None, metadata={"help": "Hub id of the target, where it is a folder."})
    repo_id: str | None = field(default=None, metadata={"help": "Repository to push to, ORG/NAME."})


if __name__ == "__main__":
    (args,) = TrlParser((ExampleArguments,)).parse_args_and_config()
    described = read_target(args.target, target_id=args.target_id)
    drafter = AutoDrafter.from_pretrained(args.drafter)
    result = export_drafter(drafter, args.output, target=described, repo_id=args.repo_id)
    print("written:", ", ".join(result.layouts))
    target = FrozenTarget.load(args.target, dtype="float32")
    rows = load_dataset("json", data_files=args.dataset, split="train")
    prompts = list(target.text_reader().read_prompts(rows)["prompt_ids"])[:8]
    report = verify_drafter(args.output, target, prompts, checkpoint=args.drafter, max_completion_length=64)
    print("verified" if report.ok else f"differs: {report}")
    if report.ok and args.repo_id is not None:
        print("pushed as", push_folder(args.output, args.repo_id))
