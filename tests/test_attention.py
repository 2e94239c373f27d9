# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of `trl_draft_opd/drafters/attention` against one dense mask over every key of every block.
"""

from functools import partial

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.counters import PeakBytes
from trl_draft_opd.drafters.attention import AttentionPlan, Sight, anchored_attention, flex, kernels, tiles
from trl_draft_opd.drafters.attention import plan as planning


B, L, HEADS, KV_HEADS, HEAD_DIM = 2, 7, 6, 2, 4
ANCHORS = torch.tensor([[1, 4, 7, 4, 2], [3, 1, 6, 5, 7]])
SCALING = 0.6


def make_inputs(queries, block_keys, dtype=torch.float64):
    """
    Random `query, context_key, context_value, block_key, block_value`, wide enough that weights are far from uniform.
    """
    generator = torch.Generator().manual_seed(queries * 10 + block_keys)
    num_anchors = ANCHORS.shape[1]
    shapes = [(B, HEADS, num_anchors, queries, HEAD_DIM), *[(B, KV_HEADS, L, HEAD_DIM)] * 2]
    shapes += [(B, KV_HEADS, num_anchors, block_keys, HEAD_DIM)] * 2
    return [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


@pytest.fixture(params=["flash", "products", "flex"])
def run(request, monkeypatch):
    """Attention by each backend; by itself only `"flash"` is used on this device."""
    # torch's own reference of its fused kernel, which has gradients here too; it reads the mask by pairs alone.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    return partial(attend, backend=request.param)


def attend(
    query,
    context_key,
    context_value,
    block_key,
    block_value,
    sinks=None,
    anchors=ANCHORS,
    pieces=1,
    firsts=None,
    backend=None,
    sight=planning.SEES_ALL,
):
    keys = list(block_key.tensor_split(pieces, dim=3)) if block_key.shape[3] else []
    values = list(block_value.tensor_split(pieces, dim=3)) if block_value.shape[3] else []
    plan = AttentionPlan(anchors, firsts)
    context = (context_key, context_value)
    return anchored_attention(query, *context, keys, values, plan, SCALING, backend, sight=sight, sinks=sinks)


def dense_reference(
    query,
    context_key,
    context_value,
    block_key,
    block_value,
    sinks=None,
    anchors=ANCHORS,
    firsts=None,
    sight=planning.SEES_ALL,
):
    """Line up the keys of the context and of all blocks, and let a boolean mask say who sees what."""
    num_anchors, queries, block_keys = anchors.shape[1], query.shape[3], block_key.shape[3]
    per_group = HEADS // KV_HEADS
    key = torch.cat([context_key, block_key.flatten(2, 3)], dim=2).repeat_interleave(per_group, dim=1)
    value = torch.cat([context_value, block_value.flatten(2, 3)], dim=2).repeat_interleave(per_group, dim=1)
    num_rows = query.shape[0]
    mask = torch.zeros(num_rows, num_anchors * queries, L + num_anchors * block_keys, dtype=torch.bool)
    for row in range(num_rows):
        for block in range(num_anchors):
            for slot in range(queries):
                seen, anchor = mask[row, block * queries + slot], int(anchors[row, block])
                first = 0 if firsts is None else int(firsts[row, block])
                # A window holds the slot itself, at `anchor + slot` in the text, and the tokens before it.
                window = anchor + slot + 1 if sight.window is None else sight.window
                seen[max(first, anchor + slot - window + 1) : anchor] = True
                num_seen = slot + 1 if sight.is_causal else block_keys
                seen[L + block * block_keys : L + block * block_keys + num_seen] = True
    flat, mask = query.flatten(2, 3), mask[:, None]
    if sinks is None:
        mixed = scaled_dot_product_attention(flat, key, value, attn_mask=mask, scale=SCALING)
    else:
        scores = (flat @ key.transpose(2, 3) * SCALING).masked_fill(~mask, float("-inf"))
        sink = sinks[:, None, None].expand(num_rows, -1, scores.shape[2], -1)
        mixed = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1] @ value
    return mixed.unflatten(2, (num_anchors, queries)).permute(0, 2, 3, 1, 4).flatten(3)


@pytest.mark.parametrize(("queries", "block_keys"), [(1, 0), (1, 1), (1, 3), (4, 4), (3, 0)])
def test_packed_blocks_equal_attention_under_a_dense_mask(run, queries, block_keys):
    inputs = make_inputs(queries, block_keys)
    torch.testing.assert_close(run(*inputs), dense_reference(*inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("queries", "block_keys"), [(1, 0), (1, 2), (4, 4)])
def test_gradients_equal_those_under_a_dense_mask(run, queries, block_keys):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(queries, block_keys)]
    wanted = inputs if block_keys else inputs[:3]
    expected = dense_reference(*inputs)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, wanted, upstream)
    actual_grads = torch.autograd.grad(run(*inputs), wanted, upstream)
    for actual, reference in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=1e-12)


SIGHTS = {
    "window": Sight(window=4),
    "wider window": Sight(window=5),
    "causal": Sight(is_causal=True),
    "window, causal": Sight(window=4, is_causal=True),
}


@pytest.mark.parametrize("is_packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("tile_queries", [1, 4, 64])
@pytest.mark.parametrize("name", [*SIGHTS, "sinks", "window, causal, sinks"])
def test_windows_causal_blocks_and_sinks_equal_a_dense_mask(run, name, tile_queries, is_packed, monkeypatch):
    monkeypatch.setattr(planning, "TILE_QUERIES", tile_queries)
    options = {"sight": SIGHTS.get(name.removesuffix(", sinks"), Sight())}
    if is_packed:
        options["firsts"] = torch.tensor([[0, 2, 6, 0, 1], [0, 0, 3, 3, 6]])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        inputs = make_inputs(3, 3, dtype)
        if "sinks" in name:
            inputs.append(torch.linspace(-3, 5, HEADS, dtype=dtype))
        expected = values_and_grads(dense_reference, [tensor.double() for tensor in inputs], **options)
        assert_all_close(values_and_grads(run, inputs, **options), expected, tolerance)


def test_sinks_alone_join_a_softmax_without_own_keys(run):
    inputs = [*make_inputs(2, 0), torch.linspace(-3, 5, HEADS, dtype=torch.float64)]
    options = {"sight": Sight(window=3)}
    expected = values_and_grads(dense_reference, inputs, **options)
    assert_all_close(values_and_grads(run, inputs, **options), expected, 1e-12)


def test_what_a_window_leaves_out_has_no_influence(run):
    query, context_key, context_value, block_key, block_value = make_inputs(3, 3)
    clean = run(query, context_key, context_value, block_key, block_value, sight=Sight(window=4))
    for position in range(L):
        key, value = context_key.clone(), context_value.clone()
        key[:, :, position], value[:, :, position] = 1e4, -1e4
        changed = run(query, key, value, block_key, block_value, sight=Sight(window=4))
        for slot in range(3):
            is_blind = (position >= ANCHORS) | (position < ANCHORS + slot - 3)
            assert torch.equal(changed[:, :, slot][is_blind], clean[:, :, slot][is_blind])
            seeing = (changed - clean)[:, :, slot][~is_blind]
            assert (seeing.abs().amax(dim=-1) > 0.1).all()


@pytest.mark.parametrize("spacing", [1, 20, 500])
def test_a_window_costs_its_width_and_not_the_text(spacing):
    length, num_queries, window = 32768, 16, 1024
    anchors = torch.arange(2048, length + 1, spacing)[None]
    plan = AttentionPlan(anchors)
    pairs = sum(tile.num_pairs for tile in plan.tiles(num_queries, window))
    whole = sum(tile.num_pairs for tile in plan.tiles(num_queries))
    # The edges of tiles cost a little; without a window a block reads the text before it, half of all on average.
    assert anchors.numel() * window < pairs * 1.03 < 1.1 * anchors.numel() * window < whole / 14
    mask = flex.block_mask(plan, num_queries, length, (num_queries,), Sight(window))
    used = (mask.kv_num_blocks + mask.full_kv_num_blocks)[0, 0]
    # Eight blocks share a tile of queries: their windows, their own keys' tile, and the rests of tiles at the ends.
    assert used.max() <= -(-(window + 7 * spacing) // flex.TILE) + 2


@pytest.mark.parametrize("block_keys", [0, 3])
def test_a_context_entry_at_or_behind_the_anchor_has_no_influence(run, block_keys):
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


def test_no_gradient_reaches_an_entry_that_no_block_sees(run):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(2, 2)]
    anchors = torch.full_like(ANCHORS, 3)
    run(*inputs, anchors=anchors).square().sum().backward()
    for tensor in inputs[1:3]:
        assert tensor.grad[:, :, 3:].eq(0).all()
        assert tensor.grad[:, :, :3].ne(0).all()


def test_blocks_do_not_see_each_other(run):
    query, context_key, context_value, block_key, block_value = make_inputs(2, 2)
    clean = run(query, context_key, context_value, block_key, block_value)
    block_key[:, :, 1] += 3
    block_value[:, :, 1] -= 5
    changed = run(query, context_key, context_value, block_key, block_value)
    others = [0, 2, 3, 4]
    assert torch.equal(changed[:, others], clean[:, others])
    assert not torch.allclose(changed[:, 1], clean[:, 1])


def test_a_later_query_of_a_block_is_seen_by_an_earlier_one(run):
    inputs = make_inputs(3, 3)
    clean = run(*inputs)
    inputs[4][:, :, :, 2] += 5
    assert ((run(*inputs) - clean)[:, :, 0].abs().amax(dim=-1) > 1e-3).all()


def test_low_precision_keeps_its_type_and_normalises_in_float32(run):
    exact = make_inputs(2, 2)
    low = [tensor.bfloat16() for tensor in exact]
    output = run(*low)
    assert output.dtype == torch.bfloat16
    reference = dense_reference(*[tensor.double() for tensor in low])
    torch.testing.assert_close(output.double(), reference, rtol=0.03, atol=0.06)


# -- every path through the tiles and the kernels ---------------------------------------------------------------------


def values_and_grads(function, inputs, **options):
    """Return the output, and the gradients of all inputs of any size for one fixed upstream gradient."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs, **options)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(upstream.to(output.dtype))
    assert all(tensor.grad is not None or tensor.numel() == 0 for tensor in inputs)
    assert all(tensor.grad is None or tensor.grad.dtype == tensor.dtype for tensor in inputs)
    return [output.detach(), *[tensor.grad for tensor in inputs if tensor.numel()]]


