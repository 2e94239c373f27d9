# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Both trainers on an accelerator, without one: no operation mixes devices in any path, the losses are the CPU's, and no
step waits for the device or starts kernels more often than it is known to.
"""

import itertools
import os
import tempfile
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from functools import cache

import pytest
import torch
import transformers.training_args
from transformers import TrainerCallback

from helpers.oracle import greedy_rows
from helpers.pretend_accelerator import DEVICE, Counts, pretend_accelerator
from helpers.tiny import FAMILIES, TINY_RUN, VOCAB, make_drafter, make_target
from helpers.trained import overfit
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer, DraftVocabulary


class Steps(TrainerCallback):
    """Notes what was counted at the end of each step."""

    def __init__(self, counts):
        self.counts, self.at_end = counts, []

    def on_step_end(self, *args, **kwargs):
        self.at_end.append({name: Counter(counter) for name, counter in vars(self.counts).items()})

    def cost(self, step):
        """What happened between the ends of the step before and of this one."""
        return {name: counter - self.at_end[step - 1][name] for name, counter in self.at_end[step].items()}


def reduced_vocabulary():
    is_known = torch.arange(VOCAB) % 3 != 0
    ids = is_known.nonzero()[:, 0]
    return {"draft_vocabulary": DraftVocabulary(d2t=ids - torch.arange(len(ids)), t2d=is_known, coverage=1.0)}


@cache
def good_drafter(family):
    """A drafter that is often right along the rows, so that there is something to accept."""
    target = make_target()
    prompts = greedy_rows(target, 4, 12)["prompt_ids"]
    return overfit(target, make_drafter(family, target), list(prompts), num_tokens=12, steps=40)


def train(kind, family, options, device=DEVICE, steps=1, is_reduced=False):
    """Train some steps on four rows; return the logs, and what the last step cost by line."""
    config, trainer_class = (DraftSFTConfig, DraftSFTTrainer) if kind == "sft" else (DraftOPDConfig, DraftOPDTrainer)
    shared = {"per_device_train_batch_size": 2, "max_steps": steps, "logging_steps": 1, "save_strategy": "no"}
    if kind == "opd":
        shared |= {"completions_from_target": True, "max_completion_length": 16, "max_mismatch_share": 1.0}
    else:
        shared |= {"eval_rollouts": False}
    place = TINY_RUN
    if device == DEVICE:
        place = TINY_RUN | {"use_cpu": False, "bf16": True}
        os.environ["ACCELERATE_TORCH_DEVICE"] = DEVICE
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    target = make_target()
    rows = greedy_rows(target, 4, 12)
    drafter = make_drafter(family, target, **reduced_vocabulary()) if is_reduced else deepcopy(good_drafter(family))
    # Registered for good, the device would change the defaults of other tests.
    counting = pretend_accelerator() if device == DEVICE else nullcontext(Counts())
    with counting as counts, tempfile.TemporaryDirectory() as folder:
        callback = Steps(counts)
        args = config(output_dir=folder, **place | shared | options)
        trainer = trainer_class(drafter, target, args, rows, rows.select(range(2)), callbacks=[callback])
        trainer.train()
        assert trainer.model.device.type == torch.device(device).type
        return trainer.state.log_history, callback.cost(-1) if steps > 1 else None


# -- devices ----------------------------------------------------------------------------------------------------------

# Kind, family, options, whether the vocabulary is reduced: every pair of values meets in one of them.
PATHS = {
    "sft eagle3": ("sft", "eagle3", {}, False),
    "sft eagle3 reduced, ce": ("sft", "eagle3", {"accepted_loss": "ce"}, True),
    "sft eagle3 lk, until fail": ("sft", "eagle3", {"accepted_loss": "lk", "slot_scope": "until_fail"}, True),
    "sft dflash checkpointed": ("sft", "dflash", {"activation_checkpointing": True}, False),
    "sft dflash ce, d-pace": ("sft", "dflash", {"accepted_loss": "ce", "slot_weighting": "d_pace"}, False),
    "sft dflash evaluated": (
        "sft",
        "dflash",
        {"eval_rollouts": True, "eval_strategy": "steps", "max_completion_length": 4},
        False,
    ),
    "sft dspark": ("sft", "dspark", {}, False),
    "sft dspark reduced, checkpointed": ("sft", "dspark", {"activation_checkpointing": True}, True),
    "opd dspark sampled, suffix": (
        "opd",
        "dspark",
        {"temperature": 1.0, "draft_sampling": "sample", "rejected_scope": "suffix"},
        False,
    ),
    "opd dspark live": ("opd", "dspark", {"rollout": "live", "completions_from_target": False}, False),
    "sft in passes": ("sft", "eagle3", {"blocks_per_pass": 9}, False),
    "opd eagle3 first": ("opd", "eagle3", {}, False),
    "opd eagle3 suffix, reduced, checkpointed": (
        "opd",
        "eagle3",
        {"rejected_scope": "suffix", "activation_checkpointing": True, "rejected_loss": "jsd"},
        True,
    ),
    "opd eagle3 sampled, suffix": (
        "opd",
        "eagle3",
        {"temperature": 1.0, "draft_sampling": "sample", "rejected_scope": "suffix"},
        False,
    ),
    "opd eagle3 sampled, reduced": ("opd", "eagle3", {"temperature": 1.0, "rejected_loss": "ce"}, True),
    "opd dflash suffix": ("opd", "dflash", {"rejected_scope": "suffix", "rejected_loss": "tv"}, False),
    "opd dflash sampled, checkpointed": (
        "opd",
        "dflash",
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "activation_checkpointing": True},
        False,
    ),
    "opd dflash live": ("opd", "dflash", {"rollout": "live", "completions_from_target": False}, False),
    "opd eagle3 live, suffix": (
        "opd",
        "eagle3",
        {"rollout": "live", "completions_from_target": False, "rejected_scope": "suffix"},
        False,
    ),
    "opd eagle3 supervised": ("opd", "eagle3", {"supervised_weight": 0.5}, False),
    "opd dflash without readings": ("opd", "dflash", {"reading_bytes": 0}, False),
}


@pytest.mark.parametrize("name", PATHS)
def test_no_operation_of_a_step_mixes_devices(call, name):
    kind, family, options, is_reduced = PATHS[name]
    logs, _ = call(train, kind, family, options, DEVICE, 1, is_reduced)
    assert torch.isfinite(torch.tensor(logs[0]["loss"])) and logs[0]["grad_norm"] > 0


CHOSEN = {("sft", "dspark"), ("sft", "dflash2"), ("opd", "dflash"), ("opd", "eagle3")}


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param(*pair, marks=() if pair in CHOSEN else pytest.mark.slow)
        for pair in itertools.product(["sft", "opd"], FAMILIES)
    ],
)
def test_in_float32_the_losses_are_those_of_the_cpu(call, kind, family):
    there, _ = call(train, kind, family, {"bf16": False}, DEVICE, 2)
    here, _ = train(kind, family, {}, "cpu", 2)
    names = {"loss", "grad_norm"} | ({"tau", "loss/rejected"} if kind == "opd" else {"loss/accepted"})
    # Of a random drafter, perhaps no draft is accepted.
    names |= {"loss/accepted"} & here[0].keys() & here[1].keys()
    for name in names:
        assert [log[name] for log in there[:2]] == pytest.approx([log[name] for log in here[:2]], rel=1e-4)


# -- a budget ---------------------------------------------------------------------------------------------------------

# Of a step on four rows: waits for the device, and kernels that the package starts itself; waits of one more
# micro-batch. Waits are exact, launches a tenth above what is counted; raise a number only with a reason.
BUDGET = {
    "sft eagle3": (("sft", "eagle3", {}), 12, 1000, 9),
    "sft dflash": (("sft", "dflash", {}), 12, 800, 9),
    "sft dspark": (("sft", "dspark", {}), 12, 850, 9),
    "opd dspark suffix": (("opd", "dspark", {"rejected_scope": "suffix"}), 20, 1830, 14),
    "opd eagle3 first": (("opd", "eagle3", {}), 15, 1740, 13),
    "opd dflash first": (("opd", "dflash", {}), 17, 1420, 11),
    "opd eagle3 suffix": (("opd", "eagle3", {"rejected_scope": "suffix"}), 18, 2250, 16),
}


def ours(counter):
    """Kernels that the package starts: not the target's layers, the optimizer, or what transformers does."""
    foreign = ("target/", "trainer/resuming.py", "runs/guard.py")
    return Counter({line: n for line, n in counter.items() if not line.startswith(foreign) and "/" in line})


