# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Seconds of a training step, stage by stage: what has to be computed, and what the code does on top of it.

A stage takes as long as its kernels, or as the host needs to launch them where that is longer. The floor of a job is
its FLOPs at the speed of large products, and nothing else. How often the code launches, waits and touches memory is in
`Counts`, which are counted, not chosen.

Shape letters:  T = text tokens, H = hidden size, V = the target's vocabulary, D = the drafter's
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..losses.budget import chunk_bytes_of_card
from ..losses.fused import bytes_per_logit
from .gpus import ATTENTION_SHARE, LAUNCH_SECONDS, SYNC_SECONDS, Gpu
from .jobs import Job, Round, Volume, simulate_walk, volume_of
from .shapes import DrafterShape, TargetShape


BF16, FP32 = 2, 4
# Queries and keys of a tile of flex attention, as in `drafters/attention/flex.py`.
TILE = 128
# Bytes a weight of clipping (read, read and write) and of AdamW in one kernel (read four, write three) in float32.
UPDATE_BYTES = 4 + 8 + 28


@dataclass(frozen=True)
class FamilyCounts:
    """
    What the code does in a family's layers, attention apart.

    Attributes:
        context_bytes, slot_bytes (`tuple[float, float]`):
            Bytes beside products, forward and backward, per unit of H: of a text token, and of a slot.
        weight_bytes (`tuple[float, float]`): The same per weight: casts, and sums of gradients.
        launches (`tuple[int, int]`): Kernels of forward and backward.
        syncs (`int`): Waits of the host in a micro-batch, its read included, the walk left out.
        walk_launches (`tuple[int, int, int]`), walk_syncs (`tuple[int, int, int]`):
            Kernels and waits of the walk: once, per round, and per time that judged slots are read.
    """

    context_bytes: tuple[float, float]
    slot_bytes: tuple[float, float]
    weight_bytes: tuple[float, float]
    launches: tuple[int, int]
    syncs: int
    walk_launches: tuple[int, int, int]
    walk_syncs: tuple[int, int, int]


@dataclass(frozen=True)
class Counts:
    """
    What the code does beside what it must.

    Attributes:
        read_bytes (`float`): Bytes beside products of one target layer, per token and unit of H.
        read_launches (`int`): Kernels of one target layer.
        mask_share (`float`): Time that an attention mask adds to the target's read.
        logit_bytes (`float` or `None`):
            Bytes a logit of the drafter in divergence and gradient; `None` for those of the fused kernels.
        reduced_bytes (`float`): Bytes a logit of the target where the drafter's vocabulary is a part of it.
        head_gradient_bytes (`float`): Bytes a weight, once per chunk, for the gradient of a head that trains.
        judged_bytes (`float`): Bytes a logit of the walk.
        score_bytes (`tuple[float, float]`):
            Bytes a score of plain attention, forward and backward; 0 for a kernel that keeps scores on the chip.
        chunk_launches (`float`), block_launches (`float`): Kernels of a chunk of the loss, and of a block in it.
        update_launches (`int`): Kernels of clipping and AdamW.
        blocks_at_once (`int`), rows_at_once (`int`): See [`simulate_walk`].
        families (`dict[str, FamilyCounts]`): What happens in the drafter.
    """

    read_bytes: float
    read_launches: int
    mask_share: float
    logit_bytes: float | None
    reduced_bytes: float
    head_gradient_bytes: float
    judged_bytes: float
    score_bytes: tuple[float, float]
    chunk_launches: float
    block_launches: float
    update_launches: int
    blocks_at_once: int
    rows_at_once: int
    families: dict[str, FamilyCounts]


@dataclass(frozen=True)
class Chunks:
    """Rows of the loss that are projected at a time, rows compared at a time, and rows judged at a time."""

    rows: int
    block: int
    judged: int


