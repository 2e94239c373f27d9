# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decide which drafts the target keeps, and which drafts could have led to a text that is already written. Pure tensor
math on probabilities, token ids and uniform numbers: knows no models and no random state.

Shape letters: B = blocks (any leading shape, say sequences x anchors), K = drafts per block, V = vocabulary, N = rows
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class SamplingSettings:
    """
    Name the distribution that tokens are drawn from: the logits after temperature, top-k and top-p, in this order.

    Args:
        temperature (`float`):
            Divides the logits. `0.0` is greedy (top-k and top-p then change nothing), else at least `1e-5`.
        top_k (`int`), top_p (`float`):
            Number of most probable tokens to keep (`0` for all), and mass in `(0, 1]` they must reach (`1.0` for all).

    Raises:
        ValueError: If a setting is outside its range.
    """

    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        # Engines round anything colder than 1e-5 to greedy: such a setting would name two distributions.
        if not math.isfinite(self.temperature) or (self.temperature != 0 and self.temperature < 1e-5):
            raise ValueError(f"`temperature` must be 0.0 (greedy) or in [1e-5, inf), got {self.temperature}.")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"`top_k` must be an integer >= 0, got {self.top_k!r}. Set 0 to keep all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}. Set 1.0 to keep all tokens.")

    @property
    def is_greedy(self) -> bool:
        """Whether every draw is the argmax (`temperature` is 0)."""
        return self.temperature == 0


@dataclass(frozen=True)
class BlockOutcome:
    """
    Hold what became of each block once the end of its text is taken into account (see [`settle_blocks`]).

    Attributes:
        accepted (`torch.LongTensor`): Accepted drafts inside the text, `0..K`.
        is_censored (`torch.BoolTensor`): The text ended before any draft failed.
        is_counted (`torch.BoolTensor`): All K slots lie inside the text: tau and slot rates average over these.
    """

    accepted: torch.Tensor
    is_censored: torch.Tensor
    is_counted: torch.Tensor


