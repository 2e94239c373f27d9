# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of `trl_draft_opd/drafters/attention.py` against one dense mask over every key of every block.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from trl_draft_opd.drafters.attention import anchored_attention


B, L, HEADS, KV_HEADS, HEAD_DIM = 2, 7, 6, 2, 4
ANCHORS = torch.tensor([[1, 4, 7, 4, 2], [3, 1, 6, 5, 7]])
SCALING = 0.6


def make_inputs(queries, block_keys, dtype=torch.float64):
    """Random `query, context_key, context_value, block_key, block_value`, wide enough that weights are far from uniform."""
    generator = torch.Generator().manual_seed(queries * 10 + block_keys)
    num_anchors = ANCHORS.shape[1]
    shapes = [(B, HEADS, num_anchors, queries, HEAD_DIM), *[(B, KV_HEADS, L, HEAD_DIM)] * 2]
    shapes += [(B, KV_HEADS, num_anchors, block_keys, HEAD_DIM)] * 2
    return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def run(query, context_key, context_value, block_key, block_value, anchors=ANCHORS, pieces=1):
    keys = list(block_key.tensor_split(pieces, dim=3)) if block_key.shape[3] else []
    values = list(block_value.tensor_split(pieces, dim=3)) if block_value.shape[3] else []
    return anchored_attention(query, context_key, context_value, keys, values, anchors, SCALING)


def dense_reference(query, context_key, context_value, block_key, block_value, anchors=ANCHORS):
    """Line up the keys of the context and of all blocks, and let a boolean mask say who sees what."""
    num_anchors, queries, block_keys = anchors.shape[1], query.shape[3], block_key.shape[3]
    per_group = HEADS // KV_HEADS
    key = torch.cat([context_key, block_key.flatten(2, 3)], dim=2).repeat_interleave(per_group, dim=1)
    value = torch.cat([context_value, block_value.flatten(2, 3)], dim=2).repeat_interleave(per_group, dim=1)
    mask = torch.zeros(B, num_anchors * queries, L + num_anchors * block_keys, dtype=torch.bool)
    for row in range(B):
        for block in range(num_anchors):
            rows = slice(block * queries, (block + 1) * queries)
            mask[row, rows, : anchors[row, block]] = True
            mask[row, rows, L + block * block_keys : L + (block + 1) * block_keys] = True
    mixed = scaled_dot_product_attention(query.flatten(2, 3), key, value, attn_mask=mask[:, None], scale=SCALING)
    return mixed.unflatten(2, (num_anchors, queries)).permute(0, 2, 3, 1, 4).flatten(3)


@pytest.mark.parametrize(("queries", "block_keys"), [(1, 0), (1, 1), (1, 3), (4, 4), (3, 0)])
def test_packed_blocks_equal_attention_under_a_dense_mask(queries, block_keys):
    inputs = make_inputs(queries, block_keys)
    torch.testing.assert_close(run(*inputs), dense_reference(*inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("queries", "block_keys"), [(1, 0), (1, 2), (4, 4)])
def test_gradients_equal_those_under_a_dense_mask(queries, block_keys):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(queries, block_keys)]
    wanted = inputs if block_keys else inputs[:3]
    expected = dense_reference(*inputs)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, wanted, upstream)
    actual_grads = torch.autograd.grad(run(*inputs), wanted, upstream)
    for actual, reference in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block_keys", [0, 3])
def test_a_context_entry_at_or_behind_the_anchor_has_no_influence(block_keys):
    query, context_key, context_value, block_key, block_value = make_inputs(3, block_keys)
    clean = run(query, context_key, context_value, block_key, block_value)
    for position in range(L):
        key, value = context_key.clone(), context_value.clone()
        key[:, :, position], value[:, :, position] = 1e4, -1e4
        changed = run(query, key, value, block_key, block_value)
        is_blind = position >= ANCHORS
        # Bit for bit, because a weight of exactly zero multiplies what must not be seen.
        assert torch.equal(changed[is_blind], clean[is_blind])
        seeing = (changed - clean)[~is_blind]
        assert (seeing.abs().flatten(1).amax(dim=1) > 1).all()


def test_no_gradient_reaches_an_entry_that_no_block_sees():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(2, 2)]
    anchors = torch.full_like(ANCHORS, 3)
    run(*inputs, anchors=anchors).square().sum().backward()
    for tensor in inputs[1:3]:
        assert tensor.grad[:, :, 3:].eq(0).all()
        assert tensor.grad[:, :, :3].ne(0).all()


def test_blocks_do_not_see_each_other():
    query, context_key, context_value, block_key, block_value = make_inputs(2, 2)
    clean = run(query, context_key, context_value, block_key, block_value)
    block_key[:, :, 1] += 3
    block_value[:, :, 1] -= 5
    changed = run(query, context_key, context_value, block_key, block_value)
    others = [0, 2, 3, 4]
    assert torch.equal(changed[:, others], clean[:, others])
    assert not torch.allclose(changed[:, 1], clean[:, 1])


def test_a_later_query_of_a_block_is_seen_by_an_earlier_one():
    inputs = make_inputs(3, 3)
    clean = run(*inputs)
    inputs[4][:, :, :, 2] += 5
    assert ((run(*inputs) - clean)[:, :, 0].abs().amax(dim=-1) > 1e-3).all()


def test_low_precision_keeps_its_type_and_normalises_in_float32():
    exact = make_inputs(2, 2)
    low = [tensor.bfloat16() for tensor in exact]
    output = run(*low)
    assert output.dtype == torch.bfloat16
    reference = dense_reference(*[tensor.double() for tensor in low])
    torch.testing.assert_close(output.double(), reference, rtol=0.03, atol=0.06)
