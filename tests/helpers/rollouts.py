# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Both rollout engines under flat options with defaults, so that a test names only what it is about."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trl_draft_opd import SamplingSettings
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.live import rollout_live
from trl_draft_opd.rollout.replay import ReplayWalk, rollout_replay


GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)


@dataclass(frozen=True)
class Options:
    """Options of a rollout, live or replayed; of those that one engine alone has, the other reads none."""

    num_drafts: int = 4
    sampling: SamplingSettings = GREEDY
    draft_sampling: str = "greedy"
    keep_branch_hidden: bool = False
    seed: int = 0
    epoch: int = 0
    max_completion_length: int = 24
    eos_token_ids: Sequence[int] = ()
    segment_length: int = 1
    chunk_bytes: int = 2**20
    min_confidence: float | None = None
    keep_confidences: bool = False

    @property
    def drafting(self) -> DraftingSettings:
        return DraftingSettings(
            self.num_drafts,
            self.sampling,
            self.draft_sampling,
            self.keep_branch_hidden,
            self.min_confidence,
            self.keep_confidences,
        )


def decode(target, drafter, prompts, options, sample_ids=None, on_finished=None):
    """Roll out live; prompts are numbered unless they are given ids."""
    return rollout_live(
        target,
        drafter,
        prompts,
        options.drafting,
        DrawKeys(options.seed, options.epoch, range(len(prompts)) if sample_ids is None else sample_ids),
        max_completion_length=options.max_completion_length,
        eos_token_ids=options.eos_token_ids,
        on_finished=on_finished,
    )


def replay(target, drafter, text, options, reading=None):
    """Replay a text."""
    return rollout_replay(
        target,
        drafter,
        text,
        options.drafting,
        DrawKeys(options.seed, options.epoch, text.sample_ids),
        segment_length=options.segment_length,
        chunk_bytes=options.chunk_bytes,
        reading=reading,
    )


@torch.no_grad()
def draft_at(target, drafter, text, anchors, options):
    """Draft at given anchors of a text, along it."""
    keys = DrawKeys(options.seed, options.epoch, text.sample_ids)
    walk = ReplayWalk(target, drafter.eval(), text, options.drafting, keys, options.chunk_bytes, None)
    return walk.draft_at(anchors)
