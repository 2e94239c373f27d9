# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Choose the reduced vocabulary of a drafter from token counts. Knows no model, head or tokenizer.

Shape letters:  V = the target's vocabulary, DV = draft vocabulary
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset


_ROWS_AT_A_TIME = 1000


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """
    Tokens that a drafter can propose.

    Args:
        d2t (`torch.LongTensor` of shape `(DV,)`):
            Offsets: draft id `i` stands for the target's id `i + d2t[i]`. These ids increase strictly.
        t2d (`torch.BoolTensor` of shape `(V,)`):
            Whether a target id is in the draft vocabulary.
        coverage (`float`):
            Share of the counted tokens that are in it, in `[0, 1]`. A committed token outside is always a rejection.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor
    coverage: float

    @property
    def token_ids(self) -> torch.Tensor:
        """Target ids of the draft vocabulary, ascending (`torch.LongTensor` of shape `(DV,)`)."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)


def count_tokens(dataset: Dataset | IterableDataset, vocab_size: int) -> torch.Tensor:
    """
    Count the supervised tokens of a dataset.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows with `input_ids` and `completion_mask`, as `TextReader.read_texts` returns them.
        vocab_size (`int`):
            The target's vocabulary V.

    Returns:
        `torch.LongTensor` of shape `(V,)`: how often each id is supervised.

    Raises:
        ValueError: If a supervised id is outside `0..V-1`.
    """
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for token_ids, _ in _supervised(dataset):
        is_outside = (token_ids < 0) | (token_ids >= vocab_size)
        if is_outside.any():
            raise ValueError(
                f"Token id {token_ids[is_outside][0]} is outside the target's vocabulary of {vocab_size} tokens. "
                "Tokenize the dataset with the target's own tokenizer."
            )
        counts_V += np.bincount(token_ids, minlength=vocab_size)
    return torch.from_numpy(counts_V)


