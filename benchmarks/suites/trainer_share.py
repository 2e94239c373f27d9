# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Where the time of the real trainers goes, and what is left outside of forward, backward and optimiser.
"""

import argparse
import tempfile

from datasets import Dataset
from transformers import TrainerCallback

from benchmarks import texts
from benchmarks.arms import Report
from benchmarks.stages import StageClock
from trl_draft_opd import (
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    SamplingSettings,
    generate_responses,
)
from trl_draft_opd.rollout import replay
from trl_draft_opd.trainer import draft_trainer, step
from trl_draft_opd.trainer.log_printer import LogPrinter


# Asked: the share of a step that is in no stage.
REACH_OTHER = 0.05


class ClockCallback(TrainerCallback):
    """Counts whole steps, from the end of the warm-up steps to the end of the last one."""

    def __init__(self, clock: StageClock, num_warmup: int, num_steps: int):
        self.clock, self.num_warmup, self.num_steps = clock, num_warmup, num_steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.num_warmup:
            self.clock.start()
        if state.global_step == self.num_steps:
            self.clock.stop()


def run(args: argparse.Namespace, report: Report) -> None:
    """Run both trainers for a few steps on both families."""
    target = texts.real_target(args)
    prompts = texts.questions(args, target, 4 if args.quick else 32)
    responses = generate_responses(
        target,
        prompts,
        max_completion_length=32 if args.quick else args.max_completion_length,
        sampling=SamplingSettings(temperature=0.0, top_k=0, top_p=1.0),
        batch_size=32,
        seed=args.seed,
        show_progress=False,
    )
    pairs = zip(prompts, responses, strict=True)
    data = Dataset.from_list([{"prompt_ids": prompt, "completion_ids": response} for prompt, response in pairs])
    for family in args.family:
        folder = getattr(args, f"drafter_{family}")
        for name in ("DraftSFTTrainer", "DraftOPDTrainer"):
            drafter = texts.make_drafter(args, report, family, target, folder)
            shares = stage_shares(args, name, target, drafter, data)
            split = ", ".join(
                f"{stage} {share:.1%}" for stage, share in sorted(shares.items(), key=lambda item: -item[1])
            )
            report.say(f"  {name}, {family}: {split}")
            report.count(f"{name}, {family}, shares of a step", **shares)
            report.figure(f"outside all stages, {name}, {family}", shares["other"], REACH_OTHER)


def stage_shares(args: argparse.Namespace, name: str, target, drafter, data: Dataset) -> dict[str, float]:
    """Train for a few steps and return each stage's share of them."""
    num_warmup, num_steps = (1, 3) if args.quick else (3, 15)
    clock = StageClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, name, target, drafter, data, folder, num_steps)
        trainer.remove_callback(LogPrinter)
        trainer.add_callback(ClockCallback(clock, num_warmup, num_steps))
        optimizer = trainer.create_optimizer()
        places = [
            (target, "read_text", "target"),
            (replay, "score_branches", "branches"),
            (draft_trainer, "rollout_replay", "walk"),
            (step, "run_blocks", "draft"),
            (step, "chunked_divergence", "loss"),
            (trainer.accelerator, "backward", "backward"),
            (trainer.accelerator, "clip_grad_norm_", "optimiser"),
            (optimizer, "step", "optimiser"),
        ]
        with clock.watch(*places):
            trainer.train()
    return clock.shares()


def make_trainer(args: argparse.Namespace, name: str, target, drafter, data: Dataset, folder: str, num_steps: int):
    """Return a trainer of four texts per step, silent and without checkpoints."""
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "max_steps": num_steps,
        "learning_rate": 1e-6,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "seed": args.seed,
    }
    if name == "DraftSFTTrainer":
        return DraftSFTTrainer(drafter, target, DraftSFTConfig(**settings), data)
    config = DraftOPDConfig(**settings, completions_from_target=True)
    return DraftOPDTrainer(drafter, target, config, data)