def token_probs(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """
    Turn logits into the probabilities that `generate` draws from, by transformers' own warpers.

    Args:
        logits (`torch.FloatTensor` of shape `(..., V)`): Raw logits.
        settings ([`SamplingSettings`]): Tokens that tie at the k-th place are all kept, as `generate` does.

    Returns:
        `torch.FloatTensor` of shape `(..., V)`: float32, or float64 as the logits. Greedy: one-hot, lowest id on ties.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if settings.is_greedy:
        return torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    warpers: list[Any] = [TemperatureLogitsWarper(float(settings.temperature))]
    if settings.top_k > 0:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    scores_NV = scores.reshape(-1, scores.shape[-1])  # the top-p warper scatters along dim 1: two dims, no more
    for warper in warpers:
        scores_NV = warper(None, scores_NV)  # none of the three reads the `input_ids`
    return scores_NV.softmax(dim=-1).reshape(scores.shape)


def choose_tokens(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    Draw one token per row by inverting its cumulative distribution; a token of probability zero is never drawn.

    Args:
        probs (`torch.FloatTensor` of shape `(..., V)`): Probabilities; each row is divided by its sum here.
        uniforms (`torch.FloatTensor` of shape `(...)`): One uniform number in `[0, 1)` per row.

    Returns:
        `torch.LongTensor` of shape `(...)`: token ids.

    Raises:
        ValueError: If shapes differ, a uniform is outside `[0, 1)`, or a row has no finite positive mass.
    """
    tokens = draw_tokens(probs, uniforms)
    if (tokens < 0).any():
        raise ValueError(f"{int((tokens < 0).sum())} rows lack positive mass (NaN logits?) or a uniform in [0, 1).")
    return tokens


def draw_tokens(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    Draw as [`choose_tokens`] does, -1 where a row cannot be drawn from: the host need not wait for a check.
    """
    _check_shape("uniforms", uniforms, probs.shape[:-1])
    # In float32, a running sum over 150k tokens is off by more than a rare token's probability.
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    # A parallel scan may rise in the last bit where nothing was added: no impossible token may be hit or set the end.
    cumulative.masked_fill_(~(probs > 0), -1.0)
    is_behind = cumulative > (uniforms.double() * cumulative.amax(dim=-1)).unsqueeze(-1)
    is_drawable = is_behind.any(dim=-1) & (uniforms >= 0)  # none lies behind u >= 1, or behind NaN
    return torch.where(is_drawable, is_behind.to(torch.uint8).argmax(dim=-1), -1)  # the first maximum


def count_accepted(drafts_BK: torch.Tensor, target_choices_BK: torch.Tensor) -> torch.Tensor:
    """
    Count the leading drafts of each block that match the target's own choice.

    Args:
        drafts_BK (`torch.LongTensor` of shape `(B, K)`): Drafts. B may be any leading shape.
        target_choices_BK (`torch.LongTensor` of shape `(B, K)`): Target's argmax there, or the committed text.

    Returns:
        `torch.LongTensor` of shape `(B,)`: accepted drafts per block, `0..K`. Add one for the accepted length.
    """
    _check_shape("target_choices_BK", target_choices_BK, drafts_BK.shape)
    # A running product: a match after the first miss was never reached.
    return (drafts_BK == target_choices_BK).cumprod(dim=-1).sum(dim=-1)


def residual_probs(target_probs: torch.Tensor, draft_probs: torch.Tensor) -> torch.Tensor:
    """
    Compute the distribution of the correction after a rejection, `norm(max(p - q, 0))`.

    Source: Leviathan et al., [Fast Inference from Transformers via Speculative
    Decoding](https://huggingface.co/papers/2211.17192), section 2.3. Where `p == q` everywhere, which only round-off
    brings about after a rejection, the result is `p`.

    Args:
        target_probs (`torch.FloatTensor` of shape `(..., V)`), draft_probs (same shape):
            Probabilities `p` and `q` over one vocabulary.

    Returns:
        `torch.FloatTensor` of shape `(..., V)`: probabilities, zero at every token with `p <= q`.
    """
    _check_shape("draft_probs", draft_probs, target_probs.shape)
    excess = (target_probs - draft_probs).clamp(min=0)
    mass = excess.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, excess / mass, target_probs)


def verify_greedy(
    drafts_BK: torch.Tensor, target_choices_BK1: torch.Tensor, num_verified_B: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Verify drafts against a greedy target: keep the leading matches, then commit the target's own next choice.

    Args:
        drafts_BK (`torch.LongTensor` of shape `(B, K)`): Drafts.
        target_choices_BK1 (`torch.LongTensor` of shape `(B, K + 1)`):
            Target's argmax after the anchor and after each draft.
        num_verified_B (`torch.LongTensor` of shape `(B,)`, *optional*):
            Drafts of each block that are verified, `0..K`; the others are not looked at. All by default.

    Returns:
        `tuple` of two `torch.LongTensor` of shape `(B,)`: accepted drafts `0..K`; next token (correction or bonus).
    """
    _check_shape("target_choices_BK1", target_choices_BK1, (*drafts_BK.shape[:-1], drafts_BK.shape[-1] + 1))
    accepted_B = count_accepted(drafts_BK, target_choices_BK1[..., :-1])
    if num_verified_B is not None:
        accepted_B = accepted_B.minimum(num_verified_B)
    return accepted_B, _at(target_choices_BK1, accepted_B)


def verify_sampled(
    drafts_BK: torch.Tensor,
    draft_probs_BKV: torch.Tensor | None,
    target_probs_BK1V: torch.Tensor,
    accept_uniforms_BK: torch.Tensor,
    next_uniforms_B: torch.Tensor,
    num_verified_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Verify drafts by rejection sampling, so that the committed text has exactly the target's distribution.

    Keep draft `d` iff `u < p(d) / q(d)`; replace the first one refused by a draw from [`residual_probs`]; after K
    accepted drafts draw the bonus from the target's last row. Source: Leviathan et al., [Fast Inference from
    Transformers via Speculative Decoding](https://huggingface.co/papers/2211.17192), section 2.3; Chen et al.,
    [Accelerating Large Language Model Decoding with Speculative Sampling](https://huggingface.co/papers/2302.01318).

    Args:
        drafts_BK (`torch.LongTensor` of shape `(B, K)`): Drafts.
        draft_probs_BKV (`torch.FloatTensor` of shape `(B, K, V)` or `None`):
            Distribution `q` each draft was drawn from, given the drafts before it, over the target's vocabulary.
            `None`: drafts are argmax, and `d` is kept with probability `p(d)`.
        target_probs_BK1V (`torch.FloatTensor` of shape `(B, K + 1, V)`):
            Distribution `p` of the target after the anchor and each draft; temperature, top-k and top-p included.
        accept_uniforms_BK (`torch.FloatTensor` of shape `(B, K)`), next_uniforms_B (of shape `(B,)`):
            Uniform numbers in `[0, 1)`.
        num_verified_B (`torch.LongTensor` of shape `(B,)`, *optional*):
            As in [`verify_greedy`]. Must not depend on a draft that it leaves out, or on what is behind it.

    Returns:
        `tuple` of two `torch.LongTensor` of shape `(B,)`: accepted drafts `0..K`; next token (correction or bonus).

    Raises:
        ValueError: If shapes disagree, or a draft has probability zero under `draft_probs_BKV`.
    """
    num_drafts, vocab_size = drafts_BK.shape[-1], target_probs_BK1V.shape[-1]
    _check_shape("target_probs_BK1V", target_probs_BK1V, (*drafts_BK.shape[:-1], num_drafts + 1, vocab_size))
    _check_shape("accept_uniforms_BK", accept_uniforms_BK, drafts_BK.shape)
    target_prob_BK = _at(target_probs_BK1V[..., :-1, :], drafts_BK)
    if draft_probs_BKV is None:
        draft_prob_BK = torch.ones_like(target_prob_BK)
    else:
        _check_shape("draft_probs_BKV", draft_probs_BKV, (*drafts_BK.shape, vocab_size))
        draft_prob_BK = _at(draft_probs_BKV, drafts_BK)
        _check_possible("draft_probs_BKV", draft_prob_BK > 0, "Pass the distribution that the drafts were drawn from.")
    if num_verified_B is not None:
        slots = torch.arange(1, num_drafts + 1, device=drafts_BK.device)
        target_prob_BK = target_prob_BK.masked_fill(slots > num_verified_B.unsqueeze(-1), 0)
    # As a product: a draft with p(d) = 0 is refused even at u = 0.
    accepted_B = (accept_uniforms_BK * draft_prob_BK < target_prob_BK).cumprod(dim=-1).sum(dim=-1)
    refused_slot_B = accepted_B.clamp(max=num_drafts - 1)
    target_row_BV = _row_at(target_probs_BK1V, accepted_B)
    if draft_probs_BKV is None:
        draft_row_BV = torch.nn.functional.one_hot(_at(drafts_BK, refused_slot_B), vocab_size)
    else:
        draft_row_BV = _row_at(draft_probs_BKV, refused_slot_B)
    # The bonus replaces no draft: nothing is subtracted from its row.
    is_whole_B = accepted_B == (num_drafts if num_verified_B is None else num_verified_B)
    draft_row_BV = draft_row_BV.masked_fill(is_whole_B.unsqueeze(-1), 0)
    return accepted_B, choose_tokens(residual_probs(target_row_BV, draft_row_BV), next_uniforms_B)


def sample_posterior(
    committed_BK: torch.Tensor,
    draft_probs_BKV: torch.Tensor,
    target_probs_BKV: torch.Tensor,
    accept_uniforms_BK: torch.Tensor,
    draft_uniforms_BK: torch.Tensor,
    is_in_text_BK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draw the blocks that speculative sampling would have drafted, given the text `y ~ p` that it committed.

    Slot by slot, the draft was `y`, accepted, with probability `min(1, q(y) / p(y))`; else it was refused, a draw from
    `norm(max(q - p, 0))`. Slots behind the first refusal or outside the text are draws from `q`: Bayes' rule on
    [`verify_sampled`], `P(accepted, y) = min(p, q)(y)`, `P(d refused, y) = (q-p)+(d) (p-q)+(y) / sum (p-q)+`.
    A parallel drafter's rows of `q` do not depend on its drafts: pass all K at once. A sequential drafter's rows along
    the committed text are right up to the first refused slot; behind it, draw again from rows that follow the drafts.

    Args:
        committed_BK (`torch.LongTensor` of shape `(B, K)`):
            The text's tokens at the slots' positions; any id outside the text.
        draft_probs_BKV, target_probs_BKV (`torch.FloatTensor` of shape `(B, K, V)`):
            Distribution `q` of the drafts, and distribution `p` of the text.
        accept_uniforms_BK, draft_uniforms_BK (`torch.FloatTensor` of shape `(B, K)`): Numbers in `[0, 1)`.
        is_in_text_BK (`torch.BoolTensor` of shape `(B, K)`):
            Slots at or before the text's last token. Acceptance stops at the first slot outside.

    Returns:
        `tuple` of two `torch.LongTensor`: drafts of shape `(B, K)`; accepted drafts `0..K` of shape `(B,)`. Drafts are
        -1, and not accepted, where none can be drawn (NaN), or `p(y) = 0` inside the text: the host need not wait.

    Raises:
        ValueError: If shapes disagree.
    """
    _check_shape("is_in_text_BK", is_in_text_BK, committed_BK.shape)
    _check_shape("draft_probs_BKV", draft_probs_BKV, (*committed_BK.shape, draft_probs_BKV.shape[-1]))
    _check_shape("target_probs_BKV", target_probs_BKV, draft_probs_BKV.shape)
    _check_shape("accept_uniforms_BK", accept_uniforms_BK, committed_BK.shape)
    readable_BK = committed_BK.masked_fill(~is_in_text_BK, 0)  # ids outside the text need not be in the vocabulary
    target_prob_BK = _at(target_probs_BKV, readable_BK)
    is_possible_BK = (target_prob_BK > 0) | ~is_in_text_BK
    is_below_BK = accept_uniforms_BK * target_prob_BK < _at(draft_probs_BKV, readable_BK)
    is_kept_BK = is_in_text_BK & is_possible_BK & is_below_BK
    is_accepted_BK = is_kept_BK.cumprod(dim=-1).bool()
    is_refused_BK = is_in_text_BK & ~is_kept_BK & ((~is_kept_BK).cumsum(dim=-1) == 1)  # the first miss alone
    distribution_BKV = residual_probs(draft_probs_BKV, target_probs_BKV).where(
        is_refused_BK.unsqueeze(-1), draft_probs_BKV
    )
    drawn_BK = draw_tokens(distribution_BKV, draft_uniforms_BK).where(is_possible_BK, -1)
    return torch.where(is_accepted_BK, committed_BK, drawn_BK), is_accepted_BK.sum(dim=-1)


def settle_blocks(
    accepted: torch.Tensor, anchors: torch.Tensor, last_index: torch.Tensor, num_drafts: int
) -> BlockOutcome:
    """
    Cut blocks at the end of their text, and return which are censored and which are counted.

    With `r = min(accepted, last_index - anchor)`: censored iff `r < K` and `anchor + r == last_index`; counted iff
    `anchor + K <= last_index`. Counting by geometry keeps means unbiased: censored blocks are mostly long ones.

    Args:
        accepted, anchors, last_index (`torch.LongTensor`, broadcast together):
            Leading drafts accepted, `0..K`, perhaps past the text too; block's anchor; index of the text's last token.
        num_drafts (`int`): K.

    Returns:
        [`BlockOutcome`] of the broadcast shape.

    Raises:
        ValueError: If `accepted` is outside `0..K`, or an anchor lies behind its text's last token.
    """
    room = last_index - anchors
    if (room < 0).any():
        raise ValueError(f"An anchor lies {-int(room.min())} tokens behind its text. Drop padding and finished texts.")
    if ((accepted < 0) | (accepted > num_drafts)).any():
        raise ValueError(f"`accepted` (no bonus) must be in 0..{num_drafts}, got {accepted.min()}..{accepted.max()}.")
    settled = torch.minimum(accepted, room)
    is_censored = (settled < num_drafts) & (settled == room)
    return BlockOutcome(settled, is_censored, is_counted=(room >= num_drafts).expand_as(settled))


def _at(rows_BV: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    return rows_BV.gather(-1, index_B.unsqueeze(-1)).squeeze(-1)


def _row_at(rows_BKV: torch.Tensor, slot_B: torch.Tensor) -> torch.Tensor:
    return torch.take_along_dim(rows_BKV, slot_B[..., None, None], dim=-2).squeeze(-2)


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")


def _check_possible(name: str, is_possible_BK: torch.Tensor, advice: str) -> None:
    if not is_possible_BK.all():
        places = (~is_possible_BK).nonzero()[:8].tolist()
        raise ValueError(f"`{name}` is 0 or NaN at the given tokens at [row, slot from 0] {places}. {advice}")
