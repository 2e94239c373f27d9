# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What verification keeps and what the posterior draws: hand numbers first, then exact distributions by enumeration.

The second half runs whole speculative decodings on a toy vocabulary and draws no random number: every uniform takes
the middle of each interval on which nothing changes, weighted by its length. So distributions are compared to 1e-12.

Shape letters: N = paths, K = drafts per block, K1 = K + 1, V = vocabulary, M = breakpoints
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from itertools import product
from math import prod

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_draft_opd.rollout import acceptance as verification
from trl_draft_opd.rollout.acceptance import (
    SamplingSettings,
    choose_tokens,
    count_accepted,
    residual_probs,
    sample_posterior,
    settle_blocks,
    token_probs,
    verify_greedy,
    verify_sampled,
)


PLAIN = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0)
GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
EXACT = dict(rtol=0, atol=1e-12)


def double(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- sampling settings and probabilities ---------------------------------------------------------------------------
def test_a_setting_outside_its_range_is_refused_by_name():
    nan, inf = float("nan"), float("inf")
    bad = {"temperature": [-0.1, 1e-6, nan, inf], "top_k": [-1, 2.0, True], "top_p": [0.0, 1.1, nan]}
    for name, value in [(name, value) for name, values in bad.items() for value in values]:
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            SamplingSettings(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, name: value})


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "expected"),
    [
        (1.0, 0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1, 0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 0, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (1.0, 2, 1.0, [0.625, 0.375, 0, 0]),
        (1.0, 9, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0, 0.4, [1, 0, 0, 0]),
        (1.0, 0, 0.75, [0.625, 0.375, 0, 0]),
        (1.0, 0, 0.82, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (1.0, 3, 0.82, [0.625, 0.375, 0, 0]),  # top-k first: two of the three then hold 0.842
        (2.0, 0, 0.45, [0.5635083268962915, 0.4364916731037085, 0, 0]),  # temperature first: sqrt(0.5), sqrt(0.3)
        (0.0, 0, 1.0, [1, 0, 0, 0]),
    ],
)
def test_probabilities_match_numbers_worked_out_by_hand(temperature, top_k, top_p, expected):
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(token_probs(LOGITS, settings), double(expected), **EXACT)


def test_the_distribution_is_the_one_that_generate_draws_from():
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(50)  # a peaked distribution, so that the filters bite
    settings = dict(temperature=0.7, top_k=10, top_p=0.8)
    shown = dict(output_scores=True, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    out = model.generate(torch.tensor([[1, 2, 3], [4, 5, 6]]), max_new_tokens=4, do_sample=True, **settings, **shown)
    probs = token_probs(torch.stack(out.logits), SamplingSettings(**settings))  # [new tokens, rows, V]
    assert ((probs > 0).sum(-1) < 10).any()
    torch.testing.assert_close(probs, torch.stack(out.scores).softmax(-1), rtol=0, atol=0)


def test_a_greedy_tie_goes_to_the_lowest_id():
    assert GREEDY.is_greedy and SamplingSettings(temperature=0, top_k=2, top_p=0.5).is_greedy and not PLAIN.is_greedy
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    assert token_probs(logits, GREEDY).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_tokens_that_tie_at_the_last_kept_place_are_all_kept():
    probs = token_probs(torch.tensor([2.0, 1.0, 1.0, 0.0]), SamplingSettings(temperature=1.0, top_k=2, top_p=1.0))
    assert (probs > 0).tolist() == [True, True, True, False]


def test_half_precision_logits_give_float32_probabilities():
    assert {token_probs(LOGITS.bfloat16(), settings).dtype for settings in (PLAIN, GREEDY)} == {torch.float32}


# ---- drawing a token -----------------------------------------------------------------------------------------------
def test_a_draw_inverts_the_cumulative_distribution():
    uniforms = double([0.0, 0.19, 0.21, 0.69, 0.71])
    assert choose_tokens(double([[0.2, 0.5, 0.3]] * 5), uniforms).tolist() == [0, 0, 1, 1, 2]
    assert choose_tokens(double([[0.5, 0, 0.5]]), double([0.5])).tolist() == [2]  # over the impossible token


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 0.999, 1.001, 1e-6, 7.0])
def test_a_token_of_probability_zero_is_drawn_at_neither_end(dtype, scale):
    probs = scale * torch.tensor([0, 0, 0.1, 0, 0.2, 0.7, 0, 0], dtype=dtype)
    uniforms = torch.tensor([0, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)  # the ends of `torch.rand`
    assert choose_tokens(probs.expand(2, -1), uniforms).tolist() == [2, 5]


def test_round_off_of_a_parallel_sum_draws_no_impossible_token(monkeypatch):
    scan = double([[0.5, 0.6, 1.0, 1.1]] * 2)  # rises where nothing was added
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *args, **kwargs: scan.clone())
    assert choose_tokens(double([[0.5, 0, 0.5, 0]] * 2), double([0.5, 0.99])).tolist() == [2, 2]


