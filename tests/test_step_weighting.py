# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Slot rules and the supervised stream inside a training step: against loops over slots, and against supervised training.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_step import (
    CASES,
    NUM_DRAFTS,
    assert_close,
    compared,
    exact_norms,
    make_pair,
    replay,
    roll_out,
    slot_states,
    streams,
)

from helpers import rollouts
from helpers.oracle import greedy_text
from helpers.rollouts import Options
from helpers.tiny import EOS, FAMILIES, MASK, TINY_RUN, make_drafter, make_prompts, make_target
from trl_draft_opd import (
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
)
from trl_draft_opd.rollout.blocks import BlockBatch, draft_text, join_blocks, sample_anchors
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.trainer import step
from trl_draft_opd.trainer.step import Objective, PreparedBatch, SlotRules, StreamSettings, step_loss, weight_sums


__all__ = ["exact_norms"]
OFF, D_PACE, UNTIL_FAIL, BOTH = SlotRules(), SlotRules(0.5), SlotRules(None, True), SlotRules(0.25, True)


def draft_along(target, drafter, ids, anchors):
    """What the drafter proposes and how much of it the text keeps, by replay."""
    text = TargetText(ids, torch.ones_like(ids), torch.ones_like(ids).bool(), list(range(len(ids))))
    return rollouts.draft_at(target, drafter, text, anchors, Options(NUM_DRAFTS, keep_branch_hidden=True))


def half_liked_text(target, drafter):
    """Text that follows the drafter for 0, 1, ... drafts and then does not, with the anchors of those blocks."""
    ids, anchors = make_prompts(1, seed=3)[0] + [9], []
    for num_kept in (2, 0, 4, 1, 3, 0):
        anchors.append(len(ids) - 1)
        padded = torch.tensor([ids + [9] * (NUM_DRAFTS + 1)])
        drafts = draft_along(target, drafter, padded, torch.tensor([anchors[-1:]])).drafts[0, 0].tolist()
        kept = drafts[:num_kept]
        # Every third token is missing in the reduced vocabulary, so some of these misses are of tokens it lacks.
        ids = ids + kept + [(drafts[num_kept % NUM_DRAFTS] + 5 + num_kept) % 50 + 7]
    ids = torch.tensor([ids])
    anchors = torch.tensor([anchors])
    blocks = draft_text(anchors, ids, torch.ones_like(ids).bool(), num_drafts=NUM_DRAFTS)
    return ids, blocks


def run(drafter, target, ids, blocks, settings, rules, rollout=None, sums=None, mask=None):
    """Return the step, its loss as a number and every gradient."""
    drafter.zero_grad()
    mask = torch.ones_like(ids) if mask is None else mask
    if sums is None:
        sums = weight_sums([blocks], settings, drafter.draft_token_ids)
    batch = PreparedBatch(TargetText(ids, mask, mask.bool(), range(len(ids))), rollout, blocks, None)
    result = step_loss(drafter, target, batch, Objective(settings, rules, 3000, sums))
    result.loss.backward()
    return result, (float(result.loss.detach()), {name: p.grad.clone() for name, p in drafter.named_parameters()})


