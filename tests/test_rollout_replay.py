# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Replay draws the same blocks as live decoding, from the text alone. Knows no trainer.
"""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from helpers.oracle import greedy_text, plant
from helpers.rollouts import Options, decode, draft_at, replay
from helpers.tiny import FAMILIES, VOCAB, make_drafter, make_prompts, make_target
from trl_draft_opd import FrozenTarget
from trl_draft_opd.rollout.blocks import mark_slots
from trl_draft_opd.rollout.replay import TargetText


FIELDS = (
    "input_ids",
    "attention_mask",
    "completion_mask",
    "anchors",
    "drafts",
    "accepted",
    "is_censored",
    "is_counted",
)


def roll_out(target, drafter, prompts, eos_token_ids=(), max_completion_length=20):
    options = Options(
        keep_branch_hidden=True, max_completion_length=max_completion_length, eos_token_ids=eos_token_ids
    )
    return decode(target, drafter, prompts, options)


def replay_options(keep_branch_hidden, segment_length=1):
    return Options(keep_branch_hidden=keep_branch_hidden, segment_length=segment_length, chunk_bytes=4 * VOCAB * 7)


def text_of(rollout):
    return TargetText(
        rollout.input_ids, rollout.attention_mask, rollout.completion_mask, range(len(rollout.input_ids))
    )


def text_of_ids(ids, prompt_length):
    ids = torch.tensor([ids])
    return TargetText(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None] >= prompt_length, [0])


def assert_same_blocks(rollout, replayed):
    is_block = rollout.is_block
    for name in FIELDS:
        first, second = getattr(rollout, name), getattr(replayed, name)
        if name == "drafts":
            # What stands in a row's missing blocks is nobody's draft, nor what stands in slots that were not drafted.
            slots = torch.arange(1, first.shape[-1] + 1)
            last = rollout.accepted + 1 - rollout.is_censored.long()
            is_draft = is_block[..., None] & (replayed.has_suffix | (slots <= last[..., None]))
            first, second = first[is_draft], second[is_draft]
        assert torch.equal(first, second), name


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.mark.parametrize("segment_length", [1, 3, 100])
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_of_live_text_is_the_live_rollout(family, num_rows, segment_length, target):
    drafter = make_drafter(family, target)
    prompts = make_prompts(num_rows, seed=num_rows)
    eos = [roll_out(target, drafter, prompts).responses()[0][11]]
    live = roll_out(target, drafter, prompts, eos)
    replayed = replay(target, drafter, text_of(live), replay_options(True, segment_length))
    assert_same_blocks(live, replayed)
    is_branch = mark_slots(live, rejected_scope="suffix", eos_token_ids=[]).is_branch
    assert is_branch.any()
    torch.testing.assert_close(replayed.branch_hidden[is_branch], live.branch_hidden[is_branch], rtol=1e-5, atol=1e-4)
    assert replayed.num_target_forwards == 2


@pytest.mark.parametrize("seed", [1, 2])
def test_replay_agrees_where_drafts_are_mostly_right(monkeypatch, seed, target):
    generator = torch.Generator().manual_seed(seed)
    prompts = make_prompts(6, seed=seed)
    truths = [greedy_text(target, prompt, 26) for prompt in prompts]
    wrong = [
        set((torch.rand(40, generator=generator) < rate).nonzero()[:, 0].tolist())
        for rate in (0, 0.05, 0.1, 0.2, 0.4, 1)
    ]
    drafter = make_drafter("dflash", target)
    plant(monkeypatch, drafter, truths, lambda row: wrong[row])
    # An EOS that several rows meet, some of them inside an accepted block.
    eos = [truths[0][len(prompts[0]) + 7], truths[2][len(prompts[2]) + 12]]
    live = roll_out(target, drafter, prompts, eos)
    replayed = replay(target, drafter, text_of(live), replay_options(False, 5))
    assert_same_blocks(live, replayed)
    assert replayed.branch_hidden is None and replayed.num_target_forwards == 1
    assert live.is_censored.any() and (live.accepted == 4).any() and (live.is_block & (live.accepted == 0)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_redrafting_at_the_chains_own_anchors_gives_the_chain(family, target):
    drafter = make_drafter(family, target)
    live = roll_out(target, drafter, make_prompts(3))
    again = draft_at(target, drafter, text_of(live), live.anchors, replay_options(True))
    assert_same_blocks(live, again)
    shifted = draft_at(target, drafter, text_of(live), live.anchors[:, :4], replay_options(True))
    assert torch.equal(shifted.drafts, live.drafts[:, :4])


def test_a_response_of_one_token_has_no_block(target):
    text = text_of_ids([9, 8, 7], 2)
    replayed = replay(target, make_drafter("dflash", target), text, replay_options(True))
    assert replayed.anchors.tolist() == [[-1]] and int(replayed.num_rounds) == 0
    assert not replayed.is_counted.any() and not replayed.is_censored.any() and replayed.drafts.shape == (1, 1, 4)


@pytest.mark.parametrize("is_training", [True, False])
def test_replay_restores_the_drafters_mode(is_training, target):
    drafter = make_drafter("eagle3", target).train(is_training)
    text = text_of_ids([9, 8, 7, 6], 2)
    rollout = replay(target, drafter, text, replay_options(False))
    assert rollout.num_rounds > 0 and drafter.training is is_training


def test_a_sliding_window_target_can_be_replayed_but_not_branched():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=VOCAB, num_key_value_heads=1, head_dim=8, sliding_window=6, **shape)
    target = FrozenTarget(MistralForCausalLM(config).eval())
    drafter = make_drafter("dflash", target)
    text = text_of_ids(greedy_text(target, [9, 10], 12), 2)
    assert int(replay(target, drafter, text, replay_options(False)).num_rounds) > 0
    with pytest.raises(ValueError, match="sliding window of 6 tokens"):
        replay(target, drafter, text, replay_options(True))
