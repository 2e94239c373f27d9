# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Memory of a training step, stage by stage, from shapes and settings alone: weights are counted, activations follow what
each layer keeps for its backward pass. Measures nothing, and knows nothing of speed.

Shape letters:  T = text tokens of a micro-batch, N = blocks, S = slots of a block, K = drafts, H = hidden size, I =
                intermediate size, F = feature width, q = width of all query heads, k = width of all key/value heads,
                h = query heads
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..losses.budget import chunk_bytes_of_card
from .shapes import DrafterShape, TargetShape


NUM_RANKS = 8
LAUNCHES = ("one GPU", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "FSDP2, target sharded", "one GPU, 4-bit target")
BF16, FP32 = 2, 4
GIB = 2**30
# Of a card, what a step is planned to take at most: the estimate, and what an allocator wastes.
PLANNED_SHARE = 0.9
CARD_BYTES = 80 * GIB


@dataclass(frozen=True)
class Workload:
    """
    What one rank does in an optimiser step.

    Attributes:
        rows (`int`), length (`int`): Rows of a micro-batch and tokens of each, prompt included.
        blocks (`int`): Blocks of a row: its response over tau under Draft-OPD.
        accumulation (`int`): Micro-batches.
        checkpointing (`bool`): Whether the drafter's layers are computed again in the backward pass.
        chunk_bytes (`int`): `loss_chunk_bytes`; by default that of a card of `CARD_BYTES`.
        reading_bytes (`int`): `reading_bytes`.
        read_tokens (`int` or `None`): Tokens of a row that the target reads at a time, on its cache; `None` for all.
        part_blocks (`int` or `None`): Most blocks of a micro-batch that are trained at a time; `None` for all.
    """

    rows: int
    length: int
    blocks: int
    accumulation: int
    checkpointing: bool
    chunk_bytes: int = chunk_bytes_of_card(CARD_BYTES)
    reading_bytes: int = 2 * GIB
    read_tokens: int | None = None
    part_blocks: int | None = None

    @property
    def texts(self) -> int:
        """Text tokens of a micro-batch."""
        return self.rows * self.length

    @property
    def blocks_at_once(self) -> int:
        """Blocks whose activations exist at a time."""
        return min(self.rows * self.blocks, self.part_blocks or self.rows * self.blocks)


@dataclass(frozen=True)
class Stages:
    """
    Bytes per stage on one GPU without any sharding; see [`Stages.rows`] for what each is.

    `kept` is what of `activations` lives from forward to backward: the rest is one layer that is computed again.
    `logits` is what of `loss` is let go before the backward pass.
    """

    target: int
    target_layers: int
    target_layer: int
    target_4bit: int
    masters: int
    gradients: int
    adamw: int
    casts: int
    kept: int
    activations: int
    readings: int
    forward: int
    loss: int
    logits: int
    cache: int

    def rows(self) -> list[tuple[str, int]]:
        """Return stages in the order of a step, with their names for a table."""
        return [
            ("target, bf16: no gradient, no optimizer state, no float32 copy", self.target),
            ("drafter, float32 masters", self.masters),
            ("drafter, gradients", self.gradients),
            ("drafter, AdamW's two moments", self.adamw),
            ("drafter, bf16 copies of autocast", self.casts),
            ("target's forward while it reads the text, let go", self.forward),
            ("target's readings kept for the loss (`reading_bytes`)", self.readings),
            ("activations of the drafter's step", self.activations),
            ("loss: rows, and logits within `loss_chunk_bytes`", self.loss),
            ("live rollout alone: the target's and the drafter's cache", self.cache),
        ]

    @property
    def working(self) -> int:
        """What a step needs beside weights and optimizer: reading, update and live rollout take turns."""
        return max(self.readings + max(self.update, self.forward), self.cache)

    @property
    def update(self) -> int:
        """What loss and backward pass need: the logits are gone before a layer is computed again."""
        return max(self.kept + self.loss, self.activations + self.loss - self.logits)


# -- what each part takes ---------------------------------------------------------------------------------------------


def quantised_bytes(target: TargetShape) -> int:
    """
    Return the bytes of a 4-bit target: bitsandbytes keeps half a byte per weight and a float32 scale per block of 64.
    """
    linear = target.layers * target.layer_matrices
    return BF16 * target.parameters + linear // 2 + linear // 64 * FP32 - linear * BF16


def _norm(width: int, input_width: int) -> int:
    """
    Return what an RMSNorm keeps per token: its input in float32, the normalised input at its own width, a factor.
    """
    return width * (FP32 + input_width) + FP32


