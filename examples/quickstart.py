# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The whole method in a few lines: a fresh drafter, SFT on its target's responses, Draft-OPD, evaluation.

    python examples/quickstart.py --target Qwen/Qwen3-0.6B

Without `--dataset`, the prompts are 32 questions made here. Expect a table with tau, acceptance per slot, speed, and
whether every output equals the target's own. So few prompts show that everything works, not how well.
"""

from dataclasses import dataclass, field

from datasets import Dataset, load_dataset
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
from trl_draft_opd.evaluation import explain_difference


@dataclass
class ExampleArguments:
    """Flags of this script."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "JSON lines with `question`, `prompt` or `messages`; 32 made-up questions if unset."},
    )
    max_completion_length: int = field(default=128, metadata={"help": "Longest response, in tokens."})
    output: str = field(default="quickstart", metadata={"help": "Folder; everything is written below it."})


def made_up_rows() -> Dataset:
    """Return 32 raw rows as GSM8K has them."""
    question = "Mira has {} pears and buys {} more. She gives {} of them away. How many pears are left?"
    numbers = [(n + 5, 3 * n + 2, n + 1) for n in range(32)]
    return Dataset.from_list([{"question": question.format(*n), "answer": str(n[0] + n[1] - n[2])} for n in numbers])


if __name__ == "__main__":
    (args,) = TrlParser((ExampleArguments,)).parse_args_and_config()
    rows = load_dataset("json", data_files=args.dataset, split="train") if args.dataset else made_up_rows()
    if len(rows) < 8:
        raise SystemExit(f"{args.dataset} has {len(rows)} rows. Give at least 8: an eighth, at most 64, are held out.")
    rows = rows.train_test_split(min(64, len(rows) // 8), seed=0)
    target = FrozenTarget.load(args.target)
    drafter = Eagle3DraftModel.from_target(target)

    # The target responds to every prompt once; both stages train on these responses.
    shared = {
        "responses": f"{args.output}/responses",
        "max_completion_length": args.max_completion_length,
        "logging_steps": 1,
        "save_strategy": "no",  # minutes of training need no checkpoints to resume from
    }
    config = DraftSFTConfig(f"{args.output}/drafter-sft", regenerate=True, **shared)
    print("Stage 1 of 2: SFT, on all of the target's text")
    DraftSFTTrainer(drafter, target, config, rows["train"]).train()
    config = DraftOPDConfig(f"{args.output}/drafter-opd", **shared)
    trainer = DraftOPDTrainer(drafter, target, config, rows["train"], rows["test"])
    print("Stage 2 of 2: Draft-OPD, on the blocks that the drafter drafts")
    trainer.train()
    trainer.save_model()

    held_out = [row["prompt_ids"] for row in trainer.eval_dataset]
    report = evaluate_drafter(target, drafter, held_out, max_completion_length=args.max_completion_length)
    print(report.table("after Draft-OPD"))
    if report.num_different:
        print(explain_difference(target.causal_lm.dtype))
    print(f"The drafter is in {args.output}/drafter-opd")
