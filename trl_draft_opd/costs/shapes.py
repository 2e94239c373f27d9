# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Sizes of a target and of a drafter, and how many weights they have: read off their configs, computed without weights.

A target is a dense decoder: grouped-query attention, a gated MLP and two norms per layer.
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
        )

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
        attention = self.hidden * 2 * (self.query_width + self.kv_width)
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


# As published.
TARGETS = {
    "qwen3-7m": TargetShape(256, 768, 8, 4, 2, 64, 4096, True, True),
    "qwen3-0.6b": TargetShape(1024, 3072, 28, 16, 8, 128, 151936, True, True),
    "qwen3-4b": TargetShape(2560, 9728, 36, 32, 8, 128, 151936, True, True),
    "qwen3-8b": TargetShape(4096, 12288, 36, 32, 8, 128, 151936, False, True),
    "llama3-70b": TargetShape(8192, 28672, 80, 64, 8, 128, 128256, False, False),
}
FAMILIES = ("eagle3", "dflash")


@dataclass(frozen=True)
class DrafterShape:
    """
    Sizes of a drafter.

    Attributes:
        family (`str`): `"eagle3"`, or `"dflash"` for every family that drafts whole blocks.
        hidden, intermediate, layers, heads, kv_heads, head_dim (`int`): As in its config.
        features (`int`): Width of the target's layers that it reads, side by side.
        vocab (`int`): Tokens that it can propose.
        width (`int`): Positions of a block that are computed: DFlash's block with its anchor, EAGLE-3's steps.
        num_drafts (`int`): Drafts of a block.
        num_norms (`int`): Weights of all norms.
        owns_head (`bool`): Whether the head is trained with the drafter, or is the target's.
        extra (`int`): Weights that only its family has.
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
    width: int
    num_drafts: int
    num_norms: int
    owns_head: bool
    extra: int = 0

    @classmethod
    def of(cls, config: Any) -> "DrafterShape":
        """Read the sizes off a drafter's config."""
        is_dflash = config.drafts_whole_blocks
        hidden, layers = config.hidden_size, config.num_hidden_layers
        head_dim = config.head_dim or hidden // config.num_attention_heads
        features = len(config.target_layer_ids or ()) * (config.target_hidden_size or hidden)
        if is_dflash:
            # Two norms per layer and two per head size; one of the context and one at the end.
            norms = layers * (2 * hidden + 2 * head_dim) + 2 * hidden
        else:
            norms = 4 * hidden + features * (int(config.fc_norm) + int(config.norm_before_fc))
        return cls(
            family="dflash" if is_dflash else "eagle3",
            hidden=hidden,
            intermediate=config.intermediate_size,
            layers=layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            features=features,
            vocab=config.draft_vocab_size or config.vocab_size,
            width=config.block_size if is_dflash else config.ttt_steps,
            num_drafts=config.drafts_per_block if is_dflash else config.ttt_steps,
            num_norms=norms,
            owns_head=config.owns_head and config.trains_head,
            extra=config.exported.extra_parameters(config),
        )

    @classmethod
    def fresh(cls, family: str, target: TargetShape, vocab: int | None = None) -> "DrafterShape":
        """
        Return the drafter that `from_target` makes: EAGLE-3 of one layer, 3 taps and 7 steps; DFlash of 5 layers, up
        to 5 taps and blocks of 16.
        """
        is_dflash = family == "dflash"
        layers = 5 if is_dflash else 1
        taps = min(5, target.layers - 3) if is_dflash else 3
        norms = layers * (2 * target.hidden + 2 * target.head_dim) + 2 * target.hidden
        return cls(
            family=family,
            hidden=target.hidden,
            intermediate=target.intermediate,
            layers=layers,
            heads=target.heads,
            kv_heads=target.kv_heads,
            head_dim=target.head_dim,
            features=taps * target.hidden,
            vocab=vocab or target.vocab,
            width=16 if is_dflash else 7,
            num_drafts=15 if is_dflash else 7,
            num_norms=norms if is_dflash else 4 * target.hidden,
            owns_head=not is_dflash,
        )

    @property
    def query_width(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads."""
        return self.kv_heads * self.head_dim

    @property
    def input_width(self) -> int:
        """What a layer's queries, keys and values are made of: EAGLE-3 reads token and state side by side."""
        return self.hidden * (2 if self.family == "eagle3" else 1)

    @property
    def fusion(self) -> int:
        """Weights of the matrix that fuses the target's features."""
        return self.features * self.hidden

    @property
    def key_value(self) -> int:
        """Weights of one layer's key and value matrices, which the context passes too."""
        return 2 * self.input_width * self.kv_width

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's matrices."""
        queries = (self.input_width + self.hidden) * self.query_width
        return queries + self.key_value + 3 * self.hidden * self.intermediate

    @property
    def head(self) -> int:
        """Weights of the head that drafts, whoever trains it."""
        return self.vocab * self.hidden

    @property
    def matrices(self) -> int:
        """Weights of all matrices that are trained."""
        return self.fusion + self.layers * self.layer_matrices + (self.head if self.owns_head else 0)

    @property
    def parameters(self) -> int:
        """All weights that are trained."""
        return self.matrices + self.num_norms + self.extra
