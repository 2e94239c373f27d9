# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Compare two drafters of one target on the same prompts, and keep the numbers.

    python examples/evaluate_pair.py --target Qwen/Qwen3-4B --drafter drafter-opd --baseline drafter-sft \
        --dataset held_out.jsonl

Expect a table for each (tau with its 95 % interval, acceptance per slot, equal outputs), the gain in tau with the
interval of the pairs, and everything as JSON. An interval that holds 0 shows no difference: take more prompts.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from rich import print
from trl import TrlParser

from trl_draft_opd import AutoDrafter, FrozenTarget, evaluate_drafter
from trl_draft_opd.evaluation import paired_gain


@dataclass
class ExampleArguments:
    """Flags of this script."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    drafter: str = field(metadata={"help": "Hub id or path of the drafter."})
    baseline: str = field(metadata={"help": "Hub id or path of the drafter to compare with."})
    dataset: str = field(metadata={"help": "JSON lines with `question`, `prompt` or `messages`."})
    max_completion_length: int = field(default=256, metadata={"help": "Longest response, in tokens."})
    json: str = field(default="evaluation.json", metadata={"help": "File for the numbers."})


if __name__ == "__main__":
    (args,) = TrlParser((ExampleArguments,)).parse_args_and_config()
    target = FrozenTarget.load(args.target, dtype="float32")  # so that outputs agree to the last token
    rows = load_dataset("json", data_files=args.dataset, split="train")
    prompts = list(target.text_reader().read_prompts(rows)["prompt_ids"])
    reports = {}
    for name in (args.baseline, args.drafter):
        drafter = AutoDrafter.from_pretrained(name)
        reports[name] = evaluate_drafter(target, drafter, prompts, max_completion_length=args.max_completion_length)
        print(reports[name].table(name))
    gain, low, high = paired_gain(reports[args.baseline], reports[args.drafter])
    print(f"gain in tau {gain:+.1%}, between {low:+.1%} and {high:+.1%} with 95 % confidence")
    Path(args.json).write_text(json.dumps({name: report.to_dict() for name, report in reports.items()}), "utf-8")
