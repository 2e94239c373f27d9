# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Settings of supervised drafter training."""

import warnings
from dataclasses import dataclass
from typing import Self

from ..drafters.portable_config import PortableConfig
from ..target.lengths import fit_text_length
from ..utils.settings import check_at_least
from .common_config import DraftTrainingConfig, check_choice, check_position_decay, setting


SLOT_SCOPES = ("block", "until_fail")
# Holds the longest prompt and response, and a turn more.
MAX_LENGTH = 4096
# A head over more tokens than this costs more than all else in an EAGLE-3 drafter; its authors publish 32,000 tokens.
LARGE_VOCABULARY, DRAFT_VOCAB_SIZE = 65_536, 32_000


@dataclass
class DraftSFTConfig(DraftTrainingConfig):
    r"""
    Configuration of [`DraftSFTTrainer`]: the settings of [`DraftTrainingConfig`], and these.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"drafter-sft"`):
            Folder for the drafter and its checkpoints.
        max_length (`int`, *optional*):
            Rows are cut behind this many tokens, and counted. Defaults to 4096, or to what a block leaves of the
            target's positions.
        regenerate (`bool`, *optional*, defaults to `False`):
            Have the target rewrite every completion before training. A drafter should learn the target's own text;
            turn it on when the dataset was written by someone else. `responses` needs it.
        draft_vocab_size (`int`, *optional*):
            Tokens that a drafter can propose from when training starts: the most frequent of the responses it trains
            on, and those that end them. Others cannot be drafted, so every one in a text is a rejection; the share is
            logged and goes on the card. A drafter that has a part already exchanges it: tokens it had keep what they
            learned, and stay where others are not more frequent. 0 keeps all. By default a fresh EAGLE-3 drafter gets
            32,000 where the target has more than 65,536, as its authors publish theirs; other families, and a drafter
            that was loaded, keep what they have. DFlash 2 drafts from the whole vocabulary alone.
        num_anchors (`int`, *optional*):
            Anchors per row and epoch; 0 takes every position. Defaults to every position for EAGLE-3, and to 64 for
            the others, which draft whole blocks: about half the positions of a short response.
        position_decay (`float`, *optional*):
            Weight decay per slot, in (0, 1]. Defaults to 0.8 for EAGLE-3, 0.87 for DFlash and DFlash 2 and 0.78 for
            DSpark, as their authors train them. Not applied under `slot_weighting="d_pace"`.
        slot_scope (`str`, *optional*, defaults to `"block"`):
            `"block"`: every slot is trained. `"until_fail"`: those up to and including the first one where the
            drafter's argmax is not the committed token, which decoding would reach (Source:
            [Spec-AUF](https://huggingface.co/papers/2607.01893)); the loss is still divided by the weights of all
            slots. Off: at equal FLOPs it gained 0.7 % of tau for DFlash on mathematics and lost 2.9 % for EAGLE-3 on
            code (docs/why/small_targets.md).
    """

    output_dir: str | None = setting("drafter-sft", "Folder for the drafter and its checkpoints.")
    max_length: int | None = setting(
        None, f"Rows are cut behind this many tokens; {MAX_LENGTH} if unset, or what the target's positions allow."
    )
    regenerate: bool = setting(False, "Have the target rewrite every completion before training.")
    draft_vocab_size: int | None = setting(
        None,
        "Tokens that can be drafted, the most frequent ones; 0 keeps all; unset, a fresh EAGLE-3 has 32000 of many.",
    )
    num_anchors: int | None = setting(None, "Anchors per row and epoch; 0 takes all positions; the family's if unset.")
    position_decay: float | None = setting(None, "Weight decay per slot, in (0, 1]; the family's if unset.")
    slot_scope: str = setting(
        "block", "`block`: train every slot; `until_fail`: up to the drafter's first mismatch.", choices=SLOT_SCOPES
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_decay is not None:
            check_position_decay(self.position_decay)
            if self.uses_d_pace:
                warnings.warn(f"`position_decay={self.position_decay}` is ignored under `slot_weighting='d_pace'`.")
        check_choice("slot_scope", self.slot_scope, SLOT_SCOPES)
        if self.responses is not None and not self.regenerate:
            raise ValueError(
                f"`responses={self.responses!r}` keeps the target's own text, which SFT trains on with "
                "`regenerate=True` (`--regenerate`) alone. Set it, or leave `responses` out to train on the dataset's "
                "own completions."
            )
        check_at_least(self, 0, "num_anchors", "draft_vocab_size")
        check_at_least(self, 2, "max_length")

    def fit_to(self, num_positions: int | None, num_drafts: int) -> Self:
        fitted = super().fit_to(num_positions, num_drafts)
        fitted.max_length = fit_text_length(num_positions, self.max_length, num_drafts=num_drafts, default=MAX_LENGTH)
        return fitted

    def anchors_per_row(self, drafter: PortableConfig) -> int | None:
        """Return the anchors sampled per row for a drafter of this config, `None` for every position."""
        return (drafter.default_num_anchors if self.num_anchors is None else self.num_anchors) or None

    def decay(self, drafter: PortableConfig) -> float:
        """Return the weight decay per slot for a drafter of this config; 1 where D-PACE weighs the slots."""
        if self.uses_d_pace:
            return 1.0
        return drafter.default_position_decay if self.position_decay is None else self.position_decay

    @property
    def completions_are_given(self) -> bool:
        return not self.regenerate
