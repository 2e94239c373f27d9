# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Blocks that are verified only as far as their confidences carry: the text stays the target's, replay gives what live
decoding did, and what was verified is counted.
"""

from dataclasses import replace

import pytest
import torch
from test_posterior_distribution import CASES as PAIRS
from test_posterior_distribution import (
    WARM,
    Case,
    live_distribution,
    make_exact,
    make_pair,
    replayed_distribution,
    text_distribution,
    total_variation,
)
from test_rollout_replay import assert_same_blocks, text_of

from helpers.oracle import greedy_text
from helpers.rollouts import Options, decode, replay
from helpers.tiny import VOCAB, make_drafter, make_prompts, make_target
from trl_draft_opd import DSparkDraftModel, SamplingSettings
from trl_draft_opd.rollout import live
from trl_draft_opd.rollout import replay as replay_module
from trl_draft_opd.rollout.blocks import mark_slots
from trl_draft_opd.rollout.counts import Counts
from trl_draft_opd.rollout.drafting import DraftingSettings, mark_verified


GREEDY = SamplingSettings(0.0, 0, 1.0)


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    # What both heads say of every state, so that some drafts are right.
    liked = 5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))
    target.causal_lm.lm_head.bias = torch.nn.Parameter(liked, requires_grad=False)
    drafter = make_drafter("dspark", target)
    with torch.no_grad():
        # Not as loud as what both heads say.
        drafter.markov_head.markov_w2.weight.mul_(0.1)
    # Confidences about 0.82 that differ from slot to slot.
    plain = decode(target, drafter, make_prompts(5), Options(keep_confidences=True))
    logits = plain.confidences[plain.is_block].logit()
    projection, scale = drafter.confidence_head.proj, 1 / logits.std().item()
    with torch.no_grad():
        projection.bias.copy_((projection.bias - logits.mean()) * scale + 1.5)
        projection.weight.mul_(scale)
    return target, drafter


def adaptive(min_confidence, **changes):
    return Options(min_confidence=min_confidence, keep_confidences=True, max_completion_length=20, **changes)


def lengths_of(rollout):
    return rollout.verified[rollout.is_block].tolist()


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_slots_are_verified_up_to_the_one_at_which_the_running_product_falls_short():
    confidences = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.2, 1.0, 1.0, 1.0], [1.0, 0.5, 0.99, 1.0], [1.0] * 4])
    is_verified = mark_verified(confidences.double().cumprod(-1), 0.5)
    assert is_verified.sum(-1).tolist() == [4, 1, 2, 4]
    # Of a block that is judged in parts, only the first part holds the first slot.
    assert mark_verified(torch.tensor([[0.4, 0.3]]), 0.5, first_slot=3).sum() == 0


@pytest.mark.parametrize("min_confidence", [0.5, 0.65])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_greedy_text_is_the_targets_own(pair, min_confidence, num_rows):
    target, drafter = pair
    prompts = make_prompts(num_rows, seed=num_rows)
    rollout = decode(target, drafter, prompts, adaptive(min_confidence))
    for prompt, response in zip(prompts, rollout.responses(), strict=True):
        assert prompt + response == greedy_text(target, prompt, 20)
    # The claim is of blocks of several lengths, kept and refused.
    assert len(set(lengths_of(rollout))) > 1 and {0, 1} <= set(rollout.accepted[rollout.is_block].tolist())
    assert (rollout.accepted <= rollout.verified).all()


def test_only_what_is_verified_is_read_by_the_target(pair, monkeypatch):
    target, drafter = pair
    widths, step = [], target.step
    monkeypatch.setattr(target, "step", lambda ids, *rest: widths.append(ids.shape[1]) or step(ids, *rest))
    rollout = decode(target, drafter, make_prompts(1), adaptive(0.5))
    assert widths[1:] == [length + 1 for length in lengths_of(rollout)] and len(set(widths[1:])) > 1


def test_a_block_is_whole_where_its_confidences_carry_and_never_without_a_draft(pair):
    target, drafter = pair
    prompts = make_prompts(3)
    whole = decode(target, drafter, prompts, Options(max_completion_length=20))
    carried = decode(target, drafter, prompts, adaptive(1e-300))
    assert_same_blocks(whole, replace(carried, verified=None))
    assert set(lengths_of(carried)) == {4} and whole.verified is None and whole.confidences is None
    single = decode(target, drafter, prompts, adaptive(1.0))
    assert set(lengths_of(single)) == {1} and set(single.accepted[single.is_block].tolist()) == {0, 1}
    assert single.responses() == whole.responses()


# -- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots_at_once,segment_length", [(1, 1), (3, 3), (1, 100), (4, 100)])
@pytest.mark.parametrize("min_confidence", [0.5, 0.65])
def test_replay_of_live_text_is_the_live_rollout(pair, monkeypatch, min_confidence, slots_at_once, segment_length):
    target, drafter = pair
    monkeypatch.setattr(replay_module, "slots_at_once", lambda num_blocks, left, device: min(left, slots_at_once))
    prompts = make_prompts(5, seed=5)
    rollout = decode(target, drafter, prompts, adaptive(min_confidence))
    replayed = replay(target, drafter, text_of(rollout), adaptive(min_confidence, segment_length=segment_length))
    assert_same_blocks(rollout, replayed)
    assert torch.equal(replayed.verified, rollout.verified) and replayed.has_suffix
    torch.testing.assert_close(replayed.confidences, rollout.confidences, rtol=0, atol=1e-5)
    assert rollout.is_censored.any() and len(set(lengths_of(rollout))) > 1
    # Blocks that end because no more was verified, and not by a rejection.
    is_cut = (rollout.accepted == rollout.verified) & (rollout.verified < 4) & rollout.is_block
    assert is_cut.any()


def test_confidences_of_whole_blocks_are_those_of_live_decoding_where_they_are_reached(pair):
    target, drafter = pair
    options = Options(keep_confidences=True, max_completion_length=20)
    rollout = decode(target, drafter, make_prompts(3), options)
    replayed = replay(target, drafter, text_of(rollout), options)
    is_reached = (torch.arange(1, 5) <= rollout.accepted[..., None] + 1) & rollout.is_counted[..., None]
    found, expected = replayed.confidences[is_reached], rollout.confidences[is_reached]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not replayed.has_suffix and replayed.verified is None


# -- the exact distribution -------------------------------------------------------------------------------------------


def make_adaptive(sampling, draft_sampling="sample", **changes):
    """A DSpark pair whose confidences differ by the token before the slot, so that lengths differ."""
    target, _ = make_pair("dflash", 3)
    torch.manual_seed(7)
    shape = {"num_hidden_layers": 1, "block_size": 4, "target_layer_ids": [0], "markov_rank": 4}
    drafter = DSparkDraftModel.from_target(target, mask_token_id=2, sample_from_anchor=False, **shape)
    with torch.no_grad():
        # 0.92, 0.62 or 0.18, by the token before the slot.
        drafter.markov_head.markov_w1.weight[:, 0] = torch.tensor([2.0, 0.0, -2.0])
        drafter.confidence_head.proj.weight.zero_()
        drafter.confidence_head.proj.weight[0, drafter.config.hidden_size] = 1.0
        drafter.confidence_head.proj.bias.fill_(0.5)
    drafter = make_exact(drafter)
    return Case(target, drafter, sampling, draft_sampling, **changes)


ADAPTIVE = {
    "adaptive": lambda: make_adaptive(WARM, min_confidence=0.4),
    "adaptive-argmax": lambda: make_adaptive(WARM, "greedy", min_confidence=0.15),
    "adaptive-longer": lambda: make_adaptive(WARM, num_drafts=3, min_confidence=0.3),
}


@pytest.fixture
def pairs(monkeypatch):
    for name, make in ADAPTIVE.items():
        monkeypatch.setitem(PAIRS, name, make)
    yield
    live_distribution.cache_clear()


@pytest.mark.parametrize(
    "name", ["adaptive", "adaptive-argmax", pytest.param("adaptive-longer", marks=pytest.mark.slow)]
)
def test_text_and_blocks_of_several_lengths_have_one_distribution_live_and_by_replay(pairs, name):
    forward, replayed = live_distribution(name), replayed_distribution(name)
    assert abs(sum(forward.values()) - 1) <= 1e-12
    assert total_variation(forward, replayed) <= 1e-12
    written = {}
    for (text, _), mass in forward.items():
        written[text] = written.get(text, 0) + mass
    assert total_variation(written, text_distribution(ADAPTIVE[name]())) <= 1e-12
    # Lengths depend on drafts: blocks at one anchor behind one text differ in theirs.
    lengths = {block[-1] for _, chain in forward for block in chain}
    assert len(lengths) > 1 or name == "adaptive-argmax"


@pytest.mark.slow
def test_a_rule_that_looks_at_the_draft_it_drops_is_found(pairs, monkeypatch):
    def leaking(reach, min_confidence, first_slot=1):
        # Slot k by confidence k + 1, which reads draft k.
        return mark_verified(torch.cat([reach[..., 1:], reach[..., -1:]], dim=-1), min_confidence, first_slot)

    monkeypatch.setattr(live, "mark_verified", leaking)
    written = {}
    for (text, _), mass in live_distribution("adaptive-longer").items():
        written[text] = written.get(text, 0) + mass
    assert total_variation(written, text_distribution(ADAPTIVE["adaptive-longer"]())) > 1e-7


# -- what follows from it ---------------------------------------------------------------------------------------------


def test_counts_hold_what_was_verified(pair):
    target, drafter = pair
    rollout = decode(target, drafter, make_prompts(3), adaptive(0.5))
    counts = Counts.of_rollout(rollout)
    counted = rollout.is_counted
    verified, accepted = rollout.verified[counted].double(), rollout.accepted[counted].double()
    assert counts.drafts_per_block == pytest.approx(verified.mean().item())
    assert counts.kept_share == pytest.approx((accepted.sum() / verified.sum()).item()) and counts.tau > 1
    assert sum((counts.row(i) for i in range(3)), Counts()) == counts
    assert counts.pooled().drafts_per_block == counts.drafts_per_block
    whole = Counts.of_chains([[2, 0], [4]], 4)
    assert whole.drafts_per_block == 4 and whole.kept_share == 6 / 12
    assert (whole + counts).verified == (8, 4, *counts.verified)


def test_a_draft_that_was_not_verified_is_neither_accepted_nor_rejected(pair):
    target, drafter = pair
    rollout = decode(target, drafter, make_prompts(5, seed=5), adaptive(0.5))
    blocks = mark_slots(rollout, rejected_scope="first", eos_token_ids=[])
    is_cut = (rollout.accepted == rollout.verified) & rollout.is_block
    assert is_cut.any() and not blocks.is_rejected[is_cut].any()
    is_refused = (rollout.accepted < rollout.verified) & rollout.is_block & ~rollout.is_censored
    assert (blocks.is_rejected[is_refused].sum(-1) == 1).all()


def test_a_setting_that_cannot_be_is_refused_with_the_fix(pair):
    target, drafter = pair
    with pytest.raises(ValueError, match=r"`min_confidence` must be in \(0, 1\], got 0.0"):
        DraftingSettings(4, GREEDY, "greedy", False, min_confidence=0.0)
    with pytest.raises(ValueError, match="Training verifies whole blocks"):
        DraftingSettings(4, GREEDY, "greedy", True, min_confidence=0.5)
    plain = make_drafter("dflash", target)
    for run in (
        lambda: decode(target, plain, make_prompts(1), adaptive(0.5)),
        lambda: replay(target, plain, text_of(decode(target, plain, make_prompts(1), Options())), adaptive(0.5)),
    ):
        with pytest.raises(ValueError, match="This DFlash drafter has no confidence head"):
            run()


def test_without_confidences_the_head_is_never_asked(pair, monkeypatch):
    target, drafter = pair
    monkeypatch.setattr(drafter, "confidence_logits", lambda hidden: pytest.fail("asked"))
    text = text_of(decode(target, drafter, make_prompts(2), Options()))
    replay(target, drafter, text, Options(keep_branch_hidden=True))