def assert_all_close(actual, expected, tolerance):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile_queries", [1, 3, 7])
@pytest.mark.parametrize(("queries", "block_keys"), [(1, 0), (1, 2), (3, 3)])
def test_tiles_of_any_size_give_what_the_dense_mask_gives(run, tile_queries, queries, block_keys, monkeypatch):
    monkeypatch.setattr(planning, "TILE_QUERIES", tile_queries)
    assert len(AttentionPlan(ANCHORS).tiles(queries)) == -(-5 // max(1, tile_queries // queries))
    inputs = make_inputs(queries, block_keys)
    assert_all_close(values_and_grads(run, inputs), values_and_grads(dense_reference, inputs), 1e-12)


@pytest.mark.parametrize("tile_queries", [1, 4, 64])
@pytest.mark.parametrize(("queries", "block_keys"), [(1, 0), (2, 2)])
def test_a_block_sees_no_context_before_its_first_entry(run, tile_queries, queries, block_keys, monkeypatch):
    monkeypatch.setattr(planning, "TILE_QUERIES", tile_queries)
    firsts = torch.tensor([[0, 2, 6, 0, 1], [0, 0, 3, 3, 6]])
    inputs = make_inputs(queries, block_keys)
    expected = values_and_grads(dense_reference, inputs, firsts=firsts)
    assert_all_close(values_and_grads(run, inputs, firsts=firsts), expected, 1e-12)


def test_a_tile_reads_no_more_context_than_its_farthest_anchor_sees(monkeypatch):
    monkeypatch.setattr(planning, "TILE_QUERIES", 4)
    cut = [(tile.start, tile.stop, tile.first, tile.end) for tile in AttentionPlan(ANCHORS).tiles(2)]
    assert cut == [(0, 2, 0, 4), (2, 4, 0, 7), (4, 5, 0, 7)]
    lengths = []

    def watched(query, key, *rest):
        lengths.append((query.shape[2], key.shape[2]))
        return kernels.products(query, key, *rest)

    monkeypatch.setitem(tiles.KERNELS, "products", (watched, None))
    attend(*make_inputs(2, 2), backend="products")
    assert lengths == [(4, 4), (4, 7), (2, 7)]


def test_texts_share_a_tile_only_where_that_is_cheap():
    def cut(*lengths):
        """Blocks at every token of texts of these lengths, packed end to end."""
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        anchors = [start + position for start, n in zip(starts, lengths, strict=True) for position in range(1, n)]
        firsts = [start for start, n in zip(starts, lengths, strict=True) for _ in range(1, n)]
        plan = AttentionPlan(torch.tensor([anchors]), torch.tensor([firsts]))
        return [tuple(tile) for tile in plan.tiles(1)]

    assert cut(11, 11, 11) == [(0, 30, 0, 32, 22, 1)]
    # Long texts are kept apart, and each tile of one reads that one alone.
    assert cut(201, 101) == [(0, 200, 0, 200, 0, 1), (200, 300, 201, 301, 201, 202)]
    assert cut(301)[1:] == [(256, 300, 0, 300, 0, 257)]


def test_no_gradient_reaches_unseen_entries_through_any_tile(run, monkeypatch):
    monkeypatch.setattr(planning, "TILE_QUERIES", 3)
    anchors = torch.tensor([[1, 5, 2, 4, 3], [2, 2, 2, 1, 1]])
    grads = values_and_grads(run, make_inputs(1, 1), anchors=anchors)
    for grad in grads[2:4]:
        for row, first_unseen in enumerate([5, 2]):
            assert grad[row, :, first_unseen:].eq(0).all() and grad[row, :, :first_unseen].ne(0).all()


def test_the_order_of_the_anchors_is_free(run, monkeypatch):
    monkeypatch.setattr(planning, "TILE_QUERIES", 4)
    inputs = make_inputs(2, 2)
    order = torch.tensor([4, 0, 3, 2, 1])
    moved = [tensor[:, :, order] if dim in (0, 3, 4) else tensor for dim, tensor in enumerate(inputs)]
    expected = run(*inputs)[:, order]
    torch.testing.assert_close(run(*moved, anchors=ANCHORS[:, order]), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [2, 3, 5])
@pytest.mark.parametrize("queries", [1, 2])
def test_a_block_may_come_in_pieces(run, queries, pieces):
    inputs = make_inputs(queries, 5)
    actual = values_and_grads(run, inputs, pieces=pieces)
    assert_all_close(actual, values_and_grads(dense_reference, inputs), 1e-12)


@pytest.mark.parametrize("block_keys", [0, 3])
def test_a_single_block_needs_no_mask(run, block_keys):
    inputs = [
        tensor[:1, :, :1] if dim in (0, 3, 4) else tensor[:1] for dim, tensor in enumerate(make_inputs(3, block_keys))
    ]
    anchors, firsts = torch.tensor([[5]]), torch.tensor([[2]])
    assert [tile.has_hidden for tile in AttentionPlan(anchors, firsts).tiles(3)] == [False]
    actual = values_and_grads(run, inputs, anchors=anchors, firsts=firsts)
    assert_all_close(actual, values_and_grads(dense_reference, inputs, anchors=anchors, firsts=firsts), 1e-12)


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_both_kernels_of_the_context_are_one_function(dtype, tolerance, is_masked):
    query, key, value, *_ = make_inputs(3, 0, dtype)
    query, plan = query.flatten(2, 3), AttentionPlan(ANCHORS)
    hide = partial(plan.hide, tile=plan.tiles(3)[0], num_queries=3) if is_masked else None
    fused = kernels.flash(query, key, value, hide, SCALING)
    products = kernels.products(query, key, value, hide, SCALING)
    assert_all_close(products, fused, tolerance)
    assert [tensor.dtype for tensor in products] == [dtype, dtype]
    # Outputs and log-sum-exps that are not the kernel's own, as the merge with a block hands them in.
    grad, shift = torch.randn_like(query), torch.rand_like(fused[1])
    merged = (0.3 * fused[0] + 0.7 * torch.randn_like(query), fused[1] + shift)
    backward = (grad, query, key, value, *merged, hide, SCALING)
    expected = kernels.flash_backward(*backward)
    assert_all_close(kernels.products_backward(*backward), expected, 10 * tolerance)


def test_products_copy_no_key_per_query_head():
    heads, groups, length, num_blocks, dim = 8, 1, 4096, 4, 64
    query = torch.randn(1, heads, num_blocks, 1, dim, requires_grad=True)
    key, value = (torch.randn(1, groups, length, dim, requires_grad=True) for _ in range(2))
    plan = AttentionPlan(torch.full((1, num_blocks), length))
    with PeakBytes() as counter:
        anchored_attention(query, key, value, [], [], plan, SCALING, "products").sum().backward()
    # Two gradients with one tile's share each, and scores of a third of that; copies per head would be sixteen more.
    assert counter.peak < 6 * key.nbytes


def test_gradients_pass_a_numerical_check(run, monkeypatch):
    monkeypatch.setattr(planning, "TILE_QUERIES", 4)
    inputs = [tensor.requires_grad_() for tensor in make_inputs(2, 2)]
    # Random projections of the Jacobian: all entries would take minutes.
    assert torch.autograd.gradcheck(lambda *tensors: run(*tensors, pieces=2), inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["flash", "products"])
def test_a_second_derivative_is_refused(backend):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 1)]
    (grad,) = torch.autograd.grad(attend(*inputs, backend=backend).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "block_keys"), [(1, 2), (3, 3)])
