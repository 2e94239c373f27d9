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

from ..losses.budget import BLOCK_SHARE_CPU, NUM_TEMPORARIES, chunk_bytes_of_card
from .shapes import DrafterShape, TargetShape


NUM_RANKS = 8
LAUNCHES = ("one GPU", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "FSDP2, target sharded", "one GPU, 4-bit target")
LAUNCHES += ("one GPU, readings delivered",)
BF16, FP32 = 2, 4
GIB = 2**30
# Of a card, what a step is planned to take at most: the estimate, and what an allocator wastes.
PLANNED_SHARE = 0.9
# As in `drafters/base.py`: what a pass holds unless `blocks_per_pass` is set.
SLOTS_PER_PASS = 2**16
CARD_BYTES = 80 * GIB


@dataclass(frozen=True)
class Workload:
    """
    What one rank does in an optimiser step.

    Attributes:
        rows (`int`), length (`int`): Rows of a micro-batch and tokens of each, prompt included.
        longest (`int` or `None`): Tokens of the longest row, where rows lie end to end as one; `length` if unset.
        blocks (`int`): Blocks of a row: its response over tau under Draft-OPD.
        accumulation (`int`): Micro-batches.
        checkpointing (`bool`): Whether the drafter's layers are computed again in the backward pass.
        chunk_bytes (`int`): `loss_chunk_bytes`; by default that of a card of `CARD_BYTES`.
        reading_bytes (`int`): `reading_bytes`.
        read_tokens (`int`): Tokens that the target reads at a time; a longer row is read in parts, on its cache.
        blocks_per_pass (`int` or `None`):
            As the setting of that name: more blocks are drafted in passes, each computed again in the backward pass.
        is_on_cpu (`bool`): Whether the kernels are the CPU's, which keep more than those of CUDA.
    """

    rows: int
    length: int
    blocks: int
    accumulation: int
    checkpointing: bool
    chunk_bytes: int = chunk_bytes_of_card(CARD_BYTES)
    reading_bytes: int = 2 * GIB
    read_tokens: int = 8192
    blocks_per_pass: int | None = None
    longest: int | None = None
    is_on_cpu: bool = False

    @property
    def texts(self) -> int:
        """Text tokens of a micro-batch."""
        return self.rows * self.length

    def blocks_at_once(self, num_drafts: int) -> int:
        """Blocks of a pass, of as many as the micro-batch needs, all of one size."""
        num_blocks = self.rows * self.blocks
        most = self.blocks_per_pass or max(1, SLOTS_PER_PASS // num_drafts)
        return -(-num_blocks // max(1, -(-num_blocks // most)))


@dataclass(frozen=True)
class Stages:
    """
    Bytes per stage on one GPU without any sharding; see [`Stages.rows`] for what each is.

    `kept` is what of `activations` lives from forward to backward: the rest is one layer that is computed again.
    `passing` is what of the loss and of states joined with tokens is let go before the layers' backward pass, in which
    `gradient` is the widest layer's.
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
    passing: int
    gradient: int
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
    def step(self) -> int:
        """What a step needs beside masters, gradients and optimizer, the copies of autocast included."""
        return self.casts + self.working

    @property
    def working(self) -> int:
        """What a step needs beside weights and optimizer: reading, update and live rollout take turns."""
        return max(self.readings + max(self.update, self.forward), self.cache)

    @property
    def update(self) -> int:
        """What loss and backward pass need: the loss is done before a layer is computed again."""
        return max(self.kept + self.loss, self.activations + self.loss - self.passing + self.gradient)


# -- what each part takes ---------------------------------------------------------------------------------------------


def quantised_bytes(target: TargetShape) -> int:
    """
    Return the bytes of a 4-bit target: bitsandbytes keeps half a byte per weight and a float32 scale per block of 64.
    """
    linear = target.layers * target.layer_matrices
    return BF16 * target.parameters + linear // 2 + linear // 64 * FP32 - linear * BF16


def _norm(work: Workload) -> int:
    """
    Return the bytes a number that an RMSNorm keeps beside its output: its input, or on the CPU, where torch runs it in
    parts, the input and the normalised input in float32.
    """
    return 2 * FP32 if work.is_on_cpu else BF16


def block_activations(drafter: DrafterShape, work: Workload) -> tuple[int, int]:
    """
    Return what a drafter of whole blocks keeps per text token, and per block, from forward to backward under bf16
    autocast.
    """
    H, inner, S, h = drafter.hidden, drafter.intermediate, drafter.width, drafter.heads
    q, k, norm = drafter.query_width, drafter.kv_width, _norm(work)
    # Cosines and sines; the norm at the end, or of the fused features.
    around = 2 * BF16 * drafter.head_dim + (norm + BF16) * H
    # Keys behind a norm per head, and values.
    context = drafter.layers * (norm + 2 * BF16) * k
    if work.checkpointing:
        layers = drafter.layers * BF16 * H
    else:
        # Two norms and their outputs; query, output and log-sum-exp of the attention; gate and up of the MLP.
        layers = 2 * (norm + BF16) * H + (norm + 2 * BF16) * q + (norm + 2 * BF16) * k + FP32 * h + 2 * BF16 * inner
        # Of a convolution in front of a sublayer and of one behind it: what each mixes, and what it makes.
        layers += 2 * 2 * BF16 * drafter.own.taps * H + BF16 * drafter.own.layer_matrices // H
        if work.is_on_cpu:
            layers += BF16 * h * S  # the weights of a block's own keys
        else:
            context += drafter.layers * 2 * BF16 * k  # keys of context and blocks are joined in every layer
        layers *= drafter.layers
    return context + around, S * (layers + around) + drafter.num_drafts * joined_bytes(drafter)


def joined_bytes(drafter: DrafterShape) -> int:
    """Return the bytes that a slot keeps where the token before it is joined to its state."""
    rank = drafter.own.token_rank
    if rank == drafter.own.head_rank:
        return BF16 * rank
    # Joined is the product of something of the token and something of the state: both, and the state once more.
    return BF16 * (drafter.hidden + 3 * rank)


def chain_activations(drafter: DrafterShape, work: Workload) -> tuple[int, int]:
    """
    Return what a drafter of one slot at a time keeps per text token, and per block, from forward to backward under
    bf16 autocast.
    """
    H, inner, K, h = drafter.hidden, drafter.intermediate, drafter.width, drafter.heads
    q, k, norm = drafter.query_width, drafter.kv_width, _norm(work)
    rotation = 2 * BF16 * drafter.head_dim
    # Fused features; token and state normed and joined; keys and values.
    embeds = norm - FP32 if work.is_on_cpu else norm  # no gradient goes to the tokens
    joined = (embeds + norm + 2 * BF16) * H
    context = BF16 * H + joined + 2 * BF16 * k + rotation
    own = 2 * BF16 * k * (K - 1)  # of a block: keys and values of all steps but the first
    if work.checkpointing:
        return context, K * 2 * BF16 * H + own
    # Query, output and log-sum-exp of the attention; the norm before the MLP, its gate and up; the norm at the end.
    step = joined + 2 * BF16 * q + FP32 * h + (norm + BF16) * H + 2 * BF16 * inner + rotation
    # Off the CPU, the last norm's input is the next step's, kept there already.
    step += (norm + BF16) * H if work.is_on_cpu else BF16 * H
    if work.is_on_cpu:
        own += BF16 * h * K * (K - 1) // 2  # the weights of a block's own keys
    else:
        context += K * 2 * BF16 * k  # keys of context and blocks are joined in every step
        own = own * K // 2
    return context, K * step + own


def activation_bytes(drafter: DrafterShape, work: Workload) -> tuple[int, int]:
    """
    Return what the drafter's step keeps from forward to backward, casts of weights left out, and that with what exists
    of it in the backward pass beside: a layer or a whole pass that is computed again.
    """
    rates = block_activations if drafter.drafts_whole_blocks else chain_activations
    (text, block), (whole_text, whole_block) = (rates(drafter, replace(work, checkpointing=c)) for c in (True, False))
    num_blocks, at_once = work.rows * work.blocks, work.blocks_at_once(drafter.num_drafts)
    # One layer or step at a time.
    units = drafter.layers if drafter.drafts_whole_blocks else drafter.width
    if not work.checkpointing:
        text, block = whole_text, whole_block
    again = (work.texts * (whole_text - text) + at_once * (whole_block - block)) // units
    if at_once == num_blocks:
        kept = work.texts * text + num_blocks * block
        return kept, kept + again
    # The states of every pass, alone and joined.
    kept = work.texts * rates(drafter, replace(work, checkpointing=True))[0]
    kept += num_blocks * drafter.width * 2 * BF16 * (drafter.hidden + drafter.own.token_rank)
    return kept, kept + at_once * block + again


def logit_bytes(target: TargetShape, drafter: DrafterShape, work: Workload) -> int:
    """
    Return what the loss's largest chunk of logits takes: all of its budget, or, on the CPU, whose budget is large
    against a small vocabulary, what `losses/budget.py` makes of it. It counts logits in float32; autocast makes bf16.
    """
    if not work.is_on_cpu:
        return work.chunk_bytes
    numbers, compared = work.chunk_bytes // FP32, NUM_TEMPORARIES * max(target.vocab, drafter.vocab)
    # Of rows that are compared at a time, in float32.
    temporaries = compared * max(1, int(numbers * BLOCK_SHARE_CPU) // compared)
    # Rows of candidates and their gradient, in float32.
    chosen = 2 * drafter.own.candidates * (drafter.own.token_rank + 1)
    read = target.vocab + (drafter.vocab if drafter.vocab < target.vocab else 0)
    most = max(1, (numbers - temporaries) // max(read, 2 * drafter.vocab + chosen))
    slots = work.rows * work.blocks * drafter.num_drafts
    states, rows = min(most, slots, work.texts), min(most, slots)
    return max(
        BF16 * states * read,
        BF16 * (states + rows) * drafter.vocab + FP32 * (rows * chosen + temporaries),
    )


def count_stages(target: TargetShape, drafter: DrafterShape, work: Workload) -> Stages:
    """Return the bytes of every stage."""
    kept, activations = activation_bytes(drafter, work)
    texts = work.texts
    reading = texts * BF16 * (drafter.features + target.hidden)
    cached = 2 * BF16 * target.kv_width * target.layers
    # The widest layer: gate, up and product of the MLP beside some states.
    forward = min(texts, work.read_tokens) * BF16 * (4 * target.hidden + 3 * target.intermediate)
    longest = work.longest or work.length
    if longest > work.read_tokens:
        forward += longest * cached
    slots = work.rows * work.blocks * drafter.num_drafts
    # Of what is trained of the head: the cast, and the summed gradient.
    head = drafter.trained_head * (BF16 + FP32)
    # Of rows that candidates are looked up in, the gradient of all.
    head += FP32 * drafter.vocab * drafter.own.token_rank * (drafter.own.candidates > 0)
    of_tokens = slots * drafter.own.token_rank * 3 * BF16
    # Slots that are trained on, their gradients, and those back in place, before which the CPU adds a chunk's gradient
    # of the head to the sum; the target's states.
    states = back = slots * target.hidden * BF16
    if work.is_on_cpu:
        back = max(back, BF16 * drafter.trained_head)
    logits = logit_bytes(target, drafter, work)
    loss = 2 * states + back + of_tokens + texts * target.hidden * BF16 + head + logits
    # Of gate, up and product of an MLP, behind whose convolution the gradient is; steps of a chain are differentiated
    # one by one.
    widest = BF16 * (3 * drafter.intermediate - drafter.own.taps * drafter.hidden)
    at_once = work.blocks_at_once(drafter.num_drafts) * (drafter.width if drafter.drafts_whole_blocks else 1)
    own = 2 * BF16 * target.kv_width * drafter.layers
    if not drafter.drafts_whole_blocks:
        own += BF16 * target.hidden  # the fused features
    masters = FP32 * drafter.parameters
    return Stages(
        target=BF16 * target.parameters,
        target_layers=BF16 * target.layers * target.layer_parameters,
        target_layer=BF16 * target.layer_parameters,
        target_4bit=quantised_bytes(target),
        masters=masters,
        gradients=masters,
        adamw=2 * masters,
        casts=BF16 * drafter.body,
        kept=kept,
        activations=activations,
        # Beyond the budget a reading is let go and made again, so one more than fits is alive at most.
        readings=min(work.accumulation * reading, work.reading_bytes + reading),
        forward=forward,
        loss=loss,
        passing=logits + back - states + head + of_tokens + slots * joined_bytes(drafter),
        gradient=at_once * widest,
        cache=texts * (cached + own),
    )


def launch_bytes(stages: Stages, launch: str, ranks: int) -> int:
    """
    Return the peak of one rank.

    DDP keeps its buckets beside the gradients. ZeRO and FSDP2 take the drafter as one unit: during a step its bf16
    weights and gradients are whole on every rank, masters, summed gradients and AdamW's moments are not.
    """
    state = stages.masters + stages.gradients + stages.adamw
    whole_bf16 = stages.masters // 2
    target = stages.target
    if launch == "one GPU, readings delivered":
        # The target has no body: nothing is read here, and nothing decoded.
        kept = replace(stages, forward=0, cache=0)
        return target - stages.target_layers + state + kept.step
    if launch == "one GPU, 4-bit target":
        target = stages.target_4bit
    elif launch == "FSDP2, target sharded":
        # The layer that runs and the one fetched ahead are whole.
        target += stages.target_layers // ranks - stages.target_layers + 2 * stages.target_layer
    if launch in ("one GPU", "one GPU, 4-bit target"):
        return target + state + stages.step
    if launch == "DDP":
        return target + state + stages.gradients + stages.step
    return target + state // ranks + 2 * whole_bf16 + stages.working


def checkpointing_pays(needed: int, card: int) -> bool:
    """
    Tell whether the drafter's layers should be computed again in the backward pass, which costs a forward of the
    drafter and changes no value: where what a step that keeps them needs, weights and optimizer included, does not fit
    into `PLANNED_SHARE` of `card` bytes.
    """
    return needed > PLANNED_SHARE * card


# -- a card that is too small -----------------------------------------------------------------------------------------


def refuse_small_card(target: int, trained: int, optimizer: int, card: int) -> None:
    """
    Refuse a card that cannot hold what is certain: the weights, and what the optimizer keeps of the trained ones.

    Args:
        target (`int`): Bytes of the target's weights on this card.
        trained (`int`): Bytes of the drafter's trained weights on this card, as much as of their gradients.
        optimizer (`int`): Bytes that the optimizer keeps, 0 if unknown.
        card (`int`): Bytes of the card.

    Raises:
        ValueError: With the sizes and what makes them smaller.
    """
    of_drafter = 2 * trained + optimizer
    if target + of_drafter > card:
        raise ValueError(
            f"The card has {gib(card)} GiB, but weights and optimizer alone need {gib(target + of_drafter)}: "
            f"{gib(target)} for the target, {gib(of_drafter)} for the drafter with its gradients and the optimizer's "
            "state. Load the target in 4 bits (`target_init_kwargs`), leave its body out (`readings`) or shard it "
            "over several cards (`shard_target=True`), shard the drafter (ZeRO-2, ZeRO-3 or FSDP2), or take a smaller "
            "target."
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
    needed = fixed + stages.step
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
