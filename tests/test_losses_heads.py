# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Claims about the passes of a loss through a head: without autograd a linear head gives what autograd gives, in the
dtype of autocast, with its weight cast once per call and its gradient summed in float32.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tiny import make_drafter, make_target
from trl_draft_opd.losses import Head, chunked_divergence, heads, score_labels
from trl_draft_opd.trainer import step


ROWS, HIDDEN, VOCAB = 24, 6, 32
BF16 = torch.bfloat16


def draw(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) / 2).to(dtype)


def run(hidden, head, target_head=None, chunk_bytes=4 * VOCAB * 20, target_hidden=None, draft_token_ids=None):
    """Return the loss, its rows, and the gradients of hidden states and parameters."""
    result = chunked_divergence(
        hidden,
        head,
        draw(ROWS, HIDDEN, dtype=hidden.dtype) if target_hidden is None else target_hidden,
        target_head or Head.linear(draw(VOCAB, HIDDEN)),
        target_rows_N=None,
        labels_N=None,
        weights_N=torch.full((ROWS,), 1 / ROWS),
        loss_type="forward_kl",
        draft_token_ids=draft_token_ids,
        chunk_bytes=chunk_bytes,
    )
    leaves = [leaf for leaf in (hidden, *head.parameters) if leaf.requires_grad]
    return result.total.detach(), result.rows_N, torch.autograd.grad(result.total, leaves)


def by_autograd(head):
    """The same head, of which nothing but its projection is known."""
    return Head(head.project, head.parameters, head.vocab_size)


@pytest.mark.parametrize("trained", ["hidden", "hidden weight", "hidden weight bias", "weight", "bias"])
@pytest.mark.parametrize("has_autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (BF16, BF16), (BF16, torch.float32), (torch.float32, BF16)],
)
def test_a_linear_head_without_autograd_gives_what_autograd_gives(trained, has_autocast, hidden_dtype, weight_dtype):
    hidden = draw(ROWS, HIDDEN, dtype=hidden_dtype).requires_grad_("hidden" in trained)
    weight = draw(VOCAB, HIDDEN, dtype=weight_dtype).requires_grad_("weight" in trained)
    bias = draw(VOCAB, dtype=weight_dtype).requires_grad_("bias" in trained)
    head = Head.linear(weight, bias)
    with torch.autocast("cpu", BF16) if has_autocast else nullcontext():
        actual, expected = run(hidden, head), run(hidden, by_autograd(head))
    assert [grad.dtype for grad in actual[2]] == [grad.dtype for grad in expected[2]]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


RANK, REDUCED = 3, 20


