# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What `diagnose` says of a drafter: against live decoding's counts, and by hand."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from benchmarks.lab.anatomy import (
    Response,
    describe,
    follow_chain,
    repeated_tokens,
    rounds_left,
    rounds_saved,
)
from benchmarks.lab.anatomy_report import render_diagnosis
from benchmarks.lab.diagnose import diagnose_drafter, look_along
from benchmarks.lab.measure import measure_drafter
from helpers.tiny import VOCAB, make_causal_lm, make_drafter, make_prompts, make_tokenizer
from helpers.trained import overfit
from trl_draft_opd import FrozenTarget, SamplingSettings, build_draft_vocabulary
from trl_draft_opd.responses import generate_responses


pytestmark = pytest.mark.lab


def answered(target: FrozenTarget, count: int = 6) -> Dataset:
    """Return prompts with the greedy responses of a target."""
    prompts = make_prompts(count)
    sampling = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
    options = {"max_completion_length": 24, "batch_size": count, "seed": 0, "show_progress": False}
    responses = generate_responses(target, prompts, sampling=sampling, **options)
    return Dataset.from_dict({"prompt_ids": prompts, "completion_ids": responses})


@pytest.mark.parametrize("family", ["eagle3", "dflash", "dspark", "dflash2"])
def test_the_chain_of_right_drafts_is_the_one_that_decoding_walks(family):
    target = FrozenTarget(make_causal_lm(), make_tokenizer())
    rows = answered(target)
    drafter = overfit(target, make_drafter(family, target), rows["prompt_ids"][:3], num_tokens=24, steps=20)
    measured = measure_drafter(target, drafter, rows)
    found = describe(look_along(target, drafter, rows), 1.0)
    assert 0.05 < measured["slot_acceptance"][0] < 0.9
    assert found["now"]["blocks"] == sum(measured["rounds"])
    assert found["now"]["tau"] == pytest.approx(measured["tau"])
    assert found["slot_acceptance"] == pytest.approx(measured["slot_acceptance"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drafter_of_half_the_tokens_is_diagnosed_and_its_limit_said(dtype):
    target = FrozenTarget(make_causal_lm().to(dtype), make_tokenizer())
    vocabulary = build_draft_vocabulary((torch.arange(VOCAB) % 2).long(), VOCAB // 2)
    drafter = make_drafter("eagle3", target, draft_vocabulary=vocabulary)
    rows = answered(target)
    found = diagnose_drafter(target, drafter, rows, rows)
    known = set(drafter.draft_token_ids.tolist())
    tokens = [token for ids in rows["completion_ids"] for token in ids]
    assert found["outside"]["tokens"] == pytest.approx(1 - np.mean([token in known for token in tokens]))
    assert 0 < found["outside"]["tokens"] < 1
    assert 0 < found["outside"]["mass"] < 1
    assert 0 < found["outside"]["rejections"] <= 1
    assert found["now"]["tau"] <= found["limits"]["vocabulary"]["tau"] <= found["limits"]["slots"]["tau"]
    assert found["limits"]["slots"]["tau"] == drafter.default_num_drafts + 1
    for state in found["mismatch"].values():
        assert 0 < state["outside_mass"] < 1 and 0 < state["top_prob"] <= 1
    assert "first rejected" in render_diagnosis({"tiny": found})


# -- by hand ----------------------------------------------------------------------------------------------------------

# Seven tokens, blocks of two drafts. The chain: from 0 one draft is kept, from 2 none, from 3 both, and 6 is the end.
RIGHT = np.array([[1, 0], [0, 1], [0, 1], [1, 1], [1, 0], [0, 0]], dtype=bool)
HAND = Response(
    ids=np.arange(7),
    entropy=np.arange(7.0),
    top_prob=np.array([0.5, 0.95, 0.4, 0.95, 0.4, 0.95, 0.95]),
    outside=np.zeros(7),
    is_known=np.array([1, 1, 0, 1, 1, 1, 1], dtype=bool),
    is_right=RIGHT,
    draft_prob=RIGHT * 0.5,
)


def test_a_chain_by_hand():
    assert HAND.runs.tolist() == [1, 0, 0, 2, 1, 0]
    assert follow_chain(HAND.runs).tolist() == [0, 2, 3]
    # From the last anchor back: 5 needs one round, 4 and 3 too, 2 goes on at 3, 1 at 2, 0 at 2.
    assert rounds_left(HAND.runs)[:7].tolist() == [3, 3, 2, 1, 1, 1, 0]


def test_what_a_wrong_draft_costs_by_hand():
    # From 0, with slot 2 right, decoding goes on at 3 in place of 2: one round less. From 2, with slot 1 right, slot 2
    # is right as well, and it goes on at 5, from which it needs as many rounds as from 3.
    assert rounds_saved(HAND, np.array([0, 2, 3])).tolist() == [1.0, 0.0, 0.0]


def test_drafters_that_do_not_exist_by_hand():
    limits = describe([HAND], 1.0)["limits"]
    # Token 2 cannot be drafted: from 0 one draft is kept and 2 is the bonus, from 2 two are, and 5 is not counted.
    assert limits["vocabulary"] == {"tau": 2.5, "low": 2.5, "high": 2.5, "blocks": 2}
    assert limits["slots"]["tau"] == 3.0
    # Tokens that slot 1 gets right: 1, 4 and 5. From 0: one; from 2: none; from 3: two.
    assert limits["as_slot_1"]["tau"] == pytest.approx((2 + 1 + 3) / 3)


def test_the_weights_of_a_small_case_by_hand():
    weights = describe([HAND], 1.0)["weights"]
    # Eleven slots lie inside the text: reached and right are 1 + 2 + 1, first wrong 1 + 1 + 1 + 1 + 0 ...
    right, wrong = 4, 4
    # ... slot 2 of anchor 4 ends the text and is wrong, slot 1 of anchor 5 too.
    assert weights["sft"]["right"] == pytest.approx(right / 11)
    assert weights["sft"]["first_wrong"] == pytest.approx((wrong + 1) / 11)
    assert sum(weights["sft"][key] for key in ("right", "first_wrong", "behind")) == pytest.approx(1)
    assert weights["until_fail"]["behind"] == 0
    # The chain keeps 1 and 2 drafts and is wrong twice, each stream half of the loss.
    assert weights["opd_first"]["right"] == weights["opd_first"]["first_wrong"] == pytest.approx(0.5)
    assert weights["opd_first"]["slots_per_response"] == 5


def test_loops_are_what_repeats_long_enough():
    assert not repeated_tokens(np.arange(40)).any()
    assert not repeated_tokens(np.array([1, 2, 1, 2, 1, 2, 1, 2])).any()
    looping = np.array([9, 8, 7] + [1, 2, 3, 4] * 5)
    assert repeated_tokens(looping).tolist() == [False] * 7 + [True] * 16