def plain(drafter, target, ids, blocks, settings, rules, mask=None):
    """
    The same loss in loops: one block at a time, weights from the definition, forward KL on every slot.

    Labels are the text, so the target's view of every slot stands in one forward over the row.
    """
    known = range(10**6) if drafter.draft_token_ids is None else drafter.draft_token_ids.tolist()
    masks = {"accepted": blocks.is_accepted, "rejected": blocks.is_rejected, "supervised": blocks.is_supervised}
    totals, counts, texts_logits = dict.fromkeys(settings, 0.0), dict.fromkeys(settings, 0.0), {}
    for row, block in blocks.anchors.ge(0).nonzero().tolist():
        text = ids[row].tolist() if mask is None else ids[row, : int(mask[row].sum())].tolist()
        anchor, labels = int(blocks.anchors[row, block]), blocks.labels[row, block].tolist()
        if row not in texts_logits:
            with torch.no_grad():
                texts_logits[row] = target.causal_lm(input_ids=torch.tensor([text]), use_cache=False).logits[0]
        states = slot_states(target, drafter, text, anchor, blocks.drafts[row, block])
        own = drafter.draft_logits(states, target.project).log_softmax(-1)
        passed, reach, is_open, kept = 1.0, [], True, []
        for slot, label in enumerate(labels):
            index = known.index(label) if label in known else None
            probability = 0.0 if index is None else float(own[slot, index].detach().exp())
            if rules.d_pace_floor is not None:
                passed *= (1 - rules.d_pace_floor) * probability + rules.d_pace_floor
            in_sum = label >= 0 and any(
                settings[name].weight > 0 and masks[name][row, block, slot] for name in settings
            )
            reach.append(passed * in_sum)
            kept.append(float(is_open or not rules.is_until_fail))
            is_open = is_open and index is not None and int(own[slot].argmax()) == index
        for name, stream in settings.items():
            for slot in masks[name][row, block].nonzero()[:, 0].tolist():
                p = texts_logits[row][anchor + slot]
                p = p if drafter.draft_token_ids is None else p[drafter.draft_token_ids]
                pairs = compared(target, drafter, states[slot], p)
                pairs = [(p.log_softmax(-1), q.log_softmax(-1)) for p, q in pairs]
                weight = sum(reach[slot:]) if rules.d_pace_floor is not None else 1.0
                base = stream.decay**slot * (stream.weight > 0)
                divergence = sum((p.exp() * (p - q)).sum() for p, q in pairs)
                totals[name] = totals[name] + base * weight * kept[slot] * divergence
                counts[name] += base
    total_weight = sum(stream.weight for stream in settings.values())
    loss = sum(stream.weight / total_weight * totals[n] / counts[n] for n, stream in settings.items() if counts[n])
    drafter.zero_grad()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in drafter.named_parameters()}


# -- slot rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [D_PACE, UNTIL_FAIL, BOTH], ids=["d_pace", "until_fail", "both"])
@pytest.mark.parametrize("case", CASES)
def test_weighed_slots_give_the_loss_and_gradients_of_their_definition(exact_norms, case, rules):
    target, drafter = make_pair(case, torch.float64)
    ids, blocks = half_liked_text(target, drafter)
    # A decay that float32 holds exactly.
    settings = {"accepted": StreamSettings("forward_kl", 1.0, 0.5)}
    result, actual = run(drafter, target, ids, blocks, settings, rules)
    assert_close(actual, plain(drafter, target, ids, blocks, settings, rules), 1e-10)
    num_slots = result.sums.read()["slots/accepted"][0]
    assert (num_slots < blocks.is_accepted.sum()) == rules.is_until_fail and num_slots >= 12
    assert actual[0] != run(drafter, target, ids, blocks, settings, OFF)[1][0]


@pytest.mark.parametrize("case", CASES)
def test_until_fail_keeps_the_slots_that_replay_keeps(case):
    target, drafter = make_pair(case, torch.float32)
    ids, blocks = half_liked_text(target, drafter)
    accepted = draft_along(target, drafter, ids, blocks.anchors).accepted
    assert accepted.tolist() == [[2, 0, 4, 1, 3, 0]]
    slots = torch.arange(1, NUM_DRAFTS + 1)
    until_fail = replace(blocks, is_accepted=blocks.is_accepted & (slots <= accepted[..., None] + 1))
    settings = {"accepted": StreamSettings("forward_kl", 1.0, 0.8)}
    sums = weight_sums([blocks], settings, drafter.draft_token_ids)
    result, actual = run(drafter, target, ids, blocks, settings, UNTIL_FAIL)
    expected, by_hand = run(drafter, target, ids, until_fail, settings, OFF, sums=sums)
    assert actual[0] == by_hand[0] and all(torch.equal(actual[1][n], by_hand[1][n]) for n in actual[1])
    assert result.sums.read() == expected.sums.read()


def test_without_rules_nothing_is_scored(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nothing is to be scored")

    monkeypatch.setattr(step, "score_labels", refuse)
    for case in CASES:
        target, drafter = make_pair(case, torch.float32)
        ids, blocks = half_liked_text(target, drafter)
        settings = streams(weights=(1.0, 0.0))
        assert run(drafter, target, ids, blocks, settings, OFF)[1][0] > 0
        with pytest.raises(AssertionError, match="nothing is to be scored"):
            run(drafter, target, ids, blocks, settings, D_PACE)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.0, 1.0)], ids=["both streams", "first rejections alone"])
