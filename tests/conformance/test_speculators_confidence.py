# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A confidence head's loss as the speculators library computes it: the term alone, and its gradient into the layers.
"""

import math

import pytest
import torch
from test_export import make_variant
from test_speculators_drafting import read_both

from helpers.tiny import make_target
from trl_draft_opd import SamplingSettings
from trl_draft_opd.rollout.blocks import BlockBatch
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.texts import TargetText
from trl_draft_opd.trainer.step import Objective, PreparedBatch, SlotRules, StreamSettings, step_loss, verification_of


pytestmark = pytest.mark.conformance
GAMMA = 4.0


def gradients_of(model, loss):
    """Return the gradients of every parameter that the loss reaches, by name."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("variant", ["dspark", "dspark-anchor"])
def test_the_confidence_loss_and_its_gradient_into_the_layers_are_the_librarys(variant, tmp_path):
    from speculators.losses import resolve_loss_config
    from speculators.losses.eager import tv_loss
    from speculators.models.dflash.utils import select_anchors

    target = make_target("llama")
    target.causal_lm.save_pretrained(tmp_path / "target")
    drafter = make_variant(variant, target)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            # Norms near one and matrices that keep a state's size, so that rounding stays small.
            parameter.mul_(0.1).add_(1) if "norm" in name else parameter.mul_(0.2)
    ours, model = read_both(drafter, target, tmp_path / "target", tmp_path / "out")
    config, length, num_anchors = ours.config, 40, 4
    ids = torch.randint(7, 64, (1, length))
    is_trained = torch.zeros(1, length, dtype=torch.bool)
    is_trained[:, 5 : length - 1] = True
    reading = target.read_text(ids, torch.ones_like(ids), config.target_layer_ids).padded()

    def their_loss(weight):
        torch.manual_seed(1)
        _, loss, metrics = model(
            reading.features,
            ids,
            is_trained,
            reading.last_hidden,
            torch.zeros_like(ids),
            # Its default kernels need a card.
            loss_config=resolve_loss_config("kl_div", "eager"),
            tv_loss_fn=tv_loss,
            gamma=GAMMA,
            max_anchors=num_anchors,
            confidence_head_alpha=weight,
        )
        return loss, float(metrics["confidence_loss_sum"])

    torch.manual_seed(1)
    anchors, is_valid = select_anchors(is_trained, num_anchors, config.block_size)
    assert is_valid.all()
    slots = anchors[:, None] + torch.arange(1, config.drafts_per_block + 1)
    drafts = ids[:, slots]
    # The library masks a slot by the token it stands on, which may be the one before the token it drafts.
    is_in_loss = is_trained[:, slots - int(config.sample_from_anchor)]
    blocks = BlockBatch(
        anchors=anchors[None],
        drafts=drafts,
        labels=drafts,
        is_accepted=is_in_loss,
        is_rejected=torch.zeros_like(drafts, dtype=torch.bool),
        is_branch=torch.zeros_like(drafts, dtype=torch.bool),
    )
    text = TargetText(ids, torch.ones_like(ids), is_trained, [0])
    drawn = DraftingSettings(config.drafts_per_block, SamplingSettings(1.0, 0, 1.0), "sample", False)

    def our_loss(weight):
        objective = Objective(
            {"accepted": StreamSettings("forward_kl", 1.0, math.exp(-1 / GAMMA))},
            SlotRules(),
            2**20,
            # The library divides by the number of slots, not by the sum of their weights.
            torch.tensor([float(blocks.is_accepted.sum()), 0.0, 0.0]),
            verification=verification_of(drawn),
            confidence_weight=weight,
        )
        return step_loss(ours, target, PreparedBatch(text, None, blocks, None), objective).loss

    (theirs, term), (their_rest, _) = their_loss(1.0), their_loss(0.0)
    mine, my_rest = our_loss(1.0), our_loss(0.0)
    assert (
        float(mine - my_rest) == pytest.approx(term, rel=1e-4) == pytest.approx(float(theirs - their_rest), rel=1e-3)
    )
    their_grads, their_rests = (gradients_of(model, loss) for loss in (theirs, their_rest))
    my_grads, my_rests = (gradients_of(ours, loss) for loss in (mine, my_rest))
    for name, gradient in my_grads.items():
        wanted = their_grads[name] - their_rests[name]
        torch.testing.assert_close(gradient - my_rests[name], wanted, rtol=1e-3, atol=1e-5, msg=name)
        # Into every layer and the embedding of the token before; the head that drafts is no part of it.
        assert (wanted.abs().max() > 1e-4) == (name != "markov_head.markov_w2.weight"), name
