# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Train a drafter by SFT on its target's responses: a fresh one of any family, or with `--drafter` an earlier one.

    python examples/train_sft.py --target Qwen/Qwen3-4B --family eagle3 \
        --dataset prompts.jsonl --responses responses --output-dir drafter-sft

The target first responds to every prompt, which takes most of the time; `--responses` keeps the text for later runs.
Expect tau on the held-out prompts in the end: 1 is plain decoding, and it should still rise with more prompts.
"""

from dataclasses import dataclass, field
from typing import Literal

from datasets import load_dataset
from transformers import set_seed
from trl import TrlParser

from trl_draft_opd import (
    DFlash2DraftModel,
    DFlashDraftModel,
    DraftSFTConfig,
    DraftSFTTrainer,
    DSparkDraftModel,
    Eagle3DraftModel,
    FrozenTarget,
)


# Those that draft whole blocks; their masks need an id that text never uses.
BLOCK_FAMILIES = {"dflash": DFlashDraftModel, "dflash2": DFlash2DraftModel, "dspark": DSparkDraftModel}


@dataclass
class ExampleArguments:
    """Flags of this script, besides the settings of the trainer."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    dataset: str = field(metadata={"help": "JSON lines with `question`, `prompt` or `messages`."})
    drafter: str | None = field(default=None, metadata={"help": "Hub id or path of a drafter to train further."})
    family: Literal["eagle3", "dflash", "dspark", "dflash2"] = field(
        default="eagle3", metadata={"help": "Family of a fresh drafter."}
    )
    num_eval_prompts: int = field(default=64, metadata={"help": "Prompts held out, a quarter at most."})


if __name__ == "__main__":
    parser = TrlParser((ExampleArguments, DraftSFTConfig))
    # What is trained on is the target's own text.
    parser.set_defaults(regenerate=True)
    args, config = parser.parse_args_and_config()
    rows = load_dataset("json", data_files=args.dataset, split="train")
    if len(rows) < 2:
        raise SystemExit(f"{args.dataset} has {len(rows)} rows. Give at least 2: a quarter at most is held out.")
    rows = rows.train_test_split(min(args.num_eval_prompts, max(1, len(rows) // 4)), seed=0)
    target = FrozenTarget.load(args.target, dtype=config.target_dtype)
    set_seed(config.seed)
    if args.drafter is not None:
        drafter = args.drafter
    elif args.family == "eagle3":
        drafter = Eagle3DraftModel.from_target(target)
    else:
        drafter = BLOCK_FAMILIES[args.family].from_target(target, mask_token_id=target.find_mask_token_id())
    trainer = DraftSFTTrainer(drafter, target, config, rows["train"], rows["test"])
    trainer.train()
    tau = trainer.evaluate()["eval_tau"]
    trainer.save_model()  # after the evaluation, so that the model card has its numbers
    if trainer.is_world_process_zero():
        print(f"tau on {len(rows['test'])} held-out prompts: {tau:.3f}")
