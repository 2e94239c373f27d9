# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a DFlash drafter, and the portable profile it is saved in."""

from dataclasses import fields
from os import PathLike
from typing import Any

from transformers import PreTrainedConfig

from ..published.configs import config_from_dict
from ..target_shape import check_layer_ids, portable_base, refuse_misspelt


class DFlashDraftConfig(PreTrainedConfig):
    r"""
    Shape of a DFlash drafter. The saved `config.json` is the portable profile that vLLM, SGLang and z-lab's code read.

    Args:
        vocab_size (`int`):
            Vocabulary of the target.
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps, rope_parameters, max_position_embeddings:
            As in the target's config.
        num_hidden_layers (`int`, *optional*, defaults to 5):
            Layers of the drafter; 5 as published.
        block_size (`int`, *optional*, defaults to 16):
            The anchor and its drafts; a block has `block_size - 1` drafts. 16 as published.
        mask_token_id (`int`):
            Token fed at the slots to fill. Must not occur in text.
        target_layer_ids (`list[int]`):
            Ascending 0-based ids of the target layers whose outputs are read.
        num_target_layers (`int`, *optional*):
            Layers of the target these ids belong to.
        target_model_name_or_path (`str`, *optional*), target_model_revision (`str`, *optional*):
            The target this drafter belongs to.

    Raises:
        ValueError: If layer ids, block size, mask token or layer types are out of range.
    """

    model_type = "draft_opd_dflash"
    family = "dflash"

    vocab_size: int = 32000
    hidden_size: int = 4096
    target_hidden_size: int | None = None
    intermediate_size: int = 11008
    num_hidden_layers: int = 5
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    layer_types: list[str] | None = None
    # Read by the cache that transformers' generation builds from this config.
    sliding_window: int | None = None
    block_size: int = 16
    mask_token_id: int | None = None
    target_layer_ids: list[int] | None = None
    num_target_layers: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    target_model_name_or_path: str | None = None
    target_model_revision: str | None = None

    def __post_init__(self, **kwargs: Any):
        refuse_misspelt(kwargs, [setting.name for setting in fields(self)], type(self).__name__)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        if self.block_size < 2:
            raise ValueError(
                f"`block_size` counts the anchor, so it must be at least 2, got {self.block_size}. The published setting is 16."
            )
        if self.block_size > self.max_position_embeddings:
            raise ValueError(
                f"`block_size` {self.block_size} exceeds the target's {self.max_position_embeddings} positions. The published setting is 16."
            )
        if set(self.layer_types) != {"full_attention"}:
            raise ValueError(
                f"Only full-attention DFlash drafters are supported, got layer_types={self.layer_types}. Sliding-window drafters "
                "are trained and served with another mask."
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` {self.mask_token_id} lies outside the target's vocabulary 0..{self.vocab_size - 1}. Choose an "
                "id that the target's embedding has and no text uses."
            )
        if self.target_layer_ids is not None:
            check_layer_ids(self.target_layer_ids, self.num_target_layers or max(self.target_layer_ids, default=0) + 2)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the flat portable profile, the form written to `config.json`."""
        dflash = {
            "block_size": self.block_size,
            "mask_token_id": self.mask_token_id,
            "target_layer_ids": list(self.target_layer_ids or []),
        }
        return (
            portable_base(self)
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

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read `config.json` without a foreign `model_type`: `architectures` decides, and transformers would warn."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") != cls.model_type:
            config_dict = {key: value for key, value in config_dict.items() if key != "model_type"}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DFlashDraftConfig":
        """Read any published DFlash `config.json` (see `trl_draft_opd/drafters/published/configs.py`)."""
        return config_from_dict(cls, config_dict, **kwargs)
