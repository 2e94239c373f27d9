# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The whole method in a few lines: a fresh drafter, SFT on its target's responses, Draft-OPD, evaluation.

    python examples/quickstart.py --target Qwen/Qwen3-0.6B --dataset prompts.jsonl

`prompts.jsonl` holds one {"prompt": [{"role": "user", "content": "..."}]} per line. An eighth of them, at most 64, are
held out. Expect a table with tau, acceptance per slot, speed, and whether every output equals the target's own.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from rich import print
from trl import TrlParser

from trl_draft_opd import (
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    Eagle3DraftModel,
    FrozenTarget,
    evaluate_drafter,
)


@dataclass
class ExampleArguments:
    """Flags of this script."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    dataset: str = field(metadata={"help": "JSON lines with `prompt` or `messages`."})


if __name__ == "__main__":
    (args,) = TrlParser((ExampleArguments,)).parse_args_and_config()
    rows = load_dataset("json", data_files=args.dataset, split="train")
    if len(rows) < 8:
        raise SystemExit(f"{args.dataset} has {len(rows)} rows. Give at least 8: an eighth, at most 64, are held out.")
    rows = rows.train_test_split(min(64, len(rows) // 8), seed=0)
    target = FrozenTarget.load(args.target)
    drafter = Eagle3DraftModel.from_target(target)

    # The target responds to every prompt once; both stages train on these responses.
    config = DraftSFTConfig("drafter-sft", regenerate=True, responses="responses")
    DraftSFTTrainer(drafter, target, config, rows["train"]).train()
    config = DraftOPDConfig("drafter-opd", responses="responses")
    trainer = DraftOPDTrainer(drafter, target, config, rows["train"], rows["test"])
    trainer.train()
    trainer.save_model()

    held_out = [row["prompt_ids"] for row in trainer.eval_dataset]
    print(evaluate_drafter(target, drafter, held_out).table("after Draft-OPD"))
