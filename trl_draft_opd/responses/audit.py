# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whether the target at hand could have written given responses: teacher-forced scores, and a verdict. Knows no files.

Shape letters:  B = responses in a batch, L = text length, N = response tokens in a chunk, H = hidden size,
                V = vocabulary
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ..rollout.acceptance import SamplingSettings, token_probs
from ..target.frozen import FrozenTarget
from ..target.reading import TextReading


# Tokens the target reads at once, those of padding included, and bytes of one float32 buffer of logits.
_TOKENS_PER_BATCH = 8192
_CHUNK_BYTES = 32 * 2**20
# Sampled text of another distribution is less likely than the target's own by whole nats per token; other precision or
# kernels cost hundredths. Both count only when chance is excluded at this many standard errors.
_SURPRISE_WARN, _SURPRISE_REFUSE, _SURPRISE_ERRORS = 0.05, 0.5, 6.0


class ResponseScores(NamedTuple):
    """What the target computes of one response, on the CPU and of shape `(number of response tokens,)` each."""

    # Under the distribution, `-inf` where its filters exclude the token; greedy: unfiltered, at temperature 1.
    logprobs: torch.Tensor
    # Whether no other token has a larger logit.
    is_choice: torch.Tensor
    # Mean of `-log p` under the same distribution, in nats, and its variance.
    entropies: torch.Tensor
    variances: torch.Tensor


@dataclass(frozen=True)
class ResponseAudit:
    """
    How well responses fit the target at hand.

    Attributes:
        num_responses (`int`), num_tokens (`int`):
            What was looked at.
        is_greedy (`bool`):
            Which distribution the responses are checked against.
        num_mismatches (`int`):
            Tokens that are not the target's argmax; ties count as argmax.
        num_impossible (`int`):
            Responses holding a token that the distribution's filters exclude; 0 for a greedy distribution.
        mean_logprob (`float`), expected_logprob (`float`):
            Mean log-probability per token, and what the distribution's own text would have there, in nats; at
            temperature 1 for a greedy distribution.
        surprise (`float`), surprise_error (`float`):
            `expected_logprob - mean_logprob`, near 0 for text drawn from the distribution, and its standard error.
    """

    num_responses: int
    num_tokens: int
    is_greedy: bool
    num_mismatches: int
    num_impossible: int
    mean_logprob: float
    expected_logprob: float
    surprise: float
    surprise_error: float

    @property
    def share(self) -> float:
        """Greedy: share of tokens that are not the argmax. Else: share of responses with an impossible token."""
        if self.is_greedy:
            return self.num_mismatches / self.num_tokens
        return self.num_impossible / self.num_responses

    def describe(self) -> str:
        """Return one sentence."""
        if self.is_greedy:
            return (
                f"{self.num_mismatches} of {self.num_tokens} response tokens ({self.share:.2%}) are not the target's "
                "argmax"
            )
        return (
            f"{self.num_impossible} of {self.num_responses} responses ({self.share:.2%}) hold a token of probability "
            f"0; mean log-probability {self.mean_logprob:.3f}, expected {self.expected_logprob:.3f}"
        )


def audit_responses(
    target: FrozenTarget,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    sampling: SamplingSettings,
    rests: Sequence[Sequence[int]] | None = None,
) -> ResponseAudit:
    """
    Check responses against the target at hand.

    Args:
        target ([`FrozenTarget`]): The target.
        texts (`Sequence[tuple]`): Pairs of prompt ids and response ids, neither empty.
        sampling ([`SamplingSettings`]): Distribution the responses are said to be drawn from.

    Raises:
        ValueError: If there is no response, or one is empty.
    """
    if not texts:
        raise ValueError("There is no response to check. Write some with `trl-draft-opd generate`.")
    scores = [scores for _, scores in score_responses(target, texts, sampling, rests)]
    logprobs, is_choice, entropies, variances = (torch.cat(column) for column in zip(*scores, strict=True))
    # Impossible tokens are reported by count: the sums are over the others.
    possible, num_tokens = logprobs.isfinite(), len(logprobs)
    logprob, entropy, variance = (
        values[possible].sum(dtype=torch.double).item() for values in (logprobs, entropies, variances)
    )
    return ResponseAudit(
        num_responses=len(texts),
        num_tokens=num_tokens,
        is_greedy=sampling.is_greedy,
        num_mismatches=int((~is_choice).sum()),
        num_impossible=sum(not each.logprobs.isfinite().all() for each in scores),
        mean_logprob=logprob / num_tokens,
        expected_logprob=-entropy / num_tokens,
        surprise=(-entropy - logprob) / num_tokens,
        surprise_error=math.sqrt(max(variance, 0.0)) / num_tokens,
    )


