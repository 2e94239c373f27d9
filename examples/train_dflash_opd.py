# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Improve DFlash by Draft-OPD: the drafter drafts along the answers of its target and learns from what the target rejects.

    accelerate launch examples/train_dflash_opd.py --target Qwen/Qwen3-4B --model drafter-sft \
        --dataset prompts.jsonl --output_dir drafter-opd

Start from a drafter whose supervised training has stopped rising; before that, more SFT gives as much.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import TrlParser

from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer


@dataclass
class ExampleArguments:
    """What this script asks for beside the training settings."""

    model: str = field(metadata={"help": "Hub id or path of the drafter, in any published layout."})
    target: str = field(metadata={"help": "Hub id or path of the target."})
    dataset: str = field(metadata={"help": "JSON lines with `prompt` or `messages`."})
    num_eval_prompts: int = field(default=64, metadata={"help": "Prompts held out to measure tau before and after."})


if __name__ == "__main__":
    args, config = TrlParser((ExampleArguments, DraftOPDConfig)).parse_args_and_config()
    dataset = load_dataset("json", data_files=args.dataset, split="train").train_test_split(
        args.num_eval_prompts, seed=0
    )
    trainer = DraftOPDTrainer(args.model, args.target, config, dataset["train"], dataset["test"])
    before = trainer.evaluate()["eval_tau"]
    trainer.train()
    after = trainer.evaluate()["eval_tau"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"tau on {args.num_eval_prompts} held-out prompts: {before:.3f} before, {after:.3f} after")
