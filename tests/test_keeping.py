# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The chance that the target keeps a draft, against the rejection rule itself, one draft at a time: the sum of `q(d)
min(1, p(d) / q(d))`, with one-hot distributions where tokens are argmaxes.

Shape letters:  N = rows, S = target states, H = hidden size, V = vocabulary of the target, D = of the drafter
"""

import itertools

import pytest
import torch

from trl_draft_opd import SamplingSettings
from trl_draft_opd.losses import Head, Verification, chunked_divergence
from trl_draft_opd.rollout.acceptance import token_probs
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.trainer.step import verification_of


VOCAB, HIDDEN, ROWS, STATES = 24, 6, 17, 5
GREEDY, WARM = SamplingSettings(0.0, 0, 1.0), SamplingSettings(1.0, 0, 1.0)
FILTERED = SamplingSettings(0.6, 9, 0.9)
HOW = {
    "greedy": (GREEDY, "greedy"),
    "greedy-asked-to-draw": (GREEDY, "sample"),
    "argmax-drafts": (WARM, "greedy"),
    "drawn": (WARM, "sample"),
    "filtered": (FILTERED, "sample"),
    "filtered-argmax-drafts": (FILTERED, "greedy"),
}


class Problem:
    def __init__(self, is_reduced, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.ids = torch.randperm(VOCAB, generator=generator)[: VOCAB // 2] if is_reduced else None
        self.hidden, self.target_hidden = draw(ROWS, HIDDEN).requires_grad_(), draw(STATES, HIDDEN)
        self.weight = draw(VOCAB if self.ids is None else len(self.ids), HIDDEN).requires_grad_()
        self.target_weight = draw(VOCAB, HIDDEN)
        self.rows = torch.randint(STATES, (ROWS,), generator=generator)
        # Close to the target here and there, so that argmaxes agree in some rows and not in others.
        with torch.no_grad():
            own = self.target_weight if self.ids is None else self.target_weight[self.ids]
            self.weight.copy_(own + 0.2 * self.weight)
            self.hidden[::2] = self.target_hidden[self.rows][::2] + 0.1 * self.hidden[::2]
        self.weights = draw(ROWS).abs().double() + 0.1
        self.weights[3] = 0

    def run(self, verification, loss_type="forward_kl", chunk_bytes=10**9, **changes):
        arguments = dict(
            target_rows_N=self.rows,
            labels_N=torch.full((ROWS,), -1),
            weights_N=self.weights,
            loss_type=loss_type,
            draft_token_ids=self.ids,
            chunk_bytes=chunk_bytes,
            verification=verification,
        )
        heads = Head.linear(self.weight), Head.linear(self.target_weight)
        return chunked_divergence(self.hidden, heads[0], self.target_hidden, heads[1], **(arguments | changes))

    def expected(self, sampling, draft_sampling):
        """Walk over every draft of every row and ask the rejection rule."""
        chances = torch.zeros(ROWS, dtype=torch.float64)
        for row in range(ROWS):
            p = token_probs(self.target_hidden[self.rows[row]] @ self.target_weight.T, sampling)
            q = token_probs(self.hidden[row].detach() @ self.weight.detach().T, sampling)
            if draft_sampling == "greedy":
                q = torch.nn.functional.one_hot(q.argmax(), len(q)).to(q)
            for index, chance in enumerate(q.tolist()):
                token = index if self.ids is None else int(self.ids[index])
                if chance > 0:
                    chances[row] += chance * min(1.0, float(p[token]) / chance)
        return chances * (self.weights != 0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("is_reduced", [False, True])
@pytest.mark.parametrize("loss_type", ["forward_kl", "ce"])
def test_the_chance_is_that_of_the_rejection_rule(how, is_reduced, loss_type):
    problem = Problem(is_reduced)
    verification = verification_of(DraftingSettings(4, *HOW[how], False))
    kept = problem.run(verification, loss_type).kept_N
    expected = problem.expected(*HOW[how])
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-12)
    assert not kept.requires_grad and 0.1 < kept.mean() < 0.9 and kept[3] == 0
    # No row and no block of rows knows of the others.
    torch.testing.assert_close(problem.run(verification, loss_type, chunk_bytes=2000).kept_N, kept, rtol=0, atol=1e-12)


def test_what_the_target_says_outside_of_the_drafters_vocabulary_is_never_kept():
    problem = Problem(is_reduced=True)
    kept = problem.run(verification_of(DraftingSettings(4, WARM, "sample", False)))
    # A renormalised target would keep drafts that the real one refuses.
    assert (kept.kept_N <= 1 - kept.lost_mass_N + 1e-12).all() and kept.lost_mass_N.max() > 0.2


@pytest.mark.parametrize("loss_type", ["forward_kl", "reverse_kl", "ce", "lk_hybrid"])
@pytest.mark.parametrize("is_reduced", [False, True])
def test_asking_for_the_chance_changes_neither_loss_nor_gradient(loss_type, is_reduced):
    found = []
    for verification in (None, Verification(None, None), verification_of(DraftingSettings(4, WARM, "sample", False))):
        problem = Problem(is_reduced)
        rows = problem.run(verification, loss_type)
        rows.total.backward()
        found.append((rows.total.detach(), rows.rows_N, problem.hidden.grad, problem.weight.grad))
    for first, other in itertools.product(found[:1], found[1:]):
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_the_chance_costs_no_second_product_with_a_head():
    problem, calls = Problem(False), []
    project = Head(lambda hidden: calls.append(len(hidden)) or hidden @ problem.target_weight.T, (), VOCAB)
    chunked_divergence(
        problem.hidden,
        project,
        problem.target_hidden,
        project,
        target_rows_N=problem.rows,
        labels_N=torch.zeros(ROWS, dtype=torch.long),
        weights_N=problem.weights,
        loss_type="ce",
        draft_token_ids=None,
        chunk_bytes=10**9,
        verification=Verification(None, None),
    )
    assert sorted(calls) == [len(problem.rows[problem.weights != 0].unique()), ROWS - 1]


def test_half_precision_logits_give_chances_of_float32():
    problem = Problem(False, torch.bfloat16)
    kept = problem.run(verification_of(DraftingSettings(4, WARM, "sample", False))).kept_N
    assert kept.dtype == torch.float32 and (kept <= 1).all()
    torch.testing.assert_close(kept.double(), problem.expected(WARM, "sample").double(), rtol=0, atol=0.02)


def test_without_a_target_there_is_no_chance():
    problem = Problem(False)
    with pytest.raises(ValueError, match="needs the target, got None"):
        chunked_divergence(
            problem.hidden,
            Head.linear(problem.weight),
            None,
            None,
            target_rows_N=None,
            labels_N=torch.zeros(ROWS, dtype=torch.long),
            weights_N=problem.weights,
            loss_type="ce",
            draft_token_ids=None,
            chunk_bytes=10**9,
            verification=Verification(None, None),
        )
    with pytest.raises(ValueError, match="Greedy text never has drawn drafts"):
        Verification(None, torch.sigmoid)
