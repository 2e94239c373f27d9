# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What every rank of every backend trains, and one process too: two optimiser steps per case on rows of very unequal
length.

In the first step the second rank has no supervised slot at all.
"""

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from helpers.oracle import greedy_text
from helpers.tiny import MASK, make_drafter, make_prompts, make_target
from trl_draft_opd import (
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    FrozenTarget,
    build_draft_vocabulary,
)
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.readings.write import write_readings
from trl_draft_opd.runs.distributed.sharding import full_optimizer_state, full_weights
from trl_draft_opd.trainer.step import StepLoss


GLOBAL_BATCH, LONGEST = 4, 20


@dataclass(frozen=True)
class Case:
    """
    One training run; `settings` go on top of the common ones, `frozen` is the start of a parameter's name, `poison` is
    what is not finite on the last rank: its `"loss"`, or the `"gradient"` alone.

    Runs with a sharded target are evaluated after training, some before it too.
    """

    kind: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    frozen: str | None = None
    evaluates_first: bool = False
    poison: str | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether the target is sharded where there are several processes."""
        return self.settings.get("shard_target", False)


# What is gone on from: its last step is saved.
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1, "save_strategy": "steps", "save_steps": 2}
CASES = {
    "sft_dflash": Case("sft", "dflash"),
    # Each rank chooses the vocabulary by itself.
    "sft_eagle3": Case("sft", "eagle3", {"regenerate": True, "shard_target": True, "draft_vocab_size": 48}),
    "replay_dflash": Case("opd", "dflash", {"shard_target": True, "reading_bytes": 0}),
    "replay_eagle3": Case("opd", "eagle3"),
    "live_dflash": Case("opd", "dflash", {"rollout": "live"}),
    "live_eagle3": Case("opd", "eagle3", {"rollout": "live", "shard_target": True}, evaluates_first=True),
    # The first step of a rank without a slot reaches both heads too.
    "sft_dspark": Case("sft", "dspark", {"draft_vocab_size": 48}),
    "replay_dspark": Case("opd", "dspark", {"rejected_scope": "suffix"}),
    # Without the target's body, its readings from a store that both ranks read.
    "stored_sft": Case("sft", "dflash", {"readings": "readings"}),
    "stored_opd": Case("opd", "eagle3", {"readings": "readings", "completions_from_target": True}),
    "adamw": Case("sft", "eagle3", ADAMW, frozen="midlayer.mlp.up_proj"),
}
# Refused under ZeRO.
MUON = {"muon": Case("sft", "eagle3", ADAMW | {"muon_learning_rate": 2e-3, "save_strategy": "no"})}
SKIP = {"optim": "adamw_torch", "on_nonfinite": "skip", "max_steps": 1}
STOPPED = {"stopped": Case("sft", "eagle3", {"max_steps": 4, "save_strategy": "steps", "save_steps": 100})}
# Finite gradients, and a step that takes the weights out of range.
TOO_LARGE = {"too_large": Case("sft", "eagle3", SKIP | {"learning_rate": 1e30, "weight_decay": 1e20})}
POISONED = {poison: Case("sft", "eagle3", SKIP, poison=poison) for poison in ("loss", "gradient")}
# What is trained under each backend where no slow test is asked for: each way of training once under DDP, and under
# the others a target that is sharded too, a rank without a slot, and what stops or skips.
_SHARDED = ["live_eagle3", "sft_dspark", "adamw", "gradient", "stopped", "too_large"]
CHOSEN = {
    "ddp": [*_SHARDED, "sft_eagle3", "replay_dflash", "replay_dspark", "stored_opd", "loss"],
    "fsdp2": [*_SHARDED, "muon"],
    "zero2": _SHARDED,
    "zero3": _SHARDED,
}


def names_under(backend: str, is_whole: bool) -> list[str]:
    """Return the cases that are trained under a backend: all that it takes, or the chosen ones."""
    names = CASES | ({} if backend.startswith("zero") else MUON) | POISONED | STOPPED | TOO_LARGE
    return [name for name in names if is_whole or name in CHOSEN[backend]]


def prepare(folder: Path) -> None:
    """
    Write the target of all cases, prompts with its greedy responses, and its readings of them.

    Ids that end some responses at once and some late make them unequal; every second one of the first step is a single
    token.
    """
    target = make_target()
    texts = [(prompt, greedy_text(target, prompt, LONGEST)[len(prompt) :]) for prompt in make_prompts(14, seed=4)]
    # A random target may write its mask token.
    texts = [(prompt, response) for prompt, response in texts if MASK not in response][:8]
    eos = [texts[1][1][0], texts[2][1][6]]
    target.causal_lm.generation_config.eos_token_id = eos
    target.causal_lm.save_pretrained(folder / "target")
    target.tokenizer.save_pretrained(folder / "target")
    ends = [[index + 1 for index, token in enumerate(response) if token in eos] for _, response in texts]
    cut = [response[: end[0] if end else LONGEST] for (_, response), end in zip(texts, ends, strict=True)]
    order = [0, 1, 2, 1, 4, 5, 6, 7]
    rows = {"prompt_ids": [texts[row][0] for row in order], "completion_ids": [cut[row] for row in order]}
    (folder / "rows.json").write_text(json.dumps(rows))
    whole = [prompt + response for prompt, response in zip(*rows.values(), strict=True)]
    drafters = [make_drafter(family, target) for family in ("dflash", "eagle3")]
    layer_ids = sorted({layer for drafter in drafters for layer in drafter.config.target_layer_ids})
    write_readings(
        FrozenTarget.load(folder / "target"), whole, folder / "readings", layer_ids=layer_ids, show_progress=False
    )


