# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a micro-batch has to compute, whatever the code: tokens, blocks, slots, rows of the loss, the walk of a replay.
"""

import functools
import random
from dataclasses import dataclass

from .shapes import DrafterShape


@dataclass(frozen=True)
class Job:
    """
    One micro-batch of training.

    Attributes:
        name (`str`), family (`str`): How it is called, and the drafter's family.
        draft_vocab (`int` or `None`): EAGLE-3's vocabulary where it is reduced.
        num_anchors (`int` or `None`): Blocks of a row in supervised training; `None` for one at every position.
        tau (`float` or `None`): Accepted length under Draft-OPD by replay; `None` for supervised training.
        segment (`int`): Tokens of a segment of the walk.
        rows, length, prompt (`int`): Rows, tokens of each, and how many of them are prompt.
    """

    name: str
    family: str
    draft_vocab: int | None = None
    num_anchors: int | None = None
    tau: float | None = None
    segment: int = 1
    rows: int = 4
    length: int = 2048
    prompt: int = 512

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length


JOBS = (
    Job("eagle3-sft-full", "eagle3"),
    Job("eagle3-sft-32k", "eagle3", draft_vocab=32_000),
    Job("dflash-sft-512", "dflash", num_anchors=512),
    Job("dflash-sft-64", "dflash", num_anchors=64),
    Job("eagle3-opd", "eagle3", tau=3.0),
    Job("dflash-opd", "dflash", tau=4.0, segment=16),
    Job("dspark-sft-512", "dspark", num_anchors=512),
    Job("dspark-opd", "dspark", tau=4.0, segment=16),
    Job("dflash2-sft-512", "dflash2", num_anchors=512),
    Job("dflash2-opd", "dflash2", tau=4.0, segment=16),
)


@dataclass(frozen=True)
class Round:
    """
    One round of a walk, in which all walkers draft; or all rounds together.

    Attributes:
        blocks (`int`): Blocks that are drafted, those off the chain included.
        rows (`int`): Slots that are judged: those kept, and the first refused one of a block, if no more at a time.
        reads (`int`): Times that the host reads what became of judged slots.
    """

    blocks: int
    rows: int
    reads: int


@dataclass(frozen=True)
class Walk:
    """The walk of a replay: its rounds, and the blocks of its chain."""

    rounds: tuple[Round, ...]
    chain: int

    @property
    def all(self) -> Round:
        """All rounds together."""
        return Round(*(sum(getattr(each, name) for each in self.rounds) for name in ("blocks", "rows", "reads")))


@dataclass(frozen=True)
class Volume:
    """
    Sizes of a job.

    Attributes:
        tokens (`int`): Tokens that the target reads.
        blocks (`int`): Blocks that are drafted with gradient.
        slots (`int`): Positions of blocks that go through the drafter's layers.
        rows (`int`): Slots that the loss is computed on.
        states (`int`): Distinct states of the target that they are compared with.
        visible (`float`): Context entries that a slot sees, on average.
        walk (`Walk` or `None`): The replay that drafts and judges least, under Draft-OPD.
    """

    tokens: int
    blocks: int
    slots: int
    rows: int
    states: int
    visible: float
    walk: Walk | None


def volume_of(job: Job, drafter: DrafterShape) -> Volume:
    """Return the sizes of a job; losses at ends of rows, where slots lie outside of the text, are left out."""
    response = job.length - job.prompt
    tokens = job.rows * response
    visible = (job.prompt + job.length) / 2
    if job.tau is not None:
        walk = simulate_walk(job.rows, response, job.segment, job.tau, drafter.num_drafts)
        # A block trains on the drafts it keeps and the first refused one: together, every token of the response.
        return Volume(job.tokens, walk.chain, walk.chain * drafter.width, tokens, tokens, visible, walk)
    anchors = response if job.num_anchors is None else min(job.num_anchors, response)
    blocks = job.rows * anchors
    # A position has no slot if none of the anchors lies in the K positions before it.
    missed = (1 - min(1, drafter.num_drafts / response)) ** anchors if job.num_anchors is not None else 0
    return Volume(
        tokens=job.tokens,
        blocks=blocks,
        slots=blocks * drafter.width,
        rows=blocks * drafter.num_drafts,
        states=round(tokens * (1 - missed)),
        visible=visible,
        walk=None,
    )


def acceptance_of(tau: float, num_drafts: int) -> float:
    """Return the chance of each draft to be kept, the same for all, that makes the accepted length `tau`."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        length = sum(middle**k for k in range(num_drafts + 1))
        low, high = (middle, high) if length < tau else (low, middle)
    return low


@functools.cache
def simulate_walk(
    rows: int,
    response: int,
    segment: int,
    tau: float,
    num_drafts: int,
    *,
    blocks_at_once: int = 1,
    rows_at_once: int = 1,
) -> Walk:
    """
    Walk responses as a replay does, with drafts kept by chance; the same result on every run.

    A walk begins at every segment and ends at the end of its response or at an anchor that was drafted from. Where
    fewer than `blocks_at_once` walkers are left, each drafts from the positions ahead of it too; where fewer than
    `rows_at_once` blocks are judged, several slots of each are judged before the host reads the result.
    """
    keep, rng = acceptance_of(tau, num_drafts), random.Random(0)
    # The last token of a response has nothing behind it to draft.
    ends = [response * (place // response + 1) - 1 for place in range(rows * response)]
    kept = []
    for _ in ends:
        count = 0
        while count < num_drafts and rng.random() < keep:
            count += 1
        kept.append(count)

    def follow(place: int, known: set[int]) -> int:
        """Return where a walk at an anchor comes to: the first that is not known, or the end of its response."""
        end = ends[place]
        while place < end and place in known:
            place = min(end, place + kept[place] + 1)
        return place

    walkers = {start for start in range(len(ends)) if start % response % segment == 0 and start < ends[start]}
    drafted: set[int] = set()
    rounds = []
    while walkers:
        ahead = range(max(1, blocks_at_once // len(walkers)))
        places = {walker + i for walker in walkers for i in ahead if walker + i < ends[walker]} - drafted
        drafted |= places
        running, slot, judged, reads = places, 0, 0, 0
        while running and slot < num_drafts:
            size = max(1, min(num_drafts - slot, rows_at_once // len(running)))
            judged, reads, slot = judged + size * len(running), reads + 1, slot + size
            running = {place for place in running if kept[place] >= slot and place + slot < ends[place]}
        rounds.append(Round(len(places), judged, reads))
        walkers = {place for place in (follow(walker, drafted) for walker in walkers) if place < ends[place]}
    chain = 0
    for start in range(0, len(ends), response):
        place = start
        while place < ends[start]:
            chain, place = chain + 1, place + kept[place] + 1
    return Walk(tuple(rounds), chain)
