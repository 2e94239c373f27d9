# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Claims about `trl_draft_opd.losses`, checked by hand, against full logits, and against TRL's own chunked divergence.

Shape letters:  N = rows, H = hidden size, V = vocabulary of the target, D = vocabulary of the drafter
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_draft_opd.losses import (
    LOSS_TYPES,
    Head,
    chunked_divergence,
    divergence,
    position_weights,
    stream_scale,
)


NUM_ROWS, HIDDEN, TARGET_HIDDEN, VOCAB = 11, 5, 3, 13
DRAFT_TOKEN_IDS = [9, 2, 12, 0, 5, 7]  # unsorted on purpose


@dataclass(frozen=True)
class Case:
    """A small problem; `arguments` are what `chunked_divergence` gets besides the heads and hidden states."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    target_hidden: torch.Tensor
    target_weight: torch.Tensor
    arguments: dict

    @property
    def leaves(self):
        return [self.hidden, self.weight, self.bias]


def make_case(loss_type, is_reduced=False, dtype=torch.float64, chunk_rows=3, num_rows=NUM_ROWS):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    draft_vocab = len(DRAFT_TOKEN_IDS) if is_reduced else VOCAB
    choices = torch.tensor(DRAFT_TOKEN_IDS if is_reduced else range(VOCAB))
    labels = choices[torch.randint(len(choices), (num_rows,), generator=generator)]
    labels[1::4] = -1
    return Case(
        hidden=draw(num_rows, HIDDEN).requires_grad_(),
        weight=torch.nn.Parameter(draw(draft_vocab, HIDDEN)),
        bias=torch.nn.Parameter(draw(draft_vocab)),
        target_hidden=draw(num_rows, TARGET_HIDDEN),
        target_weight=2 * draw(VOCAB, TARGET_HIDDEN),
        arguments=dict(
            labels_N=labels,
            weights_N=draw(num_rows).abs() + 0.1,
            loss_type=loss_type,
            draft_token_ids=torch.tensor(DRAFT_TOKEN_IDS) if is_reduced else None,
            chunk_bytes=4 * VOCAB * chunk_rows,
        ),
    )


def run_chunked(case, **changes):
    head, target_head = Head.linear(case.weight, case.bias), Head.linear(case.target_weight)
    return chunked_divergence(case.hidden, head, case.target_hidden, target_head, **(case.arguments | changes))


def run_full(case):
    """The same total from all logits at once, in float64 and in probabilities rather than log-probabilities."""
    arguments = case.arguments
    logits = case.hidden.double() @ case.weight.double().T + case.bias.double()
    target_logits = case.target_hidden.double() @ case.target_weight.double().T
    ids = arguments["draft_token_ids"]
    ids = list(range(VOCAB)) if ids is None else ids.tolist()
    p, q = target_logits[:, ids].softmax(-1), logits.softmax(-1)
    alpha, m = torch.minimum(p, q).sum(-1), (p + q) / 2
    forward_kl = (p * (p / q).log()).sum(-1)
    share = (-3 * alpha.detach()).exp()
    choices = p.argmax(-1).tolist()
    draft_labels = [ids.index(y) if y != -1 else choices[n] for n, y in enumerate(arguments["labels_N"].tolist())]
    rows = {
        "forward_kl": forward_kl,
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
        "tv": 1 - alpha,
        "lk": -alpha.log(),
        "lk_hybrid": share * forward_kl + (1 - share) * (1 - alpha),
        "ce": -q[torch.arange(len(q)), draft_labels].log(),
    }[arguments["loss_type"]]
    return (arguments["weights_N"].double() * rows).sum(), rows.detach()


def gradients(total, leaves):
    return torch.autograd.grad(total, leaves)


def assert_near(actual, expected, tolerance):
    """Every entry within `tolerance * max(1, |expected|)`."""
    error = (actual.double() - expected.double()).abs()
    assert actual.shape == expected.shape
    assert (error <= tolerance * expected.double().abs().clamp(min=1)).all(), error.max()


def log_probs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


class CountingHead:
    """A linear head that records how many rows each call to `project` got."""

    def __init__(self, weight):
        self.calls = []
        inner = Head.linear(weight)

        def project(hidden):
            self.calls.append(len(hidden))
            return inner.project(hidden)

        self.head = replace(inner, project=project)


class LargestTensor(TorchDispatchMode):
    """Record the largest number of elements that any operator returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Values per row