def make_case_drafter(case: Case, target: FrozenTarget, seed: int) -> Drafter:
    """
    Return a drafter, EAGLE-3 with a reduced vocabulary, so that it has buffers; other ranks' are to be overwritten.
    """
    options = {}
    if case.family == "eagle3" and "draft_vocab_size" not in case.settings:
        counts = torch.arange(target.vocab_size)
        options["draft_vocabulary"] = build_draft_vocabulary(counts, 48)
    drafter = make_drafter(case.family, target, seed, **options)
    for name, parameter in drafter.named_parameters():
        parameter.requires_grad_(case.frozen is None or not name.startswith(case.frozen))
    return drafter


class _Sigterm(TrainerCallback):
    """Sends this process what a scheduler sends, in the middle of its second step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run_case(
    name: str,
    folder: Path,
    output: Path,
    launch: dict[str, Any],
    num_processes: int,
    rank: int = 0,
    resume: Path | None = None,
) -> dict[str, Any]:
    """
    Train a case, two steps from the start or two more from a checkpoint, and return what came of it: weights, losses,
    tau, optimizer state, and idle forward passes of the target.
    """
    case = (CASES | MUON | POISONED | STOPPED | TOO_LARGE)[name]
    target = FrozenTarget.load(folder / "target")
    rows = Dataset.from_dict(json.loads((folder / "rows.json").read_text()))
    trainer_class, config_class = (
        (DraftSFTTrainer, DraftSFTConfig) if case.kind == "sft" else (DraftOPDTrainer, DraftOPDConfig)
    )
    settings = dict(case.settings)
    if "readings" in settings:
        settings["readings"] = str(folder / settings["readings"])
    common = {
        "output_dir": str(output),
        "optim": "sgd",
        "learning_rate": 0.1,
        "per_device_train_batch_size": GLOBAL_BATCH // num_processes // 2,
        "per_device_eval_batch_size": GLOBAL_BATCH // num_processes,
        "target_dtype": "float32",
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 2 if resume is None else 4,
        "logging_steps": 1,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_completion_length": LONGEST,
    }
    args = config_class(**common | launch | settings)
    # Every rank its own weights: the first one's must win.
    drafter = make_case_drafter(case, target, seed=1 + rank)
    trainer = trainer_class(drafter, str(folder / "target"), args, rows, rows.select(range(4)))
    assert trainer.accelerator.num_processes == num_processes
    results: dict[str, Any] = {}
    if case.poison and rank == num_processes - 1:
        poison_losses(trainer, case.poison)
    if case.evaluates_first:
        results["first_tau"] = trainer.evaluate()["eval_tau"]
    if name in STOPPED and rank == num_processes - 1:
        trainer.add_callback(_Sigterm())
    try:
        trainer.train(resume_from_checkpoint=resume)
    except SystemExit as end:
        results["exit_code"] = end.code
    except FloatingPointError as error:
        results["refused"] = str(error)
    results["step"] = trainer.state.global_step
    results["weights"] = full_weights(trainer.accelerator, trainer.model)
    results["state"] = full_optimizer_state(trainer.accelerator, trainer.model, trainer.optimizer)
    if case.is_sharded:
        results["tau"] = trainer.evaluate()["eval_tau"]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    results |= {key: [log[key] for log in logs] for key in ("loss", "grad_norm")}
    lockstep = trainer.target._lockstep
    results["num_idle"] = lockstep.num_idle if lockstep is not None else 0
    results["num_skipped"] = trainer._guard.num_skipped
    results["wrapper"] = type(trainer.model_wrapped).__name__
    return results


def poison_losses(trainer: Any, poison: str) -> None:
    """Make this rank's losses, or their gradients alone, NaN."""
    honest = trainer._step_loss

    def step_loss(*arguments: Any) -> StepLoss:
        result = honest(*arguments)
        if poison == "loss":
            return StepLoss(result.loss * float("nan"), result.sums)
        # Its value is 0, its slope infinite times 0.
        drafter = trainer.accelerator.unwrap_model(trainer.model)
        return StepLoss(result.loss + (drafter.norm.weight.sum() * 0.0).sqrt(), result.sums)

    trainer._step_loss = step_loss


def largest_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of tensors, each relative to its own tensor's largest element."""
    assert actual.keys() == expected.keys() and len(expected) > 0
    return max(
        float((actual[name].double() - tensor.double()).abs().max() / tensor.double().abs().max().clamp(min=1e-12))
        for name, tensor in expected.items()
    )
