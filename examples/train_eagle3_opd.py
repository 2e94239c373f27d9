# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Improve a trained drafter by Draft-OPD. The script is named for EAGLE-3 but takes a drafter of any family.

    python examples/train_eagle3_opd.py --target Qwen/Qwen3-4B --drafter drafter-sft \
        --dataset prompts.jsonl --responses responses --output-dir drafter-opd

The drafter drafts along the target's responses and learns from what the target rejects. Expect tau on the held-out
prompts before and after. Start from a drafter that SFT no longer improves: before that, more SFT gains as much.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import TrlParser

from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer


@dataclass
class ExampleArguments:
    """Flags of this script, besides the settings of the trainer."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    drafter: str = field(metadata={"help": "Hub id or path of the drafter, in any published layout."})
    dataset: str = field(metadata={"help": "JSON lines with `question`, `prompt` or `messages`."})
    num_eval_prompts: int = field(default=64, metadata={"help": "Prompts held out, a quarter at most."})


if __name__ == "__main__":
    args, config = TrlParser((ExampleArguments, DraftOPDConfig)).parse_args_and_config()
    rows = load_dataset("json", data_files=args.dataset, split="train")
    if len(rows) < 2:
        raise SystemExit(f"{args.dataset} has {len(rows)} rows. Give at least 2: a quarter at most is held out.")
    rows = rows.train_test_split(min(args.num_eval_prompts, max(1, len(rows) // 4)), seed=0)
    trainer = DraftOPDTrainer(args.drafter, args.target, config, rows["train"], rows["test"])
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    after = trainer.evaluate()["eval_tau"]
    trainer.save_model()  # after the evaluation, so that the model card has its numbers
    if trainer.is_world_process_zero():
        print(f"tau on {len(rows['test'])} held-out prompts: {before:.3f} before, {after:.3f} after")
