# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Both trainers from delivered readings, without the target's body: the run in process, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from helpers.oracle import greedy_rows
from helpers.tiny import FAMILIES, TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer, FrozenTarget
from trl_draft_opd.readings.prefetch import PrefetchingSource
from trl_draft_opd.readings.store import ReadingStore
from trl_draft_opd.readings.write import write_readings
from trl_draft_opd.responses import generate_missing
from trl_draft_opd.trainer.delivery import LookAhead
from trl_draft_opd.trainer.texts import open_store


STEPS, BATCH = 8, 2
METHODS = {"sft": (DraftSFTTrainer, DraftSFTConfig), "opd": (DraftOPDTrainer, DraftOPDConfig)}
LAYERS = sorted(
    {layer for family in FAMILIES for layer in make_drafter(family, make_target()).config.target_layer_ids}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved target, rows of its own text, and stores of their readings in float32 and bfloat16."""
    path, target = tmp_path_factory.mktemp("delivered"), make_target()
    target.causal_lm.save_pretrained(path / "target")
    target.tokenizer.save_pretrained(path / "target")
    rows = greedy_rows(target, STEPS * BATCH, 10)
    rows.to_json(path / "rows.jsonl")
    for dtype in ("float32", "bfloat16"):
        write(whole_target(path), texts_of(rows), path / dtype, dtype=dtype)
    return path


def whole_target(folder: Path) -> FrozenTarget:
    """
    Load the target with its body. Weights that are mapped from a file lie at odd addresses, where kernels add up in
    another order: copies lie as those of a target without its body do.
    """
    target = FrozenTarget.load(str(folder / "target"))
    for parameter in target.causal_lm.parameters():
        parameter.data = parameter.data.clone()
    return target


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_updates_from_a_float32_store_are_those_in_process_bit_for_bit(tmp_path, folder, family, method):
    inside = train(folder, tmp_path / "in", method, family)
    outside = train(folder, tmp_path / "out", method, family, readings=str(folder / "float32"))
    assert not outside.target.has_body and inside.target.has_body
    assert losses(outside) == losses(inside) and len(losses(inside)) == STEPS
    assert_same(weights(outside), weights(inside))
