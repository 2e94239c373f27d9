# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A run that stopped and went on is the run that never stopped: every file of its last checkpoint is the same, byte for byte.
"""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from oracle import greedy_text
from tiny import EOS, MASK, make_drafter, make_prompts, make_target

from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.trainer import publishing, resuming
from trl_draft_opd.trainer.metrics import MetricSums


STEPS = 5
KINDS = {
    "sft": {"num_anchors": 3},
    "replay": {"temperature": 0.8, "draft_sampling": "sample"},
    "live": {"rollout": "live", "temperature": 0.8, "draft_sampling": "sample", "rejected_scope": "suffix"},
}
# Everything that is restored, and the function without which it is not.
ITEMS = {
    "weights": (resuming, "load_full_weights"),
    "optimizer": (resuming, "load_full_optimizer_state"),
    "scheduler": (torch.optim.lr_scheduler.LambdaLR, "load_state_dict"),
    "random states": (resuming, "set_random_states"),
    "metric sums": (MetricSums, "load"),
    "running loss": (resuming.ResumingTrainer, "_load_running_loss"),
    "measurements and counts": (publishing.PublishingTrainer, "_load_shared_state"),
}


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    """Prompts with the target's own responses: two updates of four rows an epoch."""
    texts = [(len(prompt), greedy_text(target, prompt, 10)) for prompt in make_prompts(14)]
    texts = [(start, text) for start, text in texts if not {EOS, MASK} & set(text)][:8]
    assert len(texts) == 8
    return Dataset.from_dict(
        {"prompt_ids": [text[:n] for n, text in texts], "completion_ids": [text[n:] for n, text in texts]}
    )


def train(output_dir, kind, target, rows, resume=None, seed=1, eval_rows=None, **changes):
    """Train for five updates with a checkpoint after each; return the last one."""
    options = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 1,
        # Not a divisor of what is saved: metrics and losses are under way in every other checkpoint.
        "logging_steps": 2,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "max_completion_length": 10,
        "trajectories": None if kind == "live" else str(Path(output_dir).parent / "answers"),
    }
    trainer_class, config = (
        (DraftSFTTrainer, DraftSFTConfig) if kind == "sft" else (DraftOPDTrainer, DraftOPDConfig)
    )
    drafter = make_drafter("dflash", target, seed=seed)
    trainer = trainer_class(drafter, target, config(**options | KINDS[kind] | changes), rows, eval_rows)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == STEPS
    return Path(output_dir) / f"checkpoint-{STEPS}"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def differing(first, second):
    """Names of the files that differ."""
    first, second = files(first), files(second)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_goes_on_bit_for_bit_from_every_optimiser_step(tmp_path, target, rows, kind, workers, accumulation):
    options = {
        "dataloader_num_workers": workers,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4 // accumulation,
    }
    whole = train(tmp_path / "whole", kind, target, rows, **options)
    for step in range(1, STEPS):
        start = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = train(tmp_path / f"from-{step}", kind, target, rows, resume=start, seed=9, **options)
        assert differing(whole, resumed) == [], f"resumed from step {step}"


@pytest.fixture(scope="module")
def measured(tmp_path_factory, target, rows):
    """A run that has measured tau, and whose first evaluation lies before the checkpoint that is gone on from."""
    folder = tmp_path_factory.mktemp("measured")
    options = {"eval_rows": rows.select(range(2)), "eval_strategy": "steps", "eval_steps": 3}
    return folder, train(folder / "whole", "sft", target, rows, **options), options


@pytest.mark.parametrize("item", [None, *ITEMS])
def test_leaving_any_one_item_out_of_a_restore_shows(monkeypatch, tmp_path, target, rows, measured, item):
    folder, whole, options = measured
    if item is not None:
        place, name = ITEMS[item]
        monkeypatch.setattr(place, name, lambda *args, **kwargs: None)
    start = folder / "whole" / "checkpoint-3"
    resumed = train(tmp_path / "resumed", "sft", target, rows, resume=start, seed=9, **options)
    assert (differing(whole, resumed) == []) == (item is None)


def test_a_lost_position_in_the_data_shows(tmp_path, target, rows, measured):
    folder, whole, options = measured
    start = folder / "whole" / "checkpoint-3"
    resumed = train(
        tmp_path / "resumed", "sft", target, rows, resume=start, seed=9, ignore_data_skip=True, **options
    )
    assert "model.safetensors" in differing(whole, resumed)


def test_the_newest_checkpoint_is_found_and_the_loss_of_a_window_is_whole(tmp_path, target, rows):
    whole = train(tmp_path / "whole", "sft", target, rows)
    logged = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    train(tmp_path / "cut", "sft", target, rows)
    for step in (4, 5):
        for path in (tmp_path / "cut" / f"checkpoint-{step}").iterdir():
            path.unlink()
    resumed = train(tmp_path / "cut", "sft", target, rows, resume=True, seed=9)
    assert differing(whole, resumed) == ["manifest.json", "state.json"] or differing(whole, resumed) == ["manifest.json"]
    assert json.loads((resumed / "trainer_state.json").read_text())["log_history"] == logged
