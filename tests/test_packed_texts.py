# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Texts packed end to end in one row give each text's own hidden states and gradients, in both families.
"""

import math

import pytest
import torch

from benchmarks.counters import PeakBytes
from helpers.tiny import FAMILIES, VOCAB, make_drafter, make_target
from trl_draft_opd.drafters.base import DraftContext, run_blocks
from trl_draft_opd.utils.versions import switch_checkpointing


TARGET = make_target()
LENGTHS = [23, 2, 57, 3, 41]
K = 4


def make_texts(drafter, seed=0):
    """Return per text its features, ids, anchors and drafts; anchors are at every position but the first, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for length in LENGTHS:
        ids = torch.randint(7, VOCAB, (1, length), generator=generator)
        reading = TARGET.read_text(ids, torch.ones_like(ids), drafter.config.target_layer_ids)
        anchors = 1 + torch.randperm(length - 1, generator=generator)[None]
        drafts = torch.randint(7, VOCAB, (*anchors.shape, K), generator=generator)
        texts.append([reading.features[None], ids, anchors, drafts])
    return texts


def pack(texts):
    """Return features, ids, anchors and drafts of the packed row, and the starts of its tokens."""
    starts = torch.tensor([sum(LENGTHS[:index]) for index in range(len(LENGTHS))])
    features, ids, _, drafts = (torch.cat(parts, dim=1) for parts in zip(*texts, strict=True))
    anchors = torch.cat([text[2] + start for text, start in zip(texts, starts, strict=True)], dim=1)
    return features, ids, anchors, drafts, starts.repeat_interleave(torch.tensor(LENGTHS))[None]


def gradients(drafter, hidden, weight):
    drafter.zero_grad()
    (hidden * weight).sum().backward()
    return {
        name: parameter.grad.clone() for name, parameter in drafter.named_parameters() if parameter.grad is not None
    }


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_give_what_each_gives_alone(family, is_recomputed):
    drafter = make_drafter(family, TARGET).train()
    if is_recomputed:
        switch_checkpointing(drafter, "enable")
    texts = make_texts(drafter)
    alone = torch.cat([run_blocks(drafter, *text, TARGET.embed) for text in texts], dim=1)
    *packed, starts = pack(texts)
    together = run_blocks(drafter, *packed, TARGET.embed, starts)
    assert distance(together.detach(), alone.detach()) < 1e-6
    weight = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    expected, actual = gradients(drafter, alone, weight), gradients(drafter, together, weight)
    assert actual.keys() == expected.keys() and len(actual) >= 12
    assert {name: d for name in actual if (d := distance(actual[name], expected[name])) > 1e-5} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_another_text_reaches_a_block(family):
    drafter = make_drafter(family, TARGET)
    features, ids, anchors, drafts, starts = pack(make_texts(drafter))
    with torch.no_grad():
        clean = run_blocks(drafter, features, ids, anchors, drafts, TARGET.embed, starts)
        first, last = sum(LENGTHS[:2]), sum(LENGTHS[:3])
        features, ids = features.clone(), ids.clone()
        features[:, first:last] += 5
        ids[:, first:last] = (ids[:, first:last] + 1) % VOCAB
        moved = (run_blocks(drafter, features, ids, anchors, drafts, TARGET.embed, starts) != clean).flatten(2).any(-1)
    assert torch.equal(moved, (anchors >= first) & (anchors < last))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_packed_texts_leave_slot_by_slot(family):
    drafter = make_drafter(family, TARGET)
    features, ids, anchors, drafts, starts = pack(make_texts(drafter))
    with torch.no_grad():
        expected = run_blocks(drafter, features, ids, anchors, drafts, TARGET.embed, starts)
        context = drafter.encode_text(features, ids, TARGET.embed, starts)
        state = drafter.begin(context, anchors, ids.gather(1, anchors), K, TARGET.embed)
        left = torch.arange(anchors.shape[1])[None]
        for slot in range(1, K + 1):
            torch.testing.assert_close(state.hidden, expected[:, left[0], slot - 1], rtol=1e-5, atol=1e-5)
            if slot < K:
                columns = torch.arange(left.shape[1])[None, slot % 2 :: 2]
                left = left.gather(1, columns)
                state = drafter.advance(state, drafts[:, left[0], slot - 1], columns)


def test_a_context_keeps_the_starts_of_its_entries():
    starts = torch.tensor([[0, 0, 2, 2], [0, 1, 1, 1]])
    tensor = torch.arange(8.0).view(2, 1, 4, 1)
    context = DraftContext([tensor], [tensor], None, starts)
    assert context.firsts(torch.tensor([[1, 2, 4], [3, 1, -1]])).tolist() == [[0, 0, 2], [1, 0, 0]]
    assert context.extended(6).starts.tolist() == [[0, 0, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1]]
    assert context.rows(torch.tensor([1])).starts.tolist() == [[0, 1, 1, 1]]
    assert context.prefix(3).starts.tolist() == [[0, 0, 2], [0, 1, 1]]
    written = context.extended(5)
    written.write(
        DraftContext([tensor[:, :, :1]], [tensor[:, :, :1]], None, torch.tensor([[4], [4]])), torch.tensor([[4], [4]])
    )
    assert written.starts.tolist() == [[0, 0, 2, 2, 4], [0, 1, 1, 1, 4]] and context.starts is starts
    plain = DraftContext([tensor], [tensor], None)
    assert plain.firsts(torch.tensor([[1], [2]])) is None and plain.extended(6).starts is None


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_grows_with_the_text_and_not_with_its_square(family, is_recomputed):
    drafter = make_drafter(family, TARGET, **({"ttt_steps": 2} if family == "eagle3" else {"block_size": 4})).train()
    if is_recomputed:
        switch_checkpointing(drafter, "enable")
    peaks, lengths = [], [1024, 4096]
    for length in lengths:
        # EAGLE-3 at every token; DFlash at every eighth, in blocks of four, so that the last tile is a whole one.
        anchors = torch.arange(1, length, 1 if family == "eagle3" else 8)[None]
        ids, drafts = torch.randint(7, VOCAB, (1, length)), torch.randint(7, VOCAB, (1, anchors.shape[1], 2))
        features = torch.randn(1, length, drafter.fc.in_features)
        with PeakBytes() as counter:
            run_blocks(drafter, features, ids, anchors, drafts, TARGET.embed, torch.zeros_like(ids)).sum().backward()
        peaks.append(counter.peak)
    assert math.log(peaks[1] / peaks[0]) / math.log(lengths[1] / lengths[0]) <= 1.05
