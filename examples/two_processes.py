# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Train on several processes: each takes its share of the rows, and gradients are averaged.

    accelerate launch --config_file examples/accelerate_configs/multi_cpu.yaml \
        examples/two_processes.py --target Qwen/Qwen3-0.6B --dataset prompts.jsonl --output-dir drafter-sft

Expect one table of metrics, not two, and batches of two processes in one update. For GPUs, name `multi_gpu.yaml`,
`fsdp2.yaml` or `zero2.yaml` instead: the script stays as it is.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import set_seed
from trl import TrlParser

from trl_draft_opd import DraftSFTConfig, DraftSFTTrainer, Eagle3DraftModel, FrozenTarget


@dataclass
class ExampleArguments:
    """Flags of this script, besides the settings of the trainer."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    dataset: str = field(metadata={"help": "JSON lines with `question`, `prompt` or `messages`."})


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, DraftSFTConfig))
    parser.set_defaults(regenerate=True)  # every process writes its share of the target's responses
    args, config = parser.parse_args_and_config()
    rows = load_dataset("json", data_files=args.dataset, split="train")
    target = FrozenTarget.load(args.target, dtype=config.target_dtype)
    set_seed(config.seed)  # the same fresh drafter in all
    trainer = DraftSFTTrainer(Eagle3DraftModel.from_target(target), target, config, rows)
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"trained on {trainer.accelerator.num_processes} processes; the drafter is in {config.output_dir}")