@dataclass(frozen=True)
class Stage:
    """
    A part of a step.

    Attributes:
        name (`str`): For tables.
        column (`str`): Whose FLOPs these are: target, drafter, heads or walk.
        flops (`float`), product_bytes (`float`): Of matrix products, and the bytes they move at least.
        attention_flops (`float`): Of attention in one kernel, which is slower than large products.
        bytes (`float`): What all other kernels move.
        launches (`float`), syncs (`float`): Kernels, and waits of the host.
        again (`float`): FLOPs of products that are made once more, no part of the floor.
        waste (`float`): Share of `attention_flops` on top that the kernel makes for nothing.
        extra (`float`): Share of time on top, of the target's read with a mask.
        idle (`float`): Seconds for which the card waits for launches within the stage.
    """

    name: str
    column: str
    flops: float = 0.0
    product_bytes: float = 0.0
    attention_flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0
    syncs: float = 0.0
    again: float = 0.0
    waste: float = 0.0
    extra: float = 0.0
    idle: float = 0.0

    def busy(self, gpu: Gpu) -> float:
        """Return the seconds of its kernels."""
        products = max((self.flops + self.again) / gpu.flops, self.product_bytes / gpu.bytes_per_second)
        attention = self.attention_flops * (1 + self.waste) / (gpu.flops * ATTENTION_SHARE)
        return (products + attention + self.bytes / gpu.bytes_per_second) * (1 + self.extra)


@dataclass(frozen=True)
class Prediction:
    """
    What a job takes.

    Attributes:
        job ([`Job`]), volume ([`Volume`]), gpu ([`Gpu`]): Of what.
        stages (`list[Stage]`): In the order of a step.
        seconds (`list[float]`): Of each stage.
    """

    job: Job
    volume: Volume
    gpu: Gpu
    stages: list[Stage]
    seconds: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds)

    @property
    def flops(self) -> float:
        """FLOPs that the step needs."""
        return sum(stage.flops + stage.attention_flops for stage in self.stages)

    @property
    def floor(self) -> float:
        """Seconds of its FLOPs at the speed of large products."""
        return self.flops / self.gpu.flops

    @property
    def tokens_per_second(self) -> float:
        """Text tokens a second."""
        return self.volume.tokens / self.total

    @property
    def share(self) -> float:
        """Tokens a second over those of the floor."""
        return self.floor / self.total

    @property
    def utilisation(self) -> float:
        """FLOPs over time and the published peak (MFU)."""
        return self.flops / self.total / self.gpu.peak

    def seconds_of(self, name: str) -> float:
        """Seconds of target, drafter, heads or walk."""
        return sum(s for stage, s in zip(self.stages, self.seconds, strict=True) if stage.column == name)

    def column(self, name: str) -> float:
        """FLOPs of target, drafter, heads or walk."""
        return sum(stage.flops + stage.attention_flops for stage in self.stages if stage.column == name)


def predict(
    job: Job,
    target: TargetShape,
    drafter: DrafterShape,
    gpu: Gpu,
    counts: Counts,
    chunks: Chunks | None = None,
    *,
    checkpointing: bool = False,
) -> Prediction:
    """
    Predict the step of a job on a card.

    Args:
        chunks ([`Chunks`], *optional*): Geometry of the loss; what the code makes of the card's default if not given.
        checkpointing (`bool`, *optional*, defaults to `False`):
            Whether the drafter's layers run twice. The second run is no part of the floor.
    """
    volume = volume_of(job, drafter)
    chunks = chunks or chunks_of(chunk_bytes_of_card(gpu.memory), target.vocab, drafter.vocab)
    draft, attention, backward = _drafting(volume, drafter, counts, checkpointing)
    stages = [_read(job, volume, target, counts)]
    if volume.walk is not None:
        stages.append(_walk(job, volume, target, drafter, counts, chunks, gpu))
    stages += [draft, attention, *_loss(volume, target, drafter, counts, chunks), backward]
    stages.append(
        Stage("clipping and AdamW", "", bytes=UPDATE_BYTES * drafter.parameters, launches=counts.update_launches)
    )
    return Prediction(job, volume, gpu, stages, _seconds(stages, gpu))


