# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Drafters that choose among the likeliest tokens of their head: scores of these candidates, and the loss of the choice.

`SelectorPass` compares the choice with the target's over the same few tokens, and differentiates it by hand. Knows no
drafters and no chunks.

Shape letters:  C = rows of one chunk, W = columns of a hidden state, D = vocabulary of the drafter, R = rank of the
selector, k = candidates per row
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .divergences import accumulation_dtype, differentiate, differentiate_ce
from .heads import outside_autocast


@dataclass(frozen=True)
class Selector:
    """
    How a draft is chosen among the likeliest tokens of a head: by its logit and the product of its row with what the
    hidden state holds behind the columns of the head.

    Args:
        rows_DR (`torch.Tensor` of shape `(D, R)`): One row per token, trained if it requires a gradient.
        top_k (`int`): Candidates per row.
        weight (`float`, defaults to `1.0`): Weight of the loss of the choice, beside that of the head.
    """

    rows_DR: Tensor
    top_k: int
    weight: float = 1.0

    @property
    def values_per_row(self) -> int:
        """Numbers that a row's candidates take at a time: their rows, and as much again for the gradient of these."""
        return 2 * self.top_k * (self.rows_DR.shape[1] + 1)

    def head_columns(self, hidden_CW: Tensor) -> Tensor:
        """Return what the head reads of hidden states: all columns but the selector's, which are the last."""
        return hidden_CW[:, : -self.rows_DR.shape[1]]

    def own_columns(self, hidden_CW: Tensor) -> Tensor:
        """Return what the rows of the candidates are multiplied with, `(C, R)`."""
        return hidden_CW[:, -self.rows_DR.shape[1] :]


@dataclass(frozen=True)
class Choice:
    """
    The candidates of each row.

    Attributes:
        ids_Ck (`torch.LongTensor` of shape `(C, k)`), scores_Ck (`torch.Tensor` of shape `(C, k)`):
            In the drafter's ids, and what the draft is chosen by.
        rows_CkR (`torch.Tensor` of shape `(C, k, R)`), context_CR (`torch.Tensor` of shape `(C, R)`):
            Whose products are in the scores.
    """

    ids_Ck: Tensor
    scores_Ck: Tensor
    rows_CkR: Tensor
    context_CR: Tensor


def find_candidates(selector: Selector, logits_CD: Tensor) -> Tensor:
    """Return the likeliest tokens of each row by the head's logits, `(C, k)`, the weakest last."""
    return logits_CD.topk(selector.top_k, dim=1).indices


def score(selector: Selector, logits_CD: Tensor, hidden_CW: Tensor, ids_Ck: Tensor) -> Choice:
    """Score candidates, in float32 (float64 if given so)."""
    dtype = accumulation_dtype(logits_CD)
    rows_CkR, context_CR = selector.rows_DR.detach()[ids_Ck].to(dtype), selector.own_columns(hidden_CW).to(dtype)
    with outside_autocast(logits_CD.device):
        products_Ck1 = rows_CkR @ context_CR.unsqueeze(2)
    scores_Ck = logits_CD.gather(1, ids_Ck).to(dtype) + products_Ck1.squeeze(2)
    return Choice(ids_Ck, scores_Ck, rows_CkR, context_CR)


class SelectorPass:
    """
    One call of a loss through a selector: the choice of a drafter against that of its target, over the candidates.

    The target's distribution is renormalised over them. Its likeliest token (under `"ce"`, the label) is put in place
    of the weakest candidate where it is missing, so that the head has a reason to find it.

    Source: [DFlash 2](https://inco.ai/blog/dflash2), whose loss is the cross-entropy with that token.

    Args:
        selector ([`Selector`]), loss_type (`str`): The loss is the same divergence as that of the head.
        wants_rows_grad (`bool`), wants_context_grad (`bool`): Whether its rows and the hidden states want a gradient.

    Attributes:
        sum_DR (`torch.Tensor` of shape `(D, R)` or `None`): Gradient of the rows, summed in float32 (or float64).
    """

    def __init__(self, selector: Selector, loss_type: str, wants_rows_grad: bool, wants_context_grad: bool):
        self._selector, self._loss_type, self._wants_context_grad = selector, loss_type, wants_context_grad
        rows_DR = selector.rows_DR
        self.sum_DR = torch.zeros_like(rows_DR, dtype=accumulation_dtype(rows_DR)) if wants_rows_grad else None
        self._choice: Choice | None = None
        self._grad_Ck: Tensor | None = None

    def compare(
        self,
        logits_CD: Tensor,
        hidden_CW: Tensor,
        wanted_C: Tensor,
        target_logits_SD: Tensor | None,
        places_C: Tensor,
        weights_C: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """
        Return the loss of each row's choice, and whether the head found the wanted token, `(C,)` each.

        Args:
            logits_CD, hidden_CW: Of the drafter; they are only read.
            wanted_C (`torch.LongTensor` of shape `(C,)`): The label, or the target's likeliest token.
            target_logits_SD (`torch.Tensor` of shape `(S, D)`, *optional*): Not read under `"ce"`.
            places_C (`torch.LongTensor` of shape `(C,)`): Index of each row's state there.
            weights_C (`torch.Tensor` of shape `(C,)`, *optional*): Weights of the rows, if gradients are wanted.
        """
        ids_Ck = find_candidates(self._selector, logits_CD)
        is_found_C = (ids_Ck == wanted_C.unsqueeze(1)).any(dim=1)
        ids_Ck[:, -1] = torch.where(is_found_C, ids_Ck[:, -1], wanted_C)
        choice = score(self._selector, logits_CD, hidden_CW, ids_Ck)
        if self._loss_type == "ce":
            place_C = (ids_Ck == wanted_C.unsqueeze(1)).long().argmax(dim=1)
            losses_C, grad_Ck = differentiate_ce(choice.scores_Ck, place_C)
        else:
            assert target_logits_SD is not None, "read for every loss but `ce`"
            target_logits_Ck = target_logits_SD[places_C.unsqueeze(1), ids_Ck].to(choice.scores_Ck.dtype)
            losses_C, grad_Ck = differentiate(choice.scores_Ck, target_logits_Ck, self._loss_type)
        if weights_C is not None:
            scale_C = self._selector.weight * weights_C
            self._choice, self._grad_Ck = choice, grad_Ck * scale_C.unsqueeze(1).to(grad_Ck.dtype)
        return losses_C, is_found_C

    def pull_back(self, grad_CD: Tensor) -> Tensor | None:
        """
        Add the gradient of the candidates' scores to that of the head's logits, in place, and to that of the rows;
        return that of its own columns of the hidden states, `(C, R)`, where it is wanted.
        """
        choice, grad_Ck = self._choice, self._grad_Ck
        assert choice is not None and grad_Ck is not None, "the chunk was compared with weights"
        self._choice = self._grad_Ck = None
        grad_CD.scatter_add_(1, choice.ids_Ck, grad_Ck.to(grad_CD.dtype))
        if self.sum_DR is not None:
            grad_CkR = grad_Ck.unsqueeze(2) * choice.context_CR.unsqueeze(1)
            self.sum_DR.index_add_(0, choice.ids_Ck.flatten(), grad_CkR.flatten(0, 1).to(self.sum_DR.dtype))
        if not self._wants_context_grad:
            return None
        with outside_autocast(grad_CD.device):
            return (grad_Ck.unsqueeze(1) @ choice.rows_CkR).squeeze(1)
