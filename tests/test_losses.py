# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Claims about `trl_draft_opd.losses`, checked by hand, against full logits, and against TRL's own chunked divergence.
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
ALL_LOSSES = pytest.mark.parametrize("loss_type", LOSS_TYPES)
BOTH_VOCABULARIES = pytest.mark.parametrize("is_reduced", [False, True])


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


def make_case(loss_type, is_reduced=False, dtype=torch.float64, num_rows=NUM_ROWS):
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
            target_rows_N=None,
            labels_N=labels,
            weights_N=draw(num_rows).abs() + 0.1,
            loss_type=loss_type,
            draft_token_ids=torch.tensor(DRAFT_TOKEN_IDS) if is_reduced else None,
            # One row of temporaries, and three rows of logits over both vocabularies.
            chunk_bytes=dtype.itemsize * (5 * VOCAB + 3 * (VOCAB + draft_vocab)),
        ),
    )


def run_chunked(case, head=None, target_head=None, **changes):
    head, target_head = head or Head.linear(case.weight, case.bias), target_head or Head.linear(case.target_weight)
    return chunked_divergence(case.hidden, head, case.target_hidden, target_head, **(case.arguments | changes))


def run_full(case):
    """The same total and rows from all logits at once, in float64 and without logarithms of probabilities."""
    arguments = case.arguments
    logits = case.hidden.double() @ case.weight.double().T + case.bias.double()
    target_logits = case.target_hidden.double() @ case.target_weight.double().T
    ids = range(VOCAB) if arguments["draft_token_ids"] is None else DRAFT_TOKEN_IDS
    p, q = target_logits[:, list(ids)].softmax(-1), logits.softmax(-1)
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


def assert_near(actual, expected, tolerance):
    """Every entry within `tolerance * max(1, |expected|)`."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    excess = (actual - expected).abs() / expected.abs().clamp(min=1)
    assert not excess.numel() or excess.max() <= tolerance


def assert_same_gradients(total, leaves, expected_total, expected_leaves, tolerance):
    expected_grads = torch.autograd.grad(expected_total, expected_leaves, retain_graph=True)
    for leaf, grad, expected in zip(leaves, torch.autograd.grad(total, leaves), expected_grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert_near(grad, expected, tolerance)


def log_probs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def record_calls(head):
    """Return the head and a list that gets what each call to `project` was given and returned."""
    calls = []

    def project(hidden):
        logits = head.project(hidden)
        calls.append((hidden, logits.clone()))  # the loss overwrites them by their gradient
        return logits

    return replace(head, project=project), calls


class LargestTensor(TorchDispatchMode):
    """Record the largest number of elements that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


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
    if loss_type in ("forward_kl", "reverse_kl", "jsd"):  # the others have their kink exactly here
        assert_near(torch.autograd.grad(losses.sum(), drafter_logits)[0], torch.zeros(4, 7), 1e-12)


def test_forward_kl_agrees_with_torch():
    generator = torch.Generator().manual_seed(2)
    draft_logits, target_logits = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = F.kl_div(draft_logits.log_softmax(-1), target_logits.softmax(-1), reduction="none").sum(-1)
    assert_near(divergence(draft_logits, target_logits, None, "forward_kl"), expected, 1e-12)


def test_a_missing_label_stands_for_the_targets_argmax():
    p, q = log_probs([0.1, 0.7, 0.2], [0.1, 0.7, 0.2]), log_probs([0.5, 0.25, 0.25], [0.5, 0.25, 0.25])
    losses = divergence(q, p, torch.tensor([-1, 0]), "ce")
    assert losses.tolist() == pytest.approx([math.log(4), math.log(2)], abs=1e-12)


@ALL_LOSSES
@pytest.mark.parametrize("height", [30.0, 500.0])
def test_saturated_rows_stay_finite_in_value_and_gradient(loss_type, height):
    draft_logits = torch.tensor([[height, -height, 0.0], [height, -height, -height]]).requires_grad_()
    target_logits = torch.tensor([[-height, height, 0.0], [height, -height, -height]])
    losses = divergence(draft_logits, target_logits, torch.tensor([-1, 0]), loss_type)
    (grad,) = torch.autograd.grad(losses.sum(), draft_logits)
    assert losses.isfinite().all() and grad.isfinite().all()
    assert losses[0] > 0.5 and abs(losses[1]) < 1e-6


def test_a_target_probability_that_underflows_contributes_nothing():
    target_logits = torch.tensor([[0.0, -200.0]])
    assert target_logits.softmax(-1)[0, 1] == 0
    assert divergence(torch.tensor([[-200.0, 0.0]]), target_logits, None, "forward_kl").item() == pytest.approx(200)


