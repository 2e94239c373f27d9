# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One training step on rows of any length: they lie end to end, nothing is computed for padding or for what has no
weight, and blocks may be drafted in passes. None of it changes the loss or a gradient.
"""

from dataclasses import replace

import pytest
import torch

from helpers.oracle import greedy_text, plant
from helpers.rollouts import Options, decode
from helpers.tiny import FAMILIES, VOCAB, make_drafter, make_prompts, make_target
from trl_draft_opd.drafters import base
from trl_draft_opd.rollout.blocks import BlockBatch, mark_slots, sample_anchors
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.trainer.step import Objective, PreparedBatch, SlotRules, StreamSettings, step_loss, weight_sums
from trl_draft_opd.trainer.texts import text_of_rollout


NUM_DRAFTS = 4
STREAMS = {
    "accepted": StreamSettings("forward_kl", 1.0, 1.0),
    "rejected": StreamSettings("reverse_kl", 3.0, 0.8),
}


def random_text(lengths, seed=0):
    """Random rows of given lengths, a prompt of two tokens each."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(7, VOCAB, (length,), generator=generator) for length in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return TargetText(ids, mask, mask.bool() & (torch.arange(ids.shape[1]) >= 2), list(range(len(lengths))))


def supervised(text, num_anchors=None):
    blocks = sample_anchors(
        text.input_ids,
        text.completion_mask,
        text.sample_ids,
        num_anchors=num_anchors,
        num_drafts=NUM_DRAFTS,
        seed=0,
        epoch=0,
    )
    return PreparedBatch(text, None, blocks, None)


def rolled_out(monkeypatch, target, drafter, scope):
    """Rows of different lengths with blocks of every fate."""
    prompts = make_prompts(3, seed=2)
    truths = [greedy_text(target, prompt, 20) for prompt in prompts]
    wrong = {0: {len(prompts[0]) + i for i in (3, 9)}, 1: set(range(40)), 2: {len(prompts[2]) + 2}}
    options = Options(NUM_DRAFTS, keep_branch_hidden=scope == "suffix", max_completion_length=12)
    with monkeypatch.context() as patch:
        plant(patch, drafter, truths, wrong.get)
        rollout = decode(target, drafter, prompts, options)
    blocks = mark_slots(rollout, rejected_scope=scope, eos_token_ids=[])
    return PreparedBatch(text_of_rollout(rollout, [0, 1, 2]), rollout, blocks, None)


def row_of(batch, row):
    """One row of a batch as a batch of its own, without padding."""
    text, length = batch.text, int(batch.text.attention_mask[row].sum())
    cut = [tensor[row : row + 1, :length] for tensor in (text.input_ids, text.attention_mask, text.completion_mask)]
    kept = batch.blocks.anchors[row] >= 0
    kept[0] = True
    blocks = {name: None if each is None else each[row : row + 1, kept] for name, each in vars(batch.blocks).items()}
    rollout = None
    if batch.rollout is not None:
        hidden = batch.rollout.branch_hidden
        hidden = None if hidden is None else hidden[row : row + 1, kept]
        rollout = replace(batch.rollout.rows(row, row + 1), branch_hidden=hidden)
    return PreparedBatch(TargetText(*cut, [text.sample_ids[row]]), rollout, BlockBatch(**blocks), None)


def run(target, drafter, batches, *, streams=STREAMS, rules=SlotRules(), per_pass=None):  # noqa: B008  a constant
    """Return loss and gradients of the micro-batches of one optimiser step."""
    drafter.zero_grad()
    sums = weight_sums([batch.blocks for batch in batches], streams, drafter.draft_token_ids)
    objective = Objective(streams, rules, 2**20, sums, per_pass)
    total = 0.0
    for batch in batches:
        loss = step_loss(drafter, target, batch, objective).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in drafter.named_parameters() if p.requires_grad}


