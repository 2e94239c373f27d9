# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The mask of the fused attention kernel of CUDA, tile by tile and pair by pair, and when the kernel is used. Its values
and gradients are held to the other backends in `test_attention.py`.
"""

import warnings

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_mask

from helpers.tiny import FAMILIES, VOCAB, make_drafter, make_target
from trl_draft_opd.drafters import attention
from trl_draft_opd.drafters.attention import AttentionPlan, Sight, backends, flex
from trl_draft_opd.drafters.attention.plan import SEES_ALL
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.utils.versions import switch_checkpointing


def make_plan(name, num_anchors=37, length=600):
    """Return a plan of anchors that are ascending or not, in whole rows or in packed texts, alone or in two rows."""
    generator = torch.Generator().manual_seed(0)
    rows = 2 if name == "rows" else 1
    anchors = torch.randint(1, length + 1, (rows, num_anchors), generator=generator)
    if name != "unordered":
        anchors = anchors.sort(dim=1).values
    if name != "packed":
        return AttentionPlan(anchors), length
    # Texts of all lengths; the anchors of each at its second token and later.
    starts = torch.tensor([0, 130, 133, 140, 400, 402])
    firsts = starts[torch.bucketize(anchors - 1, starts, right=True) - 1]
    return AttentionPlan(anchors, firsts), length


def visible_pairs(plan, num_queries, length, sizes, sight=SEES_ALL):
    """Say pair by pair who sees whom, `(B, Q, M)`."""
    B, A = plan.anchors.shape
    seen = torch.zeros(B, A * num_queries, length + A * sum(sizes), dtype=torch.bool)
    for row in range(B):
        for block in range(A):
            first = 0 if plan.firsts is None else int(plan.firsts[row, block])
            anchor = int(plan.anchors[row, block])
            for slot in range(num_queries):
                query, offset = block * num_queries + slot, length
                low = first if sight.window is None else max(first, anchor + slot + 1 - sight.window)
                seen[row, query, low:anchor] = True
                for size in sizes:
                    num_seen = slot + 1 if sight.is_causal else size
                    seen[row, query, offset + block * size : offset + block * size + num_seen] = True
                    offset += A * size
    return seen


@pytest.mark.parametrize("name", ["ascending", "unordered", "packed", "rows"])
@pytest.mark.parametrize(("num_queries", "sizes"), [(16, (16,)), (1, ()), (1, (1, 1, 1)), (3, (2, 5))])
@pytest.mark.parametrize("tile", [128, 32])
@pytest.mark.parametrize("sight", [Sight(), Sight(window=70), Sight(window=70, is_causal=True)])
def test_the_mask_shows_each_query_what_it_sees_and_no_tile_is_left_out(
    name, num_queries, sizes, tile, sight, monkeypatch
):
    if sight.is_causal and sizes != (num_queries,):
        sight = Sight(window=70)
    monkeypatch.setattr(flex, "TILE", tile)
    plan, length = make_plan(name)
    mask = flex.block_mask(plan, num_queries, length, sizes, sight)
    expected = visible_pairs(plan, num_queries, length, sizes, sight)
    B, Q, M = expected.shape
    assert torch.equal(create_mask(mask.mask_mod, B, 1, Q, M, device="cpu")[:, 0], expected)
    assert mask.seq_lengths == (Q, M) and mask.BLOCK_SIZE == (tile, tile)
    padded = torch.nn.functional.pad(expected, (0, -M % tile, 0, -Q % tile))
    pairs = padded.unflatten(1, (-1, tile)).unflatten(3, (-1, tile)).transpose(2, 3).flatten(3)
    partial, full = (
        flex_attention._ordered_to_dense(counts, order, pairs.shape[2])[:, 0].bool()
        for counts, order in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert not (partial & full).any()
    # What is seen is computed; where nobody looks at the mask, all is seen, but for queries that are not there.
    assert not (pairs.any(dim=-1) & ~partial & ~full).any()
    is_query = (torch.arange(padded.shape[1]) < Q).view(1, -1, 1, tile, 1).expand(B, -1, pairs.shape[2], -1, tile)
    assert (pairs | ~is_query.flatten(3)).all(dim=-1)[full].all()
    if name == "ascending" and tile == 32 and sight.window is None:
        assert full.any() and (num_queries == 1 or (~partial & ~full).any())


def test_few_tiles_are_computed_in_vain():
    length, num_queries = 4096, 1
    plan = AttentionPlan(torch.arange(1, length + 1)[None])
    mask = flex.block_mask(plan, num_queries, length, (1, 1))
    num_tiles = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    X = length // 128
    # The triangle, its diagonal included, and one tile for each of the two own keys.
    assert num_tiles == X * (X + 1) // 2 + 2 * X and int(mask.full_kv_num_blocks.sum()) == X * (X - 1) // 2


def test_the_mask_takes_memory_by_tile_and_not_by_pair():
    plan = AttentionPlan(torch.arange(1, 32769)[None])
    mask = flex.block_mask(plan, 1, 32768, ())
    tensors = [tensor for tensor in mask.as_tuple() if isinstance(tensor, torch.Tensor)]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # Two orders of the keys' tiles and two of the queries', four bytes each: of 32,768 ** 2 pairs a thousandth.
    assert num_bytes < 4 * 4 * 256 * 256 * 1.1


def test_one_mask_serves_all_layers_of_a_step(monkeypatch):
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    made, block_mask = [], flex.block_mask
    monkeypatch.setattr(flex, "block_mask", lambda *args: (made.append(args[1:]), block_mask(*args))[1])
    plain, causal = Sight(), Sight(window=4, is_causal=True)
    plan = AttentionPlan(torch.tensor([[2, 5, 9]]))
    draw = torch.randn
    for pieces in ([], [], [1], [1], [1, 1]):
        keys = [draw(1, 1, 3, size, 16) for size in pieces]
        inputs = (draw(1, 2, 3, 1, 16), draw(1, 1, 9, 16), draw(1, 1, 9, 16), [*keys, *keys], plan, 1.0)
        flex.attend_by_flex(*inputs)
        if pieces == [1]:
            flex.attend_by_flex(*inputs, sight=causal)
    assert made == [(1, 9, (), plain), (1, 9, (1,), plain), (1, 9, (1,), causal), (1, 9, (1, 1), plain)]


def test_one_compilation_serves_all_lengths_of_text(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(flex_attention.flex_attention, dynamic=True, backend=backend)
    monkeypatch.setattr(flex, "flex_attention", compiled)
    torch._dynamo.reset()
    for num_anchors, length, sizes in ((805, 500, (1,)), (150, 411, (1, 1)), (299, 555, ()), (200, 700, (1, 1, 1))):
        plan, _ = make_plan("packed", num_anchors, length)
        draw = torch.randn
        context = [draw(1, 2, length, 16) for _ in range(2)]
        keys = [draw(1, 2, num_anchors, size, 16) for size in sizes]
        inputs = (draw(1, 4, num_anchors, 1, 16), *context, [*keys, *keys], plan, 0.25)
        with torch.autocast("cpu", torch.float16, enabled=length == 411):
            actual = flex.attend_by_flex(*inputs)
        torch.testing.assert_close(actual, backends.attend_in_tiles(*inputs, "products"), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    # Windows are read from the mask's tensors. Another mask, and the output that sinks need, are one graph each.
    graphs.clear()
    variants = [(Sight(), None), (Sight(window=50), None)]
    variants += [(Sight(window=50, is_causal=True), None), (Sight(), torch.ones(4))] * 2
    for index, (sight, sinks) in enumerate(variants):
        num_anchors, length = 150 + 7 * index, 411 + 13 * index
        plan, _ = make_plan("packed", num_anchors, length)
        context = [draw(1, 2, length, 16) for _ in range(2)]
        inputs = (draw(1, 4, num_anchors, 5, 16), *context, [draw(1, 2, num_anchors, 5, 16) for _ in range(2)], plan)
        actual = flex.attend_by_flex(*inputs, 0.25, sight, sinks)
        expected = backends.attend_in_tiles(*inputs, 0.25, "products", sight, sinks)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 3


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafters_compute_the_same_through_it(family, is_recomputed, monkeypatch):
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    target = make_target()
    drafter = make_drafter(family, target).train()
    if is_recomputed:
        switch_checkpointing(drafter, "enable")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, VOCAB, (1, 200), generator=generator)
    features = torch.randn(1, 200, drafter.fc.in_features, generator=generator)
    plan, _ = make_plan("packed", 60, 200)
    starts = torch.zeros_like(ids)
    for start in (130, 133, 140):
        starts[:, start:] = start
    # Never the first token of a text.
    anchors = torch.where(plan.anchors == plan.firsts, plan.anchors + 1, plan.anchors).clamp(max=199)
    drafts = torch.randint(7, VOCAB, (1, 60, 4), generator=generator)
    weight, results = None, []
    for backend in ("flash", "flex"):
        monkeypatch.setattr(attention, "choose_backend", lambda *args, backend=backend: backend)
        drafter.zero_grad()
        hidden = run_blocks(drafter, features, ids, anchors, drafts, target.embed, starts)
        weight = torch.randn(hidden.shape, generator=generator) if weight is None else weight
        (hidden * weight).sum().backward()
        grads = [parameter.grad.clone() for parameter in drafter.parameters() if parameter.grad is not None]
        results.append([hidden.detach(), *grads])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < 2e-5 * other.norm()


# -- when it is used --------------------------------------------------------------------------------------------------


class Query:
    """What is asked of a query on a card."""

    is_cuda, device, dtype = True, torch.device("cuda:0"), torch.bfloat16

    def __init__(self, *shape, **changes):
        self.shape = torch.Size(shape)
        vars(self).update(changes)


@pytest.mark.parametrize("works", [True, False])
def test_it_is_used_on_cuda_for_whole_tiles_of_usual_heads(works, monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "_flex_works", lambda *args: (asked.append(args), works)[1])
    assert backends.choose_backend(Query(1, 32, 8, 16, 128), 8) == ("flex" if works else "products")
    assert asked == [(torch.device("cuda:0"), torch.bfloat16, 32, 8, 128, False, False)]
    for query in (
        Query(1, 32, 127, 1, 128),
        Query(1, 32, 8, 16, 8),
        Query(1, 32, 8, 16, 512),
        Query(1, 32, 8, 16, 128, dtype=torch.float64),
        Query(1, 32, 8, 16, 128, is_cuda=False, device=torch.device("xpu")),
    ):
        assert backends.choose_backend(query, 8) == "products"
    assert len(asked) == 1
    # Causal blocks are another mask, and sinks another output.
    backends.choose_backend(Query(1, 32, 8, 16, 128), 8, True, True)
    assert asked[1:] == [(torch.device("cuda:0"), torch.bfloat16, 32, 8, 128, True, True)]
    assert backends.choose_backend(torch.zeros(1, 4, 200, 1, 64), 2) == "flash"


@pytest.fixture
def tried_on_the_cpu(monkeypatch):
    """The trial as it goes on a card, with torch's own reference of the kernel."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    backends._flex_works.cache_clear()
    yield lambda dtype=torch.bfloat16, variant=(False, False): backends._flex_works(
        torch.device("cpu"), dtype, 4, 2, 16, *variant
    )
    backends._flex_works.cache_clear()


@pytest.mark.parametrize("variant", [(False, False), (True, True)], ids=["plain", "causal with sinks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_kernel_that_is_right_is_trusted_without_a_word(tried_on_the_cpu, dtype, variant):
    with warnings.catch_warnings(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        assert tried_on_the_cpu(dtype, variant)


def test_a_kernel_that_does_not_compile_is_told_of_once(tried_on_the_cpu, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Cannot find a working triton installation.\nMore lines.")

    monkeypatch.setattr(flex, "flex_attention", fail)
    with pytest.warns(
        UserWarning, match=r"\(RuntimeError: Cannot find .* installation\.\).*matrix products in its place"
    ):
        assert not tried_on_the_cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tried_on_the_cpu()


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_a_kernel_that_is_wrong_is_not_used(tried_on_the_cpu, monkeypatch, wrong):
    right = flex.flex_attention

    def differ(query, *args, **kwargs):
        out = right(query, *args, **kwargs)
        return out * 1.1 if wrong == "value" else out + 0.5 * (out - out.detach())

    monkeypatch.setattr(flex, "flex_attention", differ)
    with pytest.warns(UserWarning, match="its values differ by"):
        assert not tried_on_the_cpu()
