# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The start of all arms: SFT at a constant rate until tau on held-out prompts stops rising, then a cool-down to rate 0.

Without the cool-down every arm would gain by merely lowering the rate, and nobody could say what it added.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.counters import FlopCount
from trl_draft_opd import DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.drafters.base import Drafter

from .measure import measure_drafter
from .workbench import Workbench, read_json, reading_itself, require_unchanged, write_json


PLATEAU_COMPUTE, PLATEAU_GAIN = 1.2, 1.01  # a plateau: less than 1 % of tau for 20 % more compute
SMOOTHED = 3  # measurements averaged on each side: one alone is noisy
COUNTED_UPDATES = 4


def common_settings(bench: Workbench, folder: Path, seed: int) -> dict[str, Any]:
    """Return the settings every trainer of the laboratory shares."""
    machine, per_update = bench.machine, bench.pair.prompts_per_update
    micro = per_update if machine.micro_batch_size is None else machine.micro_batch_size
    if micro < 1 or per_update % micro:
        raise SystemExit(f"--micro-batch-size {micro} does not divide the {per_update} prompts of an update.")
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": per_update // micro,
        "logging_steps": 20,
        "report_to": "none",
        "use_cpu": machine.device == "cpu",
        "bf16": machine.bf16,
        "seed": seed,
        "disable_tqdm": True,
        "save_total_limit": 1,
        "max_completion_length": bench.pair.max_completion_length,
    }


def find_plateau(history: list[dict[str, float]]) -> bool:
    """
    Whether tau has stopped rising: the mean of the last `SMOOTHED` measurements is less than 1 % above that of those
    made with 1 / 1.2 of the compute.

    Args:
        history (`list[dict]`): `update` and `tau` of every measurement, in order.
    """
    now = history[-SMOOTHED:]
    limit = history[-1]["update"] / PLATEAU_COMPUTE
    then = [row for row in history if row["update"] <= limit][-SMOOTHED:]
    if len(then) < SMOOTHED:
        return False
    mean_now, mean_then = (sum(row["tau"] for row in rows) / SMOOTHED for rows in (now, then))
    return mean_now < PLATEAU_GAIN * mean_then


class PlateauCallback(TrainerCallback):
    """Measures tau every few updates, keeps the history on disk, saves, and stops at the plateau."""

    def __init__(self, bench: Workbench, path: Path):
        self.bench, self.path = bench, path
        self.rows = bench.answered([ids for prompts in bench.pair.dev for ids in bench.prompt_ids(prompts)], 0.0)
        self.history: list[dict[str, float]] = read_json(path) if path.exists() else []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        plan = self.bench.pair.sft
        if state.global_step % plan.measure_every == 0:
            tau = measure_drafter(self.bench.target, model, self.rows)["tau"]
            # A resumed run measures again what came after its checkpoint.
            kept = [row for row in self.history if row["update"] < state.global_step]
            self.history = [*kept, {"update": state.global_step, "tau": tau}]
            write_json(self.path, self.history)
            print(f"{self.bench.pair.name} SFT, update {state.global_step}: tau {tau:.3f}", flush=True)
            control.should_save = True
            control.should_training_stop = state.global_step >= plan.min_updates and find_plateau(self.history)
        return control


def make_start(bench: Workbench) -> Path:
    """
    Return the folder of the pair's SFT start, trained on first use; a killed run resumes from its last checkpoint.
    """
    folder = bench.folder / "sft"
    pair = dataclasses.asdict(bench.pair)
    made_of = ("family", "target", "drafter", "max_completion_length", "train", "dev", "prompts_per_update", "sft")
    require_unchanged(folder / "plan.json", {key: pair[key] for key in made_of})
    if (folder / "start" / "config.json").exists():
        return folder / "start"
    plan = bench.pair.sft
    if plan.max_updates == 0:
        write_json(folder / "history.json", [])
        write_json(folder / "plateau.json", {"updates": 0})
        bench.fresh_drafter().save_pretrained(folder / "start")
        return folder / "start"
    rows = bench.training_rows()
    plateau = folder / "plateau"
    if not (plateau / "config.json").exists():
        run = folder / "run"
        config = DraftSFTConfig(
            **common_settings(bench, run, seed=0)
            | plan.settings
            | {
                "lr_scheduler_type": "constant_with_warmup",
                "max_steps": plan.max_updates,
                "save_strategy": "steps",
                "save_steps": plan.max_updates,
            }
        )
        trainer = DraftSFTTrainer(bench.fresh_drafter(), bench.target, config, rows)
        trainer.add_callback(PlateauCallback(bench, folder / "history.json"))
        trainer.train(resume_from_checkpoint=get_last_checkpoint(run) if run.exists() else None)
        trainer.model.save_pretrained(plateau)
        write_json(folder / "plateau.json", {"updates": trainer.state.global_step})
    cooldown = {
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_steps": plan.cooldown_updates,
        "save_strategy": "no",
    }
    settings = common_settings(bench, folder / "cooldown", seed=1) | plan.settings | cooldown
    trainer = DraftSFTTrainer(bench.load_drafter(plateau), bench.target, DraftSFTConfig(**settings), rows)
    trainer.train()
    trainer.model.save_pretrained(folder / "start")
    return folder / "start"


class CountUpdates(TrainerCallback):
    """Notes the FLOPs counted at the end of every update."""

    def __init__(self, counter: FlopCount):
        self.counter = counter
        self.totals: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.totals.append(self.counter.total)


def count_flops(bench: Workbench, make_trainer) -> float:
    """
    Return the FLOPs of one update, everything in it included, on a target that remembers nothing.

    The first update is left out: it also checks the responses, once per run.

    Args:
        bench ([`Workbench`]): The pair.
        make_trainer (`Callable`): Returns a trainer for the settings it is given.
    """
    settings = {"max_steps": COUNTED_UPDATES, "learning_rate": 0.0, "save_strategy": "no"}
    with reading_itself(bench.target):
        trainer = make_trainer(**settings)
        with FlopCount() as counter:
            counted = CountUpdates(counter)
            trainer.add_callback(counted)
            trainer.train()
    return (counted.totals[-1] - counted.totals[0]) / (COUNTED_UPDATES - 1)


def mean_tau(history: list[dict[str, float]]) -> float:
    """Return the smoothed tau at the end of a history."""
    return sum(row["tau"] for row in history[-SMOOTHED:]) / len(history[-SMOOTHED:])


def sft_flops(bench: Workbench, start: Path) -> float:
    """Return the FLOPs of one update of the SFT that made the start."""
    path = bench.folder / "sft" / "flops.json"
    if not path.exists():
        rows = bench.training_rows()
        drafter: Drafter = bench.load_drafter(start)

        def make(**settings):
            common = common_settings(bench, bench.folder / "scratch", seed=0)
            config = DraftSFTConfig(**common | bench.pair.sft.settings | settings)
            return DraftSFTTrainer(drafter, bench.target, config, rows)

        torch.manual_seed(0)
        write_json(path, count_flops(bench, make))
    return read_json(path)
