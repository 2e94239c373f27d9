# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Claims about the fused divergences: they are the eager ones, whatever the vocabulary, dtype or row; what they load and
store; and that the eager ones take their place where they do not run.

The kernels run on the CPU, under Triton's interpreter, in a process of their own: a kernel is interpreted or compiled
from its import on. Without a GPU they are compiled for one all the same.

Shape letters:  C = rows, S = target states, V = vocabulary of the target, D = of the drafter
"""

import math
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from helpers.pretend_accelerator import apart
from trl_draft_opd.losses import LOSS_TYPES, Head, Selector, chunked_divergence, fused
from trl_draft_opd.losses.comparison import Comparison
from trl_draft_opd.losses.divergences import differentiate, differentiate_ce


pytest.importorskip("triton", reason="interprets and compiles the kernels; has wheels for Linux alone")

ALL_LOSSES = pytest.mark.parametrize("loss_type", LOSS_TYPES)
VOCAB, BLOCK = 37, 16  # three blocks, the last of them not full
# One step of the dtype's last digit: the interpreter cuts digits off where a GPU rounds.
STEPS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def is_interpreted():
    from trl_draft_opd.losses import fused_kernels

    fused.BLOCK = BLOCK
    return type(fused_kernels.differentiate_kernel).__name__ == "InterpretedFunction"


@pytest.fixture(scope="module")
def interpreted():
    """`call(function, *args)` in a process that interprets kernels."""
    with apart() as call:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert call(is_interpreted)
        yield call


# -- the kernels against their reference ------------------------------------------------------------------------------


def run_kernels(draft_logits, target_logits, places, labels, weights, loss_type, draft_token_ids=None):
    """Return losses, what stands in place of the logits, the target's logits and its lost mass."""
    draft_logits = draft_logits.clone(memory_format=torch.preserve_format)  # processes share what they are sent
    target_logits, statistics, lost_mass = fused.read_target(target_logits, draft_token_ids)
    is_ce = loss_type == "ce"
    target = (None, None) if is_ce else (target_logits, statistics)
    losses = fused.differentiate(draft_logits, *target, places, labels if is_ce else None, weights, loss_type)
    return losses, draft_logits, target_logits, lost_mass


def expect(draft_logits, target_logits, places, labels, weights, loss_type):
    """The same losses and gradients by the eager formulas."""
    if loss_type == "ce":
        losses, grad = differentiate_ce(draft_logits, labels)
    else:
        losses, grad = differentiate(draft_logits, target_logits[places], loss_type)
    return losses, (grad * weights[:, None]).to(draft_logits.dtype)


def draw(dtype, scale=1.0, num_rows=5, vocab=VOCAB):
    """Rows 0 and 4 share a state, row 1 has every token a tie, row 2 all but two, row 3 weighs nothing."""
    generator = torch.Generator().manual_seed(0)
    draft_logits = (2 * scale * torch.randn(num_rows, vocab, generator=generator)).to(dtype)
    target_logits = (2 * scale * torch.randn(4, vocab, generator=generator)).to(dtype)
    places = torch.tensor([2, 0, 1, 3, 2])
    target_logits[0] = draft_logits[1]
    draft_logits[2], target_logits[1] = 0, 0
    draft_logits[2, 3] = target_logits[1, vocab - 1] = -30  # so little that both sums are the same number
    labels = torch.randint(vocab, (num_rows,), generator=generator)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 0.25])
    return draft_logits, target_logits, places, labels, weights


@ALL_LOSSES
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1.0), (torch.float32, 30.0), (torch.float32, 500.0), (torch.bfloat16, 1.0), (torch.float16, 1.0)],
)
def test_fused_losses_and_gradients_are_those_of_the_eager_formulas(interpreted, loss_type, dtype, scale):
    case = draw(dtype, scale)
    losses, grad, _, _ = interpreted(run_kernels, *case, loss_type)
    expected_losses, expected_grad = expect(*case, loss_type)
    assert losses.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(losses, expected_losses, rtol=2e-6, atol=3e-6)
    step = STEPS[dtype]
    torch.testing.assert_close(grad, expected_grad, rtol=step, atol=min(step, 1e-6 * scale))
    assert not grad[3].any()


