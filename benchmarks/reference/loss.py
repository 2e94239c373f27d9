# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Divergences between drafter and target from full logits of all rows at once, in float32, differentiated by autograd.

Shape letters:  N = rows, H = hidden size, V = vocabulary of the target, D = vocabulary of the drafter
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def full_divergence(
    draft_logits: Tensor, target_logits: Tensor | None, labels: Tensor | None, loss_type: str
) -> Tensor:
    """
    Compare two next-token distributions row by row, in nats; formulas as in `trl_draft_opd.losses.divergence`.

    Args:
        draft_logits (`torch.Tensor` of shape `(N, D)`), target_logits (same shape, *optional*):
            Over the same tokens; the target's are needed unless every label is known under `"ce"`.
        labels (`torch.LongTensor` of shape `(N,)`, *optional*), loss_type (`str`):
            Read under `"ce"` only; `-1` stands for the target's argmax.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    log_q = draft_logits.float().log_softmax(dim=-1)
    if loss_type == "ce":
        if target_logits is not None:
            labels = torch.where(labels == -1, target_logits.argmax(dim=-1), labels)
        return F.nll_loss(log_q, labels, reduction="none")
    log_p = target_logits.float().log_softmax(dim=-1)
    p, q = log_p.exp(), log_q.exp()
    if loss_type == "forward_kl":
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
    if loss_type == "reverse_kl":
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(dim=-1)
    if loss_type == "jsd":
        log_m = ((p + q) / 2).log()
        halves = F.kl_div(log_m, log_p, log_target=True, reduction="none").sum(dim=-1)
        return (halves + F.kl_div(log_m, log_q, log_target=True, reduction="none").sum(dim=-1)) / 2
    alpha = torch.minimum(p, q).sum(dim=-1)
    if loss_type == "tv":
        return 1 - alpha
    if loss_type == "lk":
        return -alpha.log()
    assert loss_type == "lk_hybrid", loss_type
    share = torch.exp(-3 * alpha.detach())
    return share * full_divergence(draft_logits, target_logits, labels, "forward_kl") + (1 - share) * (1 - alpha)


def full_loss(
    hidden: Tensor,
    head_weight: Tensor,
    target_hidden: Tensor,
    target_head_weight: Tensor,
    *,
    labels: Tensor | None,
    weights: Tensor,
    loss_type: str,
    draft_token_ids: Tensor | None,
) -> Tensor:
    """
    Project all rows, whatever their weight, and return the weighted sum of their divergences.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`), head_weight (`torch.Tensor` of shape `(D, H)`):
            What the drafter's head reads, and its weight.
        target_hidden (`torch.Tensor` of shape `(N, H)`), target_head_weight (`torch.Tensor` of shape `(V, H)`):
            What the target's head reads at each row, and its weight.
        labels (`torch.LongTensor` of shape `(N,)`, *optional*), weights (`torch.Tensor` of shape `(N,)`):
            Target ids for `"ce"`, and the weight of each row.
        loss_type (`str`), draft_token_ids (`torch.LongTensor` of shape `(D,)`, *optional*):
            Divergence, and the target's ids of the drafter's tokens: the target is renormalised over them.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    with torch.no_grad():
        target_logits = F.linear(target_hidden, target_head_weight).float()
        if draft_token_ids is not None:
            target_logits = target_logits[:, draft_token_ids]
            if labels is not None:
                index = torch.full((target_head_weight.shape[0],), -1, device=labels.device)
                index[draft_token_ids] = torch.arange(len(draft_token_ids), device=labels.device)
                labels = torch.where(labels < 0, labels, index[labels])
    draft_logits = F.linear(hidden, head_weight).float()
    return (full_divergence(draft_logits, target_logits, labels, loss_type) * weights).sum()


def full_choice_loss(
    hidden: Tensor,
    head_weight: Tensor,
    successors: Tensor,
    num_candidates: int,
    target_hidden: Tensor,
    target_head_weight: Tensor,
    *,
    labels: Tensor,
    weights: Tensor,
    loss_type: str,
) -> Tensor:
    """
    Return the weighted sum of the divergences of a choice among the likeliest tokens of a head, the wanted one in the
    place of the weakest where it is not among them.

    Args:
        hidden (`torch.Tensor` of shape `(N, H + R)`), successors (`torch.Tensor` of shape `(V, R)`):
            What the head reads, behind it what rows of `successors` are multiplied with.
        num_candidates (`int`): Tokens to choose among.
        The other arguments are those of [`full_loss`].
    """
    with torch.no_grad():
        target_logits = F.linear(target_hidden, target_head_weight).float()
        wanted = target_logits.argmax(dim=-1)
        if loss_type == "ce":
            wanted = torch.where(labels < 0, wanted, labels)
    width = head_weight.shape[1]
    logits = F.linear(hidden[:, :width], head_weight).float()
    candidates = logits.argsort(dim=-1, descending=True)[:, :num_candidates]
    is_missing = (candidates != wanted[:, None]).all(dim=-1)
    candidates[is_missing, -1] = wanted[is_missing]
    scores = logits.gather(-1, candidates) + (successors[candidates] * hidden[:, None, width:]).sum(dim=-1)
    places = (candidates == wanted[:, None]).long().argmax(dim=-1)
    return (full_divergence(scores, target_logits.gather(-1, candidates), places, loss_type) * weights).sum()