@pytest.mark.parametrize("trained", ["hidden", "hidden second", "hidden first second", "second"])
@pytest.mark.parametrize("has_autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("is_reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize(
    ("first_dtype", "keeps_dtype", "second_dtype"),
    [(torch.float32, True, torch.float32), (BF16, True, torch.float32), (torch.float32, False, torch.float32)],
)
def test_a_sum_of_linear_heads_without_autograd_gives_what_autograd_gives(
    trained, has_autocast, is_reduced, first_dtype, keeps_dtype, second_dtype
):
    """As a drafter's whose first part may be the target's frozen head, and whose second part reads columns behind."""
    size = REDUCED if is_reduced else VOCAB
    hidden = draw(ROWS, HIDDEN + RANK).requires_grad_("hidden" in trained)
    first = draw(size, HIDDEN, dtype=first_dtype).requires_grad_("first" in trained)
    second = draw(size, RANK, dtype=second_dtype).requires_grad_("second" in trained)
    head = Head.joined([Head.linear(first, keeps_dtype=keeps_dtype), Head.linear(second)])

    def plain(states):
        """Sum and products as autograd would record them."""
        with torch.autocast("cpu", enabled=False) if keeps_dtype else nullcontext():
            logits = F.linear(states[:, :HIDDEN].to(first_dtype), first)
        return logits + F.linear(states[:, HIDDEN:], second)

    ids = torch.randperm(VOCAB)[:REDUCED] if is_reduced else None
    target = {"draft_token_ids": ids, "target_hidden": draw(ROWS, HIDDEN)}
    with torch.autocast("cpu", BF16) if has_autocast else nullcontext():
        actual, expected = run(hidden, head, **target), run(hidden, Head(plain, head.parameters, size), **target)
        scores, expected_scores = (
            score_labels(hidden, each, torch.arange(ROWS), draft_token_ids=ids, chunk_bytes=4 * VOCAB * 12)
            for each in (head, Head(plain, (), size))
        )
    assert [grad.dtype for grad in actual[2]] == [grad.dtype for grad in expected[2]]
    # A sum in bfloat16 is rounded once here, and twice by autograd.
    tolerance = {"rtol": 2**-6, "atol": 2**-9} if has_autocast else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(actual, expected, **tolerance)
    torch.testing.assert_close(scores.log_probs_N, expected_scores.log_probs_N, **tolerance)


def test_a_sum_of_linear_heads_casts_each_weight_once_and_never_calls_autograd(monkeypatch):
    hidden, first, second = draw(ROWS, HIDDEN + RANK).requires_grad_(), draw(VOCAB, HIDDEN), draw(VOCAB, RANK)
    head = Head.joined([Head.linear(first), Head.linear(second.requires_grad_())])
    target = {"target_head": Head.linear(draw(VOCAB, HIDDEN, dtype=BF16)), "target_hidden": draw(ROWS, HIDDEN)}
    differentiated = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: differentiated.append(args) or grad(*args))
    for weight in (first, second):
        with torch.autocast("cpu", BF16), Casts(tuple(weight.shape)) as casts:
            run(hidden, head, **target)
        assert casts.count == 1
    assert len(differentiated) == 2  # by `run` itself


def test_a_linear_head_never_calls_autograd_for_a_chunk(monkeypatch):
    hidden, weight = draw(ROWS, HIDDEN).requires_grad_(), draw(VOCAB, HIDDEN).requires_grad_()
    expected = run(hidden, Head.linear(weight))
    differentiated = []
    grad = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **kwargs: differentiated.append(args) or grad(*args, **kwargs)
    )
    torch.testing.assert_close(run(hidden, Head.linear(weight)), expected, rtol=0, atol=0)
    assert len(differentiated) == 1  # by `run` itself
    run(hidden, by_autograd(Head.linear(weight)))
    assert len(differentiated) > 3