# ---------------------------------------------------------------------------------------------------------------------


def test_every_loss_has_its_closed_form_on_two_tokens():
    p, q = log_probs([0.75, 0.25]), log_probs([0.5, 0.5])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    share = math.exp(-3 * 0.75)
    expected = {
        "forward_kl": kl,
        "reverse_kl": 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
        "jsd": (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3) + 0.5 * math.log(0.8) + 0.5 * math.log(4 / 3)) / 2,
        "tv": 0.25,
        "lk": math.log(4 / 3),
        "lk_hybrid": share * kl + (1 - share) * 0.25,
        "ce": math.log(2),
    }
    assert set(expected) == set(LOSS_TYPES)
    for loss_type, value in expected.items():
        assert divergence(q, p, torch.tensor([1]), loss_type).item() == pytest.approx(value, abs=1e-12), loss_type


def test_acceptance_of_three_tokens_is_the_sum_of_minima():
    p, q = log_probs([0.6, 0.3, 0.1]), log_probs([0.2, 0.2, 0.6])  # minima 0.2, 0.2, 0.1
    assert divergence(q, p, None, "tv").item() == pytest.approx(0.5, abs=1e-12)
    assert divergence(q, p, None, "lk").item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "ce"])
def test_equal_distributions_have_no_divergence_whatever_the_logit_offset(loss_type):
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drafter_logits = (logits + 3).requires_grad_()
    losses = divergence(drafter_logits, logits, None, loss_type)
    assert_near(losses, torch.zeros(4), 1e-12)
    if loss_type != "tv":  # its kink sits exactly here
        assert_near(gradients(losses.sum(), [drafter_logits])[0], torch.zeros(4, 7), 1e-7)


def test_forward_kl_agrees_with_torch():
    generator = torch.Generator().manual_seed(2)
    draft_logits, target_logits = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = F.kl_div(draft_logits.log_softmax(-1), target_logits.softmax(-1), reduction="none").sum(-1)
    assert_near(divergence(draft_logits, target_logits, None, "forward_kl"), expected, 1e-12)


def test_swapping_the_sides_turns_forward_into_reverse_kl():
    p, q = log_probs([0.7, 0.2, 0.1]), log_probs([0.3, 0.3, 0.4])
    assert_near(divergence(q, p, None, "forward_kl"), divergence(p, q, None, "reverse_kl"), 1e-12)


def test_the_hybrid_share_carries_no_gradient():
    p, q = log_probs([0.75, 0.25]), log_probs([0.5, 0.5]).requires_grad_()
    share = math.exp(-3 * 0.75)
    # d KL / d logits = q - p; d TV / d logits = q * (s - q.s) with s = sign(q - p) / 2
    expected = share * torch.tensor([[-0.25, 0.25]]) + (1 - share) * torch.tensor([[-0.25, 0.25]])
    assert_near(gradients(divergence(q, p, None, "lk_hybrid").sum(), [q])[0], expected, 1e-12)


