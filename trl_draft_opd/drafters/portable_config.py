# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What the configs of all families share: the target's shape, and the portable profile they are saved in."""

from dataclasses import fields
from os import PathLike
from typing import Any, ClassVar, Self

import transformers
from transformers import PreTrainedConfig

from ..costs.shapes import OwnParts
from .published.configs import parse_drafter_config
from .published.exported import ExportedFamily
from .published.family import PublishedFamily
from .target_shape import check_layer_ids, refuse_misspelt


# Settings that both families' profiles hold under their own names.
_COPIED = (
    "attention_bias bos_token_id eos_token_id head_dim hidden_act hidden_size initializer_range intermediate_size "
    "max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads num_target_layers pad_token_id "
    "rms_norm_eps target_hidden_size target_model_name_or_path target_model_revision vocab_size"
).split()


class PortableConfig(PreTrainedConfig):
    r"""
    Base of the drafters' configs.

    Args:
        vocab_size, hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps,
        rope_parameters, max_position_embeddings:
            As in the target's config; head size and key/value heads must be the same: both share a cache layout.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Biases in the four projections of attention (EAGLE-3: vLLM only).
        target_hidden_size (`int`):
            Width of one tapped layer.
        target_layer_ids (`list[int]`):
            Ascending 0-based ids of the target layers whose outputs are read.
        draft_vocab_size (`int`, *optional*):
            Tokens of the target's vocabulary that can be drafted; `None` stands for all of them.
        num_target_layers (`int`, *optional*):
            Layers of the target these ids belong to.
        target_model_name_or_path (`str`, *optional*), target_model_revision (`str`, *optional*):
            The target this drafter belongs to.

    Raises:
        ValueError: If a setting is misspelt, or layer ids do not fit the target.
    """

    #: Key of the family, in files and on the command line, and its name in prose.
    family: ClassVar[str]
    title: ClassVar[str]
    #: How the family is written, and who reads it.
    exported: ClassVar[ExportedFamily]
    #: What is published of the family, and how it is read.
    published: ClassVar[PublishedFamily]
    #: Whether one pass through the layers drafts a whole block, or every slot takes a pass of its own.
    drafts_whole_blocks: ClassVar[bool]
    #: Defaults of training, see `num_anchors` (0 is every position) and `position_decay` of [`DraftSFTConfig`], and
    #: `replay_segment_length` of [`DraftOPDConfig`].
    default_num_anchors: ClassVar[int]
    default_position_decay: ClassVar[float]
    default_segment_length: ClassVar[int]
    #: Whether a head of the drafter's own is trained; otherwise it keeps rows of the target's, as a whole one would.
    trains_head: ClassVar[bool] = False
    #: Why the drafter cannot have a part of the target's vocabulary; `None` where it can.
    whole_vocabulary_reason: ClassVar[str | None] = None

    vocab_size: int = 32000
    hidden_size: int = 4096
    target_hidden_size: int | None = None
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    target_layer_ids: list[int] | None = None
    num_target_layers: int | None = None
    draft_vocab_size: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    target_model_name_or_path: str | None = None
    target_model_revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_misspelt(kwargs, [setting.name for setting in fields(self)], type(self).__name__)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        super().__post_init__(**kwargs)
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` must lie in 1..{self.vocab_size} (the target's vocabulary), got "
                f"{self.draft_vocab_size}."
            )
        if self.has_reduced_vocabulary:
            self.check_reducible()
        if self.target_layer_ids is not None:
            check_layer_ids(self.target_layer_ids, self.num_target_layers or max(self.target_layer_ids, default=0) + 2)

    @property
    def has_reduced_vocabulary(self) -> bool:
        """Whether only a part of the target's vocabulary can be drafted (`d2t` and `t2d` exist)."""
        return self.draft_vocab_size != self.vocab_size

    @classmethod
    def check_reducible(cls) -> None:
        """Raise `ValueError` if drafters of this family draft from the whole vocabulary of their target alone."""
        if cls.whole_vocabulary_reason is not None:
            raise ValueError(
                f"`draft_vocab_size` asks for a part of the vocabulary, which a {cls.title} drafter cannot have: "
                f"{cls.whole_vocabulary_reason}. Leave it out."
            )

    @property
    def owns_head(self) -> bool:
        """Whether the drafter has an `lm_head` of its own; without one it drafts through the target's."""
        return self.has_reduced_vocabulary

    @property
    def has_confidence_head(self) -> bool:
        """Whether the drafter says how likely the target keeps each draft, see `confidence_logits`."""
        return False

    @property
    def feature_width(self) -> int:
        """Width of the target's layers that are read, side by side."""
        assert self.target_hidden_size is not None, "set by the config"
        return len(self.target_layer_ids or ()) * self.target_hidden_size

    @property
    def attention_biases(self) -> int:
        """Numbers of a layer's biases in attention."""
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        return self.attention_bias * (heads * (self.head_dim or 0) + self.hidden_size)

    def own_parts(self) -> OwnParts:
        """Return what the family's blocks are, and what its drafters have beside the matrices of every decoder."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its blocks are.")

    @classmethod
    def own_settings(cls) -> list[str]:
        """Return the names of the settings that decide a drafter's shape: those that not every config has."""
        return [setting.name for setting in fields(cls) if setting.name not in PreTrainedConfig.__dataclass_fields__]

    def portable(self) -> dict[str, Any]:
        """Return the keys that all families' profiles share."""
        # RoPE is written twice: EAGLE's code reads the legacy pair, SGLang and transformers 5 the new form.
        rope = dict(self.rope_parameters or {})
        rope_theta = rope.get("rope_theta", 10000.0)
        is_scaled = rope.get("rope_type", "default") != "default"
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype is not None else "float32"
        return {name: getattr(self, name) for name in _COPIED} | {
            "attention_dropout": 0.0,
            "dtype": dtype,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta} | rope,
            "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"} if is_scaled else None,
            "rope_theta": rope_theta,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            "transformers_version": transformers.__version__,
            "use_cache": True,
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
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """
        Build a config from any published `config.json` of the family, or from its own `to_dict()`.

        Args:
            config_dict (`dict[str, Any]`): The content.
            kwargs: As in `PreTrainedConfig.from_dict`; `num_target_layers` also resolves ids that are not written.

        Raises:
            ValueError: If the content describes another family, or see [`parse_drafter_config`].
        """
        if config_dict.get("model_type") == cls.model_type:
            own = {key: value for key, value in config_dict.items() if key != "model_type"}
        else:
            parsed = parse_drafter_config(config_dict, num_target_layers=kwargs.get("num_target_layers"))
            if parsed.family != cls.family:
                raise ValueError(
                    f"The config describes a {parsed.family} drafter (architectures {parsed.architectures}), but "
                    f"{cls.__name__} reads {cls.family} drafters. Use the other family's class, or `AutoDrafter`."
                )
            own = dict(parsed.arguments)
        return super().from_dict(own, **kwargs)  # pyright: ignore[reportReturnType]  the stub names the base class
