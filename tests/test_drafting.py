# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Drafts are chosen as the settings say: argmax, or draws from the filtered distribution. Knows no model."""

import pytest
import torch

from trl_draft_opd import SamplingSettings
from trl_draft_opd.rollout.drafting import DraftingSettings, choose_drafts


WARM, GREEDY = SamplingSettings(0.5, 0, 1.0), SamplingSettings(0.0, 0, 1.0)


def test_drafts_are_drawn_only_above_temperature_zero_and_on_request():
    draws = [
        DraftingSettings(4, *how, False).draws_drafts
        for how in ((WARM, "sample"), (WARM, "greedy"), (GREEDY, "sample"))
    ]
    assert draws == [True, False, False]
    with pytest.raises(ValueError, match=r"must be one of \('greedy', 'sample'\), got 'argmax'"):
        DraftingSettings(4, WARM, "argmax", False)


def test_argmax_drafts_are_the_lowest_of_equal_logits():
    drafts, probs = choose_drafts(torch.tensor([[[[0.0, 2.0, 2.0], [1.0, 0.0, 1.0]]]]), WARM, None)
    assert drafts.tolist() == [[[1, 0]]] and probs is None


def test_each_row_reads_its_own_uniform():
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().expand(1, 1, 4, 3)
    uniforms = torch.tensor([[[0.1, 0.6, 0.9, 0.49]]], dtype=torch.float64)
    plain = SamplingSettings(1.0, 0, 1.0)
    drafts, probs = choose_drafts(logits, plain, uniforms)
    assert drafts.tolist() == [[[0, 1, 2, 0]]]
    torch.testing.assert_close(probs, logits.exp())
    # One slot at a time, as a sequential drafter asks.
    assert [int(choose_drafts(logits[:, :, k], plain, uniforms[:, :, k])[0]) for k in range(4)] == [0, 1, 2, 0]


def test_draws_are_from_the_filtered_distribution():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64).expand(1, 1, 1, 4)
    uniforms = torch.full((1, 1, 1), 0.999_999, dtype=torch.float64)
    drafts, probs = choose_drafts(logits, SamplingSettings(0.5, 2, 1.0), uniforms)
    expected = torch.tensor([6.0, 4.0], dtype=torch.float64).softmax(dim=0)
    torch.testing.assert_close(probs[0, 0, 0], torch.cat([expected, torch.zeros(2, dtype=torch.float64)]))
    assert int(drafts) == 1
