# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Train a fresh EAGLE-3 drafter on text its target wrote.

    accelerate launch examples/train_eagle3_sft.py --target Qwen/Qwen3-4B --dataset prompts.jsonl --output_dir drafter-sft

The dataset holds prompts or chats; the target rewrites every answer, so that the drafter learns the target's own text.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import TrlParser

from trl_draft_opd import DraftSFTConfig, DraftSFTTrainer, Eagle3DraftModel, FrozenTarget


@dataclass
class ExampleArguments:
    """What this script asks for beside the training settings."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    dataset: str = field(metadata={"help": "JSON lines with `prompt` or `messages`."})
    target_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "Layers to read; the published rule if unset."}
    )


if __name__ == "__main__":
    args, config = TrlParser((ExampleArguments, DraftSFTConfig)).parse_args_and_config()
    config.regenerate = True
    target = FrozenTarget.load(args.target, dtype=config.target_dtype)
    drafter = Eagle3DraftModel.from_target(target, target_layer_ids=args.target_layer_ids)
    dataset = load_dataset("json", data_files=args.dataset, split="train")
    trainer = DraftSFTTrainer(drafter, target, config, dataset)
    trainer.train()
    trainer.save_model()
