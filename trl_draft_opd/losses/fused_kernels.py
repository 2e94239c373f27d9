# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Triton kernels of the divergences: one program per row, in passes over its logits. Importing this needs Triton.

Each formula is the one of `divergences.differentiate`, its reference. A row's probabilities take a first pass: the
largest logit and the sum of exponentials relative to it, both rescaled as the largest grows (online log-sum-exp).
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# What Triton's functions return is known to its compiler alone.

import triton
import triton.language as tl


# A logit outside of the row: its probability is 0, and no difference of two of them is infinite.
OUTSIDE = tl.constexpr(-1e30)


@triton.jit
def _load(row, column, stride, is_inside):
    return tl.where(is_inside, tl.load(row + column * stride, mask=is_inside, other=0.0).to(tl.float32), OUTSIDE)


@triton.jit
def _sign(values):
    return tl.where(values > 0, 1.0, 0.0) - tl.where(values < 0, 1.0, 0.0)


@triton.jit
def _grow(values, largest, total):
    """Add logits to an online log-sum-exp."""
    grown = tl.maximum(largest, tl.max(values, axis=0))
    return grown, total * tl.exp(largest - grown) + tl.sum(tl.exp(values - grown), axis=0)


# Arguments that differ from chunk to chunk make no kernels of their own.
@triton.jit(do_not_specialize=["num_states"])
def read_target_kernel(
    logits_SV,
    row_stride,
    stride,
    draft_token_ids,
    logits_SD,
    statistics_2S,
    lost_mass_S,
    num_states,
    num_logits,
    num_drafted,
    IS_REDUCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """
    Write the largest logit of a state and the logarithm of its sum of exponentials; with a reduced vocabulary over the
    drafter's tokens, whose logits are copied side by side, and the probability of all others.
    """
    state = tl.program_id(0).to(tl.int64)
    row = logits_SV + state * row_stride
    lanes = tl.arange(0, BLOCK)
    largest, total = -1e30, 0.0
    for first in range(0, num_logits, BLOCK):
        columns = first + lanes
        largest, total = _grow(_load(row, columns, stride, columns < num_logits), largest, total)
    if IS_REDUCED:
        of_all, sum_of_all = largest, total
        largest, total = -1e30, 0.0
        for first in range(0, num_drafted, BLOCK):
            columns = first + lanes
            is_inside = columns < num_drafted
            ids = tl.load(draft_token_ids + columns, mask=is_inside, other=0)
            values = _load(row, ids, stride, is_inside)
            tl.store(logits_SD + state * num_drafted + columns, values, mask=is_inside)
            largest, total = _grow(values, largest, total)
        tl.store(lost_mass_S + state, 1 - total * tl.exp(largest - of_all) / sum_of_all)
    tl.store(statistics_2S + state, largest)
    tl.store(statistics_2S + num_states + state, tl.log(total))


@triton.jit(do_not_specialize=["num_states"], do_not_specialize_on_alignment=["places_C"])
def differentiate_kernel(
    draft_logits_CD,
    draft_row_stride,
    draft_stride,
    target_logits_SD,
    target_row_stride,
    target_stride,
    statistics_2S,
    places_C,
    labels_C,
    weights_C,
    losses_C,
    num_states,
    num_logits,
    LOSS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the loss of a row and, over its logits, their weighted gradient."""
    index = tl.program_id(0).to(tl.int64)
    draft = draft_logits_CD + index * draft_row_stride
    lanes = tl.arange(0, BLOCK)
    weight = 0.0
    if WITH_GRAD:
        weight = tl.load(weights_C + index)
    if LOSS == "ce":
        label = tl.load(labels_C + index)
        # Now: warps wait for each other in the first pass alone, and the gradient is written over this logit.
        label_logit = tl.load(draft + label * draft_stride).to(tl.float32)
    else:
        place = tl.load(places_C + index)
        target = target_logits_SD + place * target_row_stride
        target_largest = tl.load(statistics_2S + place)
        target_log_total = tl.load(statistics_2S + num_states + place)

    largest, total, mean_ratio = -1e30, 0.0, 0.0
    for first in range(0, num_logits, BLOCK):
        columns = first + lanes
        is_inside = columns < num_logits
        values = _load(draft, columns, draft_stride, is_inside)
        if LOSS == "reverse_kl":
            # sum exp(a) (a - log p) with `a` relative to the largest: that moves by the same step as `a`.
            log_p = _load(target, columns, target_stride, is_inside) - target_largest - target_log_total
            grown = tl.maximum(largest, tl.max(values, axis=0))
            moved = tl.exp(largest - grown) * (mean_ratio + (largest - grown) * total)
            mean_ratio = moved + tl.sum(tl.exp(values - grown) * (values - grown - log_p), axis=0)
        largest, total = _grow(values, largest, total)
    log_total = tl.log(total)
    loss = 0.0
    if LOSS == "reverse_kl":
        loss = mean_ratio / total - log_total
    if LOSS == "ce":
        loss = log_total - (label_logit - largest)

    # What the gradient needs of the whole row.
    draft_half = 0.0
    if LOSS == "jsd":
        target_half = 0.0
        for first in range(0, num_logits, BLOCK):
            columns = first + lanes
            is_inside = columns < num_logits
            log_q = _load(draft, columns, draft_stride, is_inside) - largest - log_total
            log_p = _load(target, columns, target_stride, is_inside) - target_largest - target_log_total
            log_m = _log_mean(log_p, log_q)
            target_half += tl.sum(tl.exp(log_p) * (log_p - log_m), axis=0)
            draft_half += tl.sum(tl.exp(log_q) * (log_q - log_m), axis=0)
        loss = (target_half + draft_half) / 2
    mean_sign, kl_share = 0.0, 0.0
    if (LOSS == "tv") or (LOSS == "lk_hybrid"):
        kl, tv = 0.0, 0.0
        for first in range(0, num_logits, BLOCK):
            columns = first + lanes
            is_inside = columns < num_logits
            log_q = _load(draft, columns, draft_stride, is_inside) - largest - log_total
            log_p = _load(target, columns, target_stride, is_inside) - target_largest - target_log_total
            p, q = tl.exp(log_p), tl.exp(log_q)
            tv += tl.sum(tl.abs(p - q), axis=0)
            mean_sign += tl.sum(_sign(p - q) * q, axis=0)
            if LOSS == "lk_hybrid":
                kl += tl.sum(p * (log_p - log_q), axis=0)
        loss = tv / 2
        if LOSS == "lk_hybrid":
            kl_share = tl.exp(-3 * (1 - loss))
            loss = kl_share * kl + (1 - kl_share) * loss
    log_alpha, held = 0.0, 0.0
    if LOSS == "lk":
        # `held`: what alpha holds of `q`, so that it moves with `q`; half of it at a tie.
        least, alpha = -1e30, 0.0
        for first in range(0, num_logits, BLOCK):
            columns = first + lanes
            is_inside = columns < num_logits
            log_q = _load(draft, columns, draft_stride, is_inside) - largest - log_total
            log_p = _load(target, columns, target_stride, is_inside) - target_largest - target_log_total
            lower = tl.minimum(log_p, log_q, propagate_nan=tl.PropagateNan.ALL)
            grown = tl.maximum(least, tl.max(lower, axis=0))
            of_q = tl.exp(lower - grown) * (_sign(log_p - log_q) + 1) / 2
            held = held * tl.exp(least - grown) + tl.sum(of_q, axis=0)
            least, alpha = _grow(lower, least, alpha)
        held = held / alpha
        log_alpha = least + tl.log(alpha)
        loss = -log_alpha

    if WITH_GRAD or LOSS == "forward_kl":
        for first in range(0, num_logits, BLOCK):
            columns = first + lanes
            is_inside = columns < num_logits
            log_q = _load(draft, columns, draft_stride, is_inside) - largest - log_total
            q = tl.exp(log_q)
            grad = q
            if LOSS == "ce":
                grad = q - tl.where(columns == label, 1.0, 0.0)
            else:
                log_p = _load(target, columns, target_stride, is_inside) - target_largest - target_log_total
                if LOSS == "forward_kl":
                    p = tl.exp(log_p)
                    loss += tl.sum(p * (log_p - log_q), axis=0)
                    grad = q - p
                if LOSS == "reverse_kl":
                    grad = q * (log_q - log_p - loss)
                if LOSS == "jsd":
                    grad = q * (log_q - _log_mean(log_p, log_q) - draft_half) / 2
                if LOSS == "lk":
                    lower = tl.minimum(log_p, log_q, propagate_nan=tl.PropagateNan.ALL)
                    grad = q * held - tl.exp(lower - log_alpha) * (_sign(log_p - log_q) + 1) / 2
                if (LOSS == "tv") or (LOSS == "lk_hybrid"):
                    gap = tl.exp(log_p) - q
                    grad = (mean_sign - _sign(gap)) * q / 2
                    if LOSS == "lk_hybrid":
                        grad = (1 - kl_share) * grad - kl_share * gap
            if WITH_GRAD:
                tl.store(draft + columns * draft_stride, weight * grad, mask=is_inside)
    tl.store(losses_C + index, loss)


@triton.jit
def _log_mean(log_p, log_q):
    """Logarithm of `(p + q) / 2`."""
    return tl.maximum(log_p, log_q) + tl.log((1 + tl.exp(-tl.abs(log_p - log_q))) / 2)
