# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Settings of Draft-OPD training."""

from dataclasses import dataclass, field

from ..anchors import REJECTED_SCOPES
from .common_config import DraftTrainingConfig, check_loss_type, check_position_decay


@dataclass
class DraftOPDConfig(DraftTrainingConfig):
    r"""
    Configuration of [`DraftOPDTrainer`]: the settings of [`DraftTrainingConfig`], and these.

    Parameters:
        > Parameters that control the rollout

        rollout (`str`, *optional*, defaults to `"live"`):
            `"live"`: the pair decodes every prompt in every step. `"replay"`: the blocks are drafted along responses the
            target already wrote, which are the same blocks at temperature 0 without any generation; needs
            `completions_from_target=True`.
        completions_from_target (`bool`, *optional*, defaults to `False`):
            Declare that the dataset's completions were written by this target under these sampling settings. Otherwise they are
            ignored: Draft-OPD never walks text the target did not write.
        anchor_mode (`str`, *optional*, defaults to `"error"`):
            `"error"`: the anchors of the drafter's own chain. `"random"`: as many positions drawn at random, the ablation.
        rejected_scope (`str`, *optional*, defaults to `"suffix"`):
            `"suffix"`: every slot from the first rejection on, as the paper; `"first"`: the first rejected slot alone.

        > Parameters that control the loss

        rejected_loss (`str`, *optional*, defaults to `"reverse_kl"`):
            Divergence on rejected slots. Reverse KL drops modes the target does not support, the paper's choice.
        accepted_weight (`float`, *optional*, defaults to `1.0`), rejected_weight (`float`, *optional*, defaults to `1.0`):
            Weights of the two streams, both 1 in the paper.
        position_decay (`float`, *optional*, defaults to `0.8`):
            Weight decay per slot on the rejected stream, in (0, 1], counted from the anchor; 0.8 in the paper.

        > Parameters that control logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Print sampled responses with drafted, accepted and rejected tokens in colour, every `logging_steps`. Off, because
            prompts can be private.
        num_completions_to_print (`int`, *optional*, defaults to `2`):
            Responses printed each time.
    """

    rollout: str = field(
        default="live",
        metadata={"help": "`live`: decode every prompt; `replay`: draft along stored target responses."},
    )
    completions_from_target: bool = field(
        default=False, metadata={"help": "Declare that the dataset's completions were written by this target."}
    )
    anchor_mode: str = field(
        default="error", metadata={"help": "`error`: the anchors of the drafter's chain; `random`: the ablation."}
    )
    rejected_scope: str = field(
        default="suffix",
        metadata={"help": "`suffix`: every slot from the first rejection on; `first`: that slot alone."},
    )
    rejected_loss: str = field(default="reverse_kl", metadata={"help": "Divergence on rejected slots."})
    accepted_weight: float = field(default=1.0, metadata={"help": "Weight of the accepted stream."})
    rejected_weight: float = field(default=1.0, metadata={"help": "Weight of the rejected stream."})
    position_decay: float = field(
        default=0.8, metadata={"help": "Weight decay per slot on the rejected stream, in (0, 1]."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print sampled responses with drafted, accepted and rejected tokens."}
    )
    num_completions_to_print: int = field(default=2, metadata={"help": "Responses printed each time."})

    def __post_init__(self):
        super().__post_init__()
        check_loss_type("rejected_loss", self.rejected_loss)
        check_position_decay(self.position_decay)
        for name, known in {
            "rollout": ("live", "replay"),
            "anchor_mode": ("error", "random"),
            "rejected_scope": REJECTED_SCOPES,
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}.")
        if min(self.accepted_weight, self.rejected_weight) < 0 or self.accepted_weight + self.rejected_weight == 0:
            raise ValueError(
                f"`accepted_weight` and `rejected_weight` must not be negative nor both 0, got {self.accepted_weight} and "
                f"{self.rejected_weight}."
            )
        if self.rollout == "replay" and not self.completions_from_target:
            raise ValueError(
                "`rollout='replay'` drafts along stored responses. Give a dataset whose completions this target wrote and set "
                "`completions_from_target=True`, or use `rollout='live'`."
            )
        draws = self.draft_sampling == "sample" and self.temperature > 0
        if draws and (self.rollout == "replay" or self.anchor_mode == "random"):
            raise ValueError(
                "Drafts drawn with `draft_sampling='sample'` can only be replayed from a live rollout's own chain. Use "
                "`draft_sampling='greedy'`, or `rollout='live'` with `anchor_mode='error'`."
            )
