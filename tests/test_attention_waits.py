# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
On an accelerator: no operand of another device in any path of the attention, and how often the host waits for it.
"""

import pytest
import torch

from helpers.pretend_accelerator import DEVICE, pretend_accelerator
from helpers.tiny import FAMILIES, VOCAB, make_drafter, make_target
from trl_draft_opd import DFlashDraftConfig, DFlashDraftModel
from trl_draft_opd.drafters.attention import AttentionPlan, Sight, flex
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.utils.versions import switch_checkpointing


LENGTHS, K = [40, 3, 21], 4


def make_variant(target):
    """A DFlash drafter with a window, causal blocks and sinks in one of its layers and none of that in the other."""
    shape = make_drafter("dflash", target).config.to_dict()
    layers = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9, "is_causal": None}
    return DFlashDraftModel(DFlashDraftConfig.from_dict(shape | layers | {"attention_sinks": True}))


def draft(family, device, is_recomputed):
    """Draft packed texts forward and backward; return the gradients' norms, what was counted, and where."""
    target = make_target()
    drafter = make_variant(target) if family == "windows" else make_drafter(family, target)
    drafter.train()
    if is_recomputed:
        switch_checkpointing(drafter, "enable")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, VOCAB, (1, sum(LENGTHS)), generator=generator)
    features = torch.randn(1, sum(LENGTHS), drafter.fc.in_features, generator=generator)
    first = torch.tensor([sum(LENGTHS[:index]) for index in range(len(LENGTHS))])
    starts = first.repeat_interleave(torch.tensor(LENGTHS))[None]
    anchors = (torch.arange(sum(LENGTHS))[None] != starts).nonzero()[:, 1][None]
    drafts = torch.randint(7, VOCAB, (1, anchors.shape[1], K), generator=generator)
    with torch.no_grad():
        width = run_blocks(drafter, features, ids, anchors, drafts, target.embed, starts).shape[-1]
    with pretend_accelerator() as counts:
        embedding = target.causal_lm.get_input_embeddings().to(device)
        drafter.to(device)
        inputs = [tensor.to(device) for tensor in (features, ids, anchors, drafts, starts)]
        weight = torch.randn(*drafts.shape, width, generator=generator).to(device)
        counts.clear()
        hidden = run_blocks(drafter, *inputs[:4], embedding, inputs[4])
        (hidden * weight).sum().backward()
        totals, table = counts.totals(), counts.table("syncs")
        norms = {
            name: float(weight.grad.norm()) for name, weight in drafter.named_parameters() if weight.grad is not None
        }
    return norms, totals, table


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", [*FAMILIES, "windows"])
def test_the_plan_is_the_only_wait_of_drafting_packed_texts(call, family, is_recomputed):
    norms, totals, table = call(draft, family, DEVICE, is_recomputed)
    expected, none, _ = call(draft, family, "cpu", is_recomputed)
    assert norms == pytest.approx(expected, rel=1e-4) and len(norms) >= 12
    assert totals["syncs"] == 1 and "attention/plan.py" in table, table
    assert totals["uploads"] == 0 and totals["launches"] > 0 == none["launches"]


def make_masks(family):
    """Make the masks of one step for the fused kernel; return what was counted."""
    with pretend_accelerator() as counts:
        anchors = torch.arange(1, 301, device=DEVICE)[None]
        plan = AttentionPlan(anchors, (anchors > 150).long() * 150)
        counts.clear()
        for sizes in [(1,) * slot for slot in range(7)] if family == "eagle3" else [(16,)]:
            sight = Sight(window=100, is_causal=True) if family == "windows" else Sight()
            flex.block_mask(plan, sizes[-1] if sizes else 1, 300, sizes, sight)
        return counts.totals()


@pytest.mark.parametrize(("family", "most_launches"), [("eagle3", 700), ("dflash", 90), ("windows", 90)])
def test_masks_of_the_fused_kernel_wait_for_nothing(call, family, most_launches):
    totals = call(make_masks, family)
    assert totals["syncs"] == totals["uploads"] == 0
    assert 0 < totals["launches"] <= most_launches
