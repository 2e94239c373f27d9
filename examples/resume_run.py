# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Train so that a stop costs no work: the same command starts the run and, after a stop, goes on where it was.

    python examples/resume_run.py --target Qwen/Qwen3-4B --drafter drafter-sft \
        --dataset prompts.jsonl --output-dir drafter-opd --save-steps 100

Stop it with Ctrl-C or SIGTERM and start it again. Expect the second run to begin at the newest valid checkpoint
(SIGTERM writes one first), and in the end the weights of a run that never stopped, bit for bit.
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


if __name__ == "__main__":
    args, config = TrlParser((ExampleArguments, DraftOPDConfig)).parse_args_and_config()
    rows = load_dataset("json", data_files=args.dataset, split="train")
    trainer = DraftOPDTrainer(args.drafter, args.target, config, rows)
    trainer.train(resume_from_checkpoint="auto")  # the newest checkpoint, or from the start where there is none
    trainer.save_model()
    print(f"trained to step {trainer.state.global_step}; the drafter is in {config.output_dir}")
