# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Train a fresh DFlash drafter on text its target wrote.

    accelerate launch examples/train_dflash_sft.py --target Qwen/Qwen3-4B --dataset prompts.jsonl --output_dir drafter-sft

The dataset holds prompts or chats; the target rewrites every answer, so that the drafter learns the target's own text.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import TrlParser

from trl_draft_opd import DFlashDraftModel, DraftSFTConfig, DraftSFTTrainer, FrozenTarget


@dataclass
class ExampleArguments:
    """What this script asks for beside the training settings."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    dataset: str = field(metadata={"help": "JSON lines with `prompt` or `messages`."})
    target_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "Layers to read; the published rule if unset."}
    )
    num_hidden_layers: int = field(default=5, metadata={"help": "Layers of the drafter; 5 as published."})
    block_size: int = field(default=16, metadata={"help": "Anchor and drafts; 16 as published."})


if __name__ == "__main__":
    args, config = TrlParser((ExampleArguments, DraftSFTConfig)).parse_args_and_config()
    config.regenerate = True
    target = FrozenTarget.load(args.target, dtype=config.target_dtype)
    drafter = DFlashDraftModel.from_target(
        target,
        mask_token_id=target.find_mask_token_id(),
        num_hidden_layers=args.num_hidden_layers,
        block_size=args.block_size,
        target_layer_ids=args.target_layer_ids,
    )
    dataset = load_dataset("json", data_files=args.dataset, split="train")
    trainer = DraftSFTTrainer(drafter, target, config, dataset)
    trainer.train()
    trainer.save_model()
