# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Texts and rollouts at their limits: nothing to draft, nothing accepted, nothing rejected, no network. A count or a
clear error, and never a wrong update.
"""

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants

from helpers.oracle import greedy_text, plant
from helpers.tiny import EOS, TINY_RUN, make_drafter, make_target
from trl_draft_opd import (
    AutoDrafter,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    FrozenTarget,
    cli,
)
from trl_draft_opd.rollout.types import Rollout
from trl_draft_opd.trainer.metrics import rollout_sums


TRAINERS = {"sft": (DraftSFTTrainer, DraftSFTConfig), "opd": (DraftOPDTrainer, DraftOPDConfig)}
PAIRS = pytest.mark.parametrize(
    "kind, family", [("sft", "dflash"), ("sft", "eagle3"), ("opd", "dflash"), ("opd", "eagle3")]
)
EMPTY = {"prompt_ids": [9, 10], "completion_ids": [EOS]}


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def text(target):
    """A prompt and fourteen greedy tokens behind it that are no end of sequence."""
    for first in range(8, 60):
        found = greedy_text(target, [first, 10], 14)
        if EOS not in found:
            return found
    raise AssertionError("the target ends every text")


def stored(text):
    return {"prompt_ids": text[:2], "completion_ids": text[2:]}


def train(kind, folder, drafter, target, rows, **settings):
    """Train one step and return what was logged of it."""
    trainer_class, config_class = TRAINERS[kind]
    settings = {
        "max_steps": 1,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "warmup_steps": 0,
        **TINY_RUN,
        "save_strategy": "no",
        "max_completion_length": 16,
        "per_device_train_batch_size": len(rows),
    } | settings
    if kind == "opd":
        # What was stored is walked, whoever wrote it.
        settings = {"completions_from_target": True, "warn_mismatch_share": 1.0, "max_mismatch_share": 1.0} | settings
    trainer = trainer_class(drafter, target, config_class(str(folder), **settings), Dataset.from_list(rows))
    trainer.train()
    return trainer.state.log_history[0]


# -- nothing to draft (faults 4, 5 and 32) ----------------------------------------------------------------------------


@PAIRS
def test_a_step_of_responses_that_are_an_eos_alone_changes_nothing_and_says_so(tmp_path, target, kind, family):
    drafter = make_drafter(family, target)
    before = {name: p.clone() for name, p in drafter.named_parameters()}
    log = train(kind, tmp_path, drafter, target, [EMPTY, EMPTY])
    assert log["loss"] == log["grad_norm"] == log["slots/accepted"] == 0.0
    assert log.get("slots/rejected") == (0.0 if kind == "opd" else None)
    assert all(torch.equal(before[name], p) for name, p in drafter.named_parameters())
    if kind == "opd":
        assert log["empty_responses"] == 1.0 and log["rounds"] == 0.0 and "tau" not in log


@PAIRS
def test_an_empty_response_takes_no_part_in_the_loss_of_the_others(tmp_path, target, text, kind, family):
    logs = []
    for number, rows in enumerate([[stored(text)], [stored(text), EMPTY]]):
        logs.append(train(kind, tmp_path / str(number), make_drafter(family, target), target, rows))
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-5) and logs[0]["loss"] > 0
    if kind == "opd":
        assert [log["empty_responses"] for log in logs] == [0.0, 0.5] and logs[0]["tau"] == logs[1]["tau"]


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_a_response_shorter_than_a_block_trains_its_own_slots_alone(tmp_path, target, text, family):
    log = train("sft", tmp_path, make_drafter(family, target), target, [stored(text[:4])], num_anchors=0)
    # Two tokens, of which the first is the only anchor: one slot of the four.
    assert log["slots/accepted"] == 1.0 and log["loss"] > 0


def test_a_target_that_ends_at_once_is_counted_by_live_rollouts_too(tmp_path, target, text):
    ends = FrozenTarget(target.causal_lm, target.tokenizer)
    ends.causal_lm.generation_config.eos_token_id = [EOS, text[2]]
    try:
        rows = [{"prompt_ids": text[:2]}]
        log = train(
            "opd", tmp_path, make_drafter("eagle3", ends), ends, rows, rollout="live", completions_from_target=False
        )
    finally:
        ends.causal_lm.generation_config.eos_token_id = EOS
    assert log["empty_responses"] == 1.0 and log["response_length"] == 1.0 and log["loss"] == 0.0


# -- nothing but drafting (fault 31) ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rollout", ["live", "replay"])
def test_a_target_that_never_ends_is_cut_and_the_share_is_logged(tmp_path, target, text, rollout):
    ends = {"prompt_ids": [9, 10]}
    while (first := greedy_text(target, ends["prompt_ids"], 1)[-1]) != EOS:
        ends["prompt_ids"].append(first)
    rows = [{"prompt_ids": text[:2]}, ends]
    settings = {"rollout": rollout, "completions_from_target": False, "max_completion_length": 6}
    log = train("opd", tmp_path, make_drafter("dflash", target), target, rows, **settings)
    assert (log["truncated_responses"], log["empty_responses"], log["response_length"]) == (0.5, 0.5, 3.5)


def test_every_response_of_a_chat_counts_by_itself(target):
    completion_mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]).bool()
    input_ids = torch.tensor([[9, 8, EOS, 9, 8, 8, 8], [9, 8, 8, EOS, 0, 0, 0]])
    anchors = torch.full((2, 1), -1)
    rollout = Rollout(
        input_ids=input_ids,
        attention_mask=(input_ids > 0).long(),
        completion_mask=completion_mask,
        anchors=anchors,
        drafts=torch.zeros(2, 1, 4, dtype=torch.long),
        accepted=torch.zeros_like(anchors),
        is_censored=anchors < -1,
        is_counted=anchors < -1,
        branch_hidden=None,
        has_suffix=False,
        num_refused=0,
        num_target_forwards=1,
    )
    assert rollout_sums(rollout, [EOS]).read()["truncated_responses"] == (1.0, 3.0)
    assert rollout_sums(rollout, [EOS, 8]).read()["truncated_responses"] == (0.0, 3.0)


# -- one side without a slot (fault 33) -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
@pytest.mark.parametrize("present, absent, tau", [("accepted", "rejected", 5.0), ("rejected", "accepted", 1.0)])
def test_a_rollout_of_one_kind_keeps_its_share_and_invents_nothing_for_the_other(
    monkeypatch, tmp_path, target, text, family, present, absent, tau
):
    drafter = make_drafter(family, target)
    plant(monkeypatch, drafter, [text, text], lambda row: set() if present == "accepted" else set(range(len(text))))
    log = train("opd", tmp_path, drafter, target, [stored(text), stored(text)])
    assert log["tau"] == tau and log[f"slots/{absent}"] == 0.0 and f"loss/{absent}" not in log
    # The streams weigh alike: what is there keeps its half, divided by its own slots.
    assert log["loss"] == pytest.approx(log[f"loss/{present}"] / 2, rel=1e-5) and log["loss"] > 0


# -- the network (fault 40) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b/c", "org/--name", "org/a..b", "../no-such-folder", "/no/such/folder"])
def test_a_drafter_by_a_name_that_cannot_be_one_is_refused_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the Hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name.split('/')[-1]}"):
        AutoDrafter.from_pretrained(name)


# -- the shell --------------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_end_a_command_with_one_line(monkeypatch, capsys):
    def fail(argv):
        raise FloatingPointError("the loss is nan on row 7")

    monkeypatch.setattr("trl_draft_opd.cli.training.run_opd", fail)
    assert cli.main(["opd"]) == 2
    assert capsys.readouterr().err == "trl-draft-opd opd: the loss is nan on row 7\n"
