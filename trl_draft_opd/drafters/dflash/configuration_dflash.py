# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a DFlash drafter, and the portable profile it is saved in."""

import math
from typing import Any

from ...costs.shapes import OwnParts
from ..attention import Sight
from ..portable_config import PortableConfig
from .exported_dflash import ExportedDFlash
from .published_dflash import PublishedDFlash


_SLIDING = "sliding_attention"


class DFlashDraftConfig(PortableConfig):
    r"""
    Shape of a DFlash drafter. The saved `config.json` is the portable profile that vLLM, SGLang and z-lab's code read.

    Args:
        num_hidden_layers (`int`, *optional*, defaults to 5):
            Layers of the drafter; 5 as published.
        block_size (`int`, *optional*, defaults to 16):
            Positions of a block: the anchor's and the masks'. 16 as published.
        mask_token_id (`int`):
            Token fed at the masks. Must not occur in text.
        sample_from_anchor (`bool`, *optional*, defaults to `False`):
            Every position of a block drafts the token behind it, the anchor's too: `block_size` drafts per block.
            Otherwise every mask drafts the token at its own position: `block_size - 1` drafts.
        layer_types (`list[str]`, *optional*):
            Per layer, `"full_attention"`, the default, or `"sliding_attention"`.
        sliding_window (`int`, *optional*):
            Tokens that a slot of a sliding layer sees, itself and those right before it: the slot `s` places behind
            the anchor sees `sliding_window - 1 - s` entries of the context. Above `block_size`, so that it always
            sees its whole block and an entry of the context.
        is_causal (`bool`, *optional*):
            Whether a slot sees no slot behind it: in all layers, in none, or, by default, in the sliding ones alone,
            which is what engines take a `config.json` for that does not say.
        attention_sinks (`bool`, *optional*, defaults to `False`):
            Whether every head of every layer has a sink, a learned logit in the denominator of its softmax.
        attention_value_scale (`float`, *optional*, defaults to 1.0):
            Factor on the values of all layers.
        kwargs:
            As in [`PortableConfig`]; five layers are tapped as published.

    Raises:
        ValueError: If layer ids, block size, mask token, layer types, window or scale are out of range.
    """

    model_type = "draft_opd_dflash"
    family = "dflash"
    title = "DFlash"
    exported = ExportedDFlash()
    published = PublishedDFlash()
    drafts_whole_blocks = True
    # Every anchor costs a block: about half the positions of a short response.
    default_num_anchors = 64
    # A block costs more than a few more rounds.
    default_segment_length = 16
    # exp(-1 / 7), as published.
    default_position_decay = 0.87

    num_hidden_layers: int = 5
    layer_types: list[str] | None = None
    # These two are also read by the cache that transformers' generation builds from this config.
    sliding_window: int | None = None
    is_causal: bool | None = None
    attention_sinks: bool = False
    attention_value_scale: float = 1.0
    block_size: int = 16
    mask_token_id: int | None = None
    sample_from_anchor: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_hidden_layers < 1:
            raise ValueError(f"`num_hidden_layers` must be at least 1, got {self.num_hidden_layers}. Published is 5.")
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        if self.block_size < 2:
            raise ValueError(
                f"`block_size` counts the anchor, so it must be at least 2, got {self.block_size}. "
                f"Published is {type(self).block_size}."
            )
        if self.block_size > self.max_position_embeddings:
            raise ValueError(
                f"`block_size` {self.block_size} exceeds the target's {self.max_position_embeddings} positions. "
                f"Published is {type(self).block_size}."
            )
        self._check_attention(self.layer_types)
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` {self.mask_token_id} lies outside the target's vocabulary 0..{self.vocab_size - 1}. "
                "Choose an id that the target's embedding has and no text uses."
            )

    @property
    def drafts_per_block(self) -> int:
        """Most drafts of a block: one per mask, and the anchor's where it drafts too."""
        return self.block_size - (0 if self.sample_from_anchor else 1)

    def own_parts(self) -> OwnParts:
        hidden, head_dim = self.hidden_size, self.head_dim or 0
        # Two norms per layer and two per head size; one of the context and one at the end.
        layer = 2 * hidden + 2 * head_dim + self.attention_biases + self.attention_sinks * self.num_attention_heads
        vectors = self.num_hidden_layers * layer + 2 * hidden
        return OwnParts(self.block_size, self.drafts_per_block, hidden, vectors)

    def _check_attention(self, layer_types: list[str]) -> None:
        if len(layer_types) != self.num_hidden_layers or set(layer_types) - {"full_attention", _SLIDING}:
            raise ValueError(
                f"`layer_types` must hold 'full_attention' or {_SLIDING!r} for each of {self.num_hidden_layers} "
                f"layers, got {layer_types}."
            )
        has_windows = _SLIDING in layer_types
        if has_windows and (self.sliding_window is None or self.sliding_window <= self.block_size):
            raise ValueError(
                f"`sliding_window` must exceed `block_size` ({self.block_size}) where a layer has {_SLIDING!r}, got "
                f"{self.sliding_window}. Within it a slot sees its block and the context before it; published are "
                "2048 and more."
            )
        if not has_windows and self.sliding_window is not None:
            raise ValueError(
                f"`sliding_window` is {self.sliding_window}, but no layer of `layer_types` ({layer_types}) is "
                f"{_SLIDING!r}. Name the layers that it is for, or leave it out."
            )
        if not has_windows and self.is_causal is None:
            self.is_causal = False
        if not 0 < self.attention_value_scale < math.inf:
            raise ValueError(
                f"`attention_value_scale` must be a number above 0, got {self.attention_value_scale}. 1.0 is no scale."
            )

    def sight_of(self, layer: int) -> Sight:
        """Return what the slots of a layer see."""
        assert self.layer_types is not None, "set by the config"
        is_sliding = self.layer_types[layer] == _SLIDING
        is_causal = is_sliding if self.is_causal is None else self.is_causal
        return Sight(self.sliding_window if is_sliding else None, is_causal)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the flat portable profile, the form written to `config.json`."""
        top = {
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "sample_from_anchor": self.sample_from_anchor,
            "target_layer_ids": list(self.target_layer_ids or []),
        }
        dflash: dict[str, Any] = dict(top)
        # Readers of other variants see neither key.
        if self.attention_sinks:
            dflash["attention_sink_bias"] = True
        if self.attention_value_scale != 1:
            dflash["attention_value_scale"] = self.attention_value_scale
        written = {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "dflash_config": dflash,
            "is_causal": self.is_causal,
            "layer_types": list(self.layer_types or []),
            "max_window_layers": self.num_hidden_layers,
            "sliding_window": self.sliding_window,
            "use_sliding_window": self.sliding_window is not None,
        }
        # Engines take a key that is not there for causal blocks in sliding layers alone.
        if self.is_causal is None:
            del written["is_causal"]
        if self.has_reduced_vocabulary:
            written["draft_vocab_size"] = self.draft_vocab_size
        return self.portable() | top | written
