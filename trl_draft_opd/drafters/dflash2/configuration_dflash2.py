# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a DFlash 2 drafter, and the portable profile it is saved in."""

from dataclasses import replace
from typing import Any

from ...costs.shapes import OwnParts
from ..dflash import DFlashDraftConfig
from .exported_dflash2 import ExportedDFlash2
from .published_dflash2 import PublishedDFlash2


class DFlash2DraftConfig(DFlashDraftConfig):
    r"""
    Shape of a DFlash 2 drafter. The saved `config.json` is the portable profile that vLLM, SGLang and z-lab's code
    read.

    Args:
        conv_kernel_size (`int`, *optional*, defaults to 2):
            Slots that a convolution reads: a slot and those right before it. 2 as published.
        conv_group_size (`int`, *optional*, defaults to 16):
            Channels that share what a convolution's kernel owes to the slot; divides `hidden_size`. 16 as published.
        selector_rank (`int`, *optional*, defaults to 256):
            Width of the selector's codebooks. 256 as published.
        selector_top_k (`int`, *optional*, defaults to 16):
            Tokens of each slot that the selector chooses among. 16 as published.
        kwargs:
            As in [`DFlashDraftConfig`].

    Raises:
        ValueError: If a size is out of range, or the drafter's vocabulary is a part of the target's.
    """

    model_type = "draft_opd_dflash2"
    family = "dflash2"
    title = "DFlash 2"
    exported = ExportedDFlash2()
    published = PublishedDFlash2()
    whole_vocabulary_reason = "its selector has rows for all tokens of the target, and no engine reads another"

    conv_kernel_size: int = 2
    conv_group_size: int = 16
    selector_rank: int = 256
    selector_top_k: int = 16

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 1 <= self.conv_kernel_size <= self.block_size:
            raise ValueError(
                f"`conv_kernel_size` must lie in 1..{self.block_size} (`block_size`), got {self.conv_kernel_size}. "
                "Published is 2."
            )
        if self.conv_group_size < 1 or self.hidden_size % self.conv_group_size:
            raise ValueError(
                f"`conv_group_size` must divide `hidden_size` {self.hidden_size}, got {self.conv_group_size}. "
                "Published is 16."
            )
        if self.selector_rank < 1:
            raise ValueError(f"`selector_rank` must be at least 1, got {self.selector_rank}. Published is 256.")
        if not 1 <= self.selector_top_k <= self.vocab_size:
            raise ValueError(
                f"`selector_top_k` must lie in 1..{self.vocab_size} (the vocabulary), got {self.selector_top_k}. "
                "Published is 16."
            )

    def own_parts(self) -> OwnParts:
        hidden, taps, rank = self.hidden_size, self.conv_kernel_size, self.selector_rank
        plain = super().own_parts()
        return replace(
            plain,
            # Around each of two sublayers, two convolutions.
            vectors=plain.vectors + self.num_hidden_layers * 4 * taps * hidden,
            layer_matrices=4 * taps * (hidden // self.conv_group_size) * hidden,
            slot_matrices=hidden * rank,
            taps=taps,
            token_rank=rank,
            tables=2 * self.vocab_size * rank,
            candidates=self.selector_top_k,
        )

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the flat portable profile, the form written to `config.json`."""
        profile = super().to_diff_dict()
        # The engines' readers of this family look for all of its settings in the nested section.
        own = {
            "conv_kernel_size": self.conv_kernel_size,
            "conv_group_size": self.conv_group_size,
            "selector_rank": self.selector_rank,
            "selector_top_k": self.selector_top_k,
        }
        nested = profile["dflash_config"] | own
        return profile | {"architectures": ["DFlash2DraftModel"], "dflash_config": nested}