@pytest.mark.parametrize("case", CASES)
def test_d_pace_weighs_accepted_slots_and_the_first_rejected_one(monkeypatch, exact_norms, case, weights):
    target, drafter = make_pair(case, torch.float64)
    rollout = roll_out(monkeypatch, target, drafter)
    blocks = replay(rollout, "first")
    settings = streams(rejected="forward_kl", weights=weights, decay=1.0)
    ids, mask = rollout.input_ids, rollout.attention_mask
    _, actual = run(drafter, target, ids, blocks, settings, D_PACE, mask=mask)
    assert_close(actual, plain(drafter, target, ids, blocks, settings, D_PACE, mask), 1e-10)


# -- the supervised stream --------------------------------------------------------------------------------------------


def three_streams(weights=(1.0, 3.0, 2.0)):
    return streams(weights=weights[:2]) | {"supervised": StreamSettings("forward_kl", weights[2], 0.7)}


def supervised_blocks(rollout, num_anchors=3):
    ids, completions = rollout.input_ids, rollout.completion_mask
    return sample_anchors(
        ids, completions, [0, 1, 2], num_anchors=num_anchors, num_drafts=NUM_DRAFTS, seed=0, epoch=0
    ).as_supervised()


@pytest.mark.parametrize("case", CASES)
def test_one_pass_over_all_streams_is_the_sum_of_two(monkeypatch, exact_norms, case):
    target, drafter = make_pair(case, torch.float64)
    rollout = roll_out(monkeypatch, target, drafter)
    chain, on_text = replay(rollout), supervised_blocks(rollout)
    arguments = {"rollout": rollout, "mask": rollout.attention_mask}
    joined = join_blocks(chain, on_text)
    assert chain.is_branch.any() and joined.anchors.shape[1] == chain.anchors.shape[1] + 3

    def loss_of(blocks, settings):
        return run(drafter, target, rollout.input_ids, blocks, settings, OFF, **arguments)[1]

    loss, grads = loss_of(joined, three_streams())
    chain_loss, chain_grads = loss_of(chain, streams(weights=(1.0, 3.0)))
    as_sft = replace(on_text, is_accepted=on_text.is_supervised, is_supervised=None)
    text_loss, text_grads = loss_of(as_sft, {"accepted": StreamSettings("forward_kl", 1.0, 0.7)})
    assert min(chain_loss, text_loss) > 0.1
    expected = (4 * chain_loss + 2 * text_loss) / 6, {n: (4 * chain_grads[n] + 2 * text_grads[n]) / 6 for n in grads}
    assert_close((loss, grads), expected, 1e-10)


@pytest.mark.parametrize("rules", [OFF, D_PACE], ids=["decay", "d_pace"])
def test_splits_of_a_step_give_the_same_loss(monkeypatch, exact_norms, rules):
    target, drafter = make_pair("reduced", torch.float64)
    rollout = roll_out(monkeypatch, target, drafter)
    settings = three_streams()
    blocks = join_blocks(replay(rollout, "first"), supervised_blocks(rollout))
    sums = weight_sums([blocks], settings, drafter.draft_token_ids)
    assert sums.shape == (3,) and (sums > 0).all()
    whole = run(drafter, target, rollout.input_ids, blocks, settings, rules, mask=rollout.attention_mask)[1]
    parts = [BlockBatch(**{name: tensor[rows] for name, tensor in vars(blocks).items()}) for rows in ([0], [2, 1])]
    torch.testing.assert_close(weight_sums(parts, settings, drafter.draft_token_ids), sums)
    results = []
    for part, rows in zip(parts, ([0], [2, 1]), strict=True):
        ids, mask = rollout.input_ids[rows], rollout.attention_mask[rows]
        results.append(run(drafter, target, ids, part, settings, rules, mask=mask, sums=sums)[1])
    grads = {name: results[0][1][name] + results[1][1][name] for name in whole[1]}
    assert_close((results[0][0] + results[1][0], grads), whole, 1e-10)


