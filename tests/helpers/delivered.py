# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Runs of eight updates over a target's own text: in process, or from a store of its readings."""

import json
from pathlib import Path

import torch
from datasets import Dataset

from helpers.oracle import greedy_rows
from helpers.tiny import FAMILIES, TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer, FrozenTarget
from trl_draft_opd.readings.store import ReadingStore
from trl_draft_opd.readings.write import write_readings


STEPS, BATCH = 8, 2
METHODS = {"sft": (DraftSFTTrainer, DraftSFTConfig), "opd": (DraftOPDTrainer, DraftOPDConfig)}
LAYERS = sorted(
    {layer for family in FAMILIES for layer in make_drafter(family, make_target()).config.target_layer_ids}
)


def make_folder(path: Path) -> Path:
    """Save a target, rows of its own text, and stores of their readings in float32 and bfloat16; return the folder."""
    target = make_target()
    target.causal_lm.save_pretrained(path / "target")
    target.tokenizer.save_pretrained(path / "target")
    rows = greedy_rows(target, STEPS * BATCH, 10)
    rows.to_json(path / "rows.jsonl")
    for dtype in ("float32", "bfloat16"):
        write(whole_target(path), texts_of(rows), path / dtype, dtype=dtype)
    return path


def whole_target(folder: Path) -> FrozenTarget:
    """Load the target with its body."""
    return FrozenTarget.load(str(folder / "target"))


def texts_of(rows: Dataset) -> list[list[int]]:
    return [row["prompt_ids"] + row["completion_ids"] for row in rows]


def write(target: FrozenTarget, texts: list[list[int]], path: Path, **options) -> ReadingStore:
    """Read texts as a run reads its rows one after the other: in its batches."""
    settings = {"layer_ids": LAYERS, "dtype": "float32", "batch_size": BATCH, "show_progress": False} | options
    return write_readings(target, texts, path, **settings)


def rows_in(folder: Path) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()])


def make_trainer(folder, output, method="sft", family="dflash", rows=None, eval_rows=None, target=None, **changes):
    """A run of eight updates over rows in their order."""
    trainer_class, config = METHODS[method]
    options = {
        "output_dir": str(output),
        **TINY_RUN,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "max_completion_length": 10,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    if method == "opd":
        options |= {"completions_from_target": True}
    if target is None:
        target = str(folder / "target") if "readings" in changes else whole_target(folder)
    drafter = make_drafter(family, make_target())
    args = config(**options | changes)
    return trainer_class(drafter, target, args, rows_in(folder) if rows is None else rows, eval_rows)


def train(*args, **changes):
    trainer = make_trainer(*args, **changes)
    trainer.train()
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.drafter.state_dict().items()}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
