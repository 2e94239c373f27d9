# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Claims about what the loss asks of an accelerator: how often the host waits for it, and how many kernels it launches.

EAGLE-3 SFT on Qwen3-8B, 4 texts of 2,048 tokens, 7 slots, the full vocabulary: the real loss runs over all of its
rows, in the chunks and blocks that a card of 80 GB gets. Only what no launch depends on is small: the hidden size, and
the vocabulary, divided by 1,187 as is the budget, so that as many rows fit into a chunk.
"""

from functools import partial

import pytest
import torch

from helpers.pretend_accelerator import DEVICE, pretend_accelerator
from trl_draft_opd.losses import LOSS_TYPES, Head, Selector, chunked_divergence, fused
from trl_draft_opd.losses.budget import chunk_bytes_of_card


VOCAB, SCALE = 128, 1187
assert VOCAB * SCALE == 151_936
STATES, SLOTS = 4 * 2048, 7
CHUNK_BYTES = chunk_bytes_of_card(80 * 2**30)


def count(
    loss_type, is_fused, chunk_bytes=CHUNK_BYTES, num_slots=SLOTS, num_weightless=0, has_selector=False, num_parts=1
):
    """Return launches, syncs and uploads of the loss and its gradient, and where the first two are."""
    num_rows = STATES * num_slots
    with pretend_accelerator() as counts, pytest.MonkeyPatch.context() as patch:
        own_launches = []
        patch.setattr(fused, "_launch", lambda *args, **kwargs: own_launches.append(args) or True)
        patch.setattr(fused, "is_used_for", lambda hidden: is_fused)
        hidden = torch.zeros(num_rows, 4 if has_selector else 2 * num_parts, device=DEVICE).requires_grad_()
        selector = Selector(torch.zeros(VOCAB, 2, device=DEVICE).requires_grad_(), 16) if has_selector else None
        weight = torch.zeros(VOCAB, 2, device=DEVICE).requires_grad_()
        target_weight = torch.zeros(VOCAB, 2, dtype=torch.bfloat16, device=DEVICE)
        target_hidden = torch.zeros(STATES, 2, device=DEVICE)
        target_rows = torch.arange(num_rows, device=DEVICE) % STATES if num_slots > 1 else None
        labels = torch.full((num_rows,), -1, device=DEVICE)
        weights = (torch.arange(num_rows, device=DEVICE) >= num_weightless).float()
        counts.clear()
        with torch.autocast("pretend", torch.bfloat16):
            result = chunked_divergence(
                hidden,
                Head.linear(weight) if num_parts == 1 else Head.joined([Head.linear(weight)] * num_parts),
                target_hidden,
                Head.linear(target_weight, keeps_dtype=True),
                target_rows_N=target_rows,
                labels_N=labels,
                weights_N=weights,
                loss_type=loss_type,
                draft_token_ids=None,
                chunk_bytes=chunk_bytes // SCALE,
                selector=selector,
            )
        result.total.backward()
        totals = counts.totals()
        totals["launches"] += len(own_launches)
        return totals, counts.table("launches"), counts.table("syncs")


@pytest.mark.parametrize(("is_fused", "most"), [(False, 9000), (True, 500)], ids=["eager", "fused"])
@pytest.mark.parametrize("loss_type", ["forward_kl", "reverse_kl", "lk_hybrid"])
def test_the_loss_of_an_eagle3_micro_batch_launches_few_kernels(call, loss_type, is_fused, most):
    totals, launches, _ = call(count, loss_type, is_fused)
    assert totals["launches"] <= most, launches


@pytest.mark.parametrize("loss_type", ["forward_kl", "ce"])
def test_a_selector_adds_few_launches_to_each_chunk(call, loss_type):
    # In four chunks.
    totals, launches, _ = call(partial(count, num_slots=1, has_selector=True), loss_type, True)
    assert totals["launches"] <= 320, launches


def test_a_second_part_of_a_head_adds_few_launches_to_each_chunk(call):
    one, two = (call(partial(count, num_parts=parts), "forward_kl", True)[0]["launches"] for parts in (1, 2))
    # In 26 chunks: a cast and a product, its two gradients, and the two halves of the states' gradient.
    assert one < two <= one + 26 * 7


def test_a_larger_budget_is_what_saves_launches(call):
    of_a_cpu, _, _ = call(partial(count, chunk_bytes=2**28, num_slots=1), "forward_kl", False)
    of_a_card, _, _ = call(partial(count, num_slots=1), "forward_kl", False)
    assert of_a_cpu["launches"] > 10 * of_a_card["launches"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("has_selector", [False, True], ids=["head", "selector"])
@pytest.mark.parametrize("num_slots", [1, 2], ids=["own states", "shared states"])
def test_the_host_waits_once_for_the_chunks_and_once_more_for_labels(call, loss_type, num_slots, has_selector):
    kind = {"num_slots": num_slots, "num_weightless": STATES // 2, "has_selector": has_selector}
    totals, _, syncs = call(partial(count, **kind), loss_type, True)
    assert totals["syncs"] == (2 if loss_type == "ce" else 1), syncs
    assert totals["uploads"] == 0
