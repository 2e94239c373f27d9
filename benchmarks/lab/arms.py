# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Run the arms: from the SFT start, for the tier's budget of counted FLOPs, then measure on prompts nobody trained on.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint

import trl_draft_opd
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.drafters.base import Drafter

from .diagnose import diagnose_states
from .measure import measure_drafter
from .plan import Arm, read_arms
from .start import common_settings, count_flops, make_start, sft_flops
from .trainers import (
    AverageCallback,
    ConfidentErrorsTrainer,
    DenseAnchorsTrainer,
    HardAnchorsTrainer,
    OneTokenTrainer,
    RandomAnchorsTrainer,
    StaleAnchorsTrainer,
    sharpened,
)
from .workbench import Workbench, read_json, require_unchanged, write_json


SAVE_EVERY = 40  # updates a kill may cost
DIAGNOSED_PROMPTS = 48
OPD_TRAINERS = {
    "opd": DraftOPDTrainer,
    "one_token": OneTokenTrainer,
    "random_anchors": RandomAnchorsTrainer,
    "stale": StaleAnchorsTrainer,
    "dense": DenseAnchorsTrainer,
    "hard": HardAnchorsTrainer,
    "confident": ConfidentErrorsTrainer,
}


def arm_settings(bench: Workbench, arm: Arm) -> dict[str, Any]:
    """Return the config fields of an arm: the pair's, overridden by the arm's."""
    pair = bench.pair
    by_trainer = pair.continued_sft if arm.trainer == "sft" else pair.opd
    return pair.common | by_trainer | arm.settings


def make_trainer(
    bench: Workbench, arm: Arm, drafter: Drafter, rows: Dataset, folder: Path, seed: int, **settings: Any
) -> DraftSFTTrainer | DraftOPDTrainer:
    """Return the trainer of an arm; `settings` override everything."""
    fields = common_settings(bench, folder, seed) | arm_settings(bench, arm) | settings
    adapter = None if arm.lora is None else LoraConfig(**arm.lora)
    if arm.trainer == "sft":
        trainer = DraftSFTTrainer(drafter, bench.target, DraftSFTConfig(**fields), rows, peft_config=adapter)
    else:
        fields |= {"temperature": arm.temperature, "draft_sampling": arm.draft_sampling}
        fields = {"completions_from_target": True} | fields
        kind = OPD_TRAINERS[arm.trainer]
        trainer = kind(drafter, bench.target, DraftOPDConfig(**fields), rows, peft_config=adapter)
    if isinstance(trainer, StaleAnchorsTrainer):
        trainer.refresh_epochs = arm.refresh_epochs
    if arm.sharpen is not None:
        trainer._step_loss = sharpened(arm.sharpen)
    if arm.average is not None:
        trainer.add_callback(AverageCallback(arm.average))
    return trainer


def arm_flops(bench: Workbench, arm: Arm, start: Path, folder: Path) -> float:
    """Return the FLOPs of one update of an arm, counted at the start."""
    path = folder / "flops.json"
    if not path.exists():
        rows = bench.training_rows(arm.temperature, arm.pool, arm.is_fresh)
        # What an update costs does not depend on what was learned; an adapter wants the drafter that it names.
        drafter = bench.load_drafter(start)
        make = lambda **fields: make_trainer(bench, arm, drafter, rows, folder / "scratch", 0, **fields)  # noqa: E731
        write_json(path, count_flops(bench, make))
    return read_json(path)


def run_arm(bench: Workbench, arm: Arm, tier: int, seed: int) -> dict[str, Any]:
    """
    Return the result of an arm and seed, run on first use; a killed run resumes from its last checkpoint.

    Args:
        bench ([`Workbench`]): The pair.
        arm ([`Arm`]): The arm.
        tier (`int`): Decides the budget.
        seed (`int`): Of the order of prompts and of all draws; the start is the same for all.

    Raises:
        SystemExit: If the arm's folder was made by another plan.
    """
    arm_folder = bench.folder / f"tier{tier}" / arm.name
    folder = arm_folder / f"seed{seed}"
    made_of = dataclasses.asdict(dataclasses.replace(arm, tiers=(tier,), settings=arm_settings(bench, arm)))
    made_of["budget"] = bench.pair.budgets[tier]
    require_unchanged(arm_folder / "arm.json", made_of)
    if (folder / "result.json").exists():
        return read_json(folder / "result.json")
    start = make_start(bench)
    flops = arm_flops(bench, arm, start, arm_folder)
    updates = max(1, round(bench.pair.budgets[tier] * arm.budget_share * 1e12 / flops))
    rows = bench.training_rows(arm.temperature, arm.pool, arm.is_fresh)
    print(
        f"{bench.pair.name} tier {tier} {arm.name} seed {seed}: {updates} updates of {flops / 1e9:.1f} GFLOP",
        flush=True,
    )
    options = {"max_steps": updates, "save_strategy": "steps", "save_steps": SAVE_EVERY}
    drafter = begin(bench, arm, tier, seed, start)
    trainer = make_trainer(bench, arm, drafter, rows, folder / "run", seed, **options)
    run = folder / "run"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run) if run.exists() else None)
    trainer.model.save_pretrained(folder / "drafter")
    shutil.rmtree(run)
    result = {
        "arm": arm.name,
        "tier": tier,
        "seed": seed,
        "updates": updates,
        "flops_per_update": flops,
        "tflop": updates * flops / 1e12,
        "settings": {"trainer": arm.trainer} | described(arm) | arm_settings(bench, arm),
        "log": trainer.state.log_history,
        "evals": measure_all(
            bench,
            trainer.model,
            arm.temperature,
            is_everywhere=tier == 6 or (tier == 1 and seed == 0),
            is_diagnosed=tier == 1 and seed == 0,
        ),
    }
    write_json(folder / "result.json", result)
    taus = " ".join(f"{name} {row['tau']:.3f}" for name, row in result["evals"].items())
    print(f"{bench.pair.name} tier {tier} {arm.name} seed {seed}: tau {taus}", flush=True)
    return result