def test_rare_tokens_behind_likely_ones_keep_their_share():
    probs = torch.tensor([[1.0, 1e-9, 1e-9, 1.0]])
    assert choose_tokens(probs, double([(1 + 1.5e-9) / 2.000000002])).tolist() == [2]


def test_a_draw_from_no_distribution_or_with_no_uniform_is_refused():
    nan, inf = float("nan"), float("inf")
    fair, bad_rows, bad_uniforms = [0.5, 0.5], [[0.0, 0.0], [nan, nan], [inf, 1.0]], [1.0, -0.1, nan]
    for probs, uniform in [*((row, 0.5) for row in bad_rows), *((fair, uniform) for uniform in bad_uniforms)]:
        with pytest.raises(ValueError, match="1 rows lack"):
            choose_tokens(double([probs, fair]), double([uniform, 0.5]))


# ---- counting, greedy verification ---------------------------------------------------------------------------------
def test_a_match_after_the_first_miss_is_not_accepted():
    assert count_accepted(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 0, 8]])).tolist() == [2]


def test_blocks_of_several_anchors_are_counted_together():
    choices = torch.tensor([[[1, 2], [1, 0]], [[0, 2], [0, 0]]])
    assert count_accepted(torch.tensor([1, 2]).expand(2, 2, 2), choices).tolist() == [[2, 1], [0, 0]]


def test_shapes_that_would_broadcast_silently_are_refused():
    with pytest.raises(ValueError, match=r"target_choices_BK.*\(2, 3\).*\(1, 3\)"):
        count_accepted(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"target_choices_BK1.*\(1, 3\).*\(1, 2\)"):
        verify_greedy(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"`uniforms` must have shape \(2,\).*got \(1,\)"):
        choose_tokens(double([[0.5, 0.5]] * 2), double([0.5]))


def test_greedy_verification_commits_the_correction_or_the_bonus():
    drafts, choices = torch.tensor([[5, 6]] * 4), torch.tensor([[5, 6, 9], [5, 7, 9], [4, 6, 9], [4, 7, 9]])
    accepted, next_tokens = verify_greedy(drafts, choices)
    assert (accepted.tolist(), next_tokens.tolist()) == ([2, 1, 0, 0], [9, 7, 4, 4])
    accepted, next_tokens = verify_greedy(drafts[:, :1], choices[:, :2])
    assert (accepted.tolist(), next_tokens.tolist()) == ([1, 1, 0, 0], [6, 7, 4, 4])


# ---- sampled verification ------------------------------------------------------------------------------------------
def test_rejection_leaves_the_target_distribution_unchanged():
    p, q = token_probs(torch.randn(2, 50, 7, dtype=torch.float64), SamplingSettings(1.0, top_k=5, top_p=1.0))
    kept, residual = torch.minimum(p, q), residual_probs(p, q)
    torch.testing.assert_close(kept + (1 - kept.sum(-1, keepdim=True)) * residual, p, **EXACT)
    assert (residual[p <= q] == 0).all()


def test_the_residual_of_equal_distributions_is_the_target_itself():
    p = double([[0.6, 0.3, 0.1]])
    assert torch.equal(residual_probs(p, p.clone()), p)
    with pytest.raises(ValueError, match="draft_probs"):
        residual_probs(p, p[0])


def test_a_draft_is_kept_with_the_ratio_of_the_two_distributions():
    p, q = double([[[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]]] * 3), double([[[0.4, 0.5, 0.1]]] * 3)
    drafts, uniforms = torch.tensor([[0], [0], [1]]), double([[0.499], [0.501], [0.999]])
    accepted, next_tokens = verify_sampled(drafts, q, p, uniforms, double([0.5, 0.001, 0.5]))
    assert accepted.tolist() == [1, 0, 1]
    assert next_tokens.tolist() == [2, 2, 2]  # bonus, residual (only token 2 has p > q), bonus


