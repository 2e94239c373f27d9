# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One training step against the method's formulas written out naively: one prefix, one forward and full logits per slot.
"""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from helpers.oracle import greedy_text, plant
from helpers.rollouts import Options, decode
from helpers.tiny import EOS, FAMILIES, VOCAB, make_drafter, make_prompts, make_target
from trl_draft_opd import DraftVocabulary
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.rollout.blocks import BlockBatch, mark_slots, sample_anchors
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.trainer.step import (
    Objective,
    PreparedBatch,
    SlotRules,
    StreamSettings,
    row_weights,
    step_loss,
    weight_sums,
)
from trl_draft_opd.trainer.texts import text_of_rollout


NUM_DRAFTS = 4
CASES = [*FAMILIES, "reduced"]


def streams(accepted="forward_kl", rejected="reverse_kl", weights=(1.0, 1.0), decay=0.5):
    return {
        "accepted": StreamSettings(accepted, weights[0], 1.0),
        "rejected": StreamSettings(rejected, weights[1], decay),
    }


@pytest.fixture
def exact_norms(monkeypatch):
    """Norms in the precision of their input: transformers' own round to float32."""

    def norm(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(Qwen3RMSNorm, "forward", norm)


def make_pair(case, dtype):
    target = make_target()
    target.causal_lm.to(dtype)
    options = {}
    if case == "reduced":
        # Every third token is missing; the end of sequence is in.
        is_known = torch.tensor([i % 3 != 0 for i in range(VOCAB)])
        ids = is_known.nonzero()[:, 0]
        options["draft_vocabulary"] = DraftVocabulary(d2t=ids - torch.arange(len(ids)), t2d=is_known, coverage=1.0)
    if case == "dspark":
        # Its loss is not this method's, see test_confidence_step.py.
        options |= {"enable_confidence_head": False, "confidence_head_with_markov": False}
    drafter = make_drafter("eagle3" if case == "reduced" else case, target, **options).to(dtype)
    # Random drafters start with small projections: losses need something to differ by.
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if parameter.dim() == 2 and not any(part in name for part in ("markov", "selector", "_conv")):
                parameter.mul_(5)
    return target, drafter


def roll_out(monkeypatch, target, drafter, num_drafts=NUM_DRAFTS):
    """Blocks with every fate: full accepts, rejections at each slot, and a censored end."""
    prompts = make_prompts(3, seed=2)
    truths = [greedy_text(target, prompt, 20) for prompt in prompts]
    wrong = {0: {len(prompts[0]) + i for i in (3, 9)}, 1: set(range(40)), 2: {len(prompts[2]) + 2}}
    options = Options(num_drafts, keep_branch_hidden=True, max_completion_length=12)
    with monkeypatch.context() as patch:
        plant(patch, drafter, truths, wrong.get)
        return decode(target, drafter, prompts, options)


def prepare(rollout, blocks):
    return PreparedBatch(text_of_rollout(rollout, range(len(rollout.input_ids))), rollout, blocks, None)


def run(target, drafter, rollout, anchors, settings, sums=None, chunk_bytes=2**20):
    """Return the loss and every gradient of one or more micro-batches `(rollout, anchors)`."""
    parts = [(rollout, anchors)] if isinstance(anchors, BlockBatch) else list(zip(rollout, anchors, strict=True))
    drafter.zero_grad()
    if sums is None:
        sums = weight_sums([part for _, part in parts], settings, drafter.draft_token_ids)
    total = 0.0
    for part in parts:
        result = step_loss(drafter, target, prepare(*part), Objective(settings, SlotRules(), chunk_bytes, sums))
        result.loss.backward()
        total += float(result.loss)
    return total, {name: p.grad.clone() for name, p in drafter.named_parameters()}


def slot_states(target, drafter, ids, anchor, drafts):
    """States of every slot of one block, from the text up to its anchor alone."""
    text = torch.tensor([ids[: anchor + 1]])
    features = target.read_text(text, torch.ones_like(text), drafter.config.target_layer_ids).padded().features
    return run_blocks(drafter, features, text, torch.tensor([[anchor]]), drafts[None, None], target.embed)[0, 0]


def slot_logits(target, drafter, hidden):
    """Logits of the drafter's head for states of slots."""
    if drafter.candidates is None:
        return drafter.draft_logits(hidden, target.project)
    return target.project(hidden[..., : drafter.config.hidden_size])


def compared(target, drafter, hidden, teaching):
    """
    What is compared at a slot: the target's logits with those of the drafter's head; and where a selector chooses
    among the likeliest tokens, the same over these, with the target's own choice in the place of the last if need be.
    """
    logits = slot_logits(target, drafter, hidden)
    if drafter.candidates is None:
        return [(teaching, logits)]
    wanted, ids = int(teaching.argmax()), logits.sort(descending=True).indices[: drafter.candidates.top_k].tolist()
    ids = ids if wanted in ids else [*ids[:-1], wanted]
    context = hidden[drafter.config.hidden_size :]
    scores = torch.stack([logits[token] + drafter.candidates.rows[token] @ context for token in ids])
    return [(teaching, logits), (teaching[ids], scores)]


def target_logits(target, ids, anchor, drafts, slot):
    """
    Logits of the target at the draft-induced state of a slot: text up to the anchor, then the drafts before the slot.
    """
    prefix = torch.tensor([ids[: anchor + 1] + drafts[: slot - 1].tolist()])
    with torch.no_grad():
        return target.causal_lm(input_ids=prefix, use_cache=False).logits[0, -1]


def reference(target, drafter, rollout, anchors, decay=0.5, weights=(1.0, 1.0)):
    """The loss of the method, slot by slot: `L = (w_acc L_acc + w_rej L_rej) / (w_acc + w_rej)`."""
    accepted, rejected, rejected_weights = [], [], []
    for row, block in anchors.anchors.ge(0).nonzero().tolist():
        ids = rollout.input_ids[row].tolist()
        anchor, drafts = int(anchors.anchors[row, block]), anchors.drafts[row, block]
        own = slot_states(target, drafter, ids, anchor, drafts)
        for slot in range(1, NUM_DRAFTS + 1):
            at = (row, block, slot - 1)
            teaching = target_logits(target, ids, anchor, drafts, slot)
            if drafter.draft_token_ids is not None:
                teaching = teaching[drafter.draft_token_ids]
            pairs = compared(target, drafter, own[slot - 1], teaching)
            pairs = [(p.log_softmax(-1), q.log_softmax(-1)) for p, q in pairs]
            if anchors.is_accepted[at]:
                accepted.append(sum((p.exp() * (p - q)).sum() for p, q in pairs))
            if anchors.is_rejected[at]:
                rejected.append(decay ** (slot - 1) * sum((q.exp() * (q - p)).sum() for p, q in pairs))
                rejected_weights.append(decay ** (slot - 1))
    zero = torch.zeros((), dtype=drafter.dtype, requires_grad=True)
    mean_accepted = torch.stack(accepted).mean() if accepted else zero
    mean_rejected = torch.stack(rejected).sum() / sum(rejected_weights) if rejected else zero
    loss = (weights[0] * mean_accepted + weights[1] * mean_rejected) / sum(weights)
    drafter.zero_grad()
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in drafter.named_parameters()}