def test_float32_keeps_values_and_gradients_to_its_precision(run, queries, block_keys):
    single = make_inputs(queries, block_keys, torch.float32)
    exact = values_and_grads(dense_reference, [tensor.double() for tensor in single])
    assert_all_close(values_and_grads(run, single), exact, 2e-5)


@pytest.mark.parametrize(("queries", "block_keys"), [(1, 2), (3, 3), (2, 0)])
def test_bfloat16_gradients_stay_close(run, queries, block_keys):
    low = make_inputs(queries, block_keys, torch.bfloat16)
    exact = values_and_grads(dense_reference, [tensor.double() for tensor in low])
    actual = values_and_grads(run, low)
    for one, other in zip(actual, exact, strict=True):
        assert one.dtype == torch.bfloat16
        # In norm: a step of bfloat16 is 2 ** -8 of a score, scores reach 10, and a small entry is a difference of
        # large ones.
        assert (one.double() - other).norm() < 0.04 * other.norm()


@pytest.mark.parametrize("run", ["flash", "products"], indirect=True)
def test_under_autocast_precision_follows_the_values(run):
    exact = make_inputs(2, 2)
    query, context_key, context_value, block_key, block_value = (tensor.float() for tensor in exact)
    # Rotary angles leave queries and keys in float32 where the projections already gave bfloat16.
    mixed = [query, context_key, context_value.bfloat16(), block_key, block_value.bfloat16()]
    rounded = [tensor.bfloat16() for tensor in exact]
    plain = values_and_grads(run, rounded)
    with torch.autocast("cpu", torch.bfloat16):
        inside = values_and_grads(run, mixed)
    assert inside[0].dtype == torch.bfloat16
    assert [grad.dtype for grad in inside[1:]] == [tensor.dtype for tensor in mixed]
    # The same numbers as bfloat16 inputs without autocast, bit by bit.
    assert all(torch.equal(one.bfloat16(), other) for one, other in zip(inside, plain, strict=True))


@pytest.mark.parametrize("run", ["flash", "products"], indirect=True)
def test_autocast_does_not_lower_float32_inputs(run):
    single = make_inputs(3, 3, torch.float32)
    plain = values_and_grads(run, single)
    with torch.autocast("cpu", torch.bfloat16):
        inside = values_and_grads(run, single)
        output = run(*(tensor.requires_grad_() for tensor in single))
    # A backward pass outside, as trainers do it.
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float())
    outside = [output.detach(), *[tensor.grad for tensor in single]]
    for one, inner, outer in zip(plain, inside, outside, strict=True):
        assert torch.equal(one, inner) and torch.equal(one, outer)


def test_autocast_leaves_flex_as_it_is_too():
    single = make_inputs(3, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attend(*single, backend="flex")
    assert torch.equal(inside, attend(*single, backend="flex"))