def test_an_argmax_draft_is_kept_with_the_targets_own_probability():
    p = double([[[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]]] * 4)
    uniforms, next_uniforms = double([[0.49], [0.51], [0.51], [0.51]]), double([0.0, 0.39, 0.41, 0.999])
    accepted, next_tokens = verify_sampled(torch.tensor([[1]] * 4), None, p, uniforms, next_uniforms)
    assert (accepted.tolist(), next_tokens.tolist()) == ([1, 0, 0, 0], [2, 0, 2, 2])  # corrections from (0.4, 0, 0.6)


def test_an_impossible_draft_is_refused_even_at_uniform_zero():
    p, q = double([[[0.0, 1.0], [1.0, 0.0]]]), double([[[0.5, 0.5]]])
    for draft_probs in (q, None):
        accepted, next_tokens = verify_sampled(torch.tensor([[0]]), draft_probs, p, double([[0.0]]), double([0.0]))
        assert (accepted.tolist(), next_tokens.tolist()) == ([0], [1])


def test_sampled_verification_of_a_greedy_target_is_greedy_verification():
    drafts, target_probs = torch.randint(3, (40, 3)), token_probs(torch.randn(40, 4, 3), GREEDY)
    expected = verify_greedy(drafts, target_probs.argmax(-1))
    assert expected[0].unique().tolist() == [0, 1, 2, 3]
    for distribution in (token_probs(torch.randn(40, 3, 3), PLAIN), None):
        found = verify_sampled(drafts, distribution, target_probs, torch.rand(40, 3), torch.rand(40))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_leading_shapes_do_not_change_what_is_verified():
    q, p = token_probs(torch.randn(2, 5, 3, 3), PLAIN), token_probs(torch.randn(2, 5, 4, 3), PLAIN)
    given = [torch.randint(3, (2, 5, 3)), q, p, torch.rand(2, 5, 3), torch.rand(2, 5)]
    for distribution in (q, None):
        given[1] = distribution
        flat = verify_sampled(*[None if value is None else value.flatten(0, 1) for value in given])
        for folded, expected in zip(verify_sampled(*given), flat, strict=True):
            assert torch.equal(folded.flatten(), expected)


def test_drafts_that_their_own_distribution_cannot_draw_are_refused():
    q, p = double([[[1.0, 0.0]]]), double([[[0.5, 0.5], [0.5, 0.5]]])
    with pytest.raises(ValueError, match=r"`draft_probs_BKV` is 0 .*\[\[0, 0\]\]"):
        verify_sampled(torch.tensor([[1]]), q, p, double([[0.5]]), double([0.5]))
    with pytest.raises(ValueError, match=r"target_probs_BK1V.*\(1, 2, 2\)"):
        verify_sampled(torch.tensor([[1]]), None, p[:, :1], double([[0.5]]), double([0.5]))


# ---- the drafts given the text -------------------------------------------------------------------------------------
def test_a_committed_token_was_drafted_with_the_inverse_ratio():
    p, q = double([[[0.5, 0.3, 0.2]] * 3] * 2), double([[[0.2, 0.2, 0.6]] * 3] * 2)
    committed, is_in_text = torch.tensor([[0, 0, 0], [2, 2, 2]]), torch.ones(2, 3, dtype=torch.bool)
    uniforms = double([[0.39, 0.41, 0.0], [0.99] * 3])
    drafts, accepted = sample_posterior(committed, q, p, uniforms, 0 * uniforms, is_in_text)
    assert accepted.tolist() == [1, 3]
    assert drafts[0].tolist() == [
        0,
        2,
        0,
    ]  # accepted; from the residual, where only token 2 has q > p; from q at u = 0


def test_slots_outside_the_text_are_fresh_drafts_and_never_accepted():
    p, q = torch.full((1, 3, 3), float("nan"), dtype=torch.float64), double([[[0.2, 0.2, 0.6]] * 3])
    p[0, 0] = double([0.5, 0.3, 0.2])
    committed, is_in_text = torch.tensor([[0, -100, 0]]), torch.tensor([[True, False, False]])
    drafts, accepted = sample_posterior(committed, q, p, double([[0.0] * 3]), double([[0.0] * 3]), is_in_text)
    assert (drafts.tolist(), accepted.tolist()) == ([[0, 0, 0]], [1])