def dflash_activations(drafter: DrafterShape, work: Workload) -> int:
    """Return what a DFlash step keeps from forward to backward under bf16 autocast."""
    H, inner, S, h = drafter.hidden, drafter.intermediate, drafter.width, drafter.heads
    q, k, F = drafter.query_width, drafter.kv_width, drafter.features
    texts, slots = work.texts, work.blocks_at_once * S
    # Fused features; keys and values of every layer, behind a norm per head.
    rotation = 2 * FP32 * drafter.head_dim
    key = FP32 if work.checkpointing else BF16  # a layer that is run again is given the key before its cast
    context = BF16 * F + _norm(H, BF16) + rotation
    context += drafter.layers * (2 * BF16 * H + k * (FP32 + BF16) + (key + BF16) * k)
    inside = 3 * BF16 * H + (q + k) * (FP32 + BF16) + FP32 * (h + drafter.kv_heads)
    inside += (
        BF16 * (2 * q + 2 * k + h * S) + FP32 * h
    )  # the attention: query, output, key, value, weights, log-sum-exp
    inside += _norm(H, FP32) + 2 * BF16 * H + 2 * BF16 * inner
    layers = drafter.layers * (_norm(H, FP32) + inside) - FP32 * H  # no gradient goes to the first layer's input
    if work.checkpointing:
        layers = drafter.layers * FP32 * H
    return texts * context + slots * (layers + rotation + _norm(H, FP32) + FP32 * H)


def eagle3_activations(drafter: DrafterShape, work: Workload) -> int:
    """Return what an EAGLE-3 step keeps from forward to backward under bf16 autocast."""
    H, inner, K, h = drafter.hidden, drafter.intermediate, drafter.width, drafter.heads
    q, k, F = drafter.query_width, drafter.kv_width, drafter.features
    texts, blocks = work.texts, work.blocks_at_once
    # Fused features; token and state normed and joined, cast once for keys and once for values.
    rotation = 2 * BF16 * drafter.head_dim
    context = BF16 * F + BF16 * H + _norm(H, BF16) + 2 * BF16 * 2 * H + 2 * BF16 * k + rotation
    step = BF16 * H + _norm(H, BF16) + 3 * BF16 * 2 * H + 2 * BF16 * (q + k) + FP32 * h + BF16 * h * (K - 1) // 2
    step += 2 * _norm(H, BF16) + 2 * BF16 * H + 2 * BF16 * inner + rotation
    if work.checkpointing:
        step = BF16 * (H + 2 * k)
    return texts * context + blocks * K * (step + FP32 * H)


def activation_bytes(drafter: DrafterShape, work: Workload) -> int:
    """Return what the drafter's step keeps from forward to backward under bf16 autocast, casts of weights left out."""
    return {"dflash": dflash_activations, "eagle3": eagle3_activations}[drafter.family](drafter, work)


def count_stages(target: TargetShape, drafter: DrafterShape, work: Workload) -> Stages:
    """Return the bytes of every stage."""
    kept = activation_bytes(drafter, work)
    again = 0
    if work.checkpointing:
        # One layer or step at a time exists whole.
        units = drafter.layers if drafter.family == "dflash" else drafter.width
        again = (activation_bytes(drafter, replace(work, checkpointing=False)) - kept) // units
    texts = work.texts
    reading = texts * BF16 * (drafter.features + target.hidden)
    cached = 2 * BF16 * target.kv_width * target.layers
    # The taps, and the widest layer: gate, up and product of the MLP beside some states.
    widest = BF16 * (5 * target.hidden + 3 * target.intermediate)
    forward = texts * (BF16 * drafter.features + widest)
    if work.read_tokens is not None and work.read_tokens < work.length:
        # A part at a time is in a layer; the cache of all parts stays.
        forward = work.rows * work.read_tokens * widest + texts * cached
    slots = work.blocks_at_once * drafter.num_drafts
    head = drafter.head * FP32 if drafter.owns_head else 0
    # Slots that are trained on, their gradients, and those back in place; the target's states; a head's summed
    # gradient.
    loss = slots * target.hidden * 3 * FP32 + texts * target.hidden * BF16 + head
    own = (FP32 + BF16) * target.kv_width * drafter.layers  # DFlash rotates its keys in float32
    if drafter.family == "eagle3":
        own = BF16 * (2 * target.kv_width + target.hidden)
    masters = FP32 * drafter.parameters
    return Stages(
        target=BF16 * target.parameters,
        target_layers=BF16 * target.layers * target.layer_parameters,
        target_layer=BF16 * target.layer_parameters,
        target_4bit=quantised_bytes(target),
        masters=masters,
        gradients=masters,
        adamw=2 * masters,
        casts=BF16 * drafter.matrices,
        kept=kept,
        activations=kept + again,
        # Beyond the budget a reading is let go and made again, so one more than fits is alive at most.
        readings=min(work.accumulation * reading, work.reading_bytes + reading),
        forward=forward,
        loss=loss + work.chunk_bytes,
        logits=work.chunk_bytes,
        cache=texts * (cached + own),
    )