def begin(bench: Workbench, arm: Arm, tier: int, seed: int, start: Path) -> Drafter:
    """
    Return what an arm continues from.

    Raises:
        SystemExit: If it continues from an arm that was not run yet.
    """
    if arm.begins == "start":
        return bench.load_drafter(start)
    if arm.begins == "fresh":
        return bench.untrained_like(bench.load_drafter(start)).to(bench.machine.device)
    folder = bench.folder / f"tier{tier}" / arm.begins / f"seed{seed}" / "drafter"
    if not folder.exists():
        raise SystemExit(
            f"Arm {arm.name!r} continues from {arm.begins!r}, which has no run of seed {seed} yet. Run it first."
        )
    return bench.load_drafter(folder)


def described(arm: Arm) -> dict[str, Any]:
    """Return what is unusual about an arm besides its settings."""
    usual = {field.name: field.default for field in dataclasses.fields(Arm)}
    return {
        name: getattr(arm, name)
        for name in ("pool", "is_fresh", "begins", "lora", "sharpen", "average")
        if getattr(arm, name) != usual[name]
    }


def measure_all(
    bench: Workbench, drafter: Drafter, temperature: float, *, is_everywhere: bool, is_diagnosed: bool
) -> dict[str, Any]:
    """
    Measure a drafter greedily, and at a temperature above 0 on the first test set, with drafts by argmax and drawn.

    Args:
        is_everywhere (`bool`): On every test set; else on the first alone.
        is_diagnosed (`bool`): Also compare it with the target by kind of state, see [`diagnose_states`].
    """
    evals = {}
    for name, prompts in list(bench.pair.tests.items())[: None if is_everywhere else 1]:
        rows = bench.answered(bench.prompt_ids(prompts), 0.0)
        evals[name] = measure_drafter(bench.target, drafter, rows)
        if is_diagnosed:
            few = rows.select(range(min(DIAGNOSED_PROMPTS, len(rows))))
            evals[name] |= diagnose_states(bench.target, drafter, few)
    if temperature > 0:
        name, prompts = next(iter(bench.pair.tests.items()))
        rows = bench.answered(bench.prompt_ids(prompts), temperature)
        for draft_sampling in ("greedy", "sample"):
            options = {"temperature": temperature, "draft_sampling": draft_sampling}
            evals[f"{name}_t{temperature:g}_{draft_sampling}"] = measure_drafter(
                bench.target, drafter, rows, **options
            )
    return evals


def measure_start(bench: Workbench) -> dict[str, Any]:
    """Return the result of the SFT start, as an arm without updates."""
    path = bench.folder / "sft" / "result.json"
    if not path.exists():
        drafter = bench.load_drafter(make_start(bench))
        arms = [arm for tier in bench.pair.budgets for arm in read_arms(bench.pair, tier)]
        hottest = max((arm.temperature for arm in arms), default=0.0)
        evals = measure_all(bench, drafter, hottest, is_everywhere=True, is_diagnosed=True)
        result = {"arm": "sft_start", "tier": 1, "seed": 0, "updates": 0, "flops_per_update": 0.0, "tflop": 0.0}
        write_json(path, result | {"settings": bench.pair.sft.settings, "log": [], "evals": evals})
    return read_json(path)


def collect(bench: Workbench) -> dict[str, Any]:
    """Return everything measured for a pair so far, in the format of `benchmarks/lab/results`."""
    start = make_start(bench)
    flops = sft_flops(bench, start)
    history = read_json(bench.folder / "sft" / "history.json")
    plateau = read_json(bench.folder / "sft" / "plateau.json")["updates"]
    drafter, runs = bench.load_drafter(start), [measure_start(bench)]
    for tier in bench.pair.budgets:
        for arm in read_arms(bench.pair, tier):
            paths = sorted((bench.folder / f"tier{tier}" / arm.name).glob("seed*/result.json"))
            runs += [read_json(path) for path in paths]
    return {
        "pair": bench.pair.name,
        "family": bench.pair.family,
        "target": bench.pair.target,
        "num_drafts": drafter.default_num_drafts,
        "made_with": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl_draft_opd": trl_draft_opd.__version__,
            "target_dtype": bench.machine.dtype,
            "bf16_autocast": bench.machine.bf16,
        },
        "responses": bench.writing_cost(),
        "sft": {
            "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
            "updates": plateau,
            "flops_per_update": flops,
            "history": [row | {"tflop": row["update"] * flops / 1e12} for row in history],
            "plateau_update": plateau if plateau < bench.pair.sft.max_updates else None,
            "cooldown_updates": bench.pair.sft.cooldown_updates,
        },
        "budgets": {str(tier): budget for tier, budget in bench.pair.budgets.items()},
        "runs": runs,
    }