def test_lk_keeps_value_and_gradient_where_the_acceptance_underflows():
    draft_logits = torch.tensor([[-200.0, 0.0]]).requires_grad_()
    losses = divergence(draft_logits, torch.tensor([[0.0, -200.0]]), None, "lk")
    assert losses.item() == pytest.approx(200 - math.log(2), rel=1e-6)  # alpha = 2 exp(-200)
    assert_near(torch.autograd.grad(losses, draft_logits)[0], torch.tensor([[-0.5, 0.5]]), 1e-6)


@pytest.mark.parametrize(
    ("target_width", "labels", "loss_type", "message"),
    [
        (2, None, "kl", "Unknown loss_type 'kl'"),
        (2, None, "ce", "needs labels"),
        (None, [0], "tv", "needs a target"),
        (3, None, "tv", "have shapes"),
        (None, [-1], "ce", "first of them -1"),
        (2, [2], "ce", "first of them 2"),
        (2, [-100], "ce", "first of them -100"),
    ],
)
def test_divergence_refuses_what_it_cannot_compute(target_width, labels, loss_type, message):
    target_logits = None if target_width is None else torch.zeros(1, target_width)
    with pytest.raises(ValueError, match=message):
        divergence(torch.zeros(1, 2), target_logits, None if labels is None else torch.tensor(labels), loss_type)


@ALL_LOSSES
@BOTH_VOCABULARIES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunks_equal_the_full_logits_in_loss_and_gradient(loss_type, is_reduced, dtype, tolerance):
    case = make_case(loss_type, is_reduced, dtype)
    losses = run_chunked(case)
    expected_total, expected_rows = run_full(case)
    assert losses.total.dtype == losses.rows_N.dtype == losses.lost_mass_N.dtype == dtype
    assert_near(losses.total, expected_total, tolerance)
    assert_near(losses.rows_N, expected_rows, tolerance)
    assert_same_gradients(losses.total, case.leaves, expected_total, case.leaves, tolerance)


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "lk_hybrid"])  # its share is detached
def test_finite_differences_agree_with_the_gradient(loss_type):
    case = make_case(loss_type, is_reduced=True, num_rows=4)

    def total(hidden, weight, bias):
        return run_chunked(replace(case, hidden=hidden, weight=weight, bias=bias)).total * 0.7

    assert torch.autograd.gradcheck(total, tuple(case.leaves))


@pytest.mark.parametrize(("beta", "loss_type"), [(0.0, "forward_kl"), (0.5, "jsd"), (1.0, "reverse_kl")])
def test_three_losses_agree_with_the_chunked_divergence_of_trl(beta, loss_type):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    case = make_case(loss_type, dtype=torch.float32)
    losses = run_chunked(case)
    expected_rows, _ = ChunkedDivergenceFunction.apply(
        case.hidden, case.weight, case.bias, case.target_hidden, case.target_weight, None, beta
    )
    assert_near(losses.rows_N, expected_rows, 1e-5)
    expected_total = (expected_rows * case.arguments["weights_N"]).sum()
    assert_same_gradients(losses.total, case.leaves, expected_total, case.leaves, 1e-5)


@ALL_LOSSES
@pytest.mark.parametrize("chunk_bytes", [0, 8 * VOCAB * 15, 10**9])
def test_the_chunk_size_changes_nothing(loss_type, chunk_bytes):
    case = make_case(loss_type, is_reduced=True)
    expected, actual = run_chunked(case), run_chunked(case, chunk_bytes=chunk_bytes)
    assert_near(actual.rows_N, expected.rows_N, 1e-12)
    assert_near(actual.lost_mass_N, expected.lost_mass_N, 1e-12)
    assert_same_gradients(actual.total, case.leaves, expected.total, case.leaves, 1e-12)


@ALL_LOSSES
@BOTH_VOCABULARIES
def test_row_order_and_rows_of_weight_zero_change_nothing_whatever_these_hold(loss_type, is_reduced):
    case = make_case(loss_type, is_reduced)
    places = torch.randperm(16, generator=torch.Generator().manual_seed(4))[:NUM_ROWS]

    def scatter(rows, filler):
        return torch.full((16, *rows.shape[1:]), filler, dtype=rows.dtype).index_put((places,), rows.detach())

    changes = dict(
        labels_N=scatter(case.arguments["labels_N"], -100), weights_N=scatter(case.arguments["weights_N"], 0)
    )
    hidden, target_hidden = scatter(case.hidden, math.nan).requires_grad_(), scatter(case.target_hidden, math.nan)
    expected = run_chunked(case)
    actual = run_chunked(replace(case, hidden=hidden, target_hidden=target_hidden), **changes)
    assert_near(actual.total, expected.total, 1e-12)
    assert_near(actual.rows_N, scatter(expected.rows_N, 0), 1e-12)
    assert_near(actual.lost_mass_N, scatter(expected.lost_mass_N, 0), 1e-12)
    actual.total.backward()
    expected_grads = torch.autograd.grad(expected.total, case.leaves)
    assert_near(hidden.grad, scatter(expected_grads[0], 0), 1e-12)
    assert_near(case.weight.grad, expected_grads[1], 1e-12)
    assert_near(case.bias.grad, expected_grads[2], 1e-12)