def launch_bytes(stages: Stages, launch: str, ranks: int) -> int:
    """
    Return the peak of one rank.

    DDP keeps its buckets beside the gradients. ZeRO and FSDP2 take the drafter as one unit: during a step its bf16
    weights and gradients are whole on every rank, masters, summed gradients and AdamW's moments are not.
    """
    state = stages.masters + stages.gradients + stages.adamw
    step = stages.casts + stages.working
    whole_bf16 = stages.masters // 2
    target = stages.target
    if launch == "one GPU, 4-bit target":
        target = stages.target_4bit
    elif launch == "FSDP2, target sharded":
        # The layer that runs and the one fetched ahead are whole.
        target += stages.target_layers // ranks - stages.target_layers + 2 * stages.target_layer
    if launch in ("one GPU", "one GPU, 4-bit target"):
        return target + state + step
    if launch == "DDP":
        return target + state + stages.gradients + step
    return target + state // ranks + 2 * whole_bf16 + stages.working


def checkpointing_pays(target: TargetShape, drafter: DrafterShape, work: Workload, card: int) -> bool:
    """
    Tell whether the drafter's layers should be computed again in the backward pass, which costs a forward of the
    drafter and changes no value: where a step that keeps them does not fit into `PLANNED_SHARE` of `card` bytes.
    """
    kept = count_stages(target, drafter, replace(work, checkpointing=False))
    return launch_bytes(kept, "one GPU", 1) > PLANNED_SHARE * card


def blocks_at_once(target: TargetShape, drafter: DrafterShape, work: Workload, card: int) -> int | None:
    """
    Return how many blocks of a micro-batch to train at a time, in as few equal parts as let a step fit into
    `PLANNED_SHARE` of `card` bytes; `None` where not even single blocks do.
    """
    num_blocks = work.rows * work.blocks
    for parts in range(1, num_blocks + 1):
        size = -(-num_blocks // parts)
        stages = count_stages(target, drafter, replace(work, part_blocks=size))
        if launch_bytes(stages, "one GPU", 1) <= PLANNED_SHARE * card:
            return size
    return None


# -- a card that is too small -----------------------------------------------------------------------------------------


def refuse_small_card(target: int, trained: int, moments: int, card: int) -> None:
    """
    Refuse a card that cannot hold what is certain: the weights, and what the optimizer keeps of the trained ones.

    Args:
        target (`int`): Bytes of the target's weights on this card.
        trained (`int`): Bytes of the drafter's trained weights on this card, as much as of their gradients.
        moments (`int`): Numbers the optimizer keeps per trained weight: 2 of AdamW, 1 of Muon, 0 if unknown.
        card (`int`): Bytes of the card.

    Raises:
        ValueError: With the sizes and what makes them smaller.
    """
    of_drafter = (2 + moments) * trained
    if target + of_drafter > card:
        raise ValueError(
            f"The card has {gib(card)} GiB, but weights and optimizer alone need {gib(target + of_drafter)}: "
            f"{gib(target)} for the target, {gib(of_drafter)} for the drafter with its gradients and the optimizer's "
            "state. Load the target in 4 bits (`target_init_kwargs`) or shard it over several cards "
            "(`shard_target=True`), shard the drafter (ZeRO-2, ZeRO-3 or FSDP2), or take a smaller target."
        )


def describe_shortage(stages: Stages, fixed: int, card: int, settings: Sequence[str]) -> str | None:
    """
    Return a warning where a step is computed to need more than the card has, or `None` where it fits.

    Args:
        stages ([`Stages`]): The step's.
        fixed (`int`): Bytes of weights, gradients and optimizer on this card.
        card (`int`): Bytes of the card.
        settings (`Sequence[str]`): Settings that make a step smaller, the most effective first.
    """
    needed = fixed + stages.casts + stages.working
    if needed <= card:
        return None
    parts = [
        ("weights and optimizer", fixed + stages.casts),
        ("the target's readings", stages.readings),
        ("the drafter's activations", stages.activations),
        ("the loss", stages.loss),
    ]
    return (
        f"This step is computed to need {gib(needed)} GiB, and the card has {gib(card)} GiB: "
        f"{', '.join(f'{gib(size)} for {name}' for name, size in parts)}. The estimate is within about 10 %. To need "
        f"less: {', '.join(settings)}."
    )


def gib(value: float) -> str:
    """Return bytes as GiB."""
    return f"{value / GIB:.2f}" if value < 10 * GIB else f"{value / GIB:.1f}"
