# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Adapt a drafter to a fine-tune of its target by a short SFT on the fine-tune's responses, whole or as LoRA.

    python examples/adapt_drafter.py --target my/fine-tune --drafter z-lab/Qwen3-4B-DFlash-b16 \
        --dataset prompts.jsonl --output-dir adapted --learning-rate 1e-3

Use prompts of the kind that the fine-tune will serve. Expect tau on the held-out prompts before and after;
docs/do/adapting.md has a measured trial, and when LoRA is enough.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig
from trl import TrlParser

from trl_draft_opd import DraftSFTConfig, DraftSFTTrainer


@dataclass
class ExampleArguments:
    """Flags of this script, besides the settings of the trainer."""

    target: str = field(metadata={"help": "Hub id or path of the fine-tuned target."})
    drafter: str = field(metadata={"help": "Hub id or path of the drafter of the target before its fine-tuning."})
    dataset: str = field(metadata={"help": "JSON lines with `question`, `prompt` or `messages`."})
    num_eval_prompts: int = field(default=64, metadata={"help": "Prompts held out, a quarter at most."})
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter; 0 trains the whole drafter."})


if __name__ == "__main__":
    args, config = TrlParser((ExampleArguments, DraftSFTConfig)).parse_args_and_config()
    config.regenerate = True
    rows = load_dataset("json", data_files=args.dataset, split="train")
    if len(rows) < 2:
        raise SystemExit(f"{args.dataset} has {len(rows)} rows. Give at least 2: a quarter at most is held out.")
    rows = rows.train_test_split(min(args.num_eval_prompts, max(1, len(rows) // 4)), seed=0)
    adapter = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r) if args.lora_r else None
    trainer = DraftSFTTrainer(args.drafter, args.target, config, rows["train"], rows["test"], peft_config=adapter)
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    after = trainer.evaluate()["eval_tau"]
    trainer.save_model()  # after the evaluation, so that the model card has its numbers
    if trainer.is_world_process_zero():
        print(f"tau on {len(rows['test'])} held-out prompts: {before:.3f} before, {after:.3f} after")
