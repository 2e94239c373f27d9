# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Train from a store: the target writes and reads every text once, and training runs without its decoder layers.

    python examples/train_from_store.py --target Qwen/Qwen3-4B --drafter drafter-sft \
        --dataset prompts.jsonl --output-dir drafter-opd

Expect two folders beside the drafter, `responses` and `readings` (their size is printed: `trl-draft-opd read` tells it
beforehand), and a training that loads only embedding, norm and head of the target. Further runs find both written.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import TrlParser

from trl_draft_opd import (
    AutoDrafter,
    DraftOPDConfig,
    DraftOPDTrainer,
    FrozenTarget,
    write_readings,
    write_responses,
)


@dataclass
class ExampleArguments:
    """Flags of this script, besides the settings of the trainer."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    drafter: str = field(metadata={"help": "Hub id or path of the drafter, in any published layout."})
    dataset: str = field(metadata={"help": "JSON lines with `question`, `prompt` or `messages`."})


if __name__ == "__main__":
    args, config = TrlParser((ExampleArguments, DraftOPDConfig)).parse_args_and_config()
    rows = load_dataset("json", data_files=args.dataset, split="train")
    target = FrozenTarget.load(args.target, dtype=config.target_dtype)
    drafter = AutoDrafter.from_pretrained(args.drafter)
    length = config.max_completion_length = config.max_completion_length or 256
    config.responses, config.readings = f"{config.output_dir}/responses", f"{config.output_dir}/readings"
    sampling = config.sampling_settings()
    store = write_responses(target, rows, config.responses, sampling=sampling, max_completion_length=length)
    texts = [[*row["prompt_ids"], *row["completion_ids"]] for row in store.to_dataset()]
    write_readings(target, texts, config.readings, layer_ids=drafter.config.target_layer_ids)
    trainer = DraftOPDTrainer(drafter, args.target, config, rows)  # by its name, so that its body stays out
    trainer.train()
    trainer.save_model()
    print(f"trained on {len(texts)} texts that were read once; the drafter is in {config.output_dir}")
