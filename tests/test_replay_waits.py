# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How often the host waits for a card while it replays: counted at the size of a micro-batch, with tiny layers. The blocks
are those of the CPU, which judges slot by slot.

Shape letters:  T = tokens of all texts, N = blocks, K = drafts per block, H = hidden size, V = vocabulary
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from helpers.pretend_accelerator import DEVICE, apart, pretend_accelerator
from helpers.rollouts import GREEDY, Options
from helpers.rollouts import replay as run_replay
from helpers.tiny import VOCAB, make_drafter, make_target
from trl_draft_opd import SamplingSettings
from trl_draft_opd.rollout.blocks import sample_anchors
from trl_draft_opd.rollout.replay import TargetText


ROWS, LENGTH, PROMPT = 4, 2048, 512
SHAPES = {
    "dflash": ({"block_size": 16, "num_hidden_layers": 2}, 15, 16, 0.757),
    "eagle3": ({"ttt_steps": 7}, 7, 1, 0.69),
}


@pytest.fixture(scope="module")
def call():
    with apart() as run:
        yield run


def make_text(device):
    ids = torch.randint(7, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    is_written = (torch.arange(LENGTH) >= PROMPT).expand(ROWS, -1).contiguous()
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
        block = state.block_hidden
        if block is not None:
            block = torch.cat([wanted[..., None].to(block), block[..., 1:]], dim=-1)
        hidden = torch.cat([wanted[:, :, state.slot - 1, None].to(state.hidden), state.hidden[..., 1:]], dim=-1)
        return replace(state, hidden=hidden, block_hidden=block)

    def forced_begin(context, anchors, *args):
        return mark(begin(context, anchors, *args), anchors)

    def forced_advance(*args):
        state = advance(*args)
        return mark(state, state.blocks.anchors)

    def forced_logits(hidden, project):
        rows.append(len(hidden))
        index = torch.arange(VOCAB, device=hidden.device)
        return draft_logits(hidden, project) + 1e6 * (hidden[:, :1] == index)

    drafter.begin, drafter.advance, drafter.draft_logits = forced_begin, forced_advance, forced_logits
    return rows


def walk(family, device, **changes):
    """Replay one micro-batch; return counts, blocks, rows of the drafter's head and its calls."""
    options, num_drafts, segment_length, rate = SHAPES[family]
    target = make_target()
    drafter = make_drafter(family, target, **options)
    settings = Options(num_drafts, segment_length=segment_length, chunk_bytes=2**30, **changes)
    with pretend_accelerator() as counts:
        target.causal_lm.to(device)
        drafter.to(device)
        text = make_text(device)
        rows = force_drafts(drafter, text.input_ids, num_drafts, rate)
        layer_ids = drafter.config.target_layer_ids
        reading = target.read_text(
            text.input_ids, text.attention_mask, layer_ids, keep_cache=settings.keep_branch_hidden
        )
        counts.clear()
        rollout = run_replay(target, drafter, text, settings, reading)
        table = counts.table("syncs") + "\n" + counts.table("uploads") + "\n" + counts.table("launches", 60)
        totals = counts.totals()
        names = ("anchors", "accepted", "is_censored", "is_counted", "drafts")
        blocks = {name: getattr(rollout, name).cpu() for name in names}
        return totals, blocks, sum(rows), len(rows), table


if __name__ == "__main__":
    import sys, time

    for family in sys.argv[1:]:
        t = time.time()
        a = walk(family, "cpu")
        print(
            "cpu",
            a[0],
            a[2:4],
            "blocks",
            int((a[1]["anchors"] >= 0).sum()),
            "tau",
            float((a[1]["accepted"] + 1)[a[1]["is_counted"]].float().mean()),
            time.time() - t,
        )
        t = time.time()
        b = walk(family, DEVICE)
        print("dev", b[0], b[2:4], time.time() - t)
        print(b[4])
        print(all(torch.equal(a[1][n], b[1][n]) for n in a[1]))
