# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The laboratory's random anchors, and blocks drafted anew at given anchors."""

import pytest
import torch
from test_blocks import PROMPT, RESPONSE, ROUNDS, U, make_rollout
from test_rollout_replay import assert_same_blocks, text_of

from benchmarks.lab.redrafting import random_anchors, redraft
from benchmarks.lab.trainers import RandomAnchorsTrainer, StaleAnchorsTrainer
from helpers.oracle import greedy_rows
from helpers.rollouts import Options, decode
from helpers.tiny import TINY_RUN, make_drafter, make_prompts, make_target
from trl_draft_opd import DraftOPDConfig
from trl_draft_opd.rollout.keyed_random import DrawKeys


pytestmark = pytest.mark.lab


def test_random_anchors_are_as_many_as_the_chain_distinct_and_inside_the_response():
    rollout, seen = make_rollout(ROUNDS), set()
    for epoch in range(40):
        anchors = random_anchors(rollout, DrawKeys(0, epoch, [0]))
        assert anchors.shape == rollout.anchors.shape and anchors[0, 4] == -1
        kept = anchors[0, :4].tolist()
        assert kept == sorted(set(kept))
        seen |= set(kept)
    # From the first response token to the last but one: an anchor needs a token behind it.
    assert seen == set(range(PROMPT, PROMPT + len(RESPONSE) - 1))


def test_random_anchors_are_keyed_by_seed_epoch_and_sample():
    rollout = make_rollout(ROUNDS)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = [random_anchors(rollout, DrawKeys(seed, epoch, [s])).tolist() for seed, epoch, s in keys]
    assert draws[0] == random_anchors(rollout, DrawKeys(0, 0, [0])).tolist()
    assert len({str(draw) for draw in draws}) == 4


def test_a_response_without_room_has_no_random_anchor():
    rollout = make_rollout([(0, [U] * 5, 0)], response=[30])
    assert (random_anchors(rollout, DrawKeys(0, 0, [0])) == -1).all()


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_redrafting_at_the_chains_own_anchors_gives_the_chain_and_restores_the_mode(family):
    target = make_target()
    drafter = make_drafter(family, target).train()
    options = Options(keep_branch_hidden=True, max_completion_length=20)
    live = decode(target, drafter, make_prompts(3), options)
    text = text_of(live)
    again = redraft(
        target,
        drafter,
        text,
        live.anchors,
        options.drafting,
        DrawKeys(0, 0, text.sample_ids),
        chunk_bytes=2**20,
    )
    assert_same_blocks(live, again)
    assert drafter.training


@pytest.mark.parametrize("trainer_class", [RandomAnchorsTrainer, StaleAnchorsTrainer])
def test_blocks_that_are_not_the_chains_own_train_every_tensor(tmp_path, trainer_class):
    target = make_target()
    rows, drafter = greedy_rows(target, 4, 12), make_drafter("eagle3", target)
    before = {name: tensor.detach().clone() for name, tensor in drafter.named_parameters()}
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    args = DraftOPDConfig(str(tmp_path), **TINY_RUN, **options, completions_from_target=True, rejected_scope="suffix")
    trainer = trainer_class(drafter, target, args, rows)
    trainer.refresh_epochs = 2
    trainer.train()
    assert not [name for name, tensor in drafter.named_parameters() if torch.equal(tensor, before[name])]
