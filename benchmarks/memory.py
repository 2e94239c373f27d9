# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Memory of a training step, stage by stage, from shapes alone: weights are counted on models of the meta device,
activations by formulas that follow what each layer keeps for its backward pass. Measures nothing, and knows nothing of
speed.

Shape letters:  T = text tokens of a micro-batch, N = blocks, S = slots of a block, K = drafts, H = hidden size, I =
intermediate
                size, F = feature width, q = width of all query heads, k = width of all key/value heads, h = query
                heads
"""

from dataclasses import dataclass, replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from trl_draft_opd import DFlashDraftModel, DraftOPDConfig, DraftVocabulary, Eagle3DraftModel
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.losses.budget import chunk_bytes_of_card


# (class, hidden, intermediate, layers, heads, key/value heads, head size, vocabulary, tied head), as published.
SHAPES = {
    "qwen3-7m": ("qwen3", 256, 768, 8, 4, 2, 64, 4096, True),
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "llama3-70b": ("llama", 8192, 28672, 80, 64, 8, 128, 128256, False),
}
FAMILIES = ("eagle3", "dflash")
DRAFT_VOCABULARY = 32_000
NUM_RANKS = 8
LAUNCHES = ("one GPU", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "FSDP2, target sharded", "one GPU, 4-bit target")
DEFAULTS = DraftOPDConfig.__dataclass_fields__
BF16, FP32 = 2, 4
CARD_BYTES = 80 * 2**30


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
    """

    rows: int
    length: int
    blocks: int
    accumulation: int
    checkpointing: bool
    chunk_bytes: int = chunk_bytes_of_card(CARD_BYTES)


@dataclass(frozen=True)
class Stages:
    """
    Bytes per stage on one GPU without any sharding; see [`Stages.rows`] for what each is.

    `kept` is what of `activations` lives from forward to backward: the rest is one layer that is computed again.
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
        return max(self.readings + max(self.activations + self.loss, self.forward), self.cache)


def make_target(name: str, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a target of a shape with random weights on `device`."""
    family, hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, is_tied = SHAPES[name]
    config_class, model_class = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[
        family
    ]
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=40960,
        tie_word_embeddings=is_tied,
        dtype=dtype,
    )
    with torch.device(device):
        return model_class._from_config(config, dtype=dtype).eval()


def make_drafter(family: str, target: PreTrainedModel, device: torch.device | str) -> Drafter:
    """Return a drafter as published for the target: EAGLE-3 with a draft vocabulary where the target's is larger."""
    vocab = target.config.vocab_size
    with torch.device(device):
        if family == "dflash":
            return DFlashDraftModel.from_target(target, mask_token_id=vocab - 1)
        vocabulary = None
        if vocab > DRAFT_VOCABULARY:
            is_drafted = torch.arange(vocab) < DRAFT_VOCABULARY
            vocabulary = DraftVocabulary(torch.zeros(DRAFT_VOCABULARY, dtype=torch.long), is_drafted, coverage=1.0)
        return Eagle3DraftModel.from_target(target, draft_vocabulary=vocabulary)


