# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Where drafting is trained: the worked example of the method by hand, and sampled anchors. No model is needed.
"""

import pytest
import torch

from trl_draft_opd.rollout.acceptance import settle_blocks
from trl_draft_opd.rollout.blocks import mark_slots, sample_anchors
from trl_draft_opd.rollout.types import Rollout


EOS = 2
PROMPT = 3
# The response `y_0 .. y_11`: y_i is token 30 + i, and y_11 ends it.
RESPONSE = [30 + i for i in range(11)] + [EOS]
U, V, W = 50, 51, 52
# Anchor (index in the response), drafts, and leading drafts that equal the text.
ROUNDS = [
    (0, [31, 32, U, V, W], 2),
    (3, [U, 35, 36, V, W], 0),
    (4, [35, 36, 37, 38, 39], 5),
    (10, [EOS, U, V, W, U], 1),
]
LAST_FIRST_DRAFT_WRONG = (10, [U, V, EOS, W, U], 0)


def make_rollout(rounds, prompt=PROMPT, response=RESPONSE, num_padding=2):
    num_drafts = len(rounds[0][1])
    ids = [7] * prompt + response
    anchors = torch.tensor([[prompt + a for a, _, _ in rounds] + [-1]])
    drafts = torch.tensor([[d for _, d, _ in rounds] + [[U] * num_drafts]])
    accepted = torch.tensor([[r for _, _, r in rounds] + [0]])
    outcome = settle_blocks(accepted, anchors, torch.tensor([[len(ids) - 1]]), num_drafts)
    is_block = anchors >= 0
    return Rollout(
        input_ids=torch.tensor([ids + [0] * num_padding]),
        attention_mask=torch.tensor([[1] * len(ids) + [0] * num_padding]),
        completion_mask=torch.tensor([[False] * prompt + [True] * len(response) + [False] * num_padding]),
        anchors=anchors,
        drafts=drafts,
        accepted=outcome.accepted * is_block,
        is_censored=outcome.is_censored & is_block,
        is_counted=outcome.is_counted & is_block,
        branch_hidden=None,
        has_suffix=True,
        num_refused=0,
        num_target_forwards=len(rounds) + 1,
    )


def slots(mask):
    """Slots 1..K that a mask marks, one list per block."""
    return [[k + 1 for k, marked in enumerate(block) if marked] for block in mask[0].tolist()]


def replay(rounds, rejected_scope="suffix", **options):
    return mark_slots(make_rollout(rounds, **options), rejected_scope=rejected_scope, eos_token_ids=[EOS])


def test_the_worked_example_splits_into_the_two_streams():
    batch = replay(ROUNDS)
    assert slots(batch.is_accepted) == [[1, 2], [], [1, 2, 3, 4, 5], [1], []]
    assert slots(batch.is_rejected) == [[3, 4, 5], [1, 2, 3, 4, 5], [], [], []]
    assert slots(batch.is_branch) == [[4, 5], [2, 3, 4, 5], [], [], []]
    assert batch.anchors.tolist() == [[3, 6, 7, 13, -1]]


def test_labels_are_the_committed_tokens_up_to_the_correction():
    batch = replay(ROUNDS)
    assert batch.labels.tolist() == [
        [[31, 32, 33, -1, -1], [34, -1, -1, -1, -1], [35, 36, 37, 38, 39], [EOS, -1, -1, -1, -1], [-1] * 5]
    ]


def test_the_first_scope_trains_the_first_rejected_slot_alone():
    batch = replay(ROUNDS, "first")
    assert slots(batch.is_accepted) == [[1, 2], [], [1, 2, 3, 4, 5], [1], []]
    assert slots(batch.is_rejected) == [[3], [1], [], [], []]
    assert not batch.is_branch.any()


def test_a_mismatch_at_the_last_token_is_rejected_with_its_suffix_beyond_the_text():
    # Round 4': the text ends at slot 1; slots 2 and 3 lie beyond it and still count, up to the drafted EOS in slot 3.
    batch = replay([*ROUNDS[:3], LAST_FIRST_DRAFT_WRONG])
    assert slots(batch.is_rejected)[3] == [1, 2, 3] and slots(batch.is_branch)[3] == [2, 3]
    assert slots(batch.is_accepted)[3] == [] and batch.labels[0, 3].tolist() == [EOS, -1, -1, -1, -1]


def test_the_suffix_is_cut_behind_a_drafted_eos_and_not_before_it():
    assert slots(replay([(0, [31, U, EOS, V, EOS], 1)]).is_rejected)[0] == [2, 3]
    assert slots(replay([(0, [31, EOS, U, V, W], 1)]).is_rejected)[0] == [2]
    rollout = make_rollout([(0, [31, U, 60, V, 61], 1)])
    assert slots(mark_slots(rollout, rejected_scope="suffix", eos_token_ids=[60, 61]).is_rejected)[0] == [2, 3]
    assert slots(mark_slots(rollout, rejected_scope="suffix", eos_token_ids=[]).is_rejected)[0] == [2, 3, 4, 5]


def test_a_censored_block_trains_only_its_slots_inside_the_text():
    # Two drafts match, then the text ends (here by its limit): what the third slot would have met is unknown.
    batch = replay([(1, [32, 33, U, V, W], 2)], response=[30, 31, 32, 33])
    assert slots(batch.is_accepted)[0] == [1, 2] and slots(batch.is_rejected)[0] == []


def test_a_full_accept_at_the_end_of_the_text_has_no_rejection_and_is_not_censored():
    rollout = make_rollout([(6, [37, 38, 39, 40, EOS], 5)])
    assert not rollout.is_censored.any() and bool(rollout.is_counted[0, 0])
    assert slots(replay([(6, [37, 38, 39, 40, EOS], 5)]).is_accepted)[0] == [1, 2, 3, 4, 5]


def test_an_unknown_scope_is_refused():
    with pytest.raises(ValueError, match=r"`rejected_scope` must be one of \('suffix', 'first'\), got 'all'"):
        replay(ROUNDS, "all")


# -- sampled anchors --------------------------------------------------------------------------------------------------


def sample(input_ids, completion_mask, sample_ids, **changes):
    options = {"num_anchors": None, "num_drafts": 3, "seed": 0, "epoch": 0} | changes
    return sample_anchors(torch.tensor(input_ids), torch.tensor(completion_mask).bool(), sample_ids, **options)


def chosen(batch, row):
    return [anchor for anchor in batch.anchors[row].tolist() if anchor >= 0]


def test_an_anchor_and_its_next_token_are_both_completion_tokens():
    batch = sample([[10, 11, 12, 13, 14, 15]], [[0, 0, 1, 1, 1, 0]], [0])
    assert chosen(batch, 0) == [2, 3]
    assert batch.drafts[0, 0, :2].tolist() == [13, 14]
    assert slots(batch.is_accepted) == [[1, 2], [1]] and batch.labels.tolist() == [[[13, 14, -1], [14, -1, -1]]]
    assert not batch.is_rejected.any() and not batch.is_branch.any()


def test_slots_stop_at_the_end_of_their_own_span():
    # Two turns of the target with one token of the user between them.
    batch = sample([[10, 11, 12, 13, 14, 15, 16]], [[0, 1, 1, 0, 1, 1, 1]], [0])
    assert chosen(batch, 0) == [1, 4, 5]
    assert slots(batch.is_accepted) == [[1], [1, 2], [1]]


def test_the_first_token_of_a_text_is_no_anchor():
    assert chosen(sample([[10, 11, 12]], [[1, 1, 1]], [0]), 0) == [1]


def test_rows_without_an_anchor_are_padding():
    batch = sample([[10, 11, 12], [10, 11, 12]], [[0, 0, 1], [0, 1, 1]], [0, 1])
    assert batch.anchors.tolist() == [[-1], [1]] and not batch.is_accepted[0].any()
    none = sample([[10, 11, 12]], [[0, 0, 1]], [0])
    assert none.anchors.tolist() == [[-1]] and not none.is_accepted.any()


def test_anchors_depend_on_seed_epoch_and_sample_and_on_nothing_else():
    ids, mask = [list(range(40))] * 3, [[0] * 5 + [1] * 35] * 3
    batch = sample(ids, mask, [7, 8, 9], num_anchors=6)
    torch.rand(3)
    turned = sample(ids[:2], mask[:2], [9, 7], num_anchors=6)
    longer = sample([ids[0] + [0] * 9], [mask[0] + [0] * 9], [8], num_anchors=6)
    assert chosen(turned, 0) == chosen(batch, 2) and chosen(turned, 1) == chosen(batch, 0)
    assert chosen(longer, 0) == chosen(batch, 1)
    draws = [sample(ids, mask, [7, 8, 9], num_anchors=6, **key) for key in ({}, {"seed": 1}, {"epoch": 1})]
    assert len({tuple(chosen(draw, row)) for draw in draws for row in range(3)}) == 9


def test_sampled_anchors_are_distinct_eligible_and_as_many_as_asked_for():
    ids, mask = [list(range(30))], [[0] * 5 + [1] * 25]
    seen = set()
    for epoch in range(80):
        anchors = chosen(sample(ids, mask, [0], num_anchors=4, epoch=epoch), 0)
        assert len(set(anchors)) == 4 and anchors == sorted(anchors)
        seen |= set(anchors)
    assert seen == set(range(5, 29))
    assert chosen(sample(ids, mask, [0], num_anchors=None), 0) == list(range(5, 29))
    assert chosen(sample(ids, mask, [0], num_anchors=100), 0) == list(range(5, 29))


def test_no_sample_has_the_draw_of_another_in_the_next_epoch():
    ids, mask = [list(range(60))], [[0] * 5 + [1] * 55]
    # Under one number made of seed, epoch and sample these two would be the same.
    first = sample(ids, mask, [1_000_003], num_anchors=6, epoch=0)
    second = sample(ids, mask, [0], num_anchors=6, epoch=1)
    assert chosen(first, 0) != chosen(second, 0)
