# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Divergences between the target's and the drafter's next-token distributions, row by row, with closed-form gradients.

`divergence` is the readable reference, differentiated by autograd; `differentiate` gives the same values and gradients
in a few passes over memory. Knows no heads, weights or chunks.

Shape letters:  N = rows, V = vocabulary that drafter and target share
"""

import math

import torch
from torch import Tensor


LOSS_TYPES = ("forward_kl", "reverse_kl", "jsd", "tv", "lk", "lk_hybrid", "ce")
LK_HYBRID_DECAY = 3.0  # eta of the LK losses, at the value their authors recommend
NO_TOKEN = -1


def divergence(
    draft_logits_NV: Tensor, target_logits_NV: Tensor | None, labels_N: Tensor | None, loss_type: str
) -> Tensor:
    """
    Compare the drafter's next-token distribution `q` with the target's `p` at temperature 1, in nats per row.

    With `alpha = sum_v min(p(v), q(v))`, the probability that speculative sampling accepts a draft:

    | `loss_type` | value |
    |---|---|
    | `"forward_kl"`, `"reverse_kl"` | `KL(p, q) = sum p log(p / q)`, `KL(q, p)` |
    | `"jsd"` | `KL(p, m) / 2 + KL(q, m) / 2` with `m = (p + q) / 2`, at most `log 2` |
    | `"tv"` | `sum abs(p - q) / 2 = 1 - alpha` |
    | `"lk"` | `-log alpha` |
    | `"lk_hybrid"` | `w KL(p, q) + (1 - w) (1 - alpha)` with `w = exp(-3 alpha)` detached |
    | `"ce"` | `-log q(label)` |

    Source: Leviathan et al., [Fast Inference from Transformers via Speculative
    Decoding](https://huggingface.co/papers/2211.17192), section 3 for `alpha`; Samarin et al., [LK Losses: Direct
    Acceptance Rate Optimization](https://huggingface.co/papers/2602.23881) for `lk` and `lk_hybrid`.

    Args:
        draft_logits_NV (`torch.Tensor` of shape `(N, V)`):
            Finite logits of any floating dtype; accumulated in float32, or float64 if given so.
        target_logits_NV (`torch.Tensor` of shape `(N, V)`, *optional*):
            Finite logits over the same vocabulary. May be `None` under `"ce"` if no label is `-1`.
        labels_N (`torch.LongTensor` of shape `(N,)`, *optional*), loss_type (`str`):
            One of `LOSS_TYPES`; labels are read under `"ce"` only. `-1` means that no token was committed: the
            target's argmax is used.

    Returns:
        `torch.Tensor` of shape `(N,)`: differentiable losses, float32 or float64.

    Raises:
        ValueError: If `loss_type` is unknown, the shapes differ, or what the loss needs is missing.
    """
    check_sources(loss_type, target_logits_NV is not None, labels_N)
    if target_logits_NV is not None and target_logits_NV.shape != draft_logits_NV.shape:
        shapes = [draft_logits_NV.shape, target_logits_NV.shape]
        raise ValueError(f"Logits of drafter and target have shapes {shapes}. Index both by the same token ids.")
    log_q_NV = draft_logits_NV.to(accumulation_dtype(draft_logits_NV)).log_softmax(dim=1)
    if loss_type == "ce":
        assert labels_N is not None, "checked above"
        check_labels(labels_N, labels_N, draft_logits_NV.shape[1], target_logits_NV is not None)
        if target_logits_NV is not None:
            labels_N = torch.where(labels_N == NO_TOKEN, target_logits_NV.argmax(dim=1), labels_N)
        return -log_q_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1)
    assert target_logits_NV is not None, "checked above"
    log_p_NV = target_logits_NV.to(accumulation_dtype(target_logits_NV)).log_softmax(dim=1)
    if loss_type == "forward_kl":
        return _kl(log_p_NV, log_q_NV)
    if loss_type == "reverse_kl":
        return _kl(log_q_NV, log_p_NV)
    if loss_type == "jsd":
        log_m_NV = torch.logaddexp(log_p_NV, log_q_NV) - math.log(2)
        return (_kl(log_p_NV, log_m_NV) + _kl(log_q_NV, log_m_NV)) / 2
    if loss_type == "lk":
        # In the log domain alpha cannot underflow, so rows that agree nowhere keep a finite loss and a gradient.
        return -torch.minimum(log_p_NV, log_q_NV).logsumexp(dim=1)
    tv_N = (log_p_NV.exp() - log_q_NV.exp()).abs().sum(dim=1) / 2
    if loss_type == "tv":
        return tv_N
    kl_share_N = torch.exp(-LK_HYBRID_DECAY * (1 - tv_N.detach()))
    return kl_share_N * _kl(log_p_NV, log_q_NV) + (1 - kl_share_N) * tv_N


def differentiate(draft_logits_NV: Tensor, target_logits_NV: Tensor, loss_type: str) -> tuple[Tensor, Tensor]:
    """
    Return the losses of [`divergence`] and their gradient with respect to the drafter's logits, in closed form.

    With `g` the gradient with respect to `q`, that of the logits is `q (g - sum q g)`. Neither argument is changed; at
    most 5 tensors of their shape are alive at a time. `"ce"` has a function of its own.
    """
    log_q_NV, q_NV = normalise(draft_logits_NV)
    log_p_NV, p_NV = normalise(target_logits_NV)
    if loss_type == "forward_kl":
        losses_N = log_p_NV.sub_(log_q_NV).mul_(p_NV).sum(dim=1)
        return losses_N, q_NV.sub_(p_NV)
    if loss_type == "reverse_kl":
        log_ratio_NV = log_q_NV.sub_(log_p_NV)
        losses_N = torch.mul(q_NV, log_ratio_NV, out=p_NV).sum(dim=1)
        return losses_N, log_ratio_NV.sub_(losses_N.unsqueeze(1)).mul_(q_NV)
    if loss_type == "jsd":
        log_m_NV = torch.logaddexp(log_p_NV, log_q_NV).sub_(math.log(2))
        target_half_N = log_p_NV.sub_(log_m_NV).mul_(p_NV).sum(dim=1)
        log_ratio_NV = log_q_NV.sub_(log_m_NV)
        draft_half_N = torch.mul(q_NV, log_ratio_NV, out=p_NV).sum(dim=1)
        grad_NV = log_ratio_NV.sub_(draft_half_N.unsqueeze(1)).mul_(q_NV).div_(2)
        return (target_half_N + draft_half_N) / 2, grad_NV
    if loss_type == "lk":
        # In the log domain alpha cannot underflow. What it holds of `q` moves with `q`: at a tie, half of it.
        share_NV = torch.minimum(log_p_NV, log_q_NV, out=p_NV)
        log_alpha_N = share_NV.logsumexp(dim=1)
        share_NV.sub_(log_alpha_N.unsqueeze(1)).exp_()
        share_NV.mul_(log_p_NV.sub_(log_q_NV).sign_().add_(1).div_(2))
        return -log_alpha_N, q_NV.mul_(share_NV.sum(dim=1, keepdim=True)).sub_(share_NV)
    kl_N = log_p_NV.sub_(log_q_NV).mul_(p_NV).sum(dim=1) if loss_type == "lk_hybrid" else None
    gap_NV = p_NV.sub_(q_NV)
    tv_N = torch.abs(gap_NV, out=log_p_NV).sum(dim=1) / 2
    sign_NV = torch.sign(gap_NV, out=log_p_NV)
    mean_N1 = torch.mul(sign_NV, q_NV, out=log_q_NV).sum(dim=1, keepdim=True)
    grad_NV = sign_NV.sub_(mean_N1).mul_(q_NV).div_(-2)
    if kl_N is None:  # `tv`
        return tv_N, grad_NV
    kl_share_N = torch.exp(-LK_HYBRID_DECAY * (1 - tv_N))
    kl_share_N1 = kl_share_N.unsqueeze(1)
    grad_NV.mul_(1 - kl_share_N1).sub_(gap_NV.mul_(kl_share_N1))
    return kl_share_N * kl_N + (1 - kl_share_N) * tv_N, grad_NV


def differentiate_ce(draft_logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """
    Return the cross-entropy with labels in the vocabulary, and its gradient with respect to the drafter's logits.
    """
    log_q_NV, q_NV = normalise(draft_logits_NV)
    labels_N1 = labels_N.unsqueeze(1)
    losses_N1 = -log_q_NV.gather(1, labels_N1)
    return losses_N1.squeeze(1), q_NV.scatter_add_(1, labels_N1, -torch.ones_like(losses_N1))


def normalise(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and probabilities, with one `exp` for both."""
    log_probs_NV = logits_NV.to(accumulation_dtype(logits_NV)) - logits_NV.amax(dim=1, keepdim=True)
    probs_NV = log_probs_NV.exp()
    # Not `log_softmax`: on the CPU it adds up a row in few lanes, and loses digits of a large vocabulary.
    sums_N1 = probs_NV.sum(dim=1, keepdim=True)
    return log_probs_NV.sub_(sums_N1.log()), probs_NV.div_(sums_N1)


def _kl(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    # Log-probabilities of finite logits are finite, so an `a` that underflows to 0 contributes 0 and not NaN.
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(dim=1)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the precision in which losses of this tensor are summed: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def check_sources(loss_type: str, has_target: bool, labels_N: Tensor | None) -> None:
    """Raise `ValueError` if the loss is unknown, or lacks the target or the labels that it compares with."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"Unknown loss_type {loss_type!r}. Choose one of {', '.join(LOSS_TYPES)}.")
    if loss_type == "ce" and labels_N is None:
        raise ValueError("loss_type 'ce' needs labels, got None. Pass token ids, or -1 for the target's argmax.")
    if loss_type != "ce" and not has_target:
        raise ValueError(f"loss_type {loss_type!r} needs a target, got None. Pass it, or use 'ce' with labels.")


def check_labels(labels_N: Tensor, draft_labels_N: Tensor, vocab_size: int, has_target: bool) -> None:
    """Raise `ValueError` if a label is none of the drafter's tokens; labels are given in target and drafter ids."""
    is_wrong_N = find_wrong_labels(draft_labels_N, vocab_size, has_target)
    if is_wrong_N.any():
        raise ValueError(
            f"{int(is_wrong_N.sum())} labels, the first of them {int(labels_N[is_wrong_N][0])}, are not among the "
            f"drafter's {vocab_size} tokens (nor -1 beside a target). Give their rows the weight 0 under 'ce'."
        )


def find_wrong_labels(draft_labels_N: Tensor, vocab_size: int, has_target: bool) -> Tensor:
    """Return which labels, in drafter ids, are none of the drafter's tokens; `-1` is fine beside a target."""
    return (draft_labels_N < (NO_TOKEN if has_target else 0)) | (draft_labels_N >= vocab_size)