def test_rows_that_were_refused_are_not_supervised():
    ids = torch.arange(20).view(2, 10)
    chain = SimpleNamespace(
        input_ids=ids,
        completion_mask=torch.ones_like(ids).bool(),
        anchors=torch.tensor([[-1, -1], [3, 5]]),
        is_block=torch.tensor([[False, False], [True, True]]),
    )
    for positions, expected in (("random", [1, 2, 3, 4, 5, 6, 7, 8]), ("error", [3, 5])):
        args = SimpleNamespace(supervised_anchors=positions, num_supervised_anchors=0, seed=0)
        trainer = SimpleNamespace(args=args, num_drafts=3)
        blocks = DraftOPDTrainer._supervised_blocks(trainer, chain, [0, 1], epoch=0)
        assert (blocks.anchors[0] == -1).all() and not blocks.is_supervised[0].any()
        assert blocks.anchors[1].tolist() == expected and not blocks.is_accepted.any()
        assert blocks.is_supervised[1].sum(dim=-1).tolist() == [min(3, 9 - anchor) for anchor in expected]


# -- both trainers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    """Prompts with the target's own greedy responses of 12 tokens."""
    texts = [(len(prompt), greedy_text(target, prompt, 12)) for prompt in make_prompts(10)]
    texts = [(start, text) for start, text in texts if not {EOS, MASK} & set(text)][:4]
    return Dataset.from_dict(
        {"prompt_ids": [text[:n] for n, text in texts], "completion_ids": [text[n:] for n, text in texts]}
    )


def train(kind, output_dir, drafter, target, rows, eval_rows=None, **changes):
    options = {
        "output_dir": str(output_dir),
        **TINY_RUN,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_completion_length": 12,
    }
    config, trainer_class = (DraftSFTConfig, DraftSFTTrainer) if kind == "sft" else (DraftOPDConfig, DraftOPDTrainer)
    trainer = trainer_class(drafter, target, config(**options | changes), rows, eval_rows)
    trainer.train()
    return trainer, {name: tensor.detach().clone() for name, tensor in drafter.named_parameters()}


SUPERVISED_ALONE = {"accepted_weight": 0.0, "rejected_weight": 0.0, "supervised_weight": 1.0}


@pytest.mark.parametrize("rule", ["decay", "d_pace"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_supervised_stream_alone_trains_as_supervised_training_does(tmp_path, target, rows, family, rule):
    common = {"slot_weighting": rule} | ({"position_decay": 0.9} if rule == "decay" else {})
    sft, expected = train("sft", tmp_path / "a", make_drafter(family, target), target, rows, num_anchors=0, **common)
    alone = SUPERVISED_ALONE | {"num_supervised_anchors": 0, "completions_from_target": True} | common
    opd, actual = train("opd", tmp_path / "b", make_drafter(family, target), target, rows, **alone)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-5)
    for first, second in zip(sft.state.log_history[:2], opd.state.log_history[:2], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["slots/supervised"] == first["slots/accepted"]
        assert second["loss/supervised"] == pytest.approx(first["loss/accepted"], rel=1e-4)


@pytest.mark.parametrize(
    "kind, family, changes",
    [
        ("sft", "eagle3", {"slot_weighting": "d_pace", "slot_scope": "until_fail", "bf16": True}),
        ("sft", "dflash", {"slot_scope": "until_fail"}),
        ("opd", "eagle3", {"slot_weighting": "d_pace", "rejected_scope": "first", "bf16": True}),
        ("opd", "eagle3", {"supervised_weight": 1.0, "num_supervised_anchors": 3}),
        ("opd", "dflash", {"supervised_weight": 1.0, "supervised_anchors": "error"}),
        ("opd", "dflash", SUPERVISED_ALONE | {"supervised_anchors": "error", "slot_weighting": "d_pace"}),
        ("opd", "eagle3", SUPERVISED_ALONE | {"rollout": "live"}),
    ],
)
def test_every_variant_trains_and_evaluates(tmp_path, target, rows, kind, family, changes):
    drafter = make_drafter(family, target)
    before = {name: tensor.detach().clone() for name, tensor in drafter.named_parameters()}
    trainer, after = train(kind, tmp_path, drafter, target, rows, rows.select([0]), **changes)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    log, result = trainer.state.log_history[0], trainer.evaluate()
    assert result["eval_loss"] > 0
    if changes.get("supervised_weight"):
        assert log["slots/supervised"] > 0 and result["eval_loss/supervised"] > 0
    else:
        assert "slots/supervised" not in log