class Casts(TorchDispatchMode):
    """Counts casts of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_cast = func._overloadpacket is torch.ops.aten._to_copy and args[0].dtype != (kwargs or {}).get("dtype")
        self.count += is_cast and tuple(args[0].shape) == self.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_trained", [False, True], ids=["frozen", "trained"])
def test_autocast_casts_a_float32_head_once_per_call_and_not_per_chunk(is_trained):
    hidden, weight = draw(ROWS, HIDDEN).requires_grad_(), draw(VOCAB, HIDDEN).requires_grad_(is_trained)
    target_head = Head.linear(draw(VOCAB, HIDDEN, dtype=BF16))
    with torch.autocast("cpu", BF16), Casts((VOCAB, HIDDEN)) as casts:
        run(hidden, Head.linear(weight), target_head)
    assert casts.count == 1
    with torch.autocast("cpu", BF16), Casts((VOCAB, HIDDEN)) as casts:
        score_labels(hidden, Head.linear(weight), torch.arange(ROWS), draft_token_ids=None, chunk_bytes=4 * VOCAB * 12)
    assert casts.count == 1


def test_a_head_that_keeps_its_dtype_multiplies_in_it_under_autocast():
    weight, hidden = draw(VOCAB, HIDDEN), draw(ROWS, HIDDEN, dtype=BF16)
    with torch.autocast("cpu", BF16):
        kept, cast = (
            heads.open_head(Head.linear(weight, keeps_dtype=keeps)).project(hidden) for keeps in (True, False)
        )
    assert (kept.dtype, cast.dtype) == (torch.float32, BF16)
    assert torch.equal(kept, F.linear(hidden.float(), weight))


def test_a_head_that_left_autocast_is_differentiated_outside_of_it_too():
    hidden, weight = draw(ROWS, HIDDEN).requires_grad_(), draw(VOCAB, HIDDEN)

    def project(states):
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(F.linear(states, weight) / 4) * 4

    head = Head(project, (), VOCAB, 4)
    plain = run(hidden, head)
    with torch.autocast("cpu", dtype=BF16):
        inside = run(hidden, head, Head.linear(draw(VOCAB, HIDDEN), keeps_dtype=True))
    assert torch.equal(plain[0], inside[0])
    assert torch.equal(plain[2][0], inside[2][0])


def test_a_head_in_float64_stays_in_float64_under_autocast():
    weight = draw(VOCAB, HIDDEN).double()
    with torch.autocast("cpu", BF16):
        assert heads.open_head(Head.linear(weight)).project(draw(ROWS, HIDDEN)).dtype == torch.float64


def test_products_are_added_to_float32_where_the_device_can(monkeypatch):
    hidden, weight = draw(ROWS, HIDDEN, dtype=BF16), draw(VOCAB, HIDDEN, dtype=BF16).requires_grad_()
    rounded = run(hidden, Head.linear(weight))[2][0]
    calls = []

    def addmm(summed, left, right, *, out_dtype, out):
        assert out is summed and out_dtype == out.dtype == torch.float32 and left.dtype == right.dtype == BF16
        calls.append(left.shape)
        return out.add_(left.float() @ right.float())

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(heads, "_adds_to_float32", lambda device_type, dtype: True)
    summed = run(hidden, Head.linear(weight))[2][0]
    assert len(calls) > 2
    torch.testing.assert_close(summed, rounded, rtol=2**-6, atol=2**-9)


def test_whether_a_device_adds_to_float32_is_tried_and_not_assumed():
    heads._adds_to_float32.cache_clear()
    assert heads._adds_to_float32("cpu", BF16) is False  # there is no such kernel for a CPU


def test_without_such_a_product_on_cuda_one_warning_says_what_is_rounded(monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None, **options: ones(*shape, **options))
    heads._adds_to_float32.cache_clear()
    try:
        with pytest.warns(UserWarning, match="made in torch.bfloat16 chunk by chunk in its place") as caught:
            assert [heads._adds_to_float32("cuda", BF16) for _ in range(2)] == [False, False]
        assert len(caught) == 1
    finally:
        heads._adds_to_float32.cache_clear()


def test_a_targets_head_is_a_bare_product_unless_something_is_done_to_its_logits():
    target = make_target()
    hidden = draw(3, target.config.hidden_size, dtype=BF16)
    head = step._target_head(target)
    with torch.autocast("cpu", BF16):
        logits = heads.open_head(head).project(hidden)
    assert head.products and logits.dtype == torch.float32
    torch.testing.assert_close(logits, target.project(hidden))
    target.config.logit_scale = 2.0
    scaled = step._target_head(target)
    assert not scaled.products and scaled.num_buffers == 2
    torch.testing.assert_close(heads.open_head(scaled).project(hidden), 2 * logits)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_a_head_of_several_parts_is_their_products_unless_the_target_does_something_to_its_logits(kind):
    target = make_target(kind)
    drafter = make_drafter("dspark", target)
    head = step._draft_head(drafter, target, step._target_head(target))
    hidden = draw(5, target.config.hidden_size + drafter.config.markov_rank)
    assert len(head.products) == (2 if kind == "qwen3" else 0)
    assert head.parameters == (drafter.markov_head.markov_w2.weight,)
    expected = drafter.draft_logits(hidden, target.project)
    torch.testing.assert_close(heads.open_head(head).project(hidden), expected.detach())
    alone = target.project(hidden[:, : target.config.hidden_size])
    assert (expected - alone).abs().max() > 1