def test_the_target_is_renormalised_over_the_drafters_vocabulary():
    losses = chunked_divergence(
        log_probs([0.5, 0.5]),
        Head(project=lambda hidden: hidden, parameters=(), vocab_size=2),
        log_probs([0.15, 0.2, 0.6, 0.05]),
        Head(project=lambda hidden: hidden, parameters=(), vocab_size=4),
        target_rows_N=None,
        labels_N=None,
        weights_N=torch.ones(1),
        loss_type="tv",
        draft_token_ids=torch.tensor([3, 0]),  # target (0.05, 0.15) becomes (0.25, 0.75)
        chunk_bytes=64,
    )
    assert losses.rows_N.item() == pytest.approx(0.25, abs=1e-12)
    assert losses.lost_mass_N.item() == pytest.approx(0.8, abs=1e-12)


def test_no_mass_is_lost_with_a_full_vocabulary():
    case = make_case("forward_kl")
    assert run_chunked(case).lost_mass_N.eq(0).all()
    permuted = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(5))
    lost_mass = run_chunked(case, draft_token_ids=permuted).lost_mass_N
    assert lost_mass.ge(0).all() and lost_mass.lt(1e-12).all()


def test_a_label_outside_the_drafters_vocabulary_needs_weight_zero_under_ce():
    case = make_case("ce", is_reduced=True)
    labels, weights = case.arguments["labels_N"].clone(), case.arguments["weights_N"].clone()
    for outside in (-100, 1, 11, VOCAB):
        labels[3] = outside
        with pytest.raises(ValueError, match=f"first of them {outside}"):
            run_chunked(case, labels_N=labels)
        assert run_chunked(case, labels_N=labels, loss_type="tv").total.isfinite()  # reads no labels
        assert run_chunked(case, labels_N=labels, weights_N=weights.index_fill(0, torch.tensor([3]), 0)).rows_N[3] == 0


def test_cross_entropy_runs_without_a_target_if_every_label_is_given():
    case = make_case("ce", is_reduced=True)
    head, labels = Head.linear(case.weight, case.bias), torch.tensor(DRAFT_TOKEN_IDS * 2)[:NUM_ROWS]
    losses = chunked_divergence(case.hidden, head, None, None, **(case.arguments | dict(labels_N=labels)))
    expected = run_chunked(case, labels_N=labels)
    assert_near(losses.rows_N, expected.rows_N, 1e-12)
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
        ({"head": Head.linear(torch.ones(4, HIDDEN))}, "has 4 logits, expected 13.*`draft_token_ids`"),
    ],
)
def test_chunked_divergence_refuses_arguments_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        run_chunked(make_case("forward_kl"), **changes)


@ALL_LOSSES
@BOTH_VOCABULARIES
def test_each_row_that_counts_is_projected_once_and_at_most_one_chunk_at_a_time(loss_type, is_reduced):
    case = make_case(loss_type, is_reduced)
    weights = case.arguments["weights_N"].index_fill(0, torch.tensor([0, 4, 6]), 0)
    (head, calls), (target_head, target_calls) = map(record_calls, map(Head.linear, (case.weight, case.target_weight)))
    run_chunked(case, head, target_head, weights_N=weights).total.backward()
    assert [len(hidden) for hidden, _ in calls] == [len(hidden) for hidden, _ in target_calls] == [2, 3, 3]


def test_cross_entropy_with_all_labels_leaves_the_targets_head_alone():
    case = make_case("ce")
    target_head, target_calls = record_calls(Head.linear(case.target_weight))
    run_chunked(case, target_head=target_head, labels_N=case.arguments["labels_N"].clamp(min=0))
    assert target_calls == []


