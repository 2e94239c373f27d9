# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Sizes of a target and of a drafter, and how many weights they have: read off their configs, computed without weights.

A target is a decoder with grouped-query attention, a gated MLP or experts of that kind, and two norms per layer.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TargetShape:
    """
    Sizes of a target.

    Attributes:
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocab (`int`): As in its config.
        is_tied (`bool`): Whether head and embedding are one matrix.
        has_head_norms (`bool`): Whether queries and keys have a norm per head, as Qwen3's have.
        experts (`int`), active_experts (`int`), expert_width (`int`):
            Of a mixture of experts, those of a layer, those that a token passes, and their intermediate size; there is
            a router and no other MLP then. 0 for a dense layer.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    is_tied: bool
    has_head_norms: bool
    experts: int = 0
    active_experts: int = 0
    expert_width: int = 0

    @classmethod
    def of(cls, config: Any) -> "TargetShape":
        """Read the sizes off the config of a target; of one that is no plain dense decoder, widths alone are right."""
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
            is_tied=bool(config.tie_word_embeddings),
            has_head_norms=config.model_type.startswith("qwen3"),
            experts=getattr(config, "num_experts", 0),
            active_experts=getattr(config, "num_experts_per_tok", 0),
            expert_width=getattr(config, "moe_intermediate_size", 0),
        )

    @classmethod
    def of_known(cls, config: Any) -> "TargetShape":
        """
        Read the sizes off the config of a target whose weights are counted here.

        Raises:
            ValueError: If its architecture is another one, or only some of its layers have experts.
        """
        known = ", ".join(KNOWN_ARCHITECTURES)
        if config.model_type not in KNOWN_ARCHITECTURES:
            raise ValueError(
                f"The architecture {config.model_type!r} is not one whose weights are counted here: {known}. It may "
                "train all the same; a step that would not fit a card is refused or warned of before it begins."
            )
        if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
            raise ValueError(
                f"This {config.model_type!r} has experts in some of its layers only, which is not counted here. "
                f"Known are {known} whose layers are all alike."
            )
        return cls.of(config)

    @property
    def query_width(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's matrices."""
        return self._matrices(self.experts)

    @property
    def active_matrices(self) -> int:
        """Weights of those of one layer's matrices that a token passes."""
        return self._matrices(self.active_experts)

    def _matrices(self, experts: int) -> int:
        attention = self.hidden * 2 * (self.query_width + self.kv_width)
        if self.experts:
            return attention + self.hidden * (self.experts + 3 * experts * self.expert_width)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer, norms included."""
        return self.layer_matrices + 2 * self.hidden + (2 * self.head_dim if self.has_head_norms else 0)

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.layers * self.layer_parameters + self.hidden + self.head * (1 if self.is_tied else 2)


# `model_type` of the targets whose weights are counted to the last one, or, with biases, within 1 %.
KNOWN_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")

# As published.
TARGETS = {
    "qwen3-7m": TargetShape(256, 768, 8, 4, 2, 64, 4096, True, True),
    "qwen3-0.6b": TargetShape(1024, 3072, 28, 16, 8, 128, 151936, True, True),
    "qwen3-4b": TargetShape(2560, 9728, 36, 32, 8, 128, 151936, True, True),
    "qwen3-8b": TargetShape(4096, 12288, 36, 32, 8, 128, 151936, False, True),
    "llama3-70b": TargetShape(8192, 28672, 80, 64, 8, 128, 128256, False, False),
}


# Served by an engine while a trainer reads their states. As published.
SERVED = {
    "qwen3-8b": TARGETS["qwen3-8b"],
    "qwen3-32b": TargetShape(5120, 25600, 64, 64, 8, 128, 151936, False, True),
    "llama3-70b": TARGETS["llama3-70b"],
    "qwen3-235b-a22b": TargetShape(4096, 12288, 94, 64, 4, 128, 151936, False, True, 128, 8, 1536),
}


@dataclass(frozen=True)
class OwnParts:
    """
    What blocks of a family are, and what its drafters have beside the matrices that every decoder has; their configs
    say it (`own_parts`).

    Attributes:
        width (`int`): Positions of a block that go through the layers: DFlash's with its anchor, EAGLE-3's steps.
        num_drafts (`int`): Drafts of a block.
        input_width (`int`): What a layer's queries, keys and values are made of.
        vectors (`int`): All weights that are no matrices: of norms, biases, sinks, kernels.
        layer_matrices (`int`): Weights of further matrices of a layer, which every position of a block passes.
        slot_matrices (`int`): Weights of matrices behind the layers, which every slot passes.
        taps (`int`): Slots that a convolution around each sublayer reads; 0 for none.
        token_rank (`int`): Numbers that the token before a slot adds to the slot's state.
        head_rank (`int`): How many of them a trained part of the head multiplies.
        tables (`int`): Weights of tables whose rows are looked up.
        candidates (`int`): Tokens of a slot among which those numbers choose; 0 for none.
    """

    width: int
    num_drafts: int
    input_width: int
    vectors: int
    layer_matrices: int = 0
    slot_matrices: int = 0
    taps: int = 0
    token_rank: int = 0
    head_rank: int = 0
    tables: int = 0
    candidates: int = 0


@dataclass(frozen=True)
class DrafterShape:
    """
    Sizes of a drafter.

    Attributes:
        family (`str`): Its family.
        hidden, intermediate, layers, heads, kv_heads, head_dim (`int`): As in its config.
        features (`int`): Width of the target's layers that it reads, side by side.
        vocab (`int`): Tokens that it can propose.
        drafts_whole_blocks (`bool`), owns_head (`bool`): As in its config.
        own ([`OwnParts`]): What is its family's own.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    features: int
    vocab: int
    drafts_whole_blocks: bool
    owns_head: bool
    own: OwnParts

    @classmethod
    def of(cls, config: Any) -> "DrafterShape":
        """Read the sizes off a drafter's config."""
        return cls(
            family=config.family,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            features=config.feature_width,
            vocab=config.draft_vocab_size,
            drafts_whole_blocks=config.drafts_whole_blocks,
            owns_head=config.owns_head and config.trains_head,
            own=config.own_parts(),
        )

    @property
    def width(self) -> int:
        """Positions of a block that go through the layers."""
        return self.own.width

    @property
    def num_drafts(self) -> int:
        """Drafts of a block."""
        return self.own.num_drafts

    @property
    def query_width(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim

    @property
    def fusion(self) -> int:
        """Weights of the matrix that fuses the target's features."""
        return self.features * self.hidden

    @property
    def key_value(self) -> int:
        """Weights of one layer's key and value matrices, which the context passes too."""
        return 2 * self.own.input_width * self.kv_width

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's matrices."""
        queries = (self.own.input_width + self.hidden) * self.query_width
        return queries + self.key_value + 3 * self.hidden * self.intermediate + self.own.layer_matrices

    @property
    def head(self) -> int:
        """Weights of the head that drafts, whoever trains it."""
        return self.vocab * self.hidden

    @property
    def trained_head(self) -> int:
        """Weights of the head that are trained with the drafter."""
        return self.vocab * (self.own.head_rank + (self.hidden if self.owns_head else 0))

    @property
    def body(self) -> int:
        """Weights of all matrices that are trained, the head's left out."""
        return self.fusion + self.layers * self.layer_matrices + self.own.slot_matrices

    @property
    def matrices(self) -> int:
        """Weights of all matrices that are trained."""
        return self.body + self.trained_head

    @property
    def parameters(self) -> int:
        """All weights that are trained."""
        return self.matrices + self.own.vectors + self.own.tables