def assert_close(first, second, tolerance):
    (loss, grads), (other_loss, other_grads) = first, second
    assert abs(loss - other_loss) <= tolerance * max(1, abs(loss))
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        scale = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(
            grad, other_grads[name], rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def replay(rollout, scope="suffix", eos=(EOS,)):
    return mark_slots(rollout, rejected_scope=scope, eos_token_ids=eos)


# -- against the formulas ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["suffix", "first"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_methods_in_float64(monkeypatch, exact_norms, case, scope):
    target, drafter = make_pair(case, torch.float64)
    rollout = roll_out(monkeypatch, target, drafter)
    anchors = replay(rollout, scope)
    assert anchors.is_accepted.sum() >= 10 and anchors.is_rejected.sum() >= 10
    assert anchors.is_branch.any() == (scope == "suffix") and rollout.is_censored.any()
    weights = (1.0, 3.0)
    actual = run(target, drafter, rollout, anchors, streams(weights=weights))
    expected = reference(target, drafter, rollout, anchors, weights=weights)
    assert abs(expected[0]) > 0.1 and all(grad.abs().max() > 1e-6 for grad in expected[1].values())
    assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_methods_in_float32(monkeypatch, case):
    target, drafter = make_pair(case, torch.float32)
    rollout = roll_out(monkeypatch, target, drafter)
    anchors = replay(rollout)
    actual = run(target, drafter, rollout, anchors, streams(decay=0.8))
    # Scores of few candidates are steeper.
    tolerance = 1e-4 if case == "dflash2" else 1e-5
    assert_close(actual, reference(target, drafter, rollout, anchors, decay=0.8), tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_drafts", [2, 4])
def test_the_states_that_are_trained_are_the_states_that_drafted(family, num_drafts):
    target, drafter = make_pair(family, torch.float32)
    rollout = decode(target, drafter, make_prompts(3), Options(num_drafts, max_completion_length=16))
    reading = target.read_text(rollout.input_ids, rollout.attention_mask, drafter.config.target_layer_ids).padded()
    hidden = run_blocks(drafter, reading.features, rollout.input_ids, rollout.anchors, rollout.drafts, target.embed)
    logits = drafter.draft_logits(hidden, target.project)
    assert torch.equal(logits.argmax(-1)[rollout.is_block], rollout.drafts[rollout.is_block])


def test_supervised_anchors_give_the_mean_forward_kl(exact_norms):
    target, drafter = make_pair("dflash", torch.float64)
    ids = torch.tensor([greedy_text(target, [9, 10], 12), greedy_text(target, [11, 12], 12)])
    mask = torch.ones_like(ids)
    completion = mask.bool().clone()
    completion[:, :2] = False
    anchors = sample_anchors(ids, completion, [0, 1], num_anchors=3, num_drafts=NUM_DRAFTS, seed=0, epoch=0)
    settings = streams(weights=(1.0, 0.0))
    sums = weight_sums([anchors], settings, None)
    batch = PreparedBatch(TargetText(ids, mask, completion, [0, 1]), None, anchors, None)
    result = step_loss(drafter, target, batch, Objective(settings, SlotRules(), 2**20, sums))
    losses = []
    for row, block, slot in anchors.is_accepted.nonzero().tolist():
        anchor = int(anchors.anchors[row, block])
        own = slot_states(target, drafter, ids[row].tolist(), anchor, anchors.drafts[row, block])
        q = slot_logits(target, drafter, own[slot]).log_softmax(-1)
        p = target.causal_lm(input_ids=ids[row : row + 1, : anchor + slot + 1]).logits[0, -1].log_softmax(-1)
        losses.append(float((p.exp() * (p - q)).sum()))
    assert float(result.loss) == pytest.approx(sum(losses) / len(losses), abs=1e-10)


# -- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_order_and_padding_change_nothing(monkeypatch, exact_norms, case):
    target, drafter = make_pair(case, torch.float64)
    rollout = roll_out(monkeypatch, target, drafter)
    settings = streams()
    whole = run(target, drafter, rollout, replay(rollout), settings)
    # `rows` also cuts padding: the rows differ in length.
    parts = [rollout.rows(2, 3), rollout.rows(0, 2)]
    assert parts[0].input_ids.shape != parts[1].input_ids.shape
    assert_close(run(target, drafter, parts, [replay(part) for part in parts], settings), whole, 1e-12)


def test_the_size_of_a_chunk_changes_nothing(monkeypatch, exact_norms):
    target, drafter = make_pair("eagle3", torch.float64)
    rollout = roll_out(monkeypatch, target, drafter)
    runs = [run(target, drafter, rollout, replay(rollout), streams(), chunk_bytes=size) for size in (1, 1000, 2**30)]
    assert_close(runs[0], runs[1], 1e-12)
    assert_close(runs[0], runs[2], 1e-12)


def test_a_batch_without_any_slot_still_reaches_every_parameter(monkeypatch):
    for case in CASES:
        target, drafter = make_pair(case, torch.float32)
        rollout = roll_out(monkeypatch, target, drafter)
        anchors = replay(rollout)
        nothing = torch.zeros_like(anchors.is_accepted)
        empty = BlockBatch(anchors.anchors, anchors.drafts, anchors.labels, nothing, nothing, nothing)
        loss, grads = run(target, drafter, rollout, empty, streams())
        assert loss == 0.0 and all(grad is not None and not grad.any() for grad in grads.values())


# -- shares of the streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("emptied", ["is_accepted", "is_rejected"])
def test_an_empty_stream_leaves_the_other_its_share(monkeypatch, exact_norms, emptied):
    target, drafter = make_pair("dflash", torch.float64)
    rollout = roll_out(monkeypatch, target, drafter)
    anchors = replay(rollout)
    parts = dict(vars(anchors)) | {emptied: torch.zeros_like(anchors.is_accepted)}
    alone = run(target, drafter, rollout, BlockBatch(**parts), streams())
    assert_close(alone, reference(target, drafter, rollout, BlockBatch(**parts)), 1e-10)
    # The same stream as the only one with a weight has all of the loss, which is twice its half share.
    weights = (0.0, 1.0) if emptied == "is_accepted" else (1.0, 0.0)
    sole = run(target, drafter, rollout, anchors, streams(weights=weights))
    assert sole[0] == pytest.approx(2 * alone[0], rel=1e-12)


def test_metrics_are_sums_that_divide_to_the_means_of_each_stream(monkeypatch, exact_norms):
    target, drafter = make_pair("reduced", torch.float64)
    rollout = roll_out(monkeypatch, target, drafter)
    anchors, settings = replay(rollout), streams()
    sums = weight_sums([anchors], settings, drafter.draft_token_ids)
    objective = Objective(settings, SlotRules(), 2**20, sums)
    result = step_loss(drafter, target, prepare(rollout, anchors), objective)
    means = {name: top / bottom for name, (top, bottom) in result.sums.read().items()}
    assert float(result.loss) == pytest.approx((means["loss/accepted"] + means["loss/rejected"]) / 2, rel=1e-6)
    assert means["slots/accepted"] == int(anchors.is_accepted.sum())
    assert 0.05 < means["lost_target_mass/accepted"] < 0.95
    assert sums.tolist() == [result.sums.read()[f"loss/{name}"][1] for name in ("accepted", "rejected")] + [0.0]


# -- cross entropy ----------------------------------------------------------------------------------------------------


def test_cross_entropy_leaves_out_tokens_the_draft_vocabulary_lacks(monkeypatch, exact_norms):
    target, drafter = make_pair("reduced", torch.float64)
    rollout = roll_out(monkeypatch, target, drafter)
    anchors = replay(rollout)
    settings = streams(accepted="ce", weights=(1.0, 0.0))
    known = drafter.draft_token_ids.tolist()
    weights = row_weights(anchors, "accepted", settings["accepted"], drafter.draft_token_ids)
    losses = []
    for row, block, slot in anchors.is_accepted.nonzero().tolist():
        label = int(anchors.labels[row, block, slot])
        assert bool(weights[row, block, slot]) == (label in known)
        if label in known:
            anchor, drafts = int(anchors.anchors[row, block]), anchors.drafts[row, block]
            states = slot_states(target, drafter, rollout.input_ids[row].tolist(), anchor, drafts)
            own = slot_logits(target, drafter, states)[slot]
            losses.append(-float(own.log_softmax(-1)[known.index(label)]))
    assert 0 < len(losses) < int(anchors.is_accepted.sum())
    loss, _ = run(target, drafter, rollout, anchors, settings)
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-10)


def test_cross_entropy_behind_a_rejection_learns_what_the_target_would_say_there(monkeypatch, exact_norms):
    target, drafter = make_pair("reduced", torch.float64)
    rollout = roll_out(monkeypatch, target, drafter)
    anchors = replay(rollout, "suffix")
    settings = streams(rejected="ce", weights=(0.0, 1.0), decay=0.5)
    known = drafter.draft_token_ids.tolist()
    total, weight_sum, kinds = torch.zeros((), dtype=torch.float64), 0.0, set()
    for row, block, slot in anchors.is_rejected.nonzero().tolist():
        ids, label = rollout.input_ids[row].tolist(), int(anchors.labels[row, block, slot])
        anchor, drafts = int(anchors.anchors[row, block]), anchors.drafts[row, block]
        kinds.add("a branch" if label < 0 else "a known token" if label in known else "a lost token")
        if label < 0:
            # No text stands there: what the target would choose of what the drafter can say.
            label = known[int(target_logits(target, ids, anchor, drafts, slot + 1)[known].argmax())]
        if label in known:
            own = slot_logits(target, drafter, slot_states(target, drafter, ids, anchor, drafts))[slot]
            total = total - 0.5**slot * own.log_softmax(-1)[known.index(label)]
            weight_sum += 0.5**slot
    assert kinds == {"a branch", "a known token", "a lost token"}
    drafter.zero_grad()
    (total / weight_sum).backward()
    expected = float(total.detach() / weight_sum), {name: p.grad.clone() for name, p in drafter.named_parameters()}
    assert_close(run(target, drafter, rollout, anchors, settings), expected, 1e-9)


def test_the_rejected_stream_decays_from_the_anchor():
    anchors = torch.tensor([[3]])
    mask = torch.tensor([[[False, False, True, True]]])
    batch = BlockBatch(anchors, torch.zeros(1, 1, 4, dtype=torch.long), torch.full((1, 1, 4), -1), ~mask, mask, mask)
    weights = row_weights(batch, "rejected", StreamSettings("reverse_kl", 1.0, 0.8), None)
    assert weights[0, 0].tolist() == pytest.approx([0, 0, 0.64, 0.512])
    assert row_weights(batch, "accepted", StreamSettings("forward_kl", 1.0, 1.0), None)[0, 0].tolist() == [1, 1, 0, 0]
