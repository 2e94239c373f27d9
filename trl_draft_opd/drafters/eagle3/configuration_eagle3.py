# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Configuration of an EAGLE-3 drafter, and the portable profile it is saved in."""

from dataclasses import fields
from os import PathLike
from typing import Any

from transformers import PreTrainedConfig

from ..published.configs import config_from_dict
from ..target_shape import check_layer_ids, portable_base, refuse_misspelt


class Eagle3DraftConfig(PreTrainedConfig):
    r"""
    Shape of an EAGLE-3 drafter. In memory, layer ids are 0-based indices of the layer whose output is read; the saved
    `config.json` is the flat portable profile that vLLM, SGLang and EAGLE's code read.

    Args:
        vocab_size (`int`):
            Vocabulary of the target.
        draft_vocab_size (`int`, *optional*):
            Rows of the drafter's head; `None` stands for the full vocabulary.
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps, rope_parameters, max_position_embeddings:
            As in the target's config; head size and key/value heads must be the target's, which shares its cache layout.
        target_hidden_size (`int`):
            Width of one tapped layer.
        target_layer_ids (`list[int]`):
            Ascending ids of the tapped target layers, three as published.
        num_target_layers (`int`, *optional*):
            Layers of the target these ids belong to.
        fc_norm (`bool`, *optional*, defaults to `False`):
            RMSNorm on each tapped layer before the fusion (EAGLE-3.1).
        norm_output (`bool`, *optional*, defaults to `False`):
            Feed back the hidden state after the final norm instead of before it (EAGLE-3.1).
        norm_before_fc (`bool`, *optional*, defaults to `False`):
            One RMSNorm on the concatenated features. Excludes `fc_norm`.
        norm_before_residual (`bool`, *optional*, defaults to `False`):
            Use the normed fused state as residual (speculators and vLLM only).
        ttt_steps (`int`, *optional*, defaults to 7):
            Steps of training-time test the drafter was trained with; the default number of drafts in rollouts.
        target_model_name_or_path (`str`, *optional*), target_model_revision (`str`, *optional*):
            The target this drafter belongs to.

    Raises:
        ValueError: If layer ids do not fit the target, norms exclude each other, or a size is out of range.
    """

    model_type = "draft_opd_eagle3"
    family = "eagle3"

    vocab_size: int = 32000
    draft_vocab_size: int | None = None
    hidden_size: int = 4096
    target_hidden_size: int | None = None
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    target_layer_ids: list[int] | None = None
    num_target_layers: int | None = None
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    ttt_steps: int = 7
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
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        super().__post_init__(**kwargs)
        if self.num_hidden_layers != 1:
            raise ValueError(
                f"An EAGLE-3 drafter has 1 layer, got num_hidden_layers={self.num_hidden_layers}. EAGLE's code and llama.cpp read no "
                "more, and vLLM and SGLang read deeper ones differently."
            )
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("`fc_norm` and `norm_before_fc` norm the same features; set one of them.")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` must lie in 1..{self.vocab_size} (the target's vocabulary), got {self.draft_vocab_size}."
            )
        if self.ttt_steps < 1:
            raise ValueError(f"`ttt_steps` must be at least 1, got {self.ttt_steps}. The published setting is 7.")
        if self.target_layer_ids is not None:
            check_layer_ids(self.target_layer_ids, self.num_target_layers or max(self.target_layer_ids, default=0) + 2)

    @property
    def has_reduced_vocabulary(self) -> bool:
        """Whether the head covers only a part of the target's vocabulary (`d2t` and `t2d` exist)."""
        return self.draft_vocab_size != self.vocab_size

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the flat portable profile, the form written to `config.json`."""
        layer_ids = self.target_layer_ids or []
        return portable_base(self) | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "draft_vocab_size": self.draft_vocab_size,
            # vLLM counts how many layers have run; SGLang names the layer whose output is read.
            "eagle_aux_hidden_state_layer_ids": [i + 1 for i in layer_ids],
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layer_ids), "use_aux_hidden_state": True},
            "num_aux_hidden_states": len(layer_ids),
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
            "norm_before_fc": self.norm_before_fc,
            "norm_before_residual": self.norm_before_residual,
            "ttt_steps": self.ttt_steps,
        }

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
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "Eagle3DraftConfig":
        """Read any published EAGLE-3 `config.json` (see `trl_draft_opd/drafters/published/configs.py`)."""
        return config_from_dict(cls, config_dict, **kwargs)