@ALL_LOSSES
def test_a_logit_that_is_not_finite_spoils_what_it_spoils_in_the_eager_formulas(interpreted, loss_type):
    draft_logits, target_logits, places, labels, weights = draw(torch.float32)
    draft_logits[0, 20], target_logits[0, 5], draft_logits[2, 0] = math.nan, math.nan, math.inf
    case = (draft_logits, target_logits, places, labels, weights)
    losses, grad, _, _ = interpreted(run_kernels, *case, loss_type)
    expected_losses, expected_grad = expect(*case, loss_type)
    assert expected_losses.isnan().any() and not expected_losses.isnan().all()
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reduced_vocabulary_is_copied_and_its_lost_mass_summed_as_by_the_eager_code(interpreted, dtype):
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:21]
    _, target_logits, places, labels, weights = draw(dtype)
    draft_logits = draw(dtype, vocab=21)[0]
    case = (target_logits, places, labels % 21, weights)
    losses, _, kept, lost_mass = interpreted(run_kernels, draft_logits, *case, "reverse_kl", ids)
    expected = Comparison("reverse_kl", ids, 2, is_fused=False).read_target(target_logits)
    assert torch.equal(kept, expected.logits_SD)
    torch.testing.assert_close(lost_mass, expected.lost_mass_S, rtol=1e-6, atol=1e-6)
    expected_losses = expect(draft_logits, kept, places, labels, weights, "reverse_kl")[0]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=3e-6)


def run_strided(draft_logits, target_logits, *others):
    """Logits that lie column by column, as a head may hand them over."""
    return run_kernels(draft_logits.T.contiguous().T, target_logits.T.contiguous().T, *others)


def test_logits_that_lie_column_by_column_are_read_and_written_in_place(interpreted):
    case = draw(torch.float32)
    losses, grad, _, _ = interpreted(run_strided, *case, "jsd")
    expected_losses, expected_grad = expect(*case, "jsd")
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


@ALL_LOSSES
def test_values_alone_leave_the_drafters_logits_as_they_are(interpreted, loss_type):
    draft_logits, target_logits, places, labels, weights = draw(torch.bfloat16)
    losses, same, _, _ = interpreted(run_kernels, draft_logits, target_logits, places, labels, None, loss_type)
    assert torch.equal(same, draft_logits)
    expected = expect(draft_logits, target_logits, places, labels, weights, loss_type)[0]
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=3e-6)


def test_peaked_rows_of_a_thousand_tokens_are_as_exact_as_float32_allows(interpreted):
    generator = torch.Generator().manual_seed(1)
    draft_logits, target_logits = (3 * torch.randn(1, 1501, generator=generator) for _ in range(2))
    draft_logits[0, 7] = target_logits[0, 9] = 30
    case = (draft_logits, target_logits, torch.zeros(1).long(), None, torch.ones(1))
    for loss_type in ("forward_kl", "reverse_kl", "lk"):
        losses, grad, _, _ = interpreted(run_kernels, *case, loss_type)
        exact, exact_grad = differentiate(draft_logits.double(), target_logits.double(), loss_type)
        torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=1e-6)
        assert (grad - exact_grad).norm() <= max(2e-6 * exact_grad.norm(), 1e-6)


# -- in place in the loss ---------------------------------------------------------------------------------------------


def run_loss(loss_type, is_reduced, is_fused, dtype=torch.float32, has_selector=False):
    """Return total, rows, lost mass and gradients of rows that share states, some of weight 0."""
    generator = torch.Generator().manual_seed(2)

    def draw_leaf(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    ids = torch.randperm(VOCAB, generator=generator)[:21] if is_reduced else None
    hidden, weight = draw_leaf(9, 8 if has_selector else 5), draw_leaf(21 if is_reduced else VOCAB, 5)
    selector = Selector(draw_leaf(len(weight), 3), 4) if has_selector else None
    labels = (torch.arange(VOCAB) if ids is None else ids)[torch.randint(21, (9,), generator=generator)]
    labels[::4] = -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "is_used_for", lambda hidden: is_fused)
        result = chunked_divergence(
            hidden,
            Head.linear(weight),
            draw_leaf(4, 3).detach(),
            Head.linear(draw_leaf(VOCAB, 3).detach()),
            target_rows_N=torch.randint(4, (9,), generator=generator),
            labels_N=labels,
            weights_N=torch.rand(9, generator=generator).index_fill(0, torch.tensor([2, 5]), 0),
            loss_type=loss_type,
            draft_token_ids=ids,
            chunk_bytes=4 * VOCAB * 8,
            selector=selector,
        )
    trained = [hidden, weight] if selector is None else [hidden, weight, selector.rows_DR]
    grads = torch.autograd.grad(result.total, trained)
    return [result.total.detach(), result.rows_N, result.lost_mass_N, *grads]


