# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of the DFlash 2 drafter: its convolutions and its selector against loops, and both without effect against DFlash.
"""

import math
from dataclasses import replace

import pytest
import torch

from helpers.tiny import MASK, TINY_RUN, VOCAB, make_drafter, make_target
from trl_draft_opd import AutoDrafter, DFlash2DraftConfig, DFlash2DraftModel, DraftSFTConfig
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.drafters.dflash2.modeling_dflash2 import BlockConvolution
from trl_draft_opd.rollout.blocks import sample_anchors
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.trainer.common_config import check_part_weights
from trl_draft_opd.trainer.step import Objective, PreparedBatch, SlotRules, StreamSettings, step_loss, weight_sums


TARGET = make_target("llama")
BLOCK, L = 5, 12
ANCHORS = torch.tensor([[1, 4, 11, 5], [6, 2, 9, -1]])
SIZES = {"conv_group_size": 8, "selector_rank": 6, "selector_top_k": 5}


def make_lively(drafter, seed=3):
    """Give every weight a size at which nothing the drafter computes is negligible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise if "codebook" in name else noise / math.sqrt(parameter.shape[-1]))
    return drafter


def make_dflash2(**options):
    return make_lively(
        DFlash2DraftModel.from_target(
            TARGET, mask_token_id=MASK, num_hidden_layers=2, block_size=BLOCK, **SIZES | options
        )
    ).eval()


def make_text():
    """Ids, features of a made-up target, and drafts of every block."""
    generator = torch.Generator().manual_seed(0)
    width = 5 * TARGET.config.hidden_size
    input_ids = torch.randint(4, VOCAB, (2, L), generator=generator)
    drafts = torch.randint(4, VOCAB, (*ANCHORS.shape, BLOCK - 1), generator=generator)
    return input_ids, torch.randn(2, L, width, generator=generator), drafts


def run(drafter):
    input_ids, features, drafts = make_text()
    return run_blocks(drafter, features, input_ids, ANCHORS, drafts, TARGET.embed)


# -- convolutions -----------------------------------------------------------------------------------------------------


