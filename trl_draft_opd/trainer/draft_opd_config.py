# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Settings of Draft-OPD training."""

from dataclasses import dataclass, field

from ..rollout.blocks import REJECTED_SCOPES
from .common_config import (
    DraftTrainingConfig,
    check_choice,
    check_loss_type,
    check_position_decay,
)


SUPERVISED_ANCHORS = ("random", "error")


@dataclass
class DraftOPDConfig(DraftTrainingConfig):
    r"""
    Configuration of [`DraftOPDTrainer`]: the settings of [`DraftTrainingConfig`], and these.

    Parameters:
        > Parameters that control the rollout

        rollout (`str`, *optional*, defaults to `"replay"`):
            `"replay"`: the target answers every prompt once, and each step drafts along its answers with the current drafter: the
            blocks of live decoding (exactly at temperature 0, in distribution above it) without its cost. `"live"`: the pair decodes every
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
        rejected_scope (`str`, *optional*, defaults to `"first"`):
            `"first"`: the first rejected slot alone; `"suffix"`: every slot from there on, as the paper. The default departs from the
            paper: at equal FLOPs the suffix was behind by 1.9 to 3.3 % of tau in three of four pairs and not clearly apart in the
            fourth, and its updates cost a sixth (EAGLE-3) to two fifths (DFlash) more (docs/why/results.md, section 3).
            Slots behind a rejection are never reached when serving.

        > Parameters that control the loss

        rejected_loss (`str`, *optional*, defaults to `"reverse_kl"`):
            Divergence on rejected slots. Reverse KL drops modes the target does not support, the paper's choice.
        accepted_weight (`float`, *optional*, defaults to `1.0`), rejected_weight (`float`, *optional*, defaults to `1.0`):
            Weights of the two streams, both 1 in the paper.
        position_decay (`float`, *optional*, defaults to `0.8`):
            Weight decay per slot on the rejected and on the supervised stream, in (0, 1], counted from the anchor; 0.8 in the paper. Not
            applied under `slot_weighting="d_pace"`, which weighs accepted slots, the first rejected one and supervised slots; it needs
            `rejected_scope="first"`, because no token is committed behind a first rejection.
        supervised_weight (`float`, *optional*, defaults to `0.0`):
            Weight of a third stream: blocks supervised by the committed text on all their slots, as supervised training does, with
            `accepted_loss`. Off, as in the paper; the three weights share the loss.
        supervised_anchors (`str`, *optional*, defaults to `"random"`):
            Anchors of that stream. `"random"`: positions of the response drawn at random; `"error"`: the anchors of the drafter's own chain.
        num_supervised_anchors (`int`, *optional*, defaults to `24`):
            Anchors per row that `"random"` draws, keyed by seed, epoch and sample; 0 takes every position.

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
    rejected_scope: str = field(
        default="first",
        metadata={"help": "`first`: the first rejected slot alone; `suffix`: every slot from there on, as the paper."},
    )
    rejected_loss: str = field(default="reverse_kl", metadata={"help": "Divergence on rejected slots."})
    accepted_weight: float = field(default=1.0, metadata={"help": "Weight of the accepted stream."})
    rejected_weight: float = field(default=1.0, metadata={"help": "Weight of the rejected stream."})
    position_decay: float = field(
        default=0.8, metadata={"help": "Weight decay per slot on the rejected and supervised streams, in (0, 1]."}
    )
    supervised_weight: float = field(
        default=0.0, metadata={"help": "Weight of the stream supervised by the committed text; 0 leaves it out."}
    )
    supervised_anchors: str = field(
        default="random",
        metadata={"help": "Anchors of the supervised stream: `random` positions or the `error` ones."},
    )
    num_supervised_anchors: int = field(
        default=24, metadata={"help": "Random anchors of the supervised stream per row; 0 takes every position."}
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
            "rejected_scope": REJECTED_SCOPES,
            "supervised_anchors": SUPERVISED_ANCHORS,
        }.items():
            check_choice(name, getattr(self, name), known)
        self._check_streams()
        if self.completions_from_target and (self.rollout == "live" or self.responses is not None):
            raise ValueError(
                "`completions_from_target=True` walks the dataset's own completions, which `rollout='live'` and `responses` would "
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

    def _check_streams(self) -> None:
        weights = (self.accepted_weight, self.rejected_weight, self.supervised_weight)
        if min(weights) < 0 or sum(weights) == 0:
            raise ValueError(
                "`accepted_weight`, `rejected_weight` and `supervised_weight` must not be negative nor all 0, got "
                f"{', '.join(map(str, weights))}."
            )
        if self.num_supervised_anchors < 0:
            raise ValueError(
                f"`num_supervised_anchors` must be at least 0 (0 takes every position), got {self.num_supervised_anchors}."
            )
        if self.uses_d_pace and self.trains_suffix:
            raise ValueError(
                "`slot_weighting='d_pace'` weighs slots by the drafter's probability of the committed token, and no token is committed "
                "behind a first rejection. Set `rejected_scope='first'`."
            )

    @property
    def trains_suffix(self) -> bool:
        """Whether slots behind a first rejection carry weight."""
        return self.rejected_scope == "suffix" and self.rejected_weight > 0

    @property
    def trains_chain(self) -> bool:
        """Whether the blocks of the drafter's own chain carry weight."""
        return self.accepted_weight > 0 or self.rejected_weight > 0

    @property
    def slot_decay(self) -> float:
        """Weight decay per slot in use: 1 where D-PACE weighs the slots."""
        return 1.0 if self.uses_d_pace else self.position_decay

    def segment_length(self, family: str) -> int:
        """Return the tokens per segment of a replay for a drafter family."""
        defaults = {"eagle3": 1, "dflash": 16}
        return defaults[family] if self.replay_segment_length is None else self.replay_segment_length