@ALL_LOSSES
@pytest.mark.parametrize("is_reduced", [False, True], ids=["full", "reduced"])
def test_a_loss_by_the_kernels_is_the_loss_by_the_eager_formulas(interpreted, loss_type, is_reduced):
    actual = interpreted(run_loss, loss_type, is_reduced, True)
    expected = run_loss(loss_type, is_reduced, False)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual[2] > 0).any() == is_reduced


@ALL_LOSSES
@pytest.mark.parametrize("is_reduced", [False, True], ids=["full", "reduced"])
def test_a_selector_adds_the_same_beside_the_kernels(interpreted, loss_type, is_reduced):
    actual = interpreted(partial(run_loss, has_selector=True), loss_type, is_reduced, True)
    expected = run_loss(loss_type, is_reduced, False, has_selector=True)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual[-1] != 0).any(), "the rows of the selector have a gradient"


def run_float64():
    """Return how often kernels were launched for float64, which they do not know, and the results."""
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_launch", lambda *args, **kwargs: launches.append(args))
        return len(launches), run_loss("tv", False, True, torch.float64)


def test_float64_is_left_to_the_eager_formulas():
    assert not fused.is_used_for(torch.empty(0, 1, dtype=torch.float64, device="meta"))
    num_launches, actual = run_float64()
    assert num_launches == 0
    torch.testing.assert_close(actual, run_loss("tv", False, False, torch.float64))


def refuse_head_that_needs_its_logits():
    weight = torch.randn(VOCAB, 5).requires_grad_()
    head = Head(lambda hidden: (hidden @ weight.T).log_softmax(1), (weight,), VOCAB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "is_used_for", lambda hidden: True)
        chunked_divergence(
            torch.randn(2, 5),
            head,
            torch.randn(2, 3),
            Head.linear(torch.randn(VOCAB, 3)),
            target_rows_N=None,
            labels_N=None,
            weights_N=torch.ones(2),
            loss_type="tv",
            draft_token_ids=None,
            chunk_bytes=10**6,
        )


def test_a_head_whose_gradient_needs_its_own_logits_is_refused_by_the_kernels_too(interpreted):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        interpreted(refuse_head_that_needs_its_logits)


# -- where the kernels do not run -------------------------------------------------------------------------------------


class Broken:
    """A kernel whose compilation fails."""

    def __getitem__(self, grid):
        def fail(*args, **kwargs):
            raise ValueError("no such target\nand many lines more")

        return fail


def test_kernels_that_do_not_compile_are_replaced_with_one_warning_and_the_same_result(monkeypatch):
    expected = run_loss("forward_kl", True, False)
    monkeypatch.setattr(fused, "_failure", None)
    monkeypatch.setattr(
        fused, "_kernels", lambda: SimpleNamespace(read_target_kernel=Broken(), differentiate_kernel=Broken())
    )
    assert fused.can_run()
    with pytest.warns(UserWarning, match="does not run on cpu .ValueError: no such target.. The eager form") as caught:
        for _ in range(2):
            torch.testing.assert_close(run_loss("forward_kl", True, True), expected, rtol=1e-6, atol=1e-6)
    assert len(caught) == 1
    assert not fused.can_run()


