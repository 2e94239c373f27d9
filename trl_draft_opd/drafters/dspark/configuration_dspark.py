# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Configuration of a DSpark drafter, and the flat `config.json` it is saved in."""

from dataclasses import replace
from typing import Any

from ...costs.shapes import OwnParts
from ..dflash import DFlashDraftConfig
from .exported_dspark import ExportedDSpark
from .published_dspark import PublishedDSpark


class DSparkDraftConfig(DFlashDraftConfig):
    r"""
    Shape of a DSpark drafter. The saved `config.json` is that of DeepSpec's checkpoints, which vLLM reads.

    Args:
        block_size (`int`, *optional*, defaults to 7):
            As in [`DFlashDraftConfig`]; 7 as published.
        markov_rank (`int`, *optional*, defaults to 256):
            Width of what a slot keeps of the token before it; 256 as published. With 0 there is no Markov head, and
            what is left is a DFlash drafter under DSpark's name.
        enable_confidence_head (`bool`, *optional*, defaults to `True`):
            Whether there is a head that predicts a slot's chance of being accepted.
        confidence_head_with_markov (`bool`, *optional*, defaults to `True`):
            Whether that head also reads what the Markov head keeps of the token before the slot.
        sample_from_anchor (`bool`, *optional*, defaults to `True`):
            As in [`DFlashDraftConfig`]; `True` as published, which engines take for granted.
        kwargs:
            As in [`DFlashDraftConfig`].

    Raises:
        ValueError: If the rank is negative, the confidence head reads a Markov head that is not there, or see
            [`DFlashDraftConfig`].
    """

    model_type = "draft_opd_dspark"
    family = "dspark"
    title = "DSpark"
    exported = ExportedDSpark()
    published = PublishedDSpark()
    # exp(-1 / 4), as published.
    default_position_decay = 0.78

    block_size: int = 7
    sample_from_anchor: bool = True
    markov_rank: int = 256
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.markov_rank < 0:
            raise ValueError(
                f"`markov_rank` must be at least 0 (no Markov head), got {self.markov_rank}. Published is 256."
            )
        if self.markov_rank == 0 and self.enable_confidence_head and self.confidence_head_with_markov:
            raise ValueError(
                "`confidence_head_with_markov=True` reads the Markov head, which `markov_rank=0` leaves out. Set it "
                "to False, or `enable_confidence_head=False`."
            )

    @property
    def has_confidence_head(self) -> bool:
        return self.enable_confidence_head

    def own_parts(self) -> OwnParts:
        rank, plain = self.markov_rank, super().own_parts()
        read = self.hidden_size + (rank if self.confidence_head_with_markov else 0)
        return replace(
            plain,
            # The confidence head's bias and weights.
            vectors=plain.vectors + self.enable_confidence_head,
            slot_matrices=self.enable_confidence_head * read,
            token_rank=rank,
            head_rank=rank,
            tables=self.vocab_size * rank,
        )

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the flat profile, the form written to `config.json`."""
        flat = super().to_diff_dict()
        # vLLM refuses a drafter whose `dflash_config` says so, and reads it beside.
        sample_from_anchor = flat["dflash_config"].pop("sample_from_anchor")
        return flat | {
            "architectures": ["Qwen3DSparkModel"],
            "confidence_head_with_markov": self.confidence_head_with_markov,
            "enable_confidence_head": self.enable_confidence_head,
            "markov_head_type": "vanilla",
            "markov_rank": self.markov_rank,
            "sample_from_anchor": sample_from_anchor,
        }
