# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The whole path in a few lines: a fresh drafter, SFT on the target's own answers, Draft-OPD, evaluation.

    python examples/quickstart.py TARGET PROMPTS.jsonl

PROMPTS.jsonl holds one {"prompt": [{"role": "user", "content": "..."}]} per line.
"""

import sys

from datasets import load_dataset
from rich import print

from trl_draft_opd import (
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    Eagle3DraftModel,
    FrozenTarget,
    evaluate_drafter,
)


target = FrozenTarget.load(sys.argv[1])
prompts = load_dataset("json", data_files=sys.argv[2], split="train").train_test_split(64, seed=0)
drafter = Eagle3DraftModel.from_target(target)

# The target answers every prompt once; both stages train on these answers.
answers = {"responses": "answers"}
sft = DraftSFTTrainer(drafter, target, DraftSFTConfig("drafter-sft", regenerate=True, **answers), prompts["train"])
sft.train()
opd = DraftOPDTrainer(drafter, target, DraftOPDConfig("drafter-opd", **answers), prompts["train"], prompts["test"])
opd.train()
opd.save_model()

held_out = [row["prompt_ids"] for row in opd.eval_dataset]
print(evaluate_drafter(target, drafter, held_out).table("after Draft-OPD"))