def test_without_triton_one_warning_names_what_is_used(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl_draft_opd.losses.fused_kernels", None)
    monkeypatch.delattr("trl_draft_opd.losses.fused_kernels", raising=False)
    fused._kernels.cache_clear()
    cuda_like = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    try:
        with pytest.warns(UserWarning, match="Triton cannot be imported .*eager formulas are used in its place"):
            assert not fused.is_used_for(cuda_like)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not fused.is_used_for(cuda_like)
            assert not fused.is_used_for(torch.zeros(1, 1))
    finally:
        fused._kernels.cache_clear()


# -- on a card that is not there --------------------------------------------------------------------------------------


def compile_for(kernel, architecture, types, constants):
    """Compile a kernel to machine code as its launch on bf16 logits of a vocabulary of 151,936 would."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if name not in constants | {"num_states": 0, "places_C": 0}]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": fused.NUM_WARPS, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


TYPES = dict.fromkeys(("draft_logits_CD", "target_logits_SD", "logits_SV", "logits_SD"), "*bf16")
TYPES |= dict.fromkeys(("places_C", "labels_C", "draft_token_ids"), "*i64")
TYPES |= dict.fromkeys(("statistics_2S", "weights_C", "losses_C", "lost_mass_S"), "*fp32")


@ALL_LOSSES
def test_the_comparison_compiles_for_cuda_and_moves_eight_logits_at_a_time(loss_type, tmp_path, monkeypatch):
    from trl_draft_opd.losses.fused_kernels import differentiate_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"draft_stride": 1, "LOSS": loss_type, "WITH_GRAD": True, "BLOCK": fused.BLOCK}
    if loss_type == "ce":
        constants |= {"target_logits_SD": None, "statistics_2S": None}
    else:
        constants |= {"target_stride": 1, "labels_C": None}
    made = compile_for(differentiate_kernel, 90, TYPES, constants)
    assert made.asm["cubin"]
    assert "st.global.v4" in made.asm["ptx"] and "ld.global.v4" in made.asm["ptx"]


@pytest.mark.parametrize("is_reduced", [False, True])
def test_the_reading_of_the_target_compiles_for_cuda(is_reduced, tmp_path, monkeypatch):
    from trl_draft_opd.losses.fused_kernels import read_target_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"stride": 1, "IS_REDUCED": is_reduced, "BLOCK": fused.BLOCK}
    constants |= {} if is_reduced else {"draft_token_ids": None, "lost_mass_S": None}
    assert compile_for(read_target_kernel, 80, TYPES, constants).asm["cubin"]


# -- what they cost ---------------------------------------------------------------------------------------------------


def count_bytes(loss_type, has_grad):
    """Return bytes of logits that the interpreted kernels load and store, per logit of the drafter."""
    from triton.runtime.interpreter import InterpreterBuilder

    moved = []

    def note(pointers, mask):
        if mask.data.size > 1:  # what a row has once is loaded alone
            moved.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InterpreterBuilder, "create_masked_load", lambda self, p, m, *rest: note(p, m) or load(self, p, m, *rest)
        )
        patch.setattr(
            InterpreterBuilder,
            "create_masked_store",
            lambda self, p, v, m, *rest: note(p, m) or store(self, p, v, m, *rest),
        )
        draft_logits, target_logits, places, labels, weights = draw(torch.bfloat16)
        if loss_type == "ce":
            fused.differentiate(draft_logits, None, None, places, labels, weights if has_grad else None, "ce")
        else:
            run_kernels(draft_logits, target_logits, places, labels, weights if has_grad else None, loss_type)
    return sum(moved) / draft_logits.numel()


@ALL_LOSSES
@pytest.mark.parametrize("has_grad", [True, False], ids=["gradient", "values"])
def test_the_kernels_move_as_many_bytes_a_logit_as_they_say(interpreted, loss_type, has_grad):
    counted = interpreted(count_bytes, loss_type, has_grad)
    assert counted == pytest.approx(fused.bytes_per_logit(loss_type, 2, 4 / 5, has_grad=has_grad))


def test_a_logit_of_bf16_costs_at_most_12_bytes_in_the_default_losses():
    per_loss = {name: fused.bytes_per_logit(name, 2, 1) for name in LOSS_TYPES}
    assert per_loss == {"forward_kl": 10, "reverse_kl": 12, "jsd": 14, "tv": 14, "lk": 14, "lk_hybrid": 14, "ce": 6}
    # Seven TTT steps share each state of the target.
    assert max(fused.bytes_per_logit(name, 2, 1 / 7) for name in LOSS_TYPES) < 12.3