def test_text_that_the_target_could_not_write_has_no_draft():
    p, q = double([[[1.0, 0.0]] * 2] * 2), double([[[0.5, 0.5]] * 2] * 2)
    committed, is_in_text = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[True, False], [True, True]])
    drafts, accepted = sample_posterior(committed, q, p, 0 * q[0], 0 * q[0], is_in_text)
    assert (drafts.tolist(), accepted.tolist()) == ([[0, 0], [0, -1]], [1, 1])
    with pytest.raises(ValueError, match=r"`target_probs_BKV` must have shape \(2, 2, 2\), got \(2, 1, 2\)"):
        sample_posterior(committed, q, p[:, :1], q[0], q[0], is_in_text)


# ---- the end of the text -------------------------------------------------------------------------------------------

TEXT = list(range(100, 112))  # y_0 .. y_11, the last one EOS
WRONG = [7] * 5


def walk_chain(drafts_of_anchor: dict[int, list[int]]) -> list[tuple]:
    """Walk a chain: `(anchor, accepted, committed tokens, rejected slots, is_censored, is_counted)` per round."""
    anchor, last_index, rounds = 0, len(TEXT) - 1, []
    while anchor < last_index:
        committed = (TEXT + [-1] * 5)[anchor + 1 : anchor + 6]
        raw = count_accepted(torch.tensor([drafts_of_anchor[anchor]]), torch.tensor([committed]))
        outcome = settle_blocks(raw, torch.tensor([anchor]), torch.tensor([last_index]), 5)
        r, is_censored = outcome.accepted.item(), outcome.is_censored.item()
        rejected = [] if is_censored else list(range(r + 1, 6))
        rounds.append((anchor, r, TEXT[anchor + 1 : anchor + r + 2], rejected, is_censored, outcome.is_counted.item()))
        anchor += r + 1
    return rounds


def test_the_worked_example_walks_as_written():
    drafts = {0: [101, 102, 7, 7, 7], 3: WRONG, 4: [105, 106, 107, 108, 109], 10: [111, 7, 7, 7, 7]}
    assert walk_chain(drafts) == [
        (0, 2, [101, 102, 103], [3, 4, 5], False, True),
        (3, 0, [104], [1, 2, 3, 4, 5], False, True),
        (4, 5, [105, 106, 107, 108, 109, 110], [], False, True),
        (10, 1, [111], [], True, False),
    ]
    # Round 4': a miss inside the text is an ordinary rejection, also beyond the end.
    assert walk_chain(drafts | {10: WRONG})[-1] == (10, 0, [111], [1, 2, 3, 4, 5], False, False)


def test_blocks_are_settled_by_where_their_text_ends():
    # A full accept at the very end has no bonus and is counted; one token short, it is censored.
    outcome = settle_blocks(torch.tensor([5, 4]), torch.tensor([6, 6]), torch.tensor([11, 10]), 5)
    assert (outcome.is_censored.tolist(), outcome.is_counted.tolist()) == ([False, True], [True, False])
    # Matches past the end are cut.
    anchors, last_index = torch.tensor([[10, 8], [3, 7]]), torch.tensor([[11], [9]])
    outcome = settle_blocks(torch.tensor([[4, 5], [5, 1]]), anchors, last_index, 5)
    assert outcome.accepted.tolist() == [[1, 3], [5, 1]]
    assert outcome.is_censored.tolist() == [[True, True], [False, False]]
    assert outcome.is_counted.tolist() == [[False, False], [True, False]]


def test_blocks_that_cannot_exist_are_refused():
    with pytest.raises(ValueError, match="2 tokens behind"):
        settle_blocks(torch.tensor([0]), torch.tensor([7]), torch.tensor([5]), 3)
    for accepted in (4, -1):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            settle_blocks(torch.tensor([accepted]), torch.tensor([0]), torch.tensor([5]), 3)


# ---- exact distributions by enumeration -----------------------------------------------------------------------------
# A prefix is one integer in base V with a leading 1; index 0 holds a given token, indices 1..LIMIT are written.

VOCAB, EOS, LIMIT = 3, 2, 4
TEXTS = 2 * VOCAB**LIMIT
FILTERED = SamplingSettings(temperature=0.8, top_k=2, top_p=1.0)