@ALL_LOSSES
@BOTH_VOCABULARIES
def test_no_tensor_of_rows_times_vocabulary_is_ever_made(loss_type, is_reduced):
    num_rows = 60
    case = make_case(loss_type, is_reduced, num_rows=num_rows)
    with LargestTensor() as chunked:
        run_chunked(case).total.backward()
    assert chunked.numel <= max(3 * VOCAB, VOCAB * HIDDEN, num_rows * HIDDEN)
    with LargestTensor() as full:  # the recorder does see what the full logits cost
        run_full(case)[0].backward()
    assert full.numel == num_rows * VOCAB


def test_only_the_gradients_are_kept_for_the_backward_pass():
    case = make_case("jsd", is_reduced=True)
    saved = run_chunked(case).total.grad_fn.saved_tensors
    assert [tensor.shape for tensor in saved] == [leaf.shape for leaf in case.leaves]
    frozen = replace(case, weight=case.weight.detach(), bias=case.bias.detach())
    assert [tensor.shape for tensor in run_chunked(frozen).total.grad_fn.saved_tensors] == [case.hidden.shape]


@pytest.mark.parametrize("num_rows", [0, 3])
@ALL_LOSSES
def test_no_rows_give_a_zero_that_is_still_connected(num_rows, loss_type):
    case = make_case(loss_type, is_reduced=True, num_rows=num_rows)
    head, calls = record_calls(Head.linear(case.weight, case.bias))
    losses = run_chunked(case, head, weights_N=torch.zeros(num_rows))
    assert calls == [] and losses.total.item() == 0 and losses.rows_N.shape == losses.lost_mass_N.shape == (num_rows,)
    losses.total.backward()
    for leaf in case.leaves:
        assert leaf.grad is not None and leaf.grad.shape == leaf.shape and leaf.grad.eq(0).all()


def test_without_gradients_only_the_values_are_computed():
    case = make_case("forward_kl")
    head, calls = record_calls(Head.linear(case.weight, case.bias))
    expected = run_chunked(case)
    with torch.no_grad():
        losses = run_chunked(case, head)
    assert torch.equal(losses.total, expected.total) and not losses.total.requires_grad
    assert not any(logits.requires_grad for _, logits in calls)
    frozen = replace(case, hidden=case.hidden.detach(), weight=case.weight.detach(), bias=case.bias.detach())
    assert not run_chunked(frozen).total.requires_grad


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_each_input_can_train_alone(trained):
    case = make_case("reverse_kl")
    frozen = {name: getattr(case, name).detach() for name in ("hidden", "weight", "bias") if name != trained}
    leaf = [getattr(case, trained)]
    assert_same_gradients(run_chunked(replace(case, **frozen)).total, leaf, run_full(case)[0], leaf, 1e-10)


def test_the_gradient_is_scaled_and_flows_on_into_what_made_the_hidden_states():
    case = make_case("tv")
    layer = torch.eye(HIDDEN, dtype=torch.float64).requires_grad_()
    deeper = replace(case, hidden=case.hidden @ layer)
    losses = run_chunked(deeper)
    assert not losses.rows_N.requires_grad and not losses.lost_mass_N.requires_grad
    (expected,) = torch.autograd.grad(run_full(deeper)[0] * 3, layer, retain_graph=True)
    for _ in range(2):  # a repeated backward pass must not scale what is stored
        (grad,) = torch.autograd.grad(losses.total * 3, layer, retain_graph=True)
        assert_near(grad, expected, 1e-10)


@pytest.mark.parametrize("is_trained", [False, True])
def test_one_head_can_serve_drafter_and_target_and_trains_only_through_the_drafter(is_trained):
    case = make_case("reverse_kl")
    weight = case.weight if is_trained else case.weight.detach()
    target_hidden = case.hidden.detach().flip(0).requires_grad_()
    head, leaves = Head.linear(weight), [case.hidden, weight][: 1 + is_trained]
    assert len(head.parameters) == int(is_trained)
    losses = run_chunked(replace(case, target_hidden=target_hidden), head, head)
    rows = divergence(case.hidden @ weight.T, (target_hidden @ weight.T).detach(), None, "reverse_kl")
    assert_near(losses.rows_N, rows, 1e-10)
    expected_total = (rows * case.arguments["weights_N"]).sum()
    assert torch.autograd.grad(losses.total, target_hidden, allow_unused=True, retain_graph=True) == (None,)
    assert_same_gradients(losses.total, leaves, expected_total, leaves, 1e-10)


def test_each_parameter_is_accumulated_exactly_once_per_backward_pass():
    # DDP reduces a parameter when its accumulation runs: not while the loss is computed, and once if listed twice.
    case = replace(make_case("forward_kl"), bias=torch.zeros(VOCAB, dtype=torch.float64))
    counts = []
    case.weight.register_post_accumulate_grad_hook(lambda parameter: counts.append(1))
    losses = run_chunked(case, replace(Head.linear(case.weight), parameters=(case.weight, case.weight)))
    assert counts == [] and case.weight.grad is None
    losses.total.backward()
    assert counts == [1]
    assert_near(case.weight.grad, torch.autograd.grad(run_full(case)[0], case.weight)[0], 1e-10)