def test_a_missing_label_stands_for_the_targets_argmax():
    p, q = log_probs([0.1, 0.7, 0.2], [0.1, 0.7, 0.2]), log_probs([0.5, 0.25, 0.25], [0.5, 0.25, 0.25])
    losses = divergence(q, p, torch.tensor([-1, 0]), "ce")
    assert_near(losses, torch.tensor([math.log(4), math.log(2)], dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("height", [30.0, 500.0])
def test_saturated_rows_stay_finite_in_value_and_gradient(loss_type, height):
    draft_logits = torch.tensor([[height, -height, 0.0], [height, -height, -height]]).requires_grad_()
    target_logits = torch.tensor([[-height, height, 0.0], [height, -height, -height]])
    losses = divergence(draft_logits, target_logits, torch.tensor([-1, 0]), loss_type)
    (grad,) = gradients(losses.sum(), [draft_logits])
    assert losses.isfinite().all() and grad.isfinite().all()
    assert losses[0] > 0.5 and abs(losses[1]) < 1e-6


def test_a_target_probability_that_underflows_contributes_nothing():
    target_logits = torch.tensor([[0.0, -200.0]])
    assert target_logits.softmax(-1)[0, 1] == 0
    losses = divergence(torch.tensor([[-200.0, 0.0]]), target_logits, None, "forward_kl")
    assert losses.item() == pytest.approx(200)


def test_lk_keeps_value_and_gradient_where_the_acceptance_underflows():
    draft_logits = torch.tensor([[-200.0, 0.0]]).requires_grad_()
    losses = divergence(draft_logits, torch.tensor([[0.0, -200.0]]), None, "lk")
    assert losses.item() == pytest.approx(200 - math.log(2), rel=1e-6)  # alpha = 2 exp(-200)
    assert_near(gradients(losses.sum(), [draft_logits])[0], torch.tensor([[-0.5, 0.5]]), 1e-6)


def test_half_precision_logits_are_accumulated_in_float32():
    generator = torch.Generator().manual_seed(3)
    target_logits = torch.randn(5, 300, generator=generator).bfloat16()
    draft_logits = (target_logits.float() + 0.05 * torch.randn(5, 300, generator=generator)).bfloat16()
    for loss_type in LOSS_TYPES:
        labels = torch.arange(5)
        losses = divergence(draft_logits, target_logits, labels, loss_type)
        assert losses.dtype == torch.float32
        expected = divergence(draft_logits.double(), target_logits.double(), labels, loss_type)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 2), torch.zeros(1, 2), None, "kl"), "Unknown loss_type 'kl'"),
        ((torch.zeros(1, 2), torch.zeros(1, 2), None, "ce"), "needs labels"),
        ((torch.zeros(1, 2), None, torch.tensor([0]), "tv"), "needs a target"),
        ((torch.zeros(1, 2), torch.zeros(1, 3), None, "tv"), "have shapes"),
        ((torch.zeros(1, 2), None, torch.tensor([-1]), "ce"), "first of them -1"),
        ((torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([2]), "ce"), "first of them 2"),
        ((torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([-100]), "ce"), "first of them -100"),
    ],
)
def test_divergence_refuses_what_it_cannot_compute(arguments, message):
    with pytest.raises(ValueError, match=message):
        divergence(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Chunks against full logits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("is_reduced", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunks_equal_the_full_logits_in_loss_and_gradient(loss_type, is_reduced, dtype, tolerance):
    case = make_case(loss_type, is_reduced, dtype)
    losses = run_chunked(case)
    expected_total, expected_rows = run_full(case)
    assert losses.total.dtype == losses.rows_N.dtype == dtype
    assert_near(losses.total.detach(), expected_total.detach(), tolerance)
    assert_near(losses.rows_N, expected_rows, tolerance)
    for actual, expected in zip(
        gradients(losses.total, case.leaves), gradients(expected_total, case.leaves), strict=True
    ):
        assert actual.dtype == dtype
        assert_near(actual, expected, tolerance)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradcheck_passes(loss_type):
    case = make_case(loss_type, is_reduced=True, num_rows=4)

    def total(hidden, weight, bias):
        return run_chunked(replace(case, hidden=hidden, weight=weight, bias=bias)).total * 0.7

    assert torch.autograd.gradcheck(total, tuple(case.leaves))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_both_kl_directions_agree_with_the_chunked_divergence_of_trl(beta):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    case = make_case({0.0: "forward_kl", 1.0: "reverse_kl"}[beta], dtype=torch.float32)
    losses = run_chunked(case)
    expected_rows, _ = ChunkedDivergenceFunction.apply(
        case.hidden, case.weight, case.bias, case.target_hidden, case.target_weight, None, beta
    )
    assert_near(losses.rows_N, expected_rows.detach(), 1e-5)
    expected_total = (expected_rows * case.arguments["weights_N"]).sum()
    for actual, expected in zip(
        gradients(losses.total, case.leaves), gradients(expected_total, case.leaves), strict=True
    ):
        assert_near(actual, expected, 1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("chunk_bytes", [0, 4 * VOCAB * 4, 10**9])
def test_the_chunk_size_changes_nothing(loss_type, chunk_bytes):
    case = make_case(loss_type, is_reduced=True)
    expected, actual = run_chunked(case), run_chunked(case, chunk_bytes=chunk_bytes)
    assert_near(actual.rows_N, expected.rows_N, 1e-12)
    assert_near(actual.lost_mass_N, expected.lost_mass_N, 1e-12)
    for left, right in zip(gradients(actual.total, case.leaves), gradients(expected.total, case.leaves), strict=True):
        assert_near(left, right, 1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_order_of_rows_changes_nothing(loss_type):
    case = make_case(loss_type, is_reduced=True)
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(4))
    shuffled = {name: case.arguments[name][order] for name in ("labels_N", "weights_N")}
    mixed = replace(
        case,
        hidden=case.hidden.detach()[order].requires_grad_(),
        target_hidden=case.target_hidden[order],
        arguments=case.arguments | shuffled,
    )
    expected, actual = run_chunked(case), run_chunked(mixed)
    assert_near(actual.total.detach(), expected.total.detach(), 1e-12)
    assert_near(actual.rows_N, expected.rows_N[order], 1e-12)
    hidden_grad, *head_grads = gradients(actual.total, mixed.leaves)
    expected_hidden_grad, *expected_head_grads = gradients(expected.total, case.leaves)
    assert_near(hidden_grad, expected_hidden_grad[order], 1e-12)
    for left, right in zip(head_grads, expected_head_grads, strict=True):
        assert_near(left, right, 1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("is_reduced", [False, True])
def test_rows_of_weight_zero_change_nothing_whatever_they_hold(loss_type, is_reduced):
    case = make_case(loss_type, is_reduced)
    real = torch.tensor([1, 2, 5, 6, 7, 8, 9, 10, 11, 13, 15])
    hidden = torch.full((16, HIDDEN), math.nan, dtype=torch.float64)
    hidden[real] = case.hidden.detach()
    target_hidden = torch.full((16, TARGET_HIDDEN), math.nan, dtype=torch.float64)
    target_hidden[real] = case.target_hidden
    labels, weights = torch.full((16,), -100), torch.zeros(16, dtype=torch.float64)
    labels[real], weights[real] = case.arguments["labels_N"], case.arguments["weights_N"]
    arguments = case.arguments | dict(labels_N=labels, weights_N=weights)
    padded = replace(case, hidden=hidden.requires_grad_(), target_hidden=target_hidden, arguments=arguments)
    expected, actual = run_chunked(case), run_chunked(padded)
    assert_near(actual.rows_N, torch.zeros(16, dtype=torch.float64).index_put((real,), expected.rows_N), 1e-12)
    hidden_grad, *head_grads = gradients(actual.total, padded.leaves)
    expected_hidden_grad, *expected_head_grads = gradients(expected.total, case.leaves)
    assert_near(hidden_grad[real], expected_hidden_grad, 1e-12)
    assert hidden_grad[weights == 0].eq(0).all()
    for left, right in zip(head_grads, expected_head_grads, strict=True):
        assert_near(left, right, 1e-12)


def test_weights_of_either_sign_and_precision_are_taken_as_given():
    case = make_case("forward_kl", dtype=torch.float32)
    weights = case.arguments["weights_N"].double() * torch.tensor([1.0, -1.0]).repeat(6)[:NUM_ROWS]
    losses = run_chunked(case, weights_N=weights)
    assert losses.total.dtype == torch.float32
    assert_near(losses.total.detach(), (weights * run_full(case)[1]).sum(), 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary
# ---------------------------------------------------------------------------------------------------------------------


def test_the_target_is_renormalised_over_the_drafters_vocabulary():
    identity = Head(project=lambda hidden: hidden, parameters=(), vocab_size=4)
    pair = Head(project=lambda hidden: hidden, parameters=(), vocab_size=2)
    losses = chunked_divergence(
        log_probs([0.5, 0.5]),
        pair,
        log_probs([0.15, 0.2, 0.6, 0.05]),
        identity,
        labels_N=None,
        weights_N=torch.ones(1),
        loss_type="tv",
        draft_token_ids=torch.tensor([3, 0]),  # target (0.05, 0.15) becomes (0.25, 0.75)
        chunk_bytes=64,
    )
    assert losses.rows_N.item() == pytest.approx(0.25, abs=1e-12)
    assert losses.lost_mass_N.item() == pytest.approx(0.8, abs=1e-12)


def test_no_mass_is_lost_with_a_full_vocabulary():
    assert run_chunked(make_case("forward_kl")).lost_mass_N.eq(0).all()
    case = make_case("forward_kl")
    permuted = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))
    assert_near(run_chunked(case, draft_token_ids=permuted).lost_mass_N, torch.zeros(NUM_ROWS), 1e-12)


def test_a_label_outside_the_drafters_vocabulary_needs_weight_zero_under_ce():
    case = make_case("ce", is_reduced=True)
    labels, weights = case.arguments["labels_N"].clone(), case.arguments["weights_N"].clone()
    labels[3] = 11
    assert 11 not in DRAFT_TOKEN_IDS
    with pytest.raises(ValueError, match="first of them 11"):
        run_chunked(case, labels_N=labels)
    weights[3] = 0
    assert run_chunked(case, labels_N=labels, weights_N=weights).rows_N[3] == 0
    kl = run_chunked(case, labels_N=labels, loss_type="forward_kl")  # other losses do not read labels
    assert kl.total.isfinite()


def test_cross_entropy_runs_without_a_target_if_every_label_is_given():
    case = make_case("ce", is_reduced=True)
    head, labels = Head.linear(case.weight, case.bias), case.arguments["labels_N"].clamp(min=0)
    labels[labels == 0] = DRAFT_TOKEN_IDS[0]
    arguments = case.arguments | dict(labels_N=labels)
    losses = chunked_divergence(case.hidden, head, None, None, **arguments)
    expected = run_chunked(case, labels_N=labels)
    assert torch.equal(losses.rows_N, expected.rows_N)
    assert losses.lost_mass_N.eq(0).all() and expected.lost_mass_N.gt(0).all()
    with pytest.raises(ValueError, match="first of them -1"):
        chunked_divergence(case.hidden, head, None, None, **case.arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_type": "kl"}, "Unknown loss_type"),
        ({"labels_N": None, "loss_type": "ce"}, "needs labels"),
        ({"weights_N": torch.ones(NUM_ROWS + 1)}, "one axis of rows"),
        ({"labels_N": torch.zeros(NUM_ROWS - 1, dtype=torch.long)}, "one axis of rows"),
        ({"weights_N": torch.ones(NUM_ROWS, requires_grad=True)}, "Detach it"),
        ({"draft_token_ids": torch.arange(4)}, "expected 4"),
    ],
)
def test_chunked_divergence_refuses_arguments_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        run_chunked(make_case("forward_kl"), **changes)


def test_heads_of_different_vocabularies_need_the_drafters_token_ids():
    with pytest.raises(ValueError, match="draft_token_ids"):
        run_chunked(make_case("forward_kl", is_reduced=True), draft_token_ids=None)


# ---------------------------------------------------------------------------------------------------------------------
# Memory: what is projected, and what is kept
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_row_that_counts_is_projected_once_and_at_most_one_chunk_at_a_time(loss_type):
    case = make_case(loss_type)
    weights = case.arguments["weights_N"].clone()
    weights[[0, 4, 5]] = 0
    draft, target = CountingHead(case.weight), CountingHead(case.target_weight)
    arguments = case.arguments | dict(weights_N=weights)
    losses = chunked_divergence(case.hidden, draft.head, case.target_hidden, target.head, **arguments)
    losses.total.backward()
    assert draft.calls == target.calls == [3, 3, 2]


def test_cross_entropy_with_all_labels_leaves_the_targets_head_alone():
    case = make_case("ce")
    draft, target = CountingHead(case.weight), CountingHead(case.target_weight)
    arguments = case.arguments | dict(labels_N=case.arguments["labels_N"].clamp(min=0))
    chunked_divergence(case.hidden, draft.head, case.target_hidden, target.head, **arguments)
    assert sum(draft.calls) == NUM_ROWS and target.calls == []


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("is_reduced", [False, True])
def test_no_tensor_of_rows_times_vocabulary_is_ever_made(loss_type, is_reduced):
    num_rows, chunk_rows = 60, 3
    case = make_case(loss_type, is_reduced, chunk_rows=chunk_rows, num_rows=num_rows)
    with LargestTensor() as chunked:
        run_chunked(case).total.backward()
    assert chunked.numel <= max(chunk_rows * VOCAB, VOCAB * HIDDEN, num_rows * HIDDEN)
    with LargestTensor() as full:  # the recorder does see what the full logits cost
        run_full(case)[0].backward()
    assert full.numel == num_rows * VOCAB


def test_only_the_gradients_are_kept_for_the_backward_pass():
    case = make_case("jsd", is_reduced=True)
    saved = run_chunked(case).total.grad_fn.saved_tensors
    assert [tensor.shape for tensor in saved] == [leaf.shape for leaf in case.leaves]
    frozen = replace(case, weight=case.weight.detach(), bias=case.bias.detach())
    assert [tensor.shape for tensor in run_chunked(frozen).total.grad_fn.saved_tensors] == [case.hidden.shape]


# ---------------------------------------------------------------------------------------------------------------------
# Autograd
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, 3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_rows_give_a_zero_that_is_still_connected(num_rows, loss_type):
    case = make_case(loss_type, is_reduced=True, num_rows=num_rows)
    losses = run_chunked(case, weights_N=torch.zeros(num_rows))
    assert losses.total.item() == 0 and losses.rows_N.shape == losses.lost_mass_N.shape == (num_rows,)
    losses.total.backward()
    for leaf in case.leaves:
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and leaf.grad.eq(0).all()


def test_without_gradients_only_the_values_are_computed():
    case = make_case("forward_kl")
    expected = run_chunked(case)
    with torch.no_grad():
        losses = run_chunked(case)
    assert losses.total.grad_fn is None and torch.equal(losses.total, expected.total.detach())
    frozen = replace(case, hidden=case.hidden.detach(), weight=case.weight.detach(), bias=case.bias.detach())
    losses = run_chunked(frozen)
    assert not losses.total.requires_grad and torch.equal(losses.rows_N, expected.rows_N)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_each_input_can_train_alone(trained):
    case = make_case("reverse_kl")
    expected = dict(zip(("hidden", "weight", "bias"), gradients(run_full(case)[0], case.leaves), strict=True))
    frozen = {name: getattr(case, name).detach() for name in expected if name != trained}
    alone = replace(case, **frozen)
    (grad,) = gradients(run_chunked(alone).total, [getattr(alone, trained)])
    assert_near(grad, expected[trained], 1e-10)


def test_values_per_row_are_detached_and_the_backward_pass_scales_and_repeats():
    case = make_case("lk")
    losses = run_chunked(case)
    assert not losses.rows_N.requires_grad and not losses.lost_mass_N.requires_grad
    (once,) = torch.autograd.grad(losses.total, [case.hidden], retain_graph=True)
    (scaled,) = torch.autograd.grad(losses.total * 3, [case.hidden])
    assert_near(scaled, once * 3, 1e-12)


def test_the_gradient_flows_on_into_what_made_the_hidden_states():
    case = make_case("tv")
    layer = torch.nn.Parameter(torch.eye(HIDDEN, dtype=torch.float64) * 0.5)
    mixed = replace(case, hidden=case.hidden.detach() @ layer)
    (actual,) = gradients(run_chunked(mixed).total, [layer])
    (expected,) = gradients(run_full(mixed)[0], [layer])
    assert_near(actual, expected, 1e-10)


@pytest.mark.parametrize("is_trained", [False, True])
def test_one_head_can_serve_drafter_and_target_and_trains_only_through_the_drafter(is_trained):
    case = make_case("reverse_kl")
    weight = case.weight if is_trained else case.weight.detach()
    head = Head.linear(weight)
    assert len(head.parameters) == int(is_trained)
    target_hidden = torch.randn(NUM_ROWS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    target_hidden.requires_grad_()
    leaves = [case.hidden, weight] if is_trained else [case.hidden]
    losses = chunked_divergence(case.hidden, head, target_hidden, head, **case.arguments)
    rows = divergence(case.hidden @ weight.T, (target_hidden @ weight.T).detach(), None, "reverse_kl")
    expected_total = (rows * case.arguments["weights_N"]).sum()
    assert_near(losses.rows_N, rows.detach(), 1e-10)
    expected_grads = gradients(expected_total, leaves)
    losses.total.backward()
    assert target_hidden.grad is None
    for leaf, expected in zip(leaves, expected_grads, strict=True):
        assert_near(leaf.grad, expected, 1e-10)


def test_each_parameter_is_accumulated_exactly_once_per_backward_pass():
    # DDP reduces a parameter when its accumulation runs: never while the loss is computed, and once even if listed twice.
    case = make_case("forward_kl")
    counts = []
    case.weight.register_post_accumulate_grad_hook(lambda parameter: counts.append(1))
    head = replace(Head.linear(case.weight), parameters=(case.weight, case.weight))
    target_head = Head.linear(case.target_weight)
    losses = chunked_divergence(case.hidden, head, case.target_hidden, target_head, **case.arguments)
    assert counts == [] and case.weight.grad is None
    losses.total.backward()
    assert counts == [1]
    without_bias = replace(case, bias=torch.zeros(VOCAB, dtype=torch.float64))
    (expected,) = gradients(run_full(without_bias)[0], [case.weight])
    assert_near(case.weight.grad, expected, 1e-10)


def test_a_parameter_frozen_after_the_head_was_built_is_passed_over():
    case = make_case("forward_kl")
    head = Head.linear(case.weight, case.bias)
    case.weight.requires_grad_(False)
    target_head = Head.linear(case.target_weight)
    chunked_divergence(case.hidden, head, case.target_hidden, target_head, **case.arguments).total.backward()
    assert case.weight.grad is None and case.bias.grad is not None


def test_a_second_derivative_is_refused():
    case = make_case("forward_kl")
    (grad,) = torch.autograd.grad(run_chunked(case).total, [case.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# Low precision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_under_autocast_the_projection_is_bfloat16_and_the_divergence_float32(loss_type):
    case = make_case(loss_type, dtype=torch.float32)
    seen = []
    inner, target_head = Head.linear(case.weight, case.bias), Head.linear(case.target_weight)

    def project(hidden):
        seen.append(inner.project(hidden))
        return seen[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = chunked_divergence(
            case.hidden, replace(inner, project=project), case.target_hidden, target_head, **case.arguments
        )
        target_logits = target_head.project(case.target_hidden)
    losses.total.backward()
    assert all(logits.dtype == torch.bfloat16 for logits in seen)
    expected = divergence(
        torch.cat(seen).detach().double(), target_logits.double(), case.arguments["labels_N"], loss_type
    )
    assert losses.rows_N.dtype == torch.float32
    assert_near(losses.rows_N, expected, 1e-5)
    for leaf, grad in zip(case.leaves, gradients(run_full(case)[0], case.leaves), strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - grad).norm() <= 0.05 * grad.norm()


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_in_bfloat16_give_float32_losses_and_bfloat16_gradients(weight_dtype):
    case = make_case("reverse_kl", is_reduced=True, dtype=torch.float32)
    case = replace(
        case,
        hidden=case.hidden.detach().bfloat16().requires_grad_(),
        weight=case.weight.detach().to(weight_dtype).requires_grad_(),
        bias=case.bias.detach().to(weight_dtype).requires_grad_(),
        target_hidden=case.target_hidden.bfloat16(),
    )
    losses = run_chunked(case)
    expected_total, expected_rows = run_full(case)
    assert losses.total.dtype == losses.rows_N.dtype == torch.float32
    torch.testing.assert_close(losses.rows_N, expected_rows.float(), rtol=0.05, atol=0.05)
    for actual, expected, leaf in zip(
        gradients(losses.total, case.leaves), gradients(expected_total, case.leaves), case.leaves, strict=True
    ):
        assert actual.dtype == leaf.dtype
        assert (actual - expected).norm() <= 0.05 * expected.norm()


def test_the_gradient_of_a_bfloat16_head_does_not_lose_small_chunks():
    # 600 rows with the same gradient, one per chunk: a running sum in bfloat16 would stop growing at 256 times one row.
    weight = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    one = torch.ones(600, 1, dtype=torch.bfloat16)
    losses = chunked_divergence(
        one,
        Head.linear(weight),
        None,
        None,
        labels_N=torch.zeros(600, dtype=torch.long),
        weights_N=torch.ones(600),
        loss_type="ce",
        draft_token_ids=None,
        chunk_bytes=0,
    )
    (grad,) = gradients(losses.total, [weight])
    assert grad.flatten().tolist() == [-300.0, 300.0]  # each row adds (q - onehot) = (-1/2, 1/2)


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def test_position_weights_start_at_one_behind_the_anchor():
    weights = position_weights(4, 0.8)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.8, 0.64, 0.512]), rtol=1e-7, atol=0)
    assert position_weights(3, 1.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("num_drafts", "decay"), [(3, 0.0), (3, 1.1), (3, -0.5), (3, math.nan), (0, 0.8)])
def test_position_weights_refuse_values_out_of_range(num_drafts, decay):
    with pytest.raises(ValueError, match="must be"):
        position_weights(num_drafts, decay)


def test_each_stream_is_a_mean_of_its_own():
    accepted, rejected = torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 3.0])
    weights = torch.tensor([0.8, 0.64])
    loss = (accepted * stream_scale(torch.tensor(3.0), 1.0, 3.0)).sum()
    loss += (rejected * weights * stream_scale(weights.sum(), 2.0, 3.0)).sum()
    assert loss.item() == pytest.approx(4 / 3 + 2 / 3 * (0.8 + 1.92) / 1.44)


def test_an_empty_stream_contributes_nothing_and_the_other_keeps_its_share():
    assert stream_scale(0.0, 1.0, 2.0) == 0
    assert stream_scale(4.0, 1.0, 2.0) == 0.125
    scales = stream_scale(torch.tensor([0.0, 4.0, 1e-3]), 1.0, 2.0)
    torch.testing.assert_close(scales, torch.tensor([0.0, 0.125, 500.0]))
    assert stream_scale(torch.tensor(4), 1.0, 2.0).item() == 0.125  # a count


def test_a_sum_of_weights_below_one_is_not_rounded_up():
    assert stream_scale(1e-3, 1.0, 1.0) == pytest.approx(1000)


@pytest.mark.parametrize(("weight", "total"), [(0.0, 0.0), (-1.0, 1.0), (2.0, 1.0)])
def test_stream_weights_out_of_range_are_refused(weight, total):
    with pytest.raises(ValueError, match="Stream weights"):
        stream_scale(1.0, weight, total)
