# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Claims about the loss of a selector among the likeliest tokens: it is what autograd makes of a few plain lines.

Shape letters:  N = rows, M = target states, H = hidden size, V = vocabulary, R = rank of the selector, k = candidates
"""

from dataclasses import replace

import pytest
import torch

from trl_draft_opd.losses import LOSS_TYPES, Head, Selector, Verification, chunked_divergence, divergence, score_labels
from trl_draft_opd.losses.budget import fit_budget


N, M, H, V, R, TOP = 29, 11, 4, 24, 3, 5
ALL_LOSSES = pytest.mark.parametrize("loss_type", LOSS_TYPES)


class Problem:
    """Rows whose likeliest tokens often miss what the target or the label asks for."""

    def __init__(self, dtype=torch.float64, weight=0.7, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = draw(N, H + R).requires_grad_()
        self.head, self.rows = draw(V, H).requires_grad_(), draw(V, R).requires_grad_()
        self.target_hidden, self.target_head = draw(M, H), draw(V, H)
        self.target_rows = torch.randint(M, (N,), generator=generator)
        self.labels = torch.randint(V, (N,), generator=generator)
        self.labels[::3] = -1
        self.weights = torch.rand(N, generator=generator, dtype=torch.float64)
        self.weights[::5] = 0
        self.selector = Selector(self.rows, TOP, weight)

    @property
    def trained(self):
        return self.hidden, self.head, self.rows

    def run(self, loss_type, chunk_bytes=10**9, **changes):
        arguments = dict(
            target_rows_N=self.target_rows,
            labels_N=self.labels,
            weights_N=self.weights,
            loss_type=loss_type,
            draft_token_ids=None,
            chunk_bytes=chunk_bytes,
            selector=self.selector,
        )
        heads = Head.linear(self.head), self.target_hidden, Head.linear(self.target_head)
        return chunked_divergence(self.hidden, *heads, **arguments | changes)

    def gradients(self, total):
        return torch.autograd.grad(total, self.trained)

    def expected(self, loss_type):
        """Total, losses of the head, losses of the choice, and whether the wanted token was found, by autograd."""
        logits = self.hidden[:, :H] @ self.head.T
        target = (self.target_hidden @ self.target_head.T)[self.target_rows]
        wanted = target.argmax(dim=1)
        if loss_type == "ce":
            wanted = torch.where(self.labels < 0, wanted, self.labels)
        unary, chosen, found = divergence(logits, target, wanted, loss_type), [], []
        for row in range(N):
            ids = logits[row].sort(descending=True).indices[:TOP].tolist()
            found.append(int(wanted[row]) in ids)
            if not found[-1]:
                ids[-1] = int(wanted[row])
            scores = torch.stack([logits[row, token] + self.hidden[row, H:] @ self.rows[token] for token in ids])
            label = torch.tensor([ids.index(int(wanted[row]))])
            chosen.append(divergence(scores[None], target[row, ids][None], label, loss_type)[0])
        chosen = torch.stack(chosen)
        total = (self.weights * (unary + self.selector.weight * chosen)).sum()
        return total, unary, chosen, torch.tensor(found)


def assert_close(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@ALL_LOSSES
def test_value_and_gradients_are_those_of_autograd(loss_type):
    problem = Problem()
    total, unary, chosen, found = problem.expected(loss_type)
    rows, counts = problem.run(loss_type), problem.weights != 0
    assert 0 < found[counts].sum() < counts.sum(), "both kinds of rows must occur"
    torch.testing.assert_close(rows.total, total)
    torch.testing.assert_close(rows.rows_N[counts], unary[counts].detach())
    torch.testing.assert_close(rows.selector_N[counts], chosen[counts].detach())
    assert torch.equal(rows.is_found_N, (found & counts).double())
    assert_close(problem.gradients(rows.total), problem.gradients(total))


@ALL_LOSSES
@pytest.mark.parametrize("chunk_bytes", [1, 4000, 20_000])
def test_chunks_change_neither_losses_nor_gradients(loss_type, chunk_bytes):
    problem = Problem()
    whole, chunked = problem.run(loss_type), problem.run(loss_type, chunk_bytes)
    torch.testing.assert_close(chunked.total, whole.total)
    torch.testing.assert_close(chunked.selector_N, whole.selector_N)
    assert_close(problem.gradients(chunked.total), problem.gradients(whole.total))


@pytest.mark.parametrize("loss_type", ["forward_kl", "ce"])
def test_finite_differences_agree_with_the_gradient(loss_type):
    problem = Problem()

    def total(hidden, rows):
        problem.hidden, problem.selector = hidden, replace(problem.selector, rows_DR=rows)
        return problem.run(loss_type).total

    assert torch.autograd.gradcheck(total, (problem.hidden, problem.rows))


def test_the_weight_scales_the_loss_of_the_choice_alone():
    values = {weight: Problem(weight=weight).run("forward_kl") for weight in (0.0, 1.0, 2.0)}
    plain = Problem()
    without = chunked_divergence(
        plain.hidden[:, :H],
        Head.linear(plain.head),
        plain.target_hidden,
        Head.linear(plain.target_head),
        target_rows_N=plain.target_rows,
        labels_N=None,
        weights_N=plain.weights,
        loss_type="forward_kl",
        draft_token_ids=None,
        chunk_bytes=10**9,
    )
    assert without.selector_N is None and without.is_found_N is None
    torch.testing.assert_close(values[0.0].total, without.total)
    torch.testing.assert_close(values[2.0].total - values[1.0].total, values[1.0].total - values[0.0].total)
    assert values[1.0].total > values[0.0].total


def test_cross_entropy_with_all_labels_needs_no_target():
    problem = Problem()
    problem.labels[::3] = 7
    total = problem.run("ce").total
    alone = chunked_divergence(
        problem.hidden,
        Head.linear(problem.head),
        None,
        None,
        target_rows_N=None,
        labels_N=problem.labels,
        weights_N=problem.weights,
        loss_type="ce",
        draft_token_ids=None,
        chunk_bytes=4000,
        selector=problem.selector,
    )
    torch.testing.assert_close(alone.total, total)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_each_input_can_train_alone(trained):
    problem = Problem()
    expected = problem.gradients(problem.run("jsd").total)[trained]
    for index, tensor in enumerate(problem.trained):
        tensor.requires_grad_(index == trained)
    (found,) = torch.autograd.grad(problem.run("jsd").total, problem.trained[trained])
    torch.testing.assert_close(found, expected)


@ALL_LOSSES
def test_no_rows_give_every_input_a_gradient_of_zeros(loss_type):
    problem = Problem()
    problem.weights.zero_()
    rows = problem.run(loss_type)
    assert rows.total == 0
    for gradient in problem.gradients(rows.total):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_values_alone_are_those_with_gradients():
    problem = Problem()
    with torch.no_grad():
        values = problem.run("lk_hybrid")
    assert not values.total.requires_grad
    torch.testing.assert_close(values.total, problem.run("lk_hybrid").total.detach())
    torch.testing.assert_close(values.selector_N, problem.run("lk_hybrid").selector_N)


@ALL_LOSSES
def test_bfloat16_states_under_autocast_stay_near_the_float64_gradient(loss_type):
    # With this seed, rounding moves no token into the candidates or out of them.
    exact, problem = Problem(seed=4), Problem(torch.float32, seed=4)
    problem.hidden = problem.hidden.detach().bfloat16().requires_grad_()
    exact.hidden = problem.hidden.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = problem.gradients(problem.run(loss_type).total)
    assert [gradient.dtype for gradient in found] == [torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(found, exact.gradients(exact.run(loss_type).total), strict=True):
        assert torch.nn.functional.cosine_similarity(one.double().flatten(), other.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("chunk_bytes", [1, 10**9])
def test_labels_are_scored_under_the_distribution_that_is_drafted(chunk_bytes):
    problem = Problem()
    labels = torch.arange(N) % V
    scores = score_labels(
        problem.hidden,
        Head.linear(problem.head),
        labels,
        draft_token_ids=None,
        chunk_bytes=chunk_bytes,
        selector=problem.selector,
    )
    logits = problem.hidden[:, :H] @ problem.head.T
    drafted = torch.full_like(logits, -torch.inf)
    for row in range(N):
        for token in logits[row].sort(descending=True).indices[:TOP]:
            drafted[row, token] = logits[row, token] + problem.hidden[row, H:] @ problem.rows[token]
    expected = drafted.log_softmax(dim=1).gather(1, labels[:, None])[:, 0].detach()
    assert expected.isinf().any() and expected.isfinite().any()
    torch.testing.assert_close(scores.log_probs_N, expected)
    assert torch.equal(scores.is_top_N, drafted.argmax(dim=1) == labels) and scores.is_top_N.any()


def test_the_candidates_are_counted_in_the_budget():
    hidden, head = torch.zeros(2, H), Head.linear(torch.zeros(V, H))
    options = {"is_reduced": False, "is_fused": True}
    plain = fit_budget(10**6, hidden, head, head, **options).rows_per_chunk
    selector = Selector(torch.zeros(V, 256), 16)
    with_rows = fit_budget(10**6, hidden, head, head, **options, values_per_row=selector.values_per_row).rows_per_chunk
    assert with_rows == 250_000 // (2 * V + 2 * 16 * 257) < plain


def test_the_chance_that_a_draft_is_kept_is_refused_beside_a_selector():
    with pytest.raises(ValueError, match="selector chooses"):
        Problem().run("forward_kl", verification=Verification(None, None))
