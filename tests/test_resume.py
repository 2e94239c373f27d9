# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A run that stopped and went on is the run that never stopped: every file of its last checkpoint is the same, byte for
byte.
"""

import shutil
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import differing, read
from helpers.oracle import greedy_rows
from helpers.tiny import FAMILIES, TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.runs.checkpoints import list_checkpoints
from trl_draft_opd.trainer import publishing, resuming
from trl_draft_opd.trainer.metrics import MetricSums


STEPS = 4
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
    """Prompts with the target's own responses: three updates of four rows an epoch, so that no run ends with one."""
    return greedy_rows(target, 12, 10)


def train(output_dir, kind, target, rows, resume=None, seed=1, eval_rows=None, drafter=None, peft=None, **changes):
    """Train for four updates, three an epoch, with a checkpoint after each; return the last one."""
    options = {
        "output_dir": str(output_dir),
        **TINY_RUN,
        "save_strategy": "steps",
        "save_steps": 1,
        # Not a divisor of what is saved: metrics and losses are under way in every other checkpoint.
        "logging_steps": 2,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "max_completion_length": 10,
        "responses": str(Path(output_dir).parent / "responses") if kind == "replay" else None,
    }
    trainer_class, config = (DraftSFTTrainer, DraftSFTConfig) if kind == "sft" else (DraftOPDTrainer, DraftOPDConfig)
    drafter = drafter or make_drafter("dflash", target, seed=seed)
    args = config(**options | KINDS[kind] | changes)
    trainer = trainer_class(drafter, target, args, rows, eval_rows, peft_config=peft)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == STEPS
    assert max(step for step, _ in list_checkpoints(Path(output_dir))) == STEPS
    return Path(output_dir) / f"checkpoint-{STEPS}"


# Every engine, with and without workers and accumulation; the other nine of the twelve are slow tests.
QUICK = {("sft", 2, 1), ("replay", 0, 1), ("live", 2, 4)}
CASES = [(kind, workers, accumulation) for kind in KINDS for workers in (0, 2) for accumulation in (1, 4)]


@pytest.mark.parametrize(
    ("kind", "workers", "accumulation"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
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


# What a family keeps beside its weights does not depend on the engine.
FAMILY_CASES = [(family, kind) for family in FAMILIES if family != "dflash" for kind in KINDS]
QUICK_FAMILIES = {("eagle3", "replay"), ("dspark", "sft"), ("dflash2", "live")}


@pytest.mark.parametrize(
    ("family", "kind"),
    [pytest.param(*case, marks=() if case in QUICK_FAMILIES else pytest.mark.slow) for case in FAMILY_CASES],
)
def test_a_drafter_of_any_family_goes_on_bit_for_bit(tmp_path, target, rows, family, kind):
    whole = train(tmp_path / "whole", kind, target, rows, drafter=make_drafter(family, target))
    start = tmp_path / "whole" / "checkpoint-2"
    resumed = train(tmp_path / "resumed", kind, target, rows, resume=start, drafter=make_drafter(family, target, 9))
    assert differing(whole, resumed) == []


@pytest.fixture(scope="module")
def measured(tmp_path_factory, target, rows):
    """A run that measured tau at its last step but one."""
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
    options = options | {"resume": folder / "whole" / "checkpoint-2", "seed": 9, "ignore_data_skip": True}
    assert "model.safetensors" in differing(whole, train(tmp_path / "resumed", "sft", target, rows, **options))


def test_the_newest_valid_checkpoint_is_gone_on_from_and_the_rest_named(tmp_path, caplog, target, rows, measured):
    folder, whole, options = measured
    cut = tmp_path / "cut"
    shutil.copytree(folder / "whole", cut)
    (cut / "checkpoint-4" / "optimizer.safetensors").unlink()
    (cut / "checkpoint-3" / "model.safetensors").write_bytes(b"half of it")
    resumed = train(cut, "sft", target, rows, resume=True, seed=9, **options)
    assert differing(whole, resumed) == []
    assert "Resuming from checkpoint-2. Passed over checkpoint-4: optimizer.safetensors is missing" in caplog.text
    assert "checkpoint-3: model.safetensors has 10 bytes," in caplog.text


@pytest.mark.parametrize("restores_random_states", [True, False])
def test_an_adapter_with_dropout_goes_on_bit_for_bit(monkeypatch, tmp_path, target, rows, restores_random_states):
    from peft import LoraConfig

    make_drafter("eagle3", target).save_pretrained(tmp_path / "base")
    options = {"drafter": tmp_path / "base", "peft": LoraConfig(r=2, lora_dropout=0.3)}
    whole = train(tmp_path / "whole", "replay", target, rows, **options)
    assert "adapter_model.safetensors" in read(whole) and "model.safetensors" not in read(whole)
    if not restores_random_states:
        monkeypatch.setattr(resuming, "set_random_states", lambda *args: None)
    resumed = train(
        tmp_path / "resumed", "replay", target, rows, resume=tmp_path / "whole" / "checkpoint-1", **options
    )
    assert ("adapter_model.safetensors" not in differing(whole, resumed)) == restores_random_states


def test_an_adapter_of_another_shape_is_refused_before_anything_is_loaded(tmp_path, target, rows):
    from peft import LoraConfig

    make_drafter("eagle3", target).save_pretrained(tmp_path / "base")
    train(tmp_path / "whole", "sft", target, rows, drafter=tmp_path / "base", peft=LoraConfig(r=2))
    start = tmp_path / "whole" / "checkpoint-1"
    for peft in (None, LoraConfig(r=2, target_modules=["fc"])):
        with pytest.raises(ValueError, match="because these differ: the drafter's architecture or adapter"):
            train(tmp_path / "other", "sft", target, rows, resume=start, drafter=tmp_path / "base", peft=peft)
    with pytest.raises(ValueError, match=r"these differ: .*\(lora_r: 2 there, 4 here\)"):
        train(tmp_path / "third", "sft", target, rows, resume=start, drafter=tmp_path / "base", peft=LoraConfig(r=4))


def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path, target, rows):
    options = {"resume_from_checkpoint": "auto"}
    whole = train(tmp_path / "whole", "sft", target, rows, **options)
    before = read(whole)
    for way in ("auto", "true"):
        (whole / "state.json").unlink()
        again = train(tmp_path / "whole", "sft", target, rows, seed=9, resume_from_checkpoint=way)
        assert read(again) == before
    # What is damaged all over is an error, and not a reason to begin anew.
    for folder in (tmp_path / "whole").glob("checkpoint-*"):
        (folder / "state.json").unlink()
    with pytest.raises(ValueError, match="No valid checkpoint found .*state.json is missing"):
        train(tmp_path / "whole", "sft", target, rows, **options)
