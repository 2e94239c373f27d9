# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Which tokens a drafter can propose: chosen once, from the responses it is about to train on.

Every rank reads the same rows, so all choose alike; a run that resumes chooses again and then loads what it had.
"""

import logging
from collections.abc import Collection
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..drafters.base import Drafter
from ..drafters.draft_vocabulary import (
    build_draft_vocabulary,
    check_draft_vocab_size,
    count_tokens,
    coverage_elsewhere,
)
from ..target.frozen import FrozenTarget
from .adapters import is_adapted
from .draft_sft_config import DRAFT_VOCAB_SIZE, LARGE_VOCABULARY


logger = logging.getLogger(__name__)

# Rows of a stream that are counted: it may have no end.
STREAMED_ROWS = 10_000


def wanted_vocab_size(drafter: Drafter, asked: int | None, eos_token_ids: Collection[int]) -> int | None:
    """
    Return how many tokens to reduce a drafter's vocabulary to, `None` to leave it; `asked` is the setting
    `draft_vocab_size`. Needs no text, so that what cannot work is refused before the target responds to anything.

    Raises:
        ValueError: If a drafter of that kind, or with that vocabulary, cannot have so many.
    """
    config = drafter.config
    size, has = config.vocab_size, config.draft_vocab_size
    if asked is None:
        return DRAFT_VOCAB_SIZE if _is_reduced_unasked(drafter) else None
    if has == size and asked in (0, size):
        return None
    if asked == 0:
        raise ValueError(
            f"`draft_vocab_size` 0 keeps all {size} tokens, of which the drafter was made to propose {has}. Leave it "
            "out, give a number to choose them anew, or start from a fresh drafter."
        )
    if is_adapted(drafter):
        raise ValueError(
            f"`draft_vocab_size` {asked} would change the drafter under the adapter, which is not saved with it. "
            "Leave it out, or train without `peft_config`."
        )
    config.check_reducible()
    check_draft_vocab_size(asked, size, eos_token_ids)
    return asked


def _is_reduced_unasked(drafter: Drafter) -> bool:
    """Whether a drafter is fresh, of nobody's choice and over a large vocabulary."""
    return drafter.vocabulary_is_open and drafter.config.vocab_size > LARGE_VOCABULARY


def settle_vocabulary(
    drafter: Drafter, target: FrozenTarget, size: int | None, rows: Dataset | IterableDataset
) -> None:
    """
    Give a drafter the `size` most frequent tokens of what it will train on, unless that is `None`, and say how much of
    it a reduced vocabulary covers.
    """
    model: Any = drafter.get_base_model() if is_adapted(drafter) else drafter  # pyright: ignore[reportCallIssue]
    model.vocabulary_is_open = False
    if size is None and (not model.config.has_reduced_vocabulary or isinstance(rows, IterableDataset)):
        return
    counted = rows.take(STREAMED_ROWS) if isinstance(rows, IterableDataset) else rows
    counts_V = count_tokens(counted, model.config.vocab_size)
    num_new, elsewhere = 0, None
    if size is not None:
        had = model.draft_token_ids
        chosen = build_draft_vocabulary(counts_V, size, target.eos_token_ids, preferred=had)
        model.reduce_vocabulary(chosen, target)
        elsewhere = coverage_elsewhere(counted, counts_V, chosen)
        num_new = 0 if had is None else size - int(chosen.t2d[had.cpu()].sum())
    assert model.draft_token_ids is not None, "the vocabulary is reduced"
    num_tokens = int(counts_V.sum())
    model.draft_vocab_coverage = float(counts_V[model.draft_token_ids.cpu()].sum() / max(num_tokens, 1))
    if PartialState().is_main_process:
        logger.warning(_describe(model, num_tokens, num_new, elsewhere))


def _describe(model: Drafter, num_tokens: int, num_new: int, elsewhere: float | None) -> str:
    """Return what a reduced vocabulary covers, of these rows, and if chosen from them, of others like them."""
    new = f", {num_new:,} of them new to it," if num_new else ","
    others = "" if elsewhere is None else f", and about {elsewhere:.2%} of other responses like them"
    return (
        f"The drafter proposes {model.config.draft_vocab_size:,} of the target's {model.config.vocab_size:,} tokens"
        f"{new} which cover {model.draft_vocab_coverage:.2%} of the {num_tokens:,} response tokens it trains on"
        f"{others}. Every other token is a rejection. `draft_vocab_size` chooses them anew."
    )


def note_whole_vocabulary(drafter: Drafter) -> None:
    """Say that a fresh drafter of a large vocabulary keeps it, where there are no responses yet to choose from."""
    if _is_reduced_unasked(drafter) and PartialState().is_main_process:
        logger.warning(
            f"The drafter is fresh and proposes all {drafter.config.vocab_size:,} tokens of the target, which makes "
            "its head large. Supervised training (`DraftSFTTrainer`), with which to begin, would choose "
            f"{DRAFT_VOCAB_SIZE:,} of them."
        )


def vocabulary_settings(drafter: Drafter) -> dict[str, Any]:
    """Return what a training record states about a reduced vocabulary that was counted: nothing where none was."""
    coverage = drafter.draft_vocab_coverage
    if coverage is None:
        return {}
    return {"draft_vocab_size": drafter.config.draft_vocab_size, "draft_vocab_coverage": round(coverage, 6)}