def cost_of_step_and_micro_batch(kind, family, options):
    """Cost of a step of one micro-batch of four rows, and waits that the same rows take more in two of two."""
    costs = []
    for num_parts in (1, 2):
        split = {"per_device_train_batch_size": 4 // num_parts, "gradient_accumulation_steps": num_parts}
        costs.append(train(kind, family, {"logging_steps": 100} | split | options, steps=2)[1])
    whole, split = costs
    return {
        "waits": whole["syncs"],
        "launches": ours(whole["launches"]),
        "waits of a micro-batch": Counter(split["syncs"]) - whole["syncs"],
    }


def table(name, counter):
    rows = "\n".join(f"{n:6d}  {line}" for line, n in counter.most_common(40))
    return f"{counter.total()} {name}\n{rows}"


# What the others start and wait for too.
CONTAINED = {"sft dspark", "opd eagle3 first"}


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=pytest.mark.slow if path in CONTAINED else ()) for path in BUDGET]
)
def test_a_step_stays_within_its_budget_of_waits_and_launches(call, path):
    arguments, *limits = BUDGET[path]
    cost = call(cost_of_step_and_micro_batch, *arguments)
    found = [cost["waits"].total(), cost["launches"].total(), cost["waits of a micro-batch"].total()]
    message = "\n".join(table(*item) for item in cost.items())
    assert all(number <= limit for number, limit in zip(found, limits, strict=True)), f"{found}\n{message}"
