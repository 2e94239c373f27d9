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

        rollout (`str`, *optional*, defaults to `"replay"`):
            `"replay"`: the target answers every prompt once, and each step drafts along its answers with the current drafter: the
            blocks of live decoding (exactly at temperature 0, in law above it) without its cost. `"live"`: the pair decodes every
            prompt in every step.
        completions_from_target (`bool`, *optional*, defaults to `False`):
            Declare that the dataset's completions were written by this target under these sampling settings, and walk them as they
            are. Otherwise they are ignored: Draft-OPD never walks text the target did not write.
        replay_segment_length (`int`, *optional*):
            Tokens per segment of a response that is walked in parallel with the others. Defaults to 1 for EAGLE-3 (one pass over all
            positions, whose later steps run only where the earlier drafts were right) and to 16 for DFlash, whose blocks cost
            more than a few more rounds. Changes speed and nothing else.
        reading_bytes (`int`, *optional*, defaults to `2147483648`):
            Bytes of the target's hidden states kept from a replay for the loss of the same step; micro-batches beyond them are read twice.
        warn_mismatch_share (`float`, *optional*, defaults to `0.01`), max_mismatch_share (`float`, *optional*, defaults to `0.1`):
            Share of response tokens, of the first step, that are not the target's own choice, from which on a replay warns, and
            refuses. Another engine's rounding moves well under 1 %; another model, template or temperature far more than 10 %.
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
        default="replay",
        metadata={"help": "`replay`: draft along the target's answers, written once; `live`: decode every prompt."},
    )
    completions_from_target: bool = field(
        default=False, metadata={"help": "Declare that the dataset's completions were written by this target."}
    )
    replay_segment_length: int | None = field(
        default=None, metadata={"help": "Tokens per segment walked in parallel; family default if unset."}
    )
    reading_bytes: int = field(
        default=2 * 2**30, metadata={"help": "Bytes of target hidden states kept from a replay for the loss."}
    )
    warn_mismatch_share: float = field(
        default=0.01, metadata={"help": "Share of tokens the target would not write from which on a replay warns."}
    )
    max_mismatch_share: float = field(
        default=0.1, metadata={"help": "Share of tokens the target would not write from which on a replay refuses."}
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
        if self.completions_from_target and (self.rollout == "live" or self.trajectories is not None):
            raise ValueError(
                "`completions_from_target=True` walks the dataset's own completions, which `rollout='live'` and `trajectories` would "
                "put aside. Leave one of the two out."
            )
        if self.reading_bytes < 0:
            raise ValueError(f"`reading_bytes` must not be negative, got {self.reading_bytes}. 0 keeps nothing.")
        if self.replay_segment_length is not None and self.replay_segment_length < 1:
            raise ValueError(f"`replay_segment_length` must be at least 1, got {self.replay_segment_length}.")
        if not 0 <= self.warn_mismatch_share <= self.max_mismatch_share <= 1:
            raise ValueError(
                "Mismatch shares must rise within [0, 1], got `warn_mismatch_share` "
                f"{self.warn_mismatch_share} and `max_mismatch_share` {self.max_mismatch_share}."
            )

    def segment_length(self, family: str) -> int:
        """Return the tokens per segment of a replay for a drafter family."""
        defaults = {"eagle3": 1, "dflash": 16}
        return defaults[family] if self.replay_segment_length is None else self.replay_segment_length