def assert_same(first, second, loss_tolerance, tolerance):
    """Losses within a relative tolerance, gradients within one of each tensor's largest entry."""
    assert abs(first[0] - second[0]) <= loss_tolerance * abs(first[0])
    for name, grad in first[1].items():
        assert grad.abs().max() > 0
        difference = float((grad - second[1][name]).abs().max() / grad.abs().max())
        assert difference <= tolerance, f"{name}: {difference}"


# -- rows of any length -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [SlotRules(), SlotRules(0.5, True)], ids=["plain", "slot rules"])
@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_rows_of_supervised_text_train_as_each_row_alone(family, rules):
    target = make_target()
    drafter = make_drafter(family, target)
    batch = supervised(random_text([40, 7, 90, 3]))
    streams = {"accepted": StreamSettings("forward_kl", 1.0, 0.8)}
    together = run(target, drafter, [batch], streams=streams, rules=rules)
    alone = run(target, drafter, [row_of(batch, row) for row in range(4)], streams=streams, rules=rules)
    assert_same(together, alone, 1e-6, 1e-5)


@pytest.mark.parametrize("scope", ["first", "suffix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_rows_of_a_rollout_train_as_each_row_alone(monkeypatch, family, scope):
    target = make_target()
    drafter = make_drafter(family, target)
    batch = rolled_out(monkeypatch, target, drafter, scope)
    assert len(set(batch.text.attention_mask.sum(dim=1).tolist())) == 3
    assert batch.blocks.is_branch.any() == (scope == "suffix")
    together = run(target, drafter, [batch])
    assert_same(together, run(target, drafter, [row_of(batch, row) for row in range(3)]), 1e-6, 1e-5)


class Counted:
    """Counts the tokens that pass through some layers."""

    def __init__(self, *layers):
        self.tokens = [0] * len(layers)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(lambda module, args, output, i=index: self.count(i, output))

    def count(self, index, output):
        self.tokens[index] += output[..., 0].numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_200_and_2000_tokens_compute_no_token_of_padding(family):
    target = make_target()
    drafter = make_drafter(family, target)
    batch = supervised(random_text([200, 2000]), num_anchors=8)
    block_layer = drafter.midlayer.mlp.gate_proj if family == "eagle3" else drafter.layers[0].mlp.gate_proj
    counted = Counted(target.layers[0].mlp.gate_proj, drafter.fc, block_layer)
    run(target, drafter, [batch], streams={"accepted": STREAMS["accepted"]})
    slots = NUM_DRAFTS if family == "eagle3" else drafter.config.block_size
    assert counted.tokens == [2200, 2200, 16 * slots]


# -- what has no weight -----------------------------------------------------------------------------------------------


def drafted(monkeypatch):
    """Note the blocks of every call of a drafter."""
    calls = []

    def begin(inner):
        def noted(self, context, anchors, *args):
            calls.append(anchors.shape[1])
            return inner(self, context, anchors, *args)

        return noted

    for family in (base.Drafter, *base.Drafter.__subclasses__()):
        if "begin" in vars(family):
            monkeypatch.setattr(family, "begin", begin(family.begin))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_streams_without_weight_are_not_run(monkeypatch, family):
    target = make_target()
    drafter = make_drafter(family, target)
    batch = rolled_out(monkeypatch, target, drafter, "first")
    has_rejected = int(batch.blocks.is_rejected.any(dim=-1).sum())
    assert 0 < has_rejected < int((batch.blocks.anchors >= 0).sum())
    calls = drafted(monkeypatch)
    streams = STREAMS | {"accepted": StreamSettings("forward_kl", 0.0, 1.0)}
    loss, _ = run(target, drafter, [batch], streams=streams)
    assert calls == [has_rejected] and loss > 0
    sums = weight_sums([batch.blocks], streams, None)
    metrics = step_loss(drafter, target, batch, Objective(streams, SlotRules(), 2**20, sums)).sums.read()
    assert metrics["slots/accepted"] == (0.0, 1.0) and "loss/accepted" not in metrics


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_blocks_gives_every_parameter_a_gradient_of_zeros(family):
    target = make_target()
    drafter = make_drafter(family, target)
    batch = supervised(random_text([2, 5]))
    nothing = replace(batch.text, completion_mask=torch.zeros_like(batch.text.completion_mask))
    loss, gradients = run(target, drafter, [supervised(nothing)])
    assert loss == 0.0 and set(gradients) == {name for name, _ in drafter.named_parameters()}
    assert not any(gradient.any() for gradient in gradients.values())


# -- passes -----------------------------------------------------------------------------------------------------------


def saved_bytes(work):
    """Return what autograd keeps of `work` for the backward pass."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return sum(kept.values())


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_drafted_in_passes_give_the_same_loss_and_gradients(monkeypatch, family, is_checkpointed):
    target = make_target()
    drafter = make_drafter(family, target).train()
    if is_checkpointed:
        drafter.gradient_checkpointing_enable()
    batch = supervised(random_text([60, 20, 130]))
    num_blocks = int((batch.blocks.anchors >= 0).sum())
    streams = {"accepted": STREAMS["accepted"]}
    at_once = run(target, drafter, [batch], streams=streams)
    calls = drafted(monkeypatch)
    in_passes = run(target, drafter, [batch], streams=streams, per_pass=num_blocks // 4)
    assert len(calls) >= 5 and max(calls) <= num_blocks // 4 and sum(calls[: len(calls) // 2]) == num_blocks
    assert_same(at_once, in_passes, 1e-6, 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_is_computed_again_draws_an_adapters_dropout_again(monkeypatch, family):
    from peft import LoraConfig, get_peft_model

    target, batch, found = make_target(), supervised(random_text([60, 20])), []
    for checkpoint in (base.checkpoint, lambda part, *args, **options: part(*args)):
        monkeypatch.setattr(base, "checkpoint", checkpoint)
        drafter = make_drafter(family, target)
        config = LoraConfig(target_modules=["q_proj", "up_proj"], r=2, lora_dropout=0.5, init_lora_weights=False)
        torch.manual_seed(2)
        get_peft_model(drafter, config)
        torch.manual_seed(3)
        found.append(run(target, drafter.train(), [batch], streams={"accepted": STREAMS["accepted"]}, per_pass=10))
    assert_same(*found, 1e-6, 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_blocks_drafted_in_passes_only_the_results_are_kept(monkeypatch, family):
    target = make_target()
    drafter = make_drafter(family, target)
    batch = supervised(random_text([300]))
    kept = {}
    for per_pass in (1000, 30):
        text = batch.text
        reading = target.read_text(text.input_ids, text.attention_mask, drafter.config.target_layer_ids)
        features, starts = reading.features[None], torch.zeros_like(text.input_ids)
        context = saved_bytes(lambda: drafter.encode_text(features, text.input_ids, target.embed, starts))  # noqa: B023
        kept[per_pass] = -context + saved_bytes(
            lambda: base.run_blocks(
                drafter,
                features,  # noqa: B023
                text.input_ids,  # noqa: B023
                batch.blocks.anchors,
                batch.blocks.drafts,
                target.embed,
                starts,  # noqa: B023
                blocks_per_pass=per_pass,  # noqa: B023
            )
        )
    assert kept[30] < kept[1000] / 10


def test_by_default_passes_hold_as_many_slots_as_the_constant(monkeypatch):
    target = make_target()
    drafter = make_drafter("eagle3", target)
    batch = supervised(random_text([40]))
    monkeypatch.setattr(base, "SLOTS_PER_PASS", 10 * NUM_DRAFTS)
    calls = drafted(monkeypatch)
    run(target, drafter, [batch], streams={"accepted": STREAMS["accepted"]})
    assert len(calls) == 8 and max(calls) == 10