def check_responses(
    target: FrozenTarget,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    sampling: SamplingSettings,
    *,
    warn_above: float = 0.01,
    refuse_above: float = 0.1,
    rests: Sequence[Sequence[int]] | None = None,
) -> ResponseAudit:
    """
    Warn of responses that the target at hand would hardly have written, and refuse those it would not.

    Args:
        target ([`FrozenTarget`]), texts (`Sequence[tuple]`), sampling ([`SamplingSettings`]):
            As for [`audit_responses`]; a few dozen texts are enough.
        warn_above (`float`, *optional*, defaults to 0.01), refuse_above (`float`, *optional*, defaults to 0.1):
            Shares in [0, 1] of [`ResponseAudit.share`]. Another precision or another engine flips near-ties: about 1 %
            of greedy tokens in bfloat16.
        rests (`Sequence[Sequence[int]]`, *optional*):
            As for [`audit_responses`].

    Returns:
        `ResponseAudit`.

    Raises:
        ValueError: If the share is above `refuse_above`, or sampled text is unlikely beyond doubt.
    """
    audit = audit_responses(target, texts, sampling, rests)
    beyond_doubt = not audit.is_greedy and audit.surprise > _SURPRISE_ERRORS * audit.surprise_error
    surprise = audit.surprise if beyond_doubt else 0.0
    if audit.share > refuse_above or surprise > _SURPRISE_REFUSE:
        raise ValueError(
            f"The target at hand did not write these responses: {audit.describe()}. Write them anew with "
            "`trl-draft-opd generate`, or load the target and the precision that wrote them. (Refused above "
            f"{refuse_above:.2%}.)"
        )
    if audit.share > warn_above or surprise > _SURPRISE_WARN:
        dtype = target.causal_lm.dtype
        reason = "Expected from another precision or engine; otherwise write them anew."
        if dtype != torch.float32:
            reason = (
                f"In {str(dtype).removeprefix('torch.')} that is harmless if this target wrote them: it reads them in "
                "other batches than it wrote them in, and of two almost equally likely tokens the other comes out on "
                "top. If another model wrote them, write them anew."
            )
        warnings.warn(
            f"The responses fit the target at hand only roughly: {audit.describe()}. {reason} (Warned above "
            f"{warn_above:.2%}, refused above {refuse_above:.2%}.)"
        )
    return audit


@torch.no_grad()
def score_responses(
    target: FrozenTarget,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    sampling: SamplingSettings,
    rests: Sequence[Sequence[int]] | None = None,
) -> Iterator[tuple[int, ResponseScores]]:
    """
    Yield the index of each text and its response's scores, shortest text first, in batches of similar length; the head
    runs in chunks, on response tokens only.
    """
    empty = [row for row, (prompt, response) in enumerate(texts) if len(prompt) == 0 or len(response) == 0]
    if empty:
        raise ValueError(f"Texts {empty[:10]} have an empty prompt or response. Drop them.")
    whole = [[*prompt, *response] for prompt, response in texts]
    if rests is not None:
        whole = [[*text, *rest] for text, rest in zip(whole, rests, strict=True)]
    for rows in _batches([len(text) for text in whole]):
        reading = read_texts(target, [whole[row] for row in rows])
        for hidden_LH, row in zip(reading.last_hidden.split(reading.packing.lengths), rows, strict=True):
            prompt, response = texts[row]
            # The state before a token predicts it.
            hidden_NH = hidden_LH[len(prompt) - 1 :][: len(response)]
            yield row, _score_tokens(target, hidden_NH, torch.tensor(response, device=target.device), sampling)


def read_texts(target: FrozenTarget, texts: Sequence[Sequence[int]], layer_ids: Sequence[int] = ()) -> TextReading:
    """Return the target's reading of texts of token ids: the last hidden states, and those of layers where asked."""
    ids = [torch.tensor(text, dtype=torch.long, device=target.device) for text in texts]
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    return target.read_text(pad_sequence(ids, True, target.pad_token_id), mask, layer_ids)


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """Group rows of similar length, as many as fit the budget of padded tokens, at least one."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _score_tokens(
    target: FrozenTarget, hidden_NH: torch.Tensor, token_ids_N: torch.Tensor, sampling: SamplingSettings
) -> ResponseScores:
    distribution = SamplingSettings(temperature=1.0, top_k=0, top_p=1.0) if sampling.is_greedy else sampling
    rows = max(1, _CHUNK_BYTES // (4 * target.vocab_size))
    parts = []
    for hidden, token_ids in zip(hidden_NH.split(rows), token_ids_N.split(rows), strict=True):
        logits_NV = target.project(hidden).float()
        chosen_N = logits_NV.gather(-1, token_ids[:, None])[:, 0]
        probs_NV = token_probs(logits_NV, distribution)
        # xlogy is 0 where the probability is.
        plogp_NV = torch.xlogy(probs_NV, probs_NV)
        entropy_N = -plogp_NV.sum(dim=-1)
        second_moment_N = torch.xlogy(plogp_NV, probs_NV).sum(dim=-1)
        parts.append(
            (
                probs_NV.gather(-1, token_ids[:, None])[:, 0].log(),
                chosen_N >= logits_NV.amax(dim=-1),
                entropy_N,
                second_moment_N - entropy_N.square(),
            )
        )
    return ResponseScores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