Paths = dict[str, torch.Tensor]  # every value has one row per path; "weight" is the path's probability
Distribution = dict[int, float]  # probability of each `text + TEXTS * trace`


@dataclass(frozen=True, eq=False)
class Toy:
    """A random target `p(. | prefix)` and a random drafter `q_k(. | drafted prefix)` or `q_k(. | anchor's prefix)`."""

    num_drafts: int
    target_CV: torch.Tensor
    draft_KCV: torch.Tensor
    is_sequential: bool
    is_argmax: bool

    def draft_rows(self, prefixes_NK: torch.Tensor) -> torch.Tensor:
        codes_NK = prefixes_NK if self.is_sequential else prefixes_NK[:, :1].expand_as(prefixes_NK)
        return self.draft_KCV[torch.arange(codes_NK.shape[1]), codes_NK]


def make_toy(num_drafts: int, drafter: str, is_argmax: bool, settings: SamplingSettings) -> Toy:
    shape = (1 + num_drafts, 2 * VOCAB ** (LIMIT - 1 + num_drafts), VOCAB)
    logits = 1.2 * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits[..., EOS] -= 0.7
    draft_probs = token_probs(logits[1:], GREEDY if is_argmax else settings)
    return Toy(num_drafts, token_probs(logits[0], settings), draft_probs, drafter == "sequential", is_argmax)


def prefixes_of(codes_N: torch.Tensor, tokens_NK: torch.Tensor) -> torch.Tensor:
    """Codes `[N, K + 1]` of the prefix before each token, and after the last."""
    codes = [codes_N]
    for tokens_N in tokens_NK.unbind(1):
        codes.append(codes[-1] * VOCAB + tokens_N)
    return torch.stack(codes, dim=1)


def split(paths: Paths, name: str, cuts_NKM: torch.Tensor) -> Paths:
    """Append to columns `name` K uniforms per path: for each, the middle of every interval between its breakpoints."""
    paths = {name: cuts_NKM.new_zeros(len(cuts_NKM), 0), **paths, "cuts": cuts_NKM}
    for slot in range(cuts_NKM.shape[1]):
        edges = torch.nn.functional.pad(paths["cuts"][:, slot].clamp(0, 1), (1, 0))
        edges = torch.nn.functional.pad(edges, (0, 1), value=1.0).sort(dim=1).values
        lengths = edges.diff(dim=1)
        row, column = (lengths > 1e-15).nonzero(as_tuple=True)  # anything shorter is round-off
        paths = {key: value[row] for key, value in paths.items()}
        paths["weight"] = paths["weight"] * lengths[row, column]
        middle = edges[row, column] + lengths[row, column] / 2
        paths[name] = torch.cat([paths[name], middle.unsqueeze(1)], dim=1)
    return paths


