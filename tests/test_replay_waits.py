# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How often the host waits for a card while it replays: counted at the size of a micro-batch, with tiny layers. The
blocks are those of the CPU, which judges slot by slot.

Shape letters:  T = tokens of all texts, N = blocks, K = drafts per block, H = hidden size, V = vocabulary
"""

from dataclasses import replace

import pytest
import torch

from helpers.pretend_accelerator import DEVICE, pretend_accelerator
from helpers.rollouts import Options
from helpers.rollouts import replay as run_replay
from helpers.tiny import VOCAB, make_drafter, make_target
from trl_draft_opd import SamplingSettings
from trl_draft_opd.rollout.blocks import sample_anchors
from trl_draft_opd.rollout.replay import TargetText


ROWS, LENGTH, PROMPT = 4, 2048, 512
# By family: options of the drafter, drafts per block, tokens per segment, and the chance that a draft is right, for a
# tau of about 4 and 3.
SHAPES = {
    "dflash": ({"block_size": 16, "num_hidden_layers": 1}, 15, 16, 0.757),
    "dspark": ({"block_size": 16, "num_hidden_layers": 1}, 15, 16, 0.757),
    "eagle3": ({"ttt_steps": 7}, 7, 1, 0.69),
}


def make_text(device, length):
    ids = torch.randint(7, VOCAB, (ROWS, length), generator=torch.Generator().manual_seed(0))
    is_written = (torch.arange(length) >= PROMPT).expand(ROWS, -1).contiguous()
    return TargetText(ids.to(device), torch.ones_like(ids).to(device), is_written.to(device), range(ROWS))


def force_drafts(drafter, ids, num_drafts, rate):
    """Have a drafter propose the text, each slot with a chance of `rate`, and else another token."""
    text = ids.flatten()
    slots = torch.arange(1, num_drafts + 1, device=ids.device)
    right = text[(torch.arange(len(text), device=ids.device)[:, None] + slots).clamp(max=len(text) - 1)]
    is_right = torch.rand(right.shape, generator=torch.Generator().manual_seed(1)) < rate
    proposals = torch.where(is_right.to(ids.device), right, (right + 1) % VOCAB)
    begin, advance, draft_logits = drafter.begin, drafter.advance, drafter.draft_logits
    rows = []

    def mark(state, anchors):
        # The proposal travels in the first entry of a state, through the real layers' own path.
        wanted = proposals[anchors[0]][None]
        hidden = torch.cat([wanted[:, :, state.slot - 1, None].to(state.hidden), state.hidden[..., 1:]], dim=-1)
        if not drafter.config.drafts_whole_blocks:
            return replace(state, hidden=hidden)
        block = torch.cat([wanted[..., None].to(state.block), state.block[..., 1:]], dim=-1)
        return replace(state, hidden=hidden, block=block, block_hidden=None if drafter.reads_drafts else block)

    def forced_begin(context, anchors, *args):
        return mark(begin(context, anchors, *args), anchors)

    def forced_advance(*args):
        state = advance(*args)
        return state if drafter.config.drafts_whole_blocks else mark(state, state.blocks.anchors)

    def forced_logits(hidden, project):
        rows.append(len(hidden))
        index = torch.arange(VOCAB, device=hidden.device)
        return draft_logits(hidden, project) + 1e6 * (hidden[:, :1] == index)

    drafter.begin, drafter.advance, drafter.draft_logits = forced_begin, forced_advance, forced_logits
    return rows


def walk(family, device, length, changes):
    """Replay one micro-batch; return what was counted, the blocks, and the rows of each product with the head."""
    options, num_drafts, segment_length, rate = SHAPES[family]
    target = make_target()
    drafter = make_drafter(family, target, **options)
    settings = Options(num_drafts, segment_length=segment_length, chunk_bytes=2**30, **changes)
    with pretend_accelerator() as counts:
        target.causal_lm.to(device)
        drafter.to(device)
        text = make_text(device, length)
        rows = force_drafts(drafter, text.input_ids, num_drafts, rate)
        layer_ids = drafter.config.target_layer_ids
        reading = target.read_text(text.input_ids, text.attention_mask, layer_ids, settings.keep_branch_hidden)
        counts.clear()
        rollout = run_replay(target, drafter, text, settings, reading)
        totals, table = counts.totals(), counts.table("syncs")
        names = ("anchors", "accepted", "is_censored", "is_counted", "drafts")
        return totals, table, {name: getattr(rollout, name).cpu() for name in names}, rows


# Of the walk of DFlash and DSpark, about 17 rounds wait for the plan of the attention, which a fused kernel does not,
# and 40 times for a group of slots; of EAGLE-3's one round, each step for both. The rest is the mask of the responses.
@pytest.mark.parametrize(
    ("family", "most_waits", "most_launches"),
    [("dflash", 60, 6000), pytest.param("dspark", 60, 6050, marks=pytest.mark.slow), ("eagle3", 16, 2200)],
)
def test_a_walk_waits_a_few_times_for_the_blocks_that_a_cpu_finds(family, most_waits, most_launches, call):
    totals, table, blocks, rows = call(walk, family, DEVICE, LENGTH, {})
    _, _, expected, expected_rows = call(walk, family, "cpu", LENGTH, {})
    for name, values in expected.items():
        assert torch.equal(blocks[name], values), name
    num_blocks, num_tokens = int((expected["anchors"] >= 0).sum()), ROWS * (LENGTH - PROMPT)
    assert 2.8 < num_tokens / num_blocks < 4.2
    assert totals["syncs"] <= most_waits, table
    assert totals["uploads"] == 0 and totals["launches"] <= most_launches
    # Slots in vain, by far not as many as a card computes while it reads the head's weight for one more product.
    assert sum(rows) - sum(expected_rows) <= 160 * (len(expected_rows) - len(rows))


@pytest.mark.parametrize("family", [pytest.param("dflash", marks=pytest.mark.slow), "dspark", "eagle3"])
def test_drawn_blocks_and_their_suffixes_wait_a_few_times_more(family, call):
    changes = {"sampling": SamplingSettings(1.0, 0, 1.0), "draft_sampling": "sample", "keep_branch_hidden": True}
    totals, table, blocks, _ = call(walk, family, DEVICE, PROMPT + 200, changes)
    _, _, expected, _ = call(walk, family, "cpu", PROMPT + 200, changes)
    for name, values in expected.items():
        assert torch.equal(blocks[name], values), name
    assert totals["uploads"] == 0
    assert totals["syncs"] <= 50, table


def sample(num_anchors):
    """Sample anchors of one micro-batch; return what was counted, and those of the card and of the CPU."""
    with pretend_accelerator() as counts:
        found = []
        for device in (DEVICE, "cpu"):
            text = make_text(device, LENGTH)
            counts.clear() if device is DEVICE else None
            options = {"num_anchors": num_anchors, "num_drafts": 7, "seed": 0, "epoch": 0}
            blocks = sample_anchors(text.input_ids, text.completion_mask, text.sample_ids, **options)
            found.append((counts.totals(), blocks.anchors.cpu()))
        return found


@pytest.mark.parametrize("num_anchors", [64, None])
def test_sampling_anchors_waits_once(num_anchors, call):
    (totals, anchors), (_, expected) = call(sample, num_anchors)
    assert torch.equal(anchors, expected) and totals["syncs"] <= 1 and totals["uploads"] == 0
