# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
tau of a drafter along the target's own responses to prompts nobody trained on.

At temperature 0 the blocks drafted along the target's greedy text are those of live decoding, above it they have its
distribution, so an evaluation is a few forward passes and decodes nothing.

Shape letters:  B = sequences, L = text length, A = blocks per sequence, K = drafts per block
"""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset

from trl_draft_opd import FrozenTarget, SamplingSettings
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.rollout.counts import Counts
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.replay import TargetText, rollout_replay
from trl_draft_opd.rollout.types import Rollout
from trl_draft_opd.trainer.texts import join_responses


BATCH_SIZE = 16
CHUNK_BYTES = 64 * 2**20


def measure_drafter(
    target: FrozenTarget,
    drafter: Drafter,
    rows: Dataset,
    *,
    temperature: float = 0.0,
    draft_sampling: str = "greedy",
) -> dict[str, Any]:
    """
    Measure acceptance along stored responses.

    Args:
        target ([`FrozenTarget`]), drafter ([`Drafter`]): The pair.
        rows (`Dataset`): `prompt_ids` and `completion_ids`, written by the target at `temperature`.
        temperature (`float`), draft_sampling (`str`): Distribution of text and drafts.

    Returns:
        `dict`: per prompt `rounds` (counted blocks) and `accepted` (drafts they keep), `slot_acceptance` of length K,
        and `tau`.
    """
    rollouts = replays(target, drafter, rows, temperature, draft_sampling, keep_branch_hidden=False)
    counts = sum(map(Counts.of_rollout, rollouts), Counts())
    return {
        "temperature": temperature,
        "draft_sampling": draft_sampling,
        "rounds": list(counts.blocks),
        "accepted": [sum(kept) for kept in counts.kept],
        "slot_acceptance": counts.acceptance_per_slot,
        "tau": counts.tau,
    }


def replays(
    target: FrozenTarget,
    drafter: Drafter,
    rows: Dataset,
    temperature: float,
    draft_sampling: str,
    *,
    keep_branch_hidden: bool,
) -> Iterator[Rollout]:
    """Yield the rollouts along the responses of `rows`, some rows at a time, in their order."""
    settings = DraftingSettings(
        num_drafts=drafter.default_num_drafts,
        sampling=SamplingSettings(temperature=temperature, top_k=0, top_p=1.0),
        draft_sampling=draft_sampling,
        keep_branch_hidden=keep_branch_hidden,
    )
    for start in range(0, len(rows), BATCH_SIZE):
        part = rows[start : start + BATCH_SIZE]
        sample_ids = list(range(start, start + len(part["prompt_ids"])))
        text: TargetText = join_responses(
            part["prompt_ids"], part["completion_ids"], sample_ids, target.pad_token_id, target.device
        )
        yield rollout_replay(
            target,
            drafter,
            text,
            settings,
            DrawKeys(0, 0, sample_ids),
            segment_length=drafter.config.default_segment_length,
            chunk_bytes=CHUNK_BYTES,
        )
