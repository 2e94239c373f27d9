# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A confidence head inside a training step, against a loop over slots: one prefix, one forward and full logits each.
"""

from dataclasses import replace

import pytest
import torch
from test_step import NUM_DRAFTS, exact_norms, prepare, replay, roll_out, streams, target_logits
from test_step_weighting import half_liked_text

from helpers.oracle import greedy_rows
from helpers.tiny import VOCAB, make_drafter, make_target
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer, SamplingSettings
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.evaluation import evaluate_drafter
from trl_draft_opd.rollout.acceptance import token_probs
from trl_draft_opd.rollout.blocks import join_blocks
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.trainer.step import (
    Objective,
    PreparedBatch,
    SlotRules,
    StreamSettings,
    step_loss,
    verification_of,
    weight_sums,
)


__all__ = ["exact_norms"]
GREEDY, WARM = SamplingSettings(0.0, 0, 1.0), SamplingSettings(0.7, 0, 1.0)
OFF = SlotRules()
HOW = {"greedy": (GREEDY, "greedy"), "argmax-drafts": (WARM, "greedy"), "drawn": (WARM, "sample")}


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    # What both heads say of every state, so that their argmaxes agree here and there.
    liked = 8 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    target.causal_lm.lm_head.bias = torch.nn.Parameter(liked, requires_grad=False)
    target.causal_lm.double()
    drafter = make_drafter("dspark", target).double()
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
        # Not as loud as what both heads say.
        drafter.markov_head.markov_w2.weight.mul_(0.05)
        drafter.confidence_head.proj.bias.fill_(-0.3)
    return target, drafter


def step(pair, batch, settings, rules=OFF, **changes):
    """Return metrics, loss and every gradient."""
    target, drafter = pair
    drafter.zero_grad()
    sums = weight_sums([batch.blocks], settings, None)
    result = step_loss(drafter, target, batch, replace(Objective(settings, rules, 3000, sums), **changes))
    result.loss.backward()
    grads = {name: p.grad.clone() for name, p in drafter.named_parameters()}
    return result.sums.read(), float(result.loss.detach()), grads


def confidence_loss(pair, rollout, blocks, settings, how):
    """The loss of the head alone, slot by slot from the definition, with its gradients and what the metrics are."""
    target, drafter = pair
    sampling, draft_sampling = how
    masks = {"accepted": blocks.is_accepted, "rejected": blocks.is_rejected, "supervised": blocks.is_supervised}
    total, means = 0.0, {}
    for name, stream in settings.items():
        losses, predicted, kept, weights = [], [], [], []
        for row, block, slot in masks[name].nonzero().tolist():
            ids, anchor = rollout.input_ids[row].tolist(), int(blocks.anchors[row, block])
            drafts = blocks.drafts[row, block]
            text = torch.tensor([ids[: anchor + 1]])
            reading = target.read_text(text, torch.ones_like(text), drafter.config.target_layer_ids)
            features = reading.padded().features
            place = torch.tensor([[anchor]])
            hidden = run_blocks(drafter, features, text, place, drafts[None, None], target.embed)[0, 0, slot]
            chance = (drafter.confidence_head.proj(hidden)[0]).sigmoid()
            q = slot_logits_of(pair, hidden)
            p = target_logits(target, ids, anchor, drafts, slot + 1)
            p, q = token_probs(p, sampling), token_probs(q, sampling if draft_sampling == "sample" else GREEDY)
            label = float(torch.minimum(p, q.detach()).sum())
            losses.append(-(label * chance.log() + (1 - label) * (1 - chance).log()))
            predicted.append(float(chance.detach()))
            kept.append(label)
            weights.append(stream.decay**slot)
        weights = torch.tensor(weights, dtype=torch.float64)
        total = total + stream.weight * (torch.stack(losses) * weights).sum() / weights.sum()
        plain = ([float(loss.detach()) for loss in losses], predicted, kept)
        values = [torch.tensor(each, dtype=torch.float64) for each in plain]
        means[name] = [float((each * weights).sum() / weights.sum()) for each in values]
    total = total / sum(stream.weight for stream in settings.values())
    drafter.zero_grad()
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in drafter.named_parameters()}, means


def slot_logits_of(pair, hidden):
    return pair[1].draft_logits(hidden, pair[0].project)


@pytest.mark.parametrize("how", HOW)
def test_loss_gradients_and_metrics_are_those_of_the_definition(monkeypatch, exact_norms, pair, how):
    target, drafter = pair
    rollout = roll_out(monkeypatch, target, drafter)
    blocks = replay(rollout, "suffix")
    settings = streams(weights=(1.0, 3.0))
    batch, verification = prepare(rollout, blocks), verification_of(DraftingSettings(NUM_DRAFTS, *HOW[how], False))
    sums, loss, grads = step(pair, batch, settings, verification=verification, confidence_weight=2.0)
    _, rest, rest_grads = step(pair, batch, settings, verification=verification, confidence_weight=0.0)
    expected, expected_grads, means = confidence_loss(pair, rollout, blocks, settings, HOW[how])
    assert loss - rest == pytest.approx(2 * expected, abs=1e-10)
    for name, grad in grads.items():
        wanted = torch.zeros_like(grad) if expected_grads[name] is None else 2 * expected_grads[name]
        torch.testing.assert_close(grad - rest_grads[name], wanted, rtol=0, atol=1e-10, msg=name)
        # Into the layers and the embedding of the token before, as published; the head that drafts is no part of it.
        assert (wanted.abs().max() > 1e-6) == (name != "markov_head.markov_w2.weight")
    for name, values in means.items():
        measures = [f"confidence_loss/{name}", f"confidence/{name}", f"kept/{name}"]
        assert [top / bottom for top, bottom in map(sums.get, measures)] == pytest.approx(values, abs=1e-10)
    # Drafts of both fates, on the text and on branches.
    assert means["rejected"][2] + means["accepted"][2] > 0 and blocks.is_branch.any()


def test_without_a_weight_every_parameter_still_has_a_gradient(monkeypatch, pair):
    rollout = roll_out(monkeypatch, *pair)
    grads = step(pair, prepare(rollout, replay(rollout)), streams(), confidence_weight=0.0)[2]
    assert grads["confidence_head.proj.weight"].abs().max() == 0 < grads["markov_head.markov_w2.weight"].abs().max()


def supervised(pair, rules):
    target, drafter = pair
    ids, blocks = half_liked_text(target, drafter)
    mask = torch.ones_like(ids)
    batch = PreparedBatch(TargetText(ids, mask, mask.bool(), [0]), None, blocks, None)
    settings = {"accepted": StreamSettings("forward_kl", 1.0, 0.5)}
    with_head = step(pair, batch, settings, rules)
    return with_head[0], with_head[2]["confidence_head.proj.weight"]


def test_the_weights_of_d_pace_leave_the_confidence_loss_as_it_is(pair):
    (plain, grad), (weighed, other) = supervised(pair, OFF), supervised(pair, SlotRules(0.5))
    names = ["confidence_loss/accepted", "confidence/accepted", "kept/accepted"]
    assert [plain[name] for name in names] == [weighed[name] for name in names]
    assert torch.equal(grad, other) and plain["loss/accepted"] != weighed["loss/accepted"]


def test_slots_behind_a_mismatch_that_weigh_nothing_train_no_confidence(pair):
    plain, until_fail = (supervised(pair, rules)[0] for rules in (OFF, SlotRules(None, True)))
    # They have no label: a label of 0 in its place would teach doubt.
    weights = [sums["confidence/accepted"][1] for sums in (plain, until_fail)]
    assert 0 < weights[1] < weights[0] == plain["loss/accepted"][1]


def test_supervised_blocks_beside_a_chain_are_labelled_too(monkeypatch, exact_norms, pair):
    rollout = roll_out(monkeypatch, *pair)
    blocks = replay(rollout, "suffix")
    on_text = replace(blocks, is_rejected=torch.zeros_like(blocks.is_rejected), is_branch=blocks.is_branch & False)
    blocks = join_blocks(blocks, on_text.as_supervised())
    settings = streams() | {"supervised": StreamSettings("ce", 0.5, 0.5)}
    sums, _, _ = step(pair, prepare(rollout, blocks), settings)
    _, _, means = confidence_loss(pair, rollout, blocks, settings, HOW["greedy"])
    for name, (_, predicted, kept) in means.items():
        assert sums[f"confidence/{name}"][0] / sums[f"confidence/{name}"][1] == pytest.approx(predicted, abs=1e-10)
        assert sums[f"kept/{name}"][0] / sums[f"kept/{name}"][1] == pytest.approx(kept, abs=1e-10)


def test_a_drafter_without_the_head_has_no_such_metrics_and_takes_no_weight(monkeypatch, tmp_path):
    target = make_target()
    drafter = make_drafter("dspark", target, enable_confidence_head=False)
    rollout = roll_out(monkeypatch, target, drafter)
    sums, _, _ = step((target, drafter), prepare(rollout, replay(rollout)), streams())
    assert not [name for name in sums if "confidence" in name or "kept" in name]
    args = DraftSFTConfig(str(tmp_path), confidence_loss_weight=0.5, use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=r"`confidence_loss_weight` is 0.5, but this DSpark drafter has no"):
        DraftSFTTrainer(drafter, target, args)


@pytest.mark.parametrize("method", ["sft", "opd"])
def test_an_evaluation_in_training_reports_the_calibration_that_evaluate_does(tmp_path, method):
    target = make_target()
    drafter, rows = make_drafter("dspark", target), greedy_rows(target, 6, 12)
    kind, settings = {"sft": (DraftSFTTrainer, DraftSFTConfig), "opd": (DraftOPDTrainer, DraftOPDConfig)}[method]
    args = settings(str(tmp_path), max_completion_length=12, use_cpu=True, bf16=False, report_to="none")
    metrics = kind(drafter, target, args, rows, eval_dataset=rows).evaluate()
    report = evaluate_drafter(target, drafter, rows["prompt_ids"], max_completion_length=12, show_progress=False)
    found = [metrics[f"eval_{name}/reached"] for name in ("confidence", "kept", "brier")]
    wanted = [report.calibration[name] for name in ("mean_confidence", "mean_kept", "brier")]
    assert found == pytest.approx(wanted, abs=1e-6) and report.calibration["num_reached_per_slot"][0] > 6
