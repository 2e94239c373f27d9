# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a DFlash drafter, and the portable profile it is saved in."""

from typing import Any

from ..portable_config import PortableConfig


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
        kwargs:
            As in [`PortableConfig`]; five layers are tapped as published.

    Raises:
        ValueError: If layer ids, block size, mask token or layer types are out of range.
    """

    model_type = "draft_opd_dflash"
    family = "dflash"
    title = "DFlash"
    drafts_whole_blocks = True
    # Every anchor costs a block: about half the positions of a short response.
    default_num_anchors = 64
    # A block costs more than a few more rounds.
    default_segment_length = 16
    # exp(-1 / 7), as published.
    default_position_decay = 0.87

    num_hidden_layers: int = 5
    layer_types: list[str] | None = None
    # Read by the cache that transformers' generation builds from this config.
    sliding_window: int | None = None
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
                f"`block_size` counts the anchor, so it must be at least 2, got {self.block_size}. Published is 16."
            )
        if self.block_size > self.max_position_embeddings:
            raise ValueError(
                f"`block_size` {self.block_size} exceeds the target's {self.max_position_embeddings} positions. The "
                "published setting is 16."
            )
        if set(self.layer_types) != {"full_attention"}:
            raise ValueError(
                f"Only full-attention DFlash drafters are supported, got layer_types={self.layer_types}: a sliding "
                "window is another mask."
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` {self.mask_token_id} lies outside the target's vocabulary 0..{self.vocab_size - 1}. "
                "Choose an id that the target's embedding has and no text uses."
            )

    @property
    def drafts_per_block(self) -> int:
        """Most drafts of a block: one per mask, and the anchor's where it drafts too."""
        return self.block_size - (0 if self.sample_from_anchor else 1)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the flat portable profile, the form written to `config.json`."""
        dflash = {
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "sample_from_anchor": self.sample_from_anchor,
            "target_layer_ids": list(self.target_layer_ids or []),
        }
        return (
            self.portable()
            | dflash
            | {
                "architectures": ["DFlashDraftModel"],
                "model_type": "qwen3",
                "dflash_config": dflash,
                "is_causal": False,
                "layer_types": list(self.layer_types or []),
                "max_window_layers": self.num_hidden_layers,
                "sliding_window": None,
                "use_sliding_window": False,
            }
        )