def cuts_of_residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Breakpoints of a draw from norm((p - q)+), worked out here on purpose."""
    excess = (p - q).clamp(min=0)
    return (excess / excess.sum(-1, keepdim=True)).nan_to_num(0).cumsum(-1)


def move_finished(distribution: Distribution, paths: Paths, is_finished: torch.Tensor) -> Paths:
    """
    Add up paths that differ only in their uniforms, move the finished ones into the distribution, return the others.
    """
    keys, inverse = (paths["text"] + TEXTS * paths["trace"]).unique(return_inverse=True)
    first = torch.zeros_like(keys).scatter(0, inverse, torch.arange(len(inverse)))
    weight = torch.zeros(len(keys), dtype=torch.float64).index_add(0, inverse, paths["weight"])
    is_finished = is_finished[first]
    distribution.update(zip(keys[is_finished].tolist(), weight[is_finished].tolist(), strict=True))
    paths = {key: value[first] for key, value in paths.items()} | {"weight": weight}
    return {key: value[~is_finished] for key, value in paths.items()}


def add_round(paths: Paths, accepted_N: torch.Tensor, show: str) -> torch.Tensor:
    """Trace with one more round: its accepted drafts and, as `show` says, its drafts; below 1000 a round."""
    slots = torch.arange(paths["drafts"].shape[1])
    num_shown = {"counts": 0 * accepted_N, "reached": accepted_N + 1, "blocks": 0 * accepted_N + len(slots)}[show]
    shown_NK = paths["drafts"] * (slots < num_shown.unsqueeze(1))
    return 1000 * paths["trace"] + prefixes_of(1 + accepted_N, shown_NK)[:, -1]


def draft_blocks(toy: Toy, paths: Paths) -> Paths:
    paths = {**paths, "drafts": paths["text"].new_zeros(len(paths["text"]), 0)}
    for _ in range(toy.num_drafts):
        rows = toy.draft_rows(prefixes_of(paths["prefix"], paths["drafts"]))[:, -1]
        paths = split({**paths, "row": rows}, "draft_uniform", rows.cumsum(-1).unsqueeze(1))
        tokens = choose_tokens(paths["row"], paths["draft_uniform"][:, -1])
        paths["drafts"] = torch.cat([paths["drafts"], tokens.unsqueeze(1)], dim=1)
    return paths


def forward_distribution(toy: Toy, show: str, verify: Callable = verify_sampled, power: float = 1.0) -> Distribution:
    """
    Distribution of text and blocks when drafting and verification write the text; `power` is a fault's, for
    breakpoints.
    """
    one, distribution = torch.ones(1, dtype=torch.long), {}
    paths = {"weight": one.double(), "text": one, "prefix": one, "anchor": 0 * one, "trace": 0 * one}
    while len(paths["weight"]):
        paths = draft_blocks(toy, paths)
        prefixes = prefixes_of(paths["prefix"], paths["drafts"])
        p, q = toy.target_CV[prefixes], toy.draft_rows(prefixes[:, :-1])
        ratio = (p[:, :-1] / q).gather(-1, paths["drafts"].unsqueeze(-1)).clamp(max=1)
        paths = split({**paths, "p": p, "q": q}, "accept", torch.cat([ratio, ratio**power], dim=-1))
        cuts = torch.cat([paths["p"].cumsum(-1), cuts_of_residual(paths["p"][:, :-1], paths["q"])], dim=1)
        paths = split(paths, "next", cuts.flatten(1).unsqueeze(1))
        q, uniforms = None if toy.is_argmax else paths["q"], (paths["accept"], paths["next"][:, 0])
        raw, next_tokens = verify(paths["drafts"], q, paths["p"], *uniforms)
        text, end, is_open = paths["text"], paths["anchor"], torch.ones_like(raw, dtype=torch.bool)
        for slot, draft in enumerate([*paths["drafts"].unbind(1), next_tokens]):
            token, is_added = torch.where(raw == slot, next_tokens, draft), is_open & (slot <= raw)
            text, end = torch.where(is_added, text * VOCAB + token, text), end + is_added
            is_open = is_open & (end < LIMIT) & ~(is_added & (token == EOS))
        accepted = settle_blocks(raw, paths["anchor"], end.where(~is_open, LIMIT), toy.num_drafts).accepted
        state = {"text": text, "prefix": text, "anchor": end, "trace": add_round(paths, accepted, show)}
        paths = move_finished(distribution, {"weight": paths["weight"], **state}, ~is_open)
    return distribution


def posterior_distribution(
    toy: Toy, show: str, sample: Callable = sample_posterior, is_slotwise: bool = False
) -> Distribution:
    """Distribution of text and blocks when the target writes the text alone and the blocks are drawn afterwards."""
    paths, distribution = written_texts(toy), {}
    kept, step = tuple(paths), 1 if is_slotwise else toy.num_drafts
    while len(paths["weight"]):
        paths["prefix"] = paths["prefixes"].gather(1, paths["anchor"].unsqueeze(1))[:, 0]
        choices = draft_blocks(toy, paths)["drafts"] if toy.is_argmax else None
        paths |= {"drafts": paths["tokens"][:, :0], "accepted": 0 * paths["text"]}
        for first in range(0, toy.num_drafts, step):
            index = paths["anchor"].unsqueeze(1) + torch.arange(first, first + step)
            committed = paths["tokens"].gather(1, index)
            prefixes = prefixes_of(paths["prefix"], torch.cat([paths["drafts"], committed], dim=1))[:, :-1]
            p, q = toy.target_CV[prefixes][:, first:], toy.draft_rows(prefixes)[:, first:]
            is_in_text = (index < paths["last"].unsqueeze(1)) & (paths["accepted"] == first).unsqueeze(1)
            paths |= {"p": p, "q": q, "committed": committed, "is_in_text": is_in_text}
            ratio = (q / p).gather(-1, committed.unsqueeze(-1)).nan_to_num(0)
            paths = split(paths, "accept", ratio * is_in_text.unsqueeze(-1) * (not toy.is_argmax))
            cuts = torch.cat([paths["q"].cumsum(-1), cuts_of_residual(paths["q"], paths["p"])], dim=-1)
            paths = split(paths, "redraft", cuts * (not toy.is_argmax))
            committed, is_in_text = paths["committed"], paths["is_in_text"]
            if toy.is_argmax:
                drafts, accepted = choices, count_accepted(choices, committed.masked_fill(~is_in_text, -1))
            else:
                uniforms = paths["accept"][:, first:], paths["redraft"][:, first:]
                drafts, accepted = sample(committed, paths["q"], paths["p"], *uniforms, is_in_text)
            paths["drafts"] = torch.cat([paths["drafts"], drafts], dim=1)
            paths["accepted"] = paths["accepted"] + accepted
        settled = settle_blocks(paths["accepted"], paths["anchor"], paths["last"], toy.num_drafts).accepted
        paths |= {"trace": add_round(paths, settled, show), "anchor": paths["anchor"] + settled + 1}
        paths = move_finished(distribution, {key: paths[key] for key in kept}, paths["anchor"] >= paths["last"])
    return distribution


def written_texts(toy: Toy) -> Paths:
    """Every text with its probability under the target; tokens behind its end are 0."""
    texts = {(*seq, EOS)[: (*seq, EOS).index(EOS) + 1][:LIMIT] for seq in product(range(VOCAB), repeat=LIMIT)}
    tokens = torch.tensor([[*text, *[0] * (LIMIT + toy.num_drafts - len(text))] for text in texts])
    last = torch.tensor([len(text) for text in texts])
    prefixes = prefixes_of(torch.ones_like(last), tokens)
    shares = toy.target_CV[prefixes[:, :LIMIT]].gather(-1, tokens[:, :LIMIT, None])[..., 0]
    weight = shares.masked_fill(torch.arange(LIMIT) >= last.unsqueeze(1), 1).prod(dim=1)
    text = prefixes.gather(1, last.unsqueeze(1))[:, 0]
    paths = {"weight": weight, "text": text, "prefixes": prefixes, "tokens": tokens, "last": last}
    return {key: value[weight > 0] for key, value in {**paths, "anchor": 0 * last, "trace": 0 * last}.items()}


def target_distribution(toy: Toy, code: int = 1, room: int = LIMIT) -> Distribution:
    distribution = {}
    for token, weight in enumerate(toy.target_CV[code].tolist()):
        text = code * VOCAB + token
        rest = {text: 1.0} if token == EOS or room == 1 else target_distribution(toy, text, room - 1)
        distribution |= {end: weight * share for end, share in rest.items() if weight > 0}
    return distribution


def definition_distribution(toy: Toy) -> Distribution:
    """Distribution of text and accepted counts, from the definition of speculative sampling in plain numbers."""

    def code_of(tokens: tuple[int, ...], code: int) -> int:
        return reduce(lambda prefix, token: prefix * VOCAB + token, tokens, code)

    target, draft, num_drafts = toy.target_CV.tolist(), toy.draft_KCV.tolist(), toy.num_drafts

    @cache
    def distribution_from(code: int, room: int) -> Counter:
        distribution = Counter()  # of (text, accepted drafts of every round)
        for drafts in product(range(VOCAB), repeat=num_drafts):
            codes = [code_of(drafts[:k], code) for k in range(num_drafts + 1)]
            p = [target[prefix] for prefix in codes]
            q = [draft[k][codes[k] if toy.is_sequential else code] for k in range(num_drafts)]
            reach = prod(q[k][drafts[k]] for k in range(num_drafts))  # these drafts are drawn, and r of them accepted
            for r in range(num_drafts + 1 if reach > 0 else 0):
                kept = min(1, p[r][drafts[r]] / q[r][drafts[r]]) if r < num_drafts else 0
                excess = [max(a - b, 0) for a, b in zip(p[r], q[r] if r < num_drafts else [0] * VOCAB, strict=True)]
                for token in range(VOCAB):
                    weight = reach * (1 - kept) * excess[token] / (sum(excess) or 1)
                    committed = (*drafts[:r], token)[:room]
                    committed = committed[: committed.index(EOS) + 1] if EOS in committed else committed
                    text = code_of(committed, code)
                    is_open = committed[-1] != EOS and len(committed) < room
                    rest = distribution_from(text, room - len(committed)) if is_open and weight else {(text, ()): 1}
                    for (end, counts), share in rest.items():
                        distribution[end, (min(r, len(committed)), *counts)] += weight * share
                reach *= kept
        return distribution

    def key_of(text: int, counts: tuple[int, ...]) -> int:
        return text + TEXTS * reduce(lambda trace, r: 1000 * trace + (1 + r) * VOCAB**num_drafts, counts, 0)

    return {key_of(*key): weight for key, weight in distribution_from(1, LIMIT).items()}


def text_distribution(distribution: Distribution) -> Distribution:
    texts = {key % TEXTS for key in distribution}
    return {text: sum(weight for key, weight in distribution.items() if key % TEXTS == text) for text in texts}


def total_variation(distribution: Distribution, other: Distribution) -> float:
    return sum(abs(distribution.get(key, 0.0) - other.get(key, 0.0)) for key in distribution.keys() | other.keys()) / 2


@pytest.mark.parametrize("settings", [PLAIN, FILTERED])
@pytest.mark.parametrize("is_argmax", [False, True])
@pytest.mark.parametrize(("num_drafts", "drafter"), [(1, "sequential"), (3, "parallel"), (3, "sequential")])
def test_rounds_of_verification_have_the_distribution_of_the_definition(num_drafts, drafter, is_argmax, settings):
    toy = make_toy(num_drafts, drafter, is_argmax, settings)
    distribution = forward_distribution(toy, "counts")
    assert total_variation(distribution, definition_distribution(toy)) <= 1e-12
    assert total_variation(text_distribution(distribution), target_distribution(toy)) <= 1e-12


FAULTS = {
    "accepts too often": lambda d, q, p, u, next_u: verify_sampled(d, q, p, u ** (1 / 0.9), next_u),
    "bonus from the wrong row": lambda d, q, p, *u: verify_sampled(d, q, torch.cat([p[:, :-1], p[:, -2:-1]], 1), *u),
    "correction from p": verify_sampled,
}


@pytest.mark.parametrize("is_argmax", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_sampler_is_told_from_the_definition(fault, is_argmax, monkeypatch):
    if fault == "correction from p":
        monkeypatch.setattr(verification, "residual_probs", lambda p, q: p)
    toy = make_toy(2, "sequential", is_argmax, PLAIN)
    distribution = forward_distribution(toy, "counts", FAULTS[fault], power=0.9)
    assert abs(sum(distribution.values()) - 1) <= 1e-12
    assert total_variation(distribution, definition_distribution(toy)) > 1e-3
    assert total_variation(text_distribution(distribution), target_distribution(toy)) > 1e-3


@pytest.mark.parametrize("settings", [PLAIN, FILTERED])
@pytest.mark.parametrize(
    ("drafter", "is_argmax", "show", "is_slotwise"),
    [
        ("parallel", False, "blocks", False),
        ("sequential", False, "blocks", True),
        ("sequential", False, "reached", False),  # rows along the text are exact through the first refused slot
        ("parallel", True, "blocks", False),
        ("sequential", True, "blocks", False),
    ],
)
def test_blocks_drawn_after_the_text_have_the_distribution_of_live_blocks(
    drafter, is_argmax, show, is_slotwise, settings
):
    toy = make_toy(3 if is_argmax else 2, drafter, is_argmax, settings)
    distribution = posterior_distribution(toy, show, is_slotwise=is_slotwise)
    assert total_variation(distribution, forward_distribution(toy, show)) <= 1e-12


def test_drafts_drawn_without_looking_at_the_text_are_told_apart():
    def ignore_the_text(committed, q, p, accept_uniforms, draft_uniforms, is_in_text):
        drafts = choose_tokens(q, draft_uniforms)
        return drafts, count_accepted(drafts, committed.masked_fill(~is_in_text, -1))

    toy = make_toy(2, "parallel", False, PLAIN)
    distribution = posterior_distribution(toy, "counts", ignore_the_text)
    assert total_variation(text_distribution(distribution), target_distribution(toy)) <= 1e-12
    assert total_variation(distribution, forward_distribution(toy, "counts")) > 1e-3