def _supervised(dataset: Dataset | IterableDataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the supervised token ids of some rows at a time, and the row of each."""
    rows: Any = dataset.select_columns(["input_ids", "completion_mask"]).with_format("numpy")
    for batch in rows.iter(batch_size=_ROWS_AT_A_TIME):
        is_supervised = np.concatenate(batch["completion_mask"]).astype(bool)
        row_of = np.repeat(np.arange(len(batch["input_ids"])), [len(ids) for ids in batch["input_ids"]])
        yield np.concatenate(batch["input_ids"])[is_supervised].astype(np.int64), row_of[is_supervised]


def coverage_elsewhere(
    dataset: Dataset | IterableDataset, token_counts: torch.Tensor, vocabulary: DraftVocabulary
) -> float:
    """
    Estimate which share of other responses' tokens a vocabulary of the most frequent ones covers: each response's, had
    the vocabulary been chosen from the other responses alone (leave one out).

    Args:
        dataset (`Dataset` or `IterableDataset`), token_counts (`torch.LongTensor` of shape `(V,)`):
            The rows it was chosen from, and their [`count_tokens`].
        vocabulary ([`DraftVocabulary`]): Chosen by [`build_draft_vocabulary`].

    Returns:
        `float`: In `[0, 1]`.
    """
    counts_V, chosen_V = token_counts.numpy(), vocabulary.t2d.numpy()
    # What a token must beat to stay in; of those that only equal it, as many get in as did.
    beaten = counts_V[~chosen_V].max()
    tied_share = chosen_V[counts_V == beaten].mean()
    num_covered, num_tokens = 0.0, 0
    for token_ids, row_of in _supervised(dataset):
        _, index, own = np.unique(row_of * len(counts_V) + token_ids, return_inverse=True, return_counts=True)
        elsewhere = counts_V[token_ids] - own[index]
        num_covered += (elsewhere > beaten).sum() + tied_share * (elsewhere == beaten).sum()
        num_tokens += len(token_ids)
    return float(num_covered) / max(num_tokens, 1)


def build_draft_vocabulary(
    token_counts: torch.Tensor,
    draft_vocab_size: int,
    always_include: Iterable[int] = (),
    preferred: torch.Tensor | None = None,
) -> DraftVocabulary:
    """
    Keep the most frequent tokens; of equally frequent ones, and of those never counted, the preferred, then the lowest
    ids.

    Args:
        token_counts (`torch.LongTensor` of shape `(V,)`):
            How often the target writes each token, see [`count_tokens`].
        draft_vocab_size (`int`):
            Tokens to keep (DV), in `1..V-1`.
        always_include (`Iterable[int]`, *optional*, defaults to `()`):
            Ids kept whatever their count, such as the EOS ids.
        preferred (`torch.LongTensor`, *optional*):
            Distinct ids that win where counts are equal, such as those that a drafter was trained to propose.

    Returns:
        [`DraftVocabulary`] on the CPU.

    Raises:
        ValueError: If the counts are not one non-negative integer per token, or all zero; if `draft_vocab_size` is out
            of range; or if `always_include` does not fit.
    """
    counts_V, forced = _check_counts(token_counts), sorted(set(always_include))
    vocab_size = len(counts_V)
    check_draft_vocab_size(draft_vocab_size, vocab_size, forced)
    is_preferred_V = torch.zeros(vocab_size, dtype=torch.bool)
    if preferred is not None:
        is_preferred_V[preferred.cpu()] = True
    order_V = torch.sort(is_preferred_V, descending=True, stable=True).indices
    # Stable: of equal counts the first in that order comes first.
    by_count_V = order_V[torch.sort(counts_V[order_V], descending=True, stable=True).indices]
    is_forced_V = torch.zeros(vocab_size, dtype=torch.bool)
    is_forced_V[forced] = True
    chosen_V = torch.cat([by_count_V[is_forced_V[by_count_V]], by_count_V[~is_forced_V[by_count_V]]])
    token_ids_DV = chosen_V[:draft_vocab_size].sort().values
    t2d_V = torch.zeros(vocab_size, dtype=torch.bool)
    t2d_V[token_ids_DV] = True
    coverage = counts_V[token_ids_DV].sum().item() / counts_V.sum().item()
    return DraftVocabulary(d2t=token_ids_DV - torch.arange(draft_vocab_size), t2d=t2d_V, coverage=coverage)


def _check_counts(token_counts: torch.Tensor) -> torch.Tensor:
    if token_counts.dim() != 1 or token_counts.is_floating_point() or token_counts.dtype == torch.bool:
        raise ValueError(
            "`token_counts` must hold one integer per token of the target's vocabulary, got shape "
            f"{tuple(token_counts.shape)} and {token_counts.dtype}. `count_tokens` returns them."
        )
    if (token_counts < 0).any():
        first = int((token_counts < 0).nonzero()[0])
        raise ValueError(f"`token_counts` must not be negative, got {int(token_counts[first])} for token {first}.")
    if not token_counts.any():
        raise ValueError("`token_counts` are all zero. Count a dataset that has supervised tokens.")
    return token_counts.detach().cpu().long()


def check_draft_vocab_size(draft_vocab_size: int, vocab_size: int, forced: Collection[int]) -> None:
    """Raise `ValueError` unless that many tokens are a part of the vocabulary that can hold those in `forced`."""
    if not 1 <= draft_vocab_size < vocab_size:
        raise ValueError(
            f"`draft_vocab_size` must lie in 1..{vocab_size - 1} (the target has {vocab_size} tokens), got "
            f"{draft_vocab_size}. For all of them, leave the vocabulary whole (in training: `draft_vocab_size=0`)."
        )
    outside = [token_id for token_id in forced if not 0 <= token_id < vocab_size]
    if outside:
        raise ValueError(f"`always_include` holds {outside}, outside the target's vocabulary of {vocab_size} tokens.")
    if forced and len(forced) >= draft_vocab_size:
        raise ValueError(
            f"`draft_vocab_size` {draft_vocab_size} leaves no room for text: the tokens {sorted(forced)} are kept in "
            f"any case (they end responses). It must be above {len(forced)}; thousands are usual."
        )
