# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Claims about how the chunked loss works: closed-form gradients, shared target states, its budget of bytes, its
accuracy.

Shape letters:  N = rows, M = target states, H = hidden size, V = vocabulary of the target, D = of the drafter
"""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_draft_opd.losses import LOSS_TYPES, Head, chunked_divergence, divergence


ALL_LOSSES = pytest.mark.parametrize("loss_type", LOSS_TYPES)
BOTH_VOCABULARIES = pytest.mark.parametrize("is_reduced", [False, True])
REAL_VOCAB = 151_936
CAP = 3.0


def identity_head(vocab_size):
    """Hidden states that are the logits themselves: their gradient is the closed form, without a product behind it."""
    return Head(lambda hidden: hidden, (), vocab_size)


def soft_capped(weight, parameters=()):
    return Head(lambda hidden: torch.tanh(hidden @ weight.T / CAP) * CAP, parameters, len(weight), num_buffers=4)


def compare_logits(draft_logits, target_logits, labels, loss_type, weights, chunk_bytes=10**9):
    """Return total and rows of the chunked loss on given logits."""
    return chunked_divergence(
        draft_logits,
        identity_head(draft_logits.shape[1]),
        target_logits,
        identity_head(target_logits.shape[1]),
        target_rows_N=None,
        labels_N=labels,
        weights_N=weights,
        loss_type=loss_type,
        draft_token_ids=None,
        chunk_bytes=chunk_bytes,
    )


class Problem:
    """Rows that share target states: some states serve several rows, some none."""

    def __init__(self, is_reduced=False, dtype=torch.float64, num_rows=23, num_states=9, vocab=32, hidden=4):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.draft_token_ids = torch.randperm(vocab, generator=generator)[: vocab // 3] if is_reduced else None
        ids = torch.arange(vocab) if self.draft_token_ids is None else self.draft_token_ids
        self.hidden = draw(num_rows, hidden).requires_grad_()
        self.weight = draw(len(ids), hidden).requires_grad_()
        self.target_hidden, self.target_weight = draw(num_states, hidden), draw(vocab, hidden)
        self.target_rows = torch.randint(num_states, (num_rows,), generator=generator)
        self.labels = ids[torch.randint(len(ids), (num_rows,), generator=generator)]
        self.labels[::3] = -1
        self.weights = draw(num_rows).abs().double() + 0.1

    def run(self, loss_type, head=None, target_head=None, *, is_shared=True, chunk_bytes=10**9, **changes):
        target_rows = changes.pop("target_rows", self.target_rows)
        target_hidden = changes.pop("target_hidden", self.target_hidden)
        arguments = dict(
            target_rows_N=target_rows if is_shared else None,
            labels_N=self.labels,
            weights_N=self.weights,
            loss_type=loss_type,
            draft_token_ids=self.draft_token_ids,
            chunk_bytes=chunk_bytes,
        )
        return chunked_divergence(
            self.hidden,
            head or Head.linear(self.weight),
            target_hidden if is_shared else target_hidden[target_rows],
            target_head or Head.linear(self.target_weight),
            **(arguments | changes),
        )

    def plain(self, loss_type, project):
        """The same weighted sum from all logits at once, differentiated by autograd."""
        target_logits = self.target_hidden[self.target_rows] @ self.target_weight.T
        labels = self.labels
        if self.draft_token_ids is not None:
            target_logits = target_logits[:, self.draft_token_ids]
            places = {token: place for place, token in enumerate(self.draft_token_ids.tolist())} | {-1: -1}
            labels = torch.tensor([places[label] for label in labels.tolist()])
        return (divergence(project(self.hidden), target_logits, labels, loss_type) * self.weights).sum()


class PeakBytes(TorchDispatchMode):
    """Largest sum of bytes of the storages made under it and alive at once; those that came in count for nothing."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in self.tensors((args, kwargs)):
            self.meet(tensor, 0)
        out = func(*args, **(kwargs or {}))
        for tensor in self.tensors(out):
            self.meet(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    @staticmethod
    def tensors(tree):
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    def meet(self, tensor, cost):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = cost
            self.alive += cost
            weakref.finalize(storage, self.part, storage._cdata).atexit = False

    def part(self, key):
        self.alive -= self.sizes.pop(key)


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@ALL_LOSSES
@pytest.mark.parametrize("scale", [1.0, 30.0, 500.0])
def test_the_closed_form_gradient_is_that_of_autograd(loss_type, scale):
    generator = torch.Generator().manual_seed(1)
    draft_logits, target_logits = (torch.randn(8, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    draft_logits, target_logits = (scale * draft_logits).requires_grad_(), scale * target_logits
    with torch.no_grad():
        target_logits[1] = draft_logits[1]  # every token is a tie
        draft_logits[2], target_logits[2] = 0, 0  # all but two are
        draft_logits[2, 3] = target_logits[2, 5] = math.log(2)
    labels = torch.tensor([0, -1, 8, -1, 4, 4, -1, 2])
    weights = torch.rand(8, generator=generator, dtype=torch.float64) + 0.1
    losses = compare_logits(draft_logits, target_logits, labels, loss_type, weights)
    expected_rows = divergence(draft_logits, target_logits, labels, loss_type)
    torch.testing.assert_close(losses.rows_N, expected_rows.detach(), rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(losses.total, draft_logits)
    (expected,) = torch.autograd.grad((expected_rows * weights).sum(), draft_logits)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


@ALL_LOSSES
@BOTH_VOCABULARIES
@pytest.mark.parametrize("chunk_bytes", [0, 8 * 300, 10**9])
def test_shared_target_states_change_nothing_whatever_unused_ones_hold(loss_type, is_reduced, chunk_bytes):
    problem = Problem(is_reduced)
    weights, target_rows, target_hidden = (
        tensor.clone() for tensor in (problem.weights, problem.target_rows, problem.target_hidden)
    )
    weights[target_rows == 3] = 0  # nobody reads state 3, and nobody looks where row 5 points
    weights[5] = 0
    expected = problem.run(loss_type, is_shared=False, weights_N=weights)
    target_rows[5], target_hidden[3] = -7, math.nan
    changes = dict(weights_N=weights, target_rows=target_rows, target_hidden=target_hidden)
    actual = problem.run(loss_type, chunk_bytes=chunk_bytes, **changes)
    for name in ("total", "rows_N", "lost_mass_N"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    leaves = [problem.hidden, problem.weight]
    grads, expected_grads = (torch.autograd.grad(losses.total, leaves) for losses in (actual, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def watched(weight, calls):
    return Head(lambda hidden: calls.append(len(hidden)) or hidden @ weight.T, (), len(weight))


@ALL_LOSSES
@BOTH_VOCABULARIES
@pytest.mark.parametrize("chunk_bytes", [0, 8 * 300, 10**9])
def test_every_row_and_every_used_state_is_projected_once(loss_type, is_reduced, chunk_bytes):
    problem = Problem(is_reduced)
    seen, target_seen = [], []
    head, target_head = watched(problem.weight, seen), watched(problem.target_weight, target_seen)
    weights = problem.weights.index_fill(0, torch.tensor([2, 7]), 0)
    problem.run(loss_type, head, target_head, weights_N=weights, chunk_bytes=chunk_bytes)
    num_supervised, num_states = int((weights > 0).sum()), len(problem.target_rows[weights > 0].unique())
    assert num_states < num_supervised
    assert sum(seen) == num_supervised
    assert sum(target_seen) == num_states
    target_seen.clear()
    problem.run(loss_type, None, target_head, is_shared=False)
    assert sum(target_seen) == len(weights)


def test_no_row_is_projected_that_is_not_read():
    problem, seen, target_seen = Problem(), [], []
    heads = watched(problem.weight, seen), watched(problem.target_weight, target_seen)
    problem.run("tv", *heads, weights_N=torch.zeros_like(problem.weights))
    assert (sum(seen), sum(target_seen)) == (0, 0)
    problem.run("ce", *heads, labels_N=problem.labels.clamp(min=0))
    assert (sum(seen), sum(target_seen)) == (len(problem.labels), 0)


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(
    ("kind", "loss_type"),
    [("full", loss_type) for loss_type in LOSS_TYPES]
    + [(kind, loss_type) for kind in ("reduced", "bfloat16", "soft-capped", "trained") for loss_type in ("jsd", "ce")],
)
def test_all_logits_alive_together_stay_within_the_budget(kind, loss_type, is_shared):
    num_rows, vocab = 384, 2048
    chunk_bytes = 4 * vocab * 40
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    problem = Problem(kind == "reduced", dtype, num_rows=num_rows, num_states=num_rows // 4, vocab=vocab, hidden=2)
    weight = problem.weight if kind == "trained" else problem.weight.detach()
    make_head = soft_capped if kind == "soft-capped" else Head.linear
    head, target_head = make_head(weight), make_head(problem.target_weight)
    with PeakBytes() as tracker:
        problem.run(loss_type, head, target_head, is_shared=is_shared, chunk_bytes=chunk_bytes).total.backward()
    # Rows and states come with a hidden state or two, their gradient, an index, a weight, a loss, a label each.
    beside = num_rows * (4 * 2 * 4 + 20 * 8) + (2 * 4 * weight.numel() if kind == "trained" else 0)
    assert chunk_bytes / 16 < tracker.peak - beside <= chunk_bytes


def test_the_tracker_of_bytes_sees_what_is_alive_together():
    with PeakBytes() as tracker:
        first = torch.ones(1000)
        second = first + 1
        del first
        second.mul_(2).view(10, 100)
        third = second.exp()
    assert (tracker.peak, tracker.alive) == (8000, 8000) and third.numel() == 1000


@ALL_LOSSES
def test_a_gradient_in_bfloat16_points_where_that_of_float64_does(loss_type):
    problem = Problem(dtype=torch.bfloat16, num_rows=64, vocab=512, hidden=32)
    with torch.no_grad():
        problem.hidden /= 8
    problem.run(loss_type).total.backward()
    grads = [problem.hidden.grad, problem.weight.grad]
    made, target_made = (
        (hidden @ weight.T).detach().double()
        for hidden, weight in ((problem.hidden, problem.weight), (problem.target_hidden, problem.target_weight))
    )
    leaves = [tensor.detach().double().requires_grad_() for tensor in (problem.hidden, problem.weight)]
    logits = leaves[0] @ leaves[1].T
    target_logits = problem.target_hidden.double() @ problem.target_weight.double().T
    if loss_type in ("tv", "lk"):  # whose gradients jump where p = q: the same rounded logits say on which side one is
        logits, target_logits = logits + (made - logits).detach(), target_made
    total = (divergence(logits, target_logits[problem.target_rows], problem.labels, loss_type) * problem.weights).sum()
    for grad, expected in zip(grads, torch.autograd.grad(total, leaves), strict=True):
        assert grad.dtype == torch.bfloat16
        assert torch.cosine_similarity(grad.double().flatten(), expected.flatten(), dim=0) >= 0.9999


@ALL_LOSSES
def test_a_real_vocabulary_with_saturated_rows_is_as_exact_as_float32_allows(loss_type):
    generator = torch.Generator().manual_seed(2)
    draft_logits, target_logits = (2 * torch.randn(4, REAL_VOCAB, generator=generator) for _ in range(2))
    for row, (draft_token, target_token) in enumerate([(7, 7), (7, 9), (7, 9)]):  # row 3 is all tail
        draft_logits[row, draft_token], target_logits[row, target_token] = 30, 30
    draft_logits[2] *= 20
    target_logits[2] *= -20
    labels, weights = torch.tensor([7, -1, REAL_VOCAB - 1, -1]), torch.full((4,), 0.25)
    draft_logits.requires_grad_()
    losses = compare_logits(draft_logits, target_logits, labels, loss_type, weights, chunk_bytes=2**22)
    (grad,) = torch.autograd.grad(losses.total, draft_logits)
    exact_logits = draft_logits.detach().double().requires_grad_()
    exact_rows = divergence(exact_logits, target_logits.double(), labels, loss_type)
    (exact_grad,) = torch.autograd.grad((exact_rows * 0.25).sum(), exact_logits)
    assert losses.rows_N.isfinite().all() and grad.isfinite().all()
    torch.testing.assert_close(losses.rows_N.double(), exact_rows.detach(), rtol=1e-6, atol=1e-6)
    for row in range(4):
        assert relative_error(grad[row], exact_grad[row]) <= 2e-6 or exact_grad[row].norm() < 1e-6


@ALL_LOSSES
@BOTH_VOCABULARIES
def test_a_soft_capped_head_that_trains_gets_the_gradient_of_autograd(loss_type, is_reduced):
    problem = Problem(is_reduced)
    head, leaves = soft_capped(problem.weight, (problem.weight,)), [problem.hidden, problem.weight]
    grads = torch.autograd.grad(problem.run(loss_type, head, chunk_bytes=8 * 300).total, leaves)
    expected = torch.autograd.grad(problem.plain(loss_type, head.project), leaves)
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_sum_in_place_of_a_linear_head_equals_what_autograd_sums(dtype):
    problem = Problem(dtype=dtype)
    linear = Head.linear(problem.weight)
    rebuilt = Head(linear.project, linear.parameters, linear.vocab_size)
    leaves = [problem.hidden, problem.weight]
    runs = [problem.run("jsd", head, chunk_bytes=8 * 300).total for head in (linear, rebuilt)]
    grads, expected = (torch.autograd.grad(total, leaves) for total in runs)
    torch.testing.assert_close(grads, expected)
    assert grads[1].dtype == dtype


def test_a_linear_head_with_another_projection_is_linear_no_more():
    problem = Problem()
    head = replace(Head.linear(problem.weight), project=soft_capped(problem.weight).project)
    (grad,) = torch.autograd.grad(problem.run("tv", head).total, problem.weight)
    (expected,) = torch.autograd.grad(problem.plain("tv", head.project), problem.weight)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


def test_a_head_whose_gradient_needs_its_own_logits_is_refused():
    problem = Problem()
    head = Head(lambda hidden: (hidden @ problem.weight.T).log_softmax(1), (problem.weight,), len(problem.weight))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        problem.run("forward_kl", head)
    with torch.no_grad():
        assert problem.run("forward_kl", head).total.isfinite()


def test_values_alone_leave_the_logits_as_they_are():
    problem, made = Problem(), []
    head = Head(lambda hidden: made.append(hidden @ problem.weight.T) or made[-1], (), len(problem.weight))
    with torch.no_grad():
        problem.run("reverse_kl", head, is_shared=False)
        assert torch.equal(made[0], problem.hidden @ problem.weight.T)


@pytest.mark.parametrize(
    ("target_rows", "message"),
    [
        (None, "9 target states for 23 rows.*`target_rows_N`"),
        (torch.zeros(22, dtype=torch.long), "expected one torch.int64 index for each of 23 rows"),
        (torch.zeros(23), "is torch.float32"),
        (torch.zeros(23, dtype=torch.bool), "is torch.bool"),
        (torch.full((23,), 9), "names state 9, but there are 9"),
        (torch.full((23,), -1), "names state -1"),
    ],
)
def test_target_rows_that_do_not_fit_are_refused(target_rows, message):
    with pytest.raises(ValueError, match=message):
        Problem().run("forward_kl", target_rows=target_rows)
