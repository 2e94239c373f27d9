# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Settings of Draft-OPD training."""

from dataclasses import dataclass

from ..drafters.portable_config import PortableConfig
from ..losses import LOSS_TYPES
from ..rollout.blocks import REJECTED_SCOPES
from ..utils.settings import check_at_least
from .common_config import DraftTrainingConfig, check_choice, check_position_decay, setting


ROLLOUTS = ("live", "replay")
SUPERVISED_ANCHORS = ("random", "error")


@dataclass
class DraftOPDConfig(DraftTrainingConfig):
    r"""
    Configuration of [`DraftOPDTrainer`]: the settings of [`DraftTrainingConfig`], and these.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"drafter-opd"`):
            Folder for the drafter and its checkpoints.

        > Parameters that control the rollout

        rollout (`str`, *optional*, defaults to `"replay"`):
            `"replay"`: the target responds to every prompt once, and each step drafts along its responses: the blocks
            of live decoding (exactly at temperature 0, in distribution above it) without its cost. `"live"`: the pair
            decodes every prompt in every step.
        completions_from_target (`bool`, *optional*, defaults to `False`):
            Declare that the dataset's completions were written by this target under these sampling settings, and walk
            them as they are. Otherwise they are ignored.
        replay_segment_length (`int`, *optional*):
            Tokens per segment of a response that is walked in parallel with the others. Defaults to 1 for EAGLE-3 (one
            pass over all positions) and to 16 for DFlash. Changes speed and nothing else.
        reading_bytes (`int`, *optional*, defaults to `2147483648`):
            Bytes of the target's hidden states kept from a replay for the loss of the same step; the target reads
            micro-batches beyond them twice.
        warn_mismatch_share (`float`, *optional*, defaults to `0.01`),
        max_mismatch_share (`float`, *optional*, defaults to `0.1`):
            Share of response tokens, of the first step, that are not the target's own choice, from which on a replay
            warns, and refuses. Another engine's rounding moves well under 1 %; another model, template or temperature
            far more than 10 %.
        rejected_scope (`str`, *optional*, defaults to `"first"`):
            `"first"`: the first rejected slot alone; `"suffix"`: every slot from there on, as in the paper. The
            default departs from the paper: at equal FLOPs the suffix lost 1.9 to 3.3 % of tau in three of four pairs
            and was not clearly apart in the fourth, and its updates cost a sixth (EAGLE-3) to two fifths (DFlash) more
            (docs/why/small_targets.md, section 3).

        > Parameters that control the loss

        rejected_loss (`str`, *optional*, defaults to `"forward_kl"`):
            Divergence on rejected slots. The default departs from the paper's `"reverse_kl"`, whose gradient towards
            the target's token vanishes where the drafter gives it little: on a public model, forward KL has more tau
            at equal FLOPs with both families (docs/why/results.md).
        accepted_weight (`float`, *optional*, defaults to `1.0`),
        rejected_weight (`float`, *optional*, defaults to `1.0`):
            Weights of the two streams, both 1 in the paper.
        position_decay (`float`, *optional*, defaults to `0.8`):
            Weight decay per slot on the rejected and the supervised stream, in (0, 1]; 0.8 in the paper. Not applied
            under `slot_weighting="d_pace"`, which needs `rejected_scope="first"`.
        supervised_weight (`float`, *optional*, defaults to `0.0`):
            Weight of a third stream: blocks supervised by the committed text on all their slots, as in supervised
            training, with `accepted_loss`. Off, as in the paper; the three weights share the loss.
        supervised_anchors (`str`, *optional*, defaults to `"random"`):
            Anchors of that stream: `"random"` positions of the response, or those of the drafter's chain (`"error"`).
        num_supervised_anchors (`int`, *optional*, defaults to `24`):
            Anchors per row that `"random"` draws, keyed by seed, epoch and sample; 0 takes every position.

        > Parameters that control logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Print responses with drafted, accepted and rejected tokens in colour, every `logging_steps`. Off, because
            prompts can be private.
        num_completions_to_print (`int`, *optional*, defaults to `2`):
            Responses printed each time.
    """

    output_dir: str | None = setting("drafter-opd", "Folder for the drafter and its checkpoints.")
    rollout: str = setting(
        "replay", "`replay`: draft along the target's responses; `live`: decode every prompt.", choices=ROLLOUTS
    )
    completions_from_target: bool = setting(False, "Declare that the target wrote the dataset's completions.")
    replay_segment_length: int | None = setting(None, "Tokens per segment walked in parallel; the family's if unset.")
    reading_bytes: int = setting(2 * 2**30, "Bytes of target hidden states kept from a replay for the loss.")
    warn_mismatch_share: float = setting(0.01, "Share of tokens not the target's from which on a replay warns.")
    max_mismatch_share: float = setting(0.1, "Share of tokens not the target's from which on a replay refuses.")
    rejected_scope: str = setting(
        "first", "`first`: the first rejected slot alone; `suffix`: all from there on.", choices=REJECTED_SCOPES
    )
    rejected_loss: str = setting("forward_kl", "Divergence on rejected slots.", choices=LOSS_TYPES)
    accepted_weight: float = setting(1.0, "Weight of the accepted stream.")
    rejected_weight: float = setting(1.0, "Weight of the rejected stream.")
    position_decay: float = setting(0.8, "Weight decay per slot on the rejected and supervised streams, in (0, 1].")
    supervised_weight: float = setting(0.0, "Weight of the stream supervised by the committed text; 0 leaves it out.")
    supervised_anchors: str = setting(
        "random", "Anchors of the supervised stream: `random` ones or the `error` ones.", choices=SUPERVISED_ANCHORS
    )
    num_supervised_anchors: int = setting(24, "Random anchors per row of that stream; 0 takes every position.")
    log_completions: bool = setting(False, "Print sampled responses with drafted, accepted and rejected tokens.")
    num_completions_to_print: int = setting(2, "Responses printed each time.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rejected_loss", self.rejected_loss, LOSS_TYPES)
        check_choice("rollout", self.rollout, ROLLOUTS)
        check_choice("rejected_scope", self.rejected_scope, REJECTED_SCOPES)
        check_choice("supervised_anchors", self.supervised_anchors, SUPERVISED_ANCHORS)
        check_position_decay(self.position_decay)
        check_at_least(self, 1, "replay_segment_length")
        check_at_least(self, 0, "reading_bytes", "num_supervised_anchors")
        check_at_least(self, 1, "num_completions_to_print")
        self._check_streams()
        if self.train_sampling_strategy == "group_by_length" and not self.completions_from_target:
            raise ValueError(
                "`train_sampling_strategy='group_by_length'` sorts rows by their whole text, and responses are not "
                "written yet. Leave it out: the rows of an update are dealt to its batches by length anyway."
            )
        if self.completions_from_target and (self.rollout == "live" or self.responses is not None):
            raise ValueError(
                "`completions_from_target=True` walks the dataset's own completions, which `rollout='live'` and "
                "`responses` would put aside. Leave one of the two out."
            )
        if self.readings is not None and (self.rollout == "live" or self.trains_suffix):
            given = "rollout='live'" if self.rollout == "live" else "rejected_scope='suffix'"
            raise ValueError(
                f"`{given}` makes text that no reading was kept of, and needs the target's decoder layers at every "
                "step. With `readings`, use `rollout='replay'` and `rejected_scope='first'`, or leave `readings` out."
            )
        if not 0 <= self.warn_mismatch_share <= self.max_mismatch_share <= 1:
            raise ValueError(
                f"Mismatch shares must rise within [0, 1], got `warn_mismatch_share` {self.warn_mismatch_share} and "
                f"`max_mismatch_share` {self.max_mismatch_share}."
            )

    def _check_streams(self) -> None:
        weights = (self.accepted_weight, self.rejected_weight, self.supervised_weight)
        if min(weights) < 0 or sum(weights) == 0:
            raise ValueError(
                "`accepted_weight`, `rejected_weight` and `supervised_weight` must not be negative nor all 0, got "
                f"{', '.join(map(str, weights))}."
            )
        if self.uses_d_pace and self.trains_suffix:
            raise ValueError(
                "`slot_weighting='d_pace'` weighs slots by the drafter's probability of the committed token, and no "
                "token is committed behind a first rejection. Set `rejected_scope='first'`."
            )

    @property
    def trained_streams(self) -> tuple[str, ...]:
        weights = {
            "accepted": self.accepted_weight,
            "rejected": self.rejected_weight,
            "supervised": self.supervised_weight,
        }
        return tuple(name for name, weight in weights.items() if weight > 0)

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

    def segment_length(self, drafter: PortableConfig) -> int:
        """Return the tokens per segment of a replay for a drafter of this config."""
        return drafter.default_segment_length if self.replay_segment_length is None else self.replay_segment_length
