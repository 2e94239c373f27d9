# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Configuration of an EAGLE-3 drafter, and the portable profile it is saved in."""

from typing import Any

from ...costs.shapes import OwnParts
from ..portable_config import PortableConfig
from .exported_eagle3 import ExportedEagle3
from .published_eagle3 import PublishedEagle3


class Eagle3DraftConfig(PortableConfig):
    r"""
    Shape of an EAGLE-3 drafter. In memory, layer ids are 0-based indices of the layer whose output is read; the saved
    `config.json` is the flat portable profile that vLLM, SGLang and EAGLE's code read.

    Args:
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
        kwargs:
            As in [`PortableConfig`]; three layers are tapped as published.

    Raises:
        ValueError: If layer ids do not fit the target, norms exclude each other, or a size is out of range.
    """

    model_type = "draft_opd_eagle3"
    family = "eagle3"
    title = "EAGLE-3"
    exported = ExportedEagle3()
    published = PublishedEagle3()
    drafts_whole_blocks = False
    # Step 1 runs over all positions anyway, and later steps only where the earlier drafts were right.
    default_num_anchors = 0
    default_segment_length = 1
    # As in EAGLE's training code.
    default_position_decay = 0.8
    trains_head = True

    num_hidden_layers: int = 1
    mlp_bias: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    ttt_steps: int = 7

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_hidden_layers != 1:
            raise ValueError(
                f"An EAGLE-3 drafter has 1 layer, got num_hidden_layers={self.num_hidden_layers}. Engines disagree on "
                "deeper ones."
            )
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("`fc_norm` and `norm_before_fc` norm the same features; set one of them.")
        if self.ttt_steps < 1:
            raise ValueError(f"`ttt_steps` must be at least 1, got {self.ttt_steps}. The published setting is 7.")

    @property
    def owns_head(self) -> bool:
        return True

    def own_parts(self) -> OwnParts:
        vectors = 4 * self.hidden_size + self.feature_width * (self.fc_norm + self.norm_before_fc)
        vectors += self.attention_biases + self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        # A layer reads token and state side by side.
        return OwnParts(self.ttt_steps, self.ttt_steps, 2 * self.hidden_size, vectors)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the flat portable profile, the form written to `config.json`."""
        layer_ids = self.target_layer_ids or []
        return self.portable() | {
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
