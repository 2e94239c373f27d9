# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Weights of slots from the drafter's own probabilities: D-PACE by hand and as a gradient, accept-until-fail, scored
labels.
"""

import pytest
import torch

from trl_draft_opd import DFlashDraftConfig, DraftOPDConfig, DraftSFTConfig, Eagle3DraftConfig
from trl_draft_opd.losses import Head, d_pace_weights, mark_until_fail, score_labels


def weigh(probs, mask=(True, True, True), floor=0.5):
    return d_pace_weights(torch.tensor([[probs]]).log(), torch.tensor([[mask]]), floor)[0, 0].tolist()


# -- D-PACE -----------------------------------------------------------------------------------------------------------


def test_d_pace_weights_by_hand():
    # s = 0.75, 0.6, 1 and their running products 0.75, 0.45, 0.45.
    assert weigh([0.5, 0.2, 1.0]) == pytest.approx([1.65, 0.9, 0.45])


def test_the_sum_counts_masked_slots_and_the_product_runs_over_all():
    assert weigh([0.5, 0.2, 1.0], mask=(True, True, False)) == pytest.approx([1.2, 0.45, 0.0])
    assert weigh([0.5, 0.2, 1.0], mask=(False, False, True)) == pytest.approx([0.45, 0.45, 0.45])


def test_a_token_the_drafter_cannot_draft_passes_on_the_floor():
    assert weigh([1.0, 0.0, 1.0], floor=0.0) == [1.0, 0.0, 0.0]
    assert weigh([1.0, 0.0, 1.0], floor=0.25) == [1.5, 0.5, 0.25]
    assert weigh([0.3, 0.0, 0.9], floor=1.0) == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("floor", [0.0, 0.3, 0.5, 1.0])
def test_d_pace_weights_are_the_gradient_of_the_expected_accepted_length(floor):
    torch.manual_seed(0)
    log_probs = torch.rand(2, 3, 5, dtype=torch.float64).log().requires_grad_()
    mask = torch.arange(5) < torch.tensor([[5, 2, 0], [1, 4, 3]])[..., None]
    log_passed = ((1 - floor) * log_probs.exp() + floor).log()
    log_passed.retain_grad()
    expected_length = (log_passed.cumsum(dim=-1).exp() * mask).sum()
    expected_length.backward()
    weights = d_pace_weights(log_probs, mask, floor)
    torch.testing.assert_close(weights, log_passed.grad)
    assert not weights.requires_grad and not weights[~mask].any()


def test_a_floor_out_of_range_is_refused():
    for floor in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"`floor` must be in \[0, 1\], got {floor}"):
            weigh([0.5, 0.5, 0.5], floor=floor)


# -- accept until fail ------------------------------------------------------------------------------------------------


def test_slots_are_kept_up_to_and_including_the_first_miss():
    is_top = [[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    kept = [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert mark_until_fail(torch.tensor([is_top]).bool()).tolist() == torch.tensor([kept]).bool().tolist()


# -- scored labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 2**24])
@pytest.mark.parametrize("is_reduced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scored_labels_are_those_of_full_logits(chunk_bytes, is_reduced, dtype):
    torch.manual_seed(0)
    num_rows, vocab = 40, 30
    ids = torch.randperm(vocab)[:20] if is_reduced else torch.arange(vocab)
    hidden = torch.randn(num_rows, 8).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(len(ids), 8).to(dtype))
    logits = (hidden @ weight.T).detach()
    labels = torch.randint(0, vocab, (num_rows,))
    labels[::2] = ids[logits.argmax(dim=1)][::2]
    labels[5] = -1
    sizes = []
    linear = Head.linear(weight)
    head = Head(lambda part: sizes.append(len(part)) or linear.project(part), (weight,), len(ids))
    scores = score_labels(hidden, head, labels, draft_token_ids=ids if is_reduced else None, chunk_bytes=chunk_bytes)
    wide = logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(dim=1)
    is_label = labels[:, None] == ids
    expected = torch.where(is_label, wide, -torch.inf).amax(dim=1)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(scores.log_probs_N, expected, rtol=0, atol=tolerance)
    assert torch.equal(scores.is_top_N, is_label.any(dim=1) & (ids[logits.argmax(dim=1)] == labels))
    assert scores.is_top_N[::2].all() and not scores.is_top_N.all() and not scores.log_probs_N.requires_grad
    assert torch.isinf(scores.log_probs_N).sum() == (~is_label.any(dim=1)).sum() >= 1
    item = scores.log_probs_N.element_size()
    assert max(sizes) == 1 or max(sizes) * len(ids) * item <= chunk_bytes
    assert (len(sizes) == 1) == (chunk_bytes == 2**24)


def test_scoring_under_autocast_leaves_the_head_its_gradient():
    weight = torch.nn.Parameter(torch.randn(6, 4))
    hidden = torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score_labels(hidden, Head.linear(weight), torch.arange(3), draft_token_ids=None, chunk_bytes=2**20)
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.requires_grad


def test_no_rows_are_scored_as_none():
    scores = score_labels(
        torch.zeros(0, 4), Head.linear(torch.ones(5, 4)), torch.zeros(0).long(), draft_token_ids=None, chunk_bytes=1
    )
    assert scores.log_probs_N.shape == scores.is_top_N.shape == (0,)


# -- settings ---------------------------------------------------------------------------------------------------------

DEVICE = {"use_cpu": True, "bf16": False}
D_PACE = {"slot_weighting": "d_pace"}


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (DraftSFTConfig, {"slot_weighting": "uniform"}, r"`slot_weighting` must be one of .*, got 'uniform'"),
        (DraftSFTConfig, {"slot_scope": "suffix"}, r"`slot_scope` must be one of .*, got 'suffix'"),
        (DraftOPDConfig, {"d_pace_floor": 1.5}, r"`d_pace_floor` must be in \[0, 1\], got 1.5"),
        (DraftOPDConfig, D_PACE | {"rejected_scope": "suffix"}, "Set `rejected_scope='first'`"),
        (DraftOPDConfig, {"supervised_anchors": "all"}, r"`supervised_anchors` must be one of .*, got 'all'"),
        (DraftOPDConfig, {"num_supervised_anchors": -1}, "`num_supervised_anchors` must be at least 0"),
        (DraftOPDConfig, {"supervised_weight": -1.0}, "must not be negative nor all 0, got 1.0, 1.0, -1.0"),
        (DraftOPDConfig, {"accepted_weight": 0.0, "rejected_weight": 0.0}, "nor all 0, got 0.0, 0.0, 0.0"),
    ],
)
def test_settings_that_cannot_hold_are_refused(tmp_path, config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(str(tmp_path), **DEVICE, **changes)


def test_d_pace_takes_the_place_of_position_decay(tmp_path):
    assert DraftSFTConfig(str(tmp_path), **DEVICE).decay(Eagle3DraftConfig()) == 0.8
    assert DraftSFTConfig(str(tmp_path), **DEVICE, **D_PACE).decay(Eagle3DraftConfig()) == 1.0
    with pytest.warns(UserWarning, match="`position_decay=0.7` is ignored"):
        assert DraftSFTConfig(str(tmp_path), position_decay=0.7, **DEVICE, **D_PACE).decay(DFlashDraftConfig()) == 1.0
    for changes in ({"rejected_scope": "first"}, {"rejected_weight": 0.0}):
        assert DraftOPDConfig(str(tmp_path), **DEVICE, **D_PACE, **changes).slot_decay == 1.0
    assert DraftOPDConfig(str(tmp_path), **DEVICE).slot_decay == 0.8