def convolved(convolution, read, states, side):
    """The convolution slot by slot and channel by channel."""
    taps, width = convolution.base_kernel.shape[1:]
    groups = convolution.num_groups
    factors = convolution.kernel_projection(read).view(*read.shape[:2], 2, taps, groups)
    mixed = torch.zeros_like(states)
    for slot in range(states.shape[1]):
        for tap in range(min(taps, slot + 1)):
            for channel in range(width):
                factor = (
                    convolution.base_kernel[side, tap, channel]
                    + factors[:, slot, side, tap, channel * groups // width]
                )
                mixed[:, slot, channel] += factor * states[:, slot - tap, channel]
    return mixed


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_convolutions_mix_each_slot_with_those_right_before_it(taps):
    config = DFlash2DraftConfig(hidden_size=12, conv_group_size=4, conv_kernel_size=taps, block_size=5)
    convolution = BlockConvolution(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter.normal_()
        read, added = torch.randn(2, 3, 5, 12)
        entered, kernels = convolution.enter(read)
        torch.testing.assert_close(entered, convolved(convolution, read, read, 0))
        torch.testing.assert_close(convolution.leave(added, kernels), convolved(convolution, read, added, 1))


def test_convolutions_end_with_their_block_and_see_no_context():
    drafter = make_dflash2()
    input_ids, features, drafts = make_text()
    both = run(drafter)
    alone = [
        run_blocks(drafter, features, input_ids, ANCHORS[:, [block]], drafts[:, [block]], TARGET.embed)
        for block in range(ANCHORS.shape[1])
    ]
    is_block = ANCHORS >= 1
    torch.testing.assert_close(both[is_block], torch.cat(alone, dim=1)[is_block], rtol=0, atol=1e-5)


# -- the selector -----------------------------------------------------------------------------------------------------


def test_draft_logits_are_those_of_the_head_and_the_selector_for_the_likeliest_tokens_alone():
    drafter = make_dflash2()
    input_ids, _, drafts = make_text()
    hidden = run(drafter)
    logits, unary = drafter.draft_logits(hidden, TARGET.project), TARGET.project(hidden[..., :32])
    before = torch.cat([input_ids.gather(1, ANCHORS.clamp(min=0))[..., None], drafts], dim=-1)
    selector = drafter.candidate_selector
    for row, block in (ANCHORS >= 1).nonzero().tolist():
        for slot in range(BLOCK - 1):
            own, state = logits[row, block, slot], hidden[row, block, slot, :32]
            candidates = unary[row, block, slot].sort(descending=True).indices[:5].tolist()
            assert (own > -torch.inf).nonzero()[:, 0].tolist() == sorted(candidates)
            context = selector.predecessor_codebook[before[row, block, slot]] * (
                selector.hidden_projection.weight @ state
            )
            for token in candidates:
                expected = unary[row, block, slot, token] + context @ selector.successor_codebook[token]
                torch.testing.assert_close(own[token], expected, rtol=1e-4, atol=1e-4)


def test_slots_run_along_drafts_are_those_of_single_steps():
    drafter = make_dflash2()
    input_ids, features, drafts = make_text()
    with torch.no_grad():
        context = drafter.encode_text(features, input_ids, TARGET.embed)
        state = drafter.begin(context, ANCHORS, input_ids.gather(1, ANCHORS.clamp(min=1)), BLOCK - 1, TARGET.embed)
        stepped, steps = state, [state.hidden]
        for slot in range(BLOCK - 2):
            stepped = drafter.advance(stepped, drafts[..., slot])
            steps.append(stepped.hidden)
        last, hidden = drafter.run_along(state, drafts[..., :-1])
    assert torch.equal(hidden, torch.stack(steps, dim=2)) and torch.equal(last.hidden, stepped.hidden)
    assert last.slot == stepped.slot == BLOCK - 1 and not torch.equal(
        run(drafter), run(make_dflash2(conv_kernel_size=1))
    )


# -- warm start -------------------------------------------------------------------------------------------------------


def test_a_drafter_made_from_a_dflash_has_its_states_and_its_logits_bit_for_bit():
    dflash = make_lively(make_drafter("dflash", TARGET))
    drafter = DFlash2DraftModel.from_dflash(dflash, **SIZES)
    plain, hidden = run(dflash), run(drafter)
    assert torch.equal(hidden[..., :32], plain)
    is_block = ANCHORS >= 1
    unary, logits = TARGET.project(plain)[is_block], drafter.draft_logits(hidden, TARGET.project)[is_block]
    is_candidate = logits > -torch.inf
    assert torch.equal(logits[is_candidate], unary[is_candidate]) and (is_candidate.sum(dim=-1) == 5).all()
    assert torch.equal(logits.argmax(dim=-1), unary.argmax(dim=-1))


def test_one_update_of_a_silent_selector_gives_all_its_weights_a_gradient():
    drafter = DFlash2DraftModel.from_dflash(make_lively(make_drafter("dflash", TARGET)), **SIZES)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    for is_awake in (False, True):
        logits = drafter.draft_logits(run(drafter), TARGET.project)[ANCHORS >= 1]
        logits.masked_fill(logits == -torch.inf, 0).square().sum().backward()
        for name, parameter in drafter.named_parameters():
            assert parameter.grad is not None
            is_silent = "codebook" in name and not is_awake
            assert bool((parameter.grad != 0).any()) != is_silent, name
        optimizer.step()
        optimizer.zero_grad()


def test_only_a_dflash_is_widened():
    with pytest.raises(ValueError, match="not from this DFlash 2 drafter"):
        DFlash2DraftModel.from_dflash(make_dflash2())


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["forward_kl", "ce"])
def test_a_batch_without_rows_gives_every_parameter_a_gradient_of_zeros(loss_type):
    drafter, ids = make_dflash2(), make_text()[0]
    mask = torch.ones_like(ids)
    blocks = sample_anchors(
        ids, mask.bool() & (mask.cumsum(1) > 1), [0, 1], num_anchors=2, num_drafts=4, seed=0, epoch=0
    )
    empty = replace(blocks, anchors=torch.full_like(blocks.anchors, -1), is_accepted=blocks.is_accepted & False)
    streams = {"accepted": StreamSettings(loss_type, 1.0, 1.0)}
    objective = Objective(streams, SlotRules(), 2**20, weight_sums([empty], streams, None))
    batch = PreparedBatch(TargetText(ids, mask, mask.bool(), [0, 1]), None, empty, None)
    result = step_loss(drafter, TARGET, batch, objective)
    result.loss.backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    metrics = result.sums.read()
    assert metrics["selector_loss/accepted"] == metrics["candidate_recall/accepted"] == (0.0, 0.0)


def test_the_weight_of_a_selector_is_refused_for_a_drafter_without_one(tmp_path):
    args = DraftSFTConfig(str(tmp_path), selector_loss_weight=0.5, **TINY_RUN)
    with pytest.raises(ValueError, match=r"`selector_loss_weight` is 0.5, but this DFlash drafter has no selector"):
        check_part_weights(args, make_drafter("dflash", TARGET))
    check_part_weights(args, make_dflash2())


# -- configuration and files ------------------------------------------------------------------------------------------


def test_a_saved_drafter_loads_bit_for_bit_under_the_published_names(tmp_path):
    drafter = make_dflash2()
    drafter.save_pretrained(tmp_path)
    loaded = AutoDrafter.from_pretrained(tmp_path)
    assert type(loaded) is DFlash2DraftModel and torch.equal(run(loaded), run(drafter))
    shapes = {name: tuple(tensor.shape) for name, tensor in loaded.state_dict().items()}
    assert shapes["layers.1.mlp_conv.base_kernel"] == (2, 2, 32)
    assert shapes["layers.0.attention_conv.kernel_projection.weight"] == (2 * 2 * 4, 32)
    assert shapes["candidate_selector.predecessor_codebook"] == (VOCAB, 6)
    assert shapes["candidate_selector.successor_codebook"] == (VOCAB, 6)
    assert shapes["candidate_selector.hidden_projection.weight"] == (6, 32)


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("conv_kernel_size", 0, "1..5"),
        ("conv_kernel_size", 6, "1..5"),
        ("conv_group_size", 5, "divide"),
        ("selector_rank", 0, "at least 1"),
        ("selector_top_k", VOCAB + 1, "1..64"),
        ("draft_vocab_size", 32, "Leave it out"),
    ],
)
def test_settings_out_of_range_are_refused(setting, value, match):
    with pytest.raises(ValueError, match=match):
        DFlash2DraftConfig(vocab_size=VOCAB, hidden_size=32, block_size=5, **SIZES | {setting: value})