def chunks_of(chunk_bytes: int, target_vocab: int, draft_vocab: int) -> Chunks:
    """
    Return the chunks of the fused loss, whose budget counts logits in float32: the drafter's and the target's, or
    while the target is read its whole ones beside those picked of them. Without temporaries a chunk is one block.
    """
    picked = draft_vocab if draft_vocab < target_vocab else 0
    rows = max(1, chunk_bytes // FP32 // max(target_vocab + picked, 2 * draft_vocab))
    return Chunks(rows, rows, max(1, chunk_bytes // (FP32 * target_vocab)))


def _seconds(stages: Sequence[Stage], gpu: Gpu) -> list[float]:
    """
    Return the time of each stage. Heads and divergence take turns chunk by chunk: the host prepares one while the
    other runs, so they are bound together.
    """
    seconds = []
    for stage in stages:
        together = [other for other in stages if other.column == "heads"] if stage.column == "heads" else [stage]
        busy = sum(other.busy(gpu) for other in together)
        launching = sum(other.launches for other in together) * LAUNCH_SECONDS
        share = stage.busy(gpu) / busy if busy else 1 / len(together)
        seconds.append(max(busy, launching) * share + stage.idle + stage.syncs * SYNC_SECONDS)
    return seconds


# -- stages -----------------------------------------------------------------------------------------------------------


def _read(job: Job, volume: Volume, target: TargetShape, counts: Counts) -> Stage:
    pairs = job.rows * job.length * (job.length + 1) / 2
    return Stage(
        "target's read",
        "target",
        flops=2 * target.layers * target.active_matrices * volume.tokens,
        attention_flops=4 * target.query_width * target.layers * pairs,
        bytes=counts.read_bytes * target.hidden * target.layers * volume.tokens,
        launches=counts.read_launches * target.layers,
        extra=counts.mask_share,
    )


def _attention(slots: float, visible: float, drafter: DrafterShape, counts: Counts, passes: str) -> Stage:
    """Return the attention of slots over the context, forward (`"forward"`) or forward and backward (`"both"`)."""
    scores = slots * visible * drafter.layers
    score_bytes = counts.score_bytes[0] if passes == "forward" else sum(counts.score_bytes)
    # Products of a pair of query and key, two forward and four backward; a flash kernel makes the scores once more.
    products = {"forward": 2, "both": 6 if score_bytes else 7}[passes]
    flops = 2 * products * scores * drafter.query_width
    if score_bytes:
        return Stage("attention", "drafter", flops=flops, bytes=score_bytes * scores * drafter.heads)
    # Whole tiles: half of one at the end of the context, one of a DFlash block's own keys, and one for each key that
    # earlier steps of EAGLE-3 added.
    tiles = 0.5 + (1 if drafter.drafts_whole_blocks else (drafter.width - 1) / 2)
    return Stage("attention", "drafter", attention_flops=flops, waste=tiles * TILE / visible)


def _drafting(
    volume: Volume, drafter: DrafterShape, counts: Counts, checkpointing: bool
) -> tuple[Stage, Stage, Stage]:
    """Return the drafter's forward and backward, and the attention of both."""
    own, again = counts.families[drafter.family], int(checkpointing)
    keys = drafter.layers * drafter.key_value
    forward = 2 * (volume.tokens * (drafter.fusion + keys) + volume.slots * drafter.layers * drafter.layer_matrices)
    forward += 2 * volume.blocks * drafter.num_drafts * drafter.own.slot_matrices
    # No gradient goes to the target's features.
    backward = 2 * forward - 2 * volume.tokens * drafter.fusion
    wide = drafter.hidden
    slot_bytes = [volume.slots * wide * part for part in own.slot_bytes]
    moved = [volume.tokens * wide * own.context_bytes[i] + slot_bytes[i] for i in (0, 1)]
    moved = [moved[i] + own.weight_bytes[i] * drafter.body for i in (0, 1)]
    attention = _attention(volume.slots, volume.visible, drafter, counts, "both")
    once_more = 2 * volume.slots * drafter.layers * drafter.layer_matrices * again
    draft = Stage("draft", "drafter", flops=forward, bytes=moved[0], launches=own.launches[0], syncs=own.syncs)
    back = Stage(
        "backward",
        "drafter",
        flops=backward,
        again=once_more,
        bytes=moved[1] + again * slot_bytes[0],
        launches=own.launches[1] + again * own.launches[0],
    )
    return draft, attention, back


def _loss(
    volume: Volume, target: TargetShape, drafter: DrafterShape, counts: Counts, chunks: Chunks
) -> tuple[Stage, Stage]:
    num_chunks = math.ceil(volume.rows / chunks.rows)
    state_chunks = math.ceil(volume.states / chunks.rows)
    # Forward, the gradient of the states, and for what is trained that of the weights.
    head = drafter.vocab * (drafter.hidden + drafter.own.head_rank)
    products = (2 * head + drafter.trained_head) * volume.rows
    passed = volume.rows * drafter.vocab * sum((2, drafter.owns_head, 4 * (drafter.own.head_rank > 0)))
    heads = Stage(
        "loss: heads",
        "heads",
        flops=2 * (products + volume.states * target.head),
        product_bytes=BF16 * (2 * num_chunks * head + state_chunks * target.head + passed),
        bytes=counts.head_gradient_bytes * drafter.trained_head * num_chunks,
        launches=counts.chunk_launches * num_chunks,
    )
    is_reduced = drafter.vocab < target.vocab
    logit_bytes = counts.logit_bytes
    if logit_bytes is None:
        logit_bytes = bytes_per_logit("forward_kl", BF16, volume.states / volume.rows)
    moved = logit_bytes * volume.rows * drafter.vocab
    moved += counts.reduced_bytes * volume.states * target.vocab if is_reduced else 0
    if drafter.own.candidates:
        # One more pass over the logits; rows of candidates picked, cast, multiplied, and as much back.
        rows = 6 * FP32 * drafter.own.candidates * drafter.own.token_rank
        moved += volume.rows * (BF16 * drafter.vocab + rows)
    blocks = num_chunks * math.ceil(min(chunks.rows, volume.rows) / chunks.block)
    return heads, Stage("loss: divergence", "heads", bytes=moved, launches=counts.block_launches * blocks)


def _walk(
    job: Job, volume: Volume, target: TargetShape, drafter: DrafterShape, counts: Counts, chunks: Chunks, gpu: Gpu
) -> Stage:
    """Return the replay as the code walks it; what it drafts and judges beyond the least is no part of the floor."""
    assert volume.walk is not None and job.tau is not None, "asked for under Draft-OPD"
    own, least = counts.families[drafter.family], volume.walk.all
    walk = simulate_walk(
        job.rows,
        job.length - job.prompt,
        job.segment,
        job.tau,
        drafter.num_drafts,
        blocks_at_once=counts.blocks_at_once,
        rows_at_once=counts.rows_at_once,
    )
    matrices = drafter.layers * drafter.layer_matrices
    # Beside: a second product and the sum; the likeliest of the logits, and float32 scores that are none elsewhere.
    judged_bytes = counts.judged_bytes + 8 * (drafter.own.head_rank > 0) + 10 * (drafter.own.candidates > 0)
    behind = drafter.head + drafter.vocab * drafter.own.head_rank + drafter.own.slot_matrices

    def stage_of(some: Round, calls: int) -> Stage:
        """Return a round, or several: `calls` times the layers read their weights."""
        # A chain goes on only where the earlier drafts were kept.
        slots = some.blocks * drafter.width if drafter.drafts_whole_blocks else some.rows
        attention = _attention(slots, volume.visible, drafter, counts, "forward")
        parts = max(some.reads, math.ceil(some.rows / chunks.judged))
        return Stage(
            "walk",
            "walk",
            flops=2 * (slots * matrices + some.rows * behind) + attention.flops,
            product_bytes=BF16 * (parts * behind + calls * matrices),
            attention_flops=attention.attention_flops,
            waste=attention.waste,
            bytes=drafter.hidden * slots * own.slot_bytes[0]
            + attention.bytes
            + judged_bytes * some.rows * drafter.vocab,
            launches=own.walk_launches[1] * calls + own.walk_launches[2] * some.reads,
        )

    whole, needed = stage_of(walk.all, len(walk.rounds)), stage_of(least, 1)
    # The host waits for the result of every round, so a small one takes as long as its launches.
    each = [stage_of(some, 1) for some in walk.rounds]
    idle = sum(max(0.0, stage.launches * LAUNCH_SECONDS - stage.busy(gpu)) for stage in each)
    context = 2 * volume.tokens * (drafter.fusion + drafter.layers * drafter.key_value)
    return replace(
        whole,
        flops=needed.flops + context,
        again=whole.flops - needed.flops,
        bytes=whole.bytes + drafter.hidden * volume.tokens * own.context_bytes[0],
        launches=whole.launches + own.walk_launches[0],
        syncs=own.walk_syncs[0] + own.walk_syncs[1] * len(each) + own.walk_syncs[2] * walk.all.reads,
        idle=idle,
    )