def workload_of(family: str, *, rows: int = 2, length: int = 2048, prompt: int = 512) -> Workload:
    """Return the tables' workload: responses of 1536 tokens, tau 3 for EAGLE-3 and 5 for DFlash, 8 micro-batches."""
    return Workload(rows, length, (length - prompt) // {"eagle3": 3, "dflash": 5}[family], 8, False)


# -- what each part takes ---------------------------------------------------------------------------------------------


def num_bytes(module: torch.nn.Module, width: int) -> int:
    """Return the bytes of a module's distinct parameters at `width` bytes each."""
    return width * sum(parameter.numel() for parameter in module.parameters())


def quantised_bytes(target: PreTrainedModel) -> int:
    """
    Return the bytes of a 4-bit target: bitsandbytes keeps half a byte per weight and a float32 scale per block of 64.
    """
    linear = sum(m.weight.numel() for m in target.base_model.modules() if isinstance(m, torch.nn.Linear))
    return num_bytes(target, BF16) + linear // 2 + linear // 64 * FP32 - linear * BF16


def cast_bytes(drafter: Drafter) -> int:
    """Return the bytes of the bf16 copies that autocast makes of the weights it multiplies with."""
    return BF16 * sum(m.weight.numel() for m in drafter.modules() if isinstance(m, torch.nn.Linear))


def _norm(width: int, input_width: int) -> int:
    """
    Return what an RMSNorm keeps per token: its input in float32, the normalised input at its own width, a factor.
    """
    return width * (FP32 + input_width) + FP32


def dflash_activations(drafter: Drafter, work: Workload) -> int:
    """Return what a DFlash step keeps from forward to backward under bf16 autocast."""
    c = drafter.config
    H, inner, S, h = c.hidden_size, c.intermediate_size, c.block_size, c.num_attention_heads
    q, k = h * c.head_dim, c.num_key_value_heads * c.head_dim
    F = len(c.target_layer_ids) * c.target_hidden_size
    texts, slots = work.rows * work.length, work.rows * work.blocks * S
    # Fused features; keys and values of every layer, behind a norm per head.
    rotation = 2 * FP32 * c.head_dim
    key = FP32 if work.checkpointing else BF16  # a layer that is run again is given the key before its cast
    context = BF16 * F + _norm(H, BF16) + rotation
    context += c.num_hidden_layers * (2 * BF16 * H + k * (FP32 + BF16) + (key + BF16) * k)
    inside = 3 * BF16 * H + (q + k) * (FP32 + BF16) + FP32 * (h + c.num_key_value_heads)
    inside += (
        BF16 * (2 * q + 2 * k + h * S) + FP32 * h
    )  # the attention: query, output, key, value, weights, log-sum-exp
    inside += _norm(H, FP32) + 2 * BF16 * H + 2 * BF16 * inner
    layers = c.num_hidden_layers * (_norm(H, FP32) + inside) - FP32 * H  # no gradient goes to the first layer's input
    if work.checkpointing:
        layers = c.num_hidden_layers * FP32 * H
    return texts * context + slots * (layers + rotation + _norm(H, FP32) + FP32 * H)


def eagle3_activations(drafter: Drafter, work: Workload) -> int:
    """Return what an EAGLE-3 step keeps from forward to backward under bf16 autocast."""
    c = drafter.config
    H, inner, K, h = c.hidden_size, c.intermediate_size, c.ttt_steps, c.num_attention_heads
    q, k = h * c.head_dim, c.num_key_value_heads * c.head_dim
    F = len(c.target_layer_ids) * c.target_hidden_size
    texts, blocks = work.rows * work.length, work.rows * work.blocks
    # Fused features; token and state normed and joined, cast once for keys and once for values.
    rotation = 2 * BF16 * c.head_dim
    context = BF16 * F + BF16 * H + _norm(H, BF16) + 2 * BF16 * 2 * H + 2 * BF16 * k + rotation
    step = BF16 * H + _norm(H, BF16) + 3 * BF16 * 2 * H + 2 * BF16 * (q + k) + FP32 * h + BF16 * h * (K - 1) // 2
    step += 2 * _norm(H, BF16) + 2 * BF16 * H + 2 * BF16 * inner + rotation
    if work.checkpointing:
        step = BF16 * (H + 2 * k)
    return texts * context + blocks * K * (step + FP32 * H)


def activation_bytes(drafter: Drafter, work: Workload) -> int:
    """Return what the drafter's step keeps from forward to backward under bf16 autocast, casts of weights left out."""
    return {"dflash": dflash_activations, "eagle3": eagle3_activations}[drafter.config.family](drafter, work)


def count_stages(target: PreTrainedModel, drafter: Drafter, work: Workload) -> Stages:
    """Return the bytes of every stage; the models may be on the meta device."""
    config = target.config
    kept = activation_bytes(drafter, work)
    again = 0
    if work.checkpointing:
        # One layer or step at a time exists whole.
        units = drafter.config.num_hidden_layers if drafter.config.family == "dflash" else drafter.config.ttt_steps
        again = (activation_bytes(drafter, replace(work, checkpointing=False)) - kept) // units
    texts, num_drafts = work.rows * work.length, drafter.default_num_drafts
    num_taps = len(drafter.config.target_layer_ids)
    reading = texts * BF16 * (num_taps + 1) * config.hidden_size
    # The taps, and the widest layer: gate, up and product of the MLP beside some states.
    forward = texts * BF16 * ((num_taps + 5) * config.hidden_size + 3 * config.intermediate_size)
    slots = work.rows * work.blocks * num_drafts
    head = drafter.lm_head.weight.numel() * FP32 if drafter.owns_head else 0
    # Slots that are trained on, their gradients, and those back in place; the target's states; a head's summed
    # gradient.
    loss = slots * config.hidden_size * 3 * FP32 + texts * config.hidden_size * BF16 + head
    kv_width = config.num_key_value_heads * config.head_dim
    own = (FP32 + BF16) * kv_width * drafter.config.num_hidden_layers  # DFlash rotates its keys in float32
    if drafter.config.family == "eagle3":
        own = BF16 * (2 * kv_width + config.hidden_size)
    cache = texts * (2 * BF16 * kv_width * config.num_hidden_layers + own)
    budget = DEFAULTS["reading_bytes"].default
    masters = num_bytes(drafter, FP32)
    return Stages(
        target=num_bytes(target, BF16),
        target_layers=num_bytes(target.base_model.layers, BF16),
        target_layer=num_bytes(target.base_model.layers[0], BF16),
        target_4bit=quantised_bytes(target),
        masters=masters,
        gradients=masters,
        adamw=2 * masters,
        casts=cast_bytes(drafter),
        kept=kept,
        activations=kept + again,
        # Beyond the budget a reading is let go and made again, so one more than fits is alive at most.
        readings=min(work.accumulation * reading, budget + reading),
        forward=forward,
        loss=loss + work.chunk_bytes,
        cache=cache,
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