def test_a_parameter_frozen_after_the_head_was_built_is_passed_over():
    case = make_case("forward_kl")
    head = Head.linear(case.weight, case.bias)
    case.weight.requires_grad_(False)
    run_chunked(case, head).total.backward()
    assert case.weight.grad is None and case.bias.grad is not None


def test_a_second_derivative_is_refused():
    case = make_case("forward_kl")
    (grad,) = torch.autograd.grad(run_chunked(case).total ** 2, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@ALL_LOSSES
def test_under_autocast_the_projection_is_bfloat16_and_the_divergence_float32(loss_type):
    case = make_case(loss_type, dtype=torch.float32)
    head, calls = record_calls(Head.linear(case.weight, case.bias))
    target_head, target_calls = record_calls(Head.linear(case.target_weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = run_chunked(case, head, target_head)
    losses.total.backward()
    logits, target_logits = (torch.cat([out for _, out in made]).detach() for made in (calls, target_calls))
    assert logits.dtype == target_logits.dtype == torch.bfloat16
    expected = divergence(logits.double(), target_logits.double(), case.arguments["labels_N"], loss_type)
    assert losses.rows_N.dtype == torch.float32
    assert_near(losses.rows_N, expected, 1e-5)
    for leaf, grad in zip(case.leaves, torch.autograd.grad(run_full(case)[0], case.leaves), strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - grad).norm() <= 0.05 * grad.norm()


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_in_bfloat16_give_float32_losses_and_bfloat16_gradients(weight_dtype):
    case = make_case("reverse_kl", is_reduced=True, dtype=torch.float32)
    dtypes = dict(hidden=torch.bfloat16, weight=weight_dtype, bias=weight_dtype)
    leaves = {name: getattr(case, name).detach().to(dtype).requires_grad_() for name, dtype in dtypes.items()}
    case = replace(case, target_hidden=case.target_hidden.bfloat16(), **leaves)
    losses = run_chunked(case)
    expected_total, expected_rows = run_full(case)
    assert losses.total.dtype == losses.rows_N.dtype == torch.float32
    torch.testing.assert_close(losses.rows_N, expected_rows.float(), rtol=0.05, atol=0.05)
    losses.total.backward()
    for leaf, expected in zip(case.leaves, torch.autograd.grad(expected_total, case.leaves), strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad - expected).norm() <= 0.05 * expected.norm()


def test_the_gradient_of_a_bfloat16_head_does_not_lose_small_chunks():
    # 600 rows of the same gradient, one per chunk: a running sum in bfloat16 would stop growing at 256 times one row.
    weight = torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    losses = chunked_divergence(
        torch.ones(600, 1, dtype=torch.bfloat16),
        Head.linear(weight),
        None,
        None,
        target_rows_N=None,
        labels_N=torch.zeros(600, dtype=torch.long),
        weights_N=torch.ones(600),
        loss_type="ce",
        draft_token_ids=None,
        chunk_bytes=0,
    )
    losses.total.backward()
    assert weight.grad.flatten().tolist() == [-300, 300]  # each row adds q - onehot = (-1/2, 1/2)


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
    loss = (accepted * stream_scale(3, 1.0, 3.0)).sum()
    loss += (rejected * weights * stream_scale(weights.sum(), 2.0, 3.0)).sum()
    assert loss.item() == pytest.approx(4 / 3 + 2 / 3 * (0.8 + 1.92) / 1.44)


def test_an_empty_stream_contributes_nothing_and_a_small_one_is_not_rounded_up():
    expected = {0.0: 0.0, 4.0: 0.125, 1e-3: 500.0}
    for weight_sum, scale in expected.items():
        assert stream_scale(weight_sum, 1.0, 2.0) == pytest.approx(scale)
    scales = stream_scale(torch.tensor(list(expected)), 1.0, 2.0)
    torch.testing.assert_close(scales, torch.tensor(list(expected.values())))
    assert stream_scale(torch.tensor(4), 1.0, 2.0).item() == 0.125  # a count


@pytest.mark.parametrize(("weight", "total"), [(0.0, 0.0), (-1.0, 1.0), (2.0, 1.0)])
def test_stream_weights_out_of_range_are_refused(weight, total):
    with pytest.raises(ValueError, match="Stream weights"):
        stream_scale(1.0, weight, total)
