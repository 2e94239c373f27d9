# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How good a drafter is: tau with its interval, acceptance per slot, speed against plain decoding in the same run, and
whether every output is the target's own. Uses the rollouts that training uses: live, or along the target's responses
where its cache cannot be rolled back.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.table import Table

from .data.token_classes import TOKEN_CLASSES, token_classes
from .drafters.base import Drafter
from .losses import default_chunk_bytes
from .responses import generate_responses
from .responses.progress import showing_progress
from .rollout.acceptance import SamplingSettings
from .rollout.calibration import Calibration
from .rollout.counts import Counts, describe_tau, interval, resampled_taus
from .rollout.drafting import DraftingSettings
from .rollout.keyed_random import DrawKeys
from .rollout.live import rollout_live
from .rollout.rejections import rejection_sums
from .rollout.replay import rollout_replay
from .rollout.texts import join_responses
from .rollout.types import Rollout
from .target.frozen import FrozenTarget
from .target.lengths import TRAINING_LENGTHS, Lengths, fit_lengths


# A sample of each response, in minutes rather than hours.
EVALUATION_LENGTHS = Lengths(TRAINING_LENGTHS.prompt, 256)


@dataclass(frozen=True)
class EvaluationReport:
    """
    Result of [`evaluate_drafter`].

    Attributes:
        tau (`float`): Accepted length, the bonus counted: pooled `sum (r + 1) / blocks` over blocks inside the text.
        tau_low (`float`), tau_high (`float`): 95 % interval by bootstrap over prompts.
        acceptance_per_slot (`list[float]`): Share of counted blocks that keep at least `k` drafts, for `k = 1..K`.
        tokens_per_target_forward (`float`): Response tokens per target pass of a row, its prefill included.
        speedup (`float` or `None`):
            Plain decoding time over speculative time, same batches, same process; `None` if not compared.
        num_different (`int` or `None`): Responses that differ from the target's own; `None` if not compared.
        different_prompts (`list[int]`): Indices of those prompts.
        num_prompts (`int`), num_tokens (`int`), num_blocks (`int`), num_drafts (`int`), batch_size (`int`):
            Sizes of the run.
        temperature (`float`), max_completion_length (`int` or `None`), ignore_eos (`bool`), draft_sampling (`str`):
            How it was decoded; see [`evaluate_drafter`].
        accepted_sums (`list[int]`), block_counts (`list[int]`):
            Per prompt, for paired comparisons: `sum (r + 1)` and counted blocks.
        drafts_per_block (`float`), kept_share (`float`):
            Drafts that the target verified per counted block, and which share of them it kept.
        min_confidence (`float` or `None`): As it was given.
        calibration (`dict` or `None`): See [`Calibration.report`]; `None` for a drafter without a confidence head.
        is_replay (`bool`): Whether the blocks were found along responses, and none was decoded live.
        rejections (`dict[str, list[int]]`):
            Rejected and decided drafts by class of the target's token and by position, see [`rejection_sums`].
    """

    tau: float
    tau_low: float
    tau_high: float
    acceptance_per_slot: list[float]
    tokens_per_target_forward: float
    speedup: float | None
    num_different: int | None
    different_prompts: list[int]
    num_prompts: int
    num_tokens: int
    num_blocks: int
    num_drafts: int
    batch_size: int
    temperature: float
    accepted_sums: list[int]
    block_counts: list[int]
    drafts_per_block: float | None = None
    kept_share: float | None = None
    min_confidence: float | None = None
    calibration: dict[str, Any] | None = None
    is_replay: bool = False
    rejections: dict[str, list[int]] = field(default_factory=dict)
    max_completion_length: int | None = None
    ignore_eos: bool = False
    draft_sampling: str = "greedy"

    def to_dict(self) -> dict:
        """Return plain numbers and lists for JSON."""
        return asdict(self)

    def table(self, title: str) -> Table:
        """Return a table to print with `rich`."""
        table = Table("measure", "value", title=title)
        table.add_row("tau (accepted length, with bonus)", describe_tau(self.tau, self.tau_low, self.tau_high))
        table.add_row("acceptance per slot", " ".join(f"{rate:.2f}" for rate in self.acceptance_per_slot))
        table.add_row("tokens per target forward", f"{self.tokens_per_target_forward:.3f}")
        if self.drafts_per_block is not None and self.kept_share is not None:
            verified = f"{self.drafts_per_block:.2f} of {self.num_drafts}, {self.kept_share:.1%}"
            table.add_row("drafts verified per block, share kept", verified)
        if self.calibration is not None:
            confident, kept = self.calibration["mean_confidence"], self.calibration["mean_kept"]
            table.add_row("confidence, drafts kept where reached", f"{confident:.3f}, {kept:.3f}")
            errors = f"{self.calibration['error']:.3f}, {self.calibration['brier']:.3f}"
            table.add_row("expected calibration error, Brier score", errors)
        if self.speedup is not None:
            table.add_row(f"speed against plain decoding (batch {self.batch_size})", f"{self.speedup:.2f}x")
        if self.num_different is not None:
            same = self.num_prompts - self.num_different
            table.add_row("outputs equal to the target's own", f"{same} of {self.num_prompts}")
        table.add_row("prompts, tokens, blocks", f"{self.num_prompts}, {self.num_tokens}, {self.num_blocks}")
        if self.is_replay:
            table.add_row("measured by", "replay along the target's responses")
        return table


def explain_replay(reason: str | None) -> str:
    """Return why tau is measured by replay, given the target's `rollback_reason`, and what that makes of it."""
    why = "The responses were given" if reason is None else f"The target {reason}"
    return (
        f"{why}: tau is measured by replay along the target's responses, without live decoding. At temperature 0 the "
        "blocks are those that live decoding would have drafted; above it, they have the same distribution."
    )


def explain_difference(dtype: torch.dtype) -> str:
    """Return why outputs can differ from the target's own, and what to do about it."""
    why = (
        f"The target computes in {str(dtype).removeprefix('torch.')}. Reading several tokens at once, it adds up in "
        "another order than one token at a time, and of two almost equally likely tokens the other may come out on "
        "top; the text goes on from there."
    )
    if dtype == torch.float32:
        return f"{why} In float32 that is rare: check with `trl-draft-opd verify`, which tells near ties from faults."
    return (
        f"{why} In this precision that is expected. To compare to the last token, load the target in float32 "
        "(`--target-dtype float32`)."
    )


def paired_gain(
    before: EvaluationReport, after: EvaluationReport, *, num_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the relative gain in tau of `after` over `before` and its 95 % interval, resampling their prompts."""
    if before.num_prompts != after.num_prompts:
        raise ValueError(
            f"Reports cover {before.num_prompts} and {after.num_prompts} prompts. Evaluate both on the same prompts."
        )
    # The same seed picks the same prompts for both.
    tau_before = resampled_taus(before.accepted_sums, before.block_counts, num_resamples, seed)
    tau_after = resampled_taus(after.accepted_sums, after.block_counts, num_resamples, seed)
    gains = tau_after / tau_before - 1
    low, high = interval(gains[gains.isfinite()])
    return after.tau / before.tau - 1, low, high


def evaluate_drafter(
    target: FrozenTarget,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    num_drafts: int | None = None,
    max_completion_length: int | None = None,
    sampling: SamplingSettings | None = None,
    draft_sampling: str = "greedy",
    min_confidence: float | None = None,
    batch_size: int = 1,
    ignore_eos: bool = False,
    compare_with_target: bool = True,
    responses: Sequence[Sequence[int]] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    show_progress: bool = True,
    on_rollout: Callable[[Rollout], None] | None = None,
) -> EvaluationReport:
    """
    Measure a drafter on prompts, by live decoding, or by replay along the target's responses, see [`explain_replay`].

    Args:
        target ([`FrozenTarget`]): The target. Load it in float32 where outputs must agree to the last token.
        drafter ([`Drafter`]): The drafter.
        prompts (`Sequence[Sequence[int]]`): Token ids, chat template applied.
        num_drafts (`int`, *optional*): Drafts per block; the drafter's own number by default.
        max_completion_length (`int`, *optional*):
            Longest response; 256 by default, or half of what the prompts leave of the target's positions.
        sampling ([`SamplingSettings`], *optional*): Greedy by default.
        draft_sampling (`str`, *optional*, defaults to `"greedy"`): See [`DraftOPDConfig`].
        min_confidence (`float`, *optional*):
            Verify a block only as far as the running product of the drafter's confidences is at least this, in (0, 1],
            see [`mark_verified`]. Whole blocks by default; the text is the target's either way.
        batch_size (`int`, *optional*, defaults to 1): Prompts decoded together.
        ignore_eos (`bool`, *optional*, defaults to `False`):
            Decode exactly `max_completion_length` tokens, to compare with an engine that counts past the end of a
            response.
        compare_with_target (`bool`, *optional*, defaults to `True`):
            Also decode plainly, batch by batch in turns, for speed and, at temperature 0, equality. Not with
            `ignore_eos`, and not by replay.
        responses (`Sequence[Sequence[int]]`, *optional*):
            The target's own response to each prompt, written under `sampling`, to replay; of longer ones the first
            `max_completion_length` tokens. Without them, a target whose cache cannot be rolled back writes them.
        num_resamples (`int`, *optional*, defaults to 2000): Bootstrap resamples.
        seed (`int`, *optional*, defaults to 0): Of draws and bootstrap.
        show_progress (`bool`, *optional*, defaults to `True`): A bar, or a line every half minute without a terminal.
        on_rollout (`Callable[[Rollout], None]`, *optional*): Called with the blocks of each batch, in order.

    Returns:
        [`EvaluationReport`]

    Raises:
        ValueError: If `min_confidence` is given for a drafter without a confidence head, there is no prompt, the
            longest one leaves no room in the target's positions, no response is long enough to hold a whole block,
            there is not one response per prompt, or `ignore_eos` is asked of a replay.
    """
    sampling = sampling or SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
    is_replay = responses is not None or target.rollback_reason is not None
    if is_replay and ignore_eos:
        raise ValueError(
            "`ignore_eos` decodes past the end of a response, and tau is measured by replay along responses, which "
            "end there. Leave it out."
        )
    if responses is not None and len(responses) != len(prompts):
        raise ValueError(f"There are {len(responses)} responses to {len(prompts)} prompts. Give one to each.")
    compare = compare_with_target and not ignore_eos and not is_replay
    num_drafts = drafter.default_num_drafts if num_drafts is None else num_drafts
    max_completion_length = fit_lengths(
        target.num_positions,
        prompt=max(map(len, prompts), default=0),
        completion=max_completion_length,
        num_drafts=num_drafts,
        defaults=EVALUATION_LENGTHS,
    ).completion
    config: Any = drafter.config
    settings = DraftingSettings(
        num_drafts,
        sampling,
        draft_sampling,
        keep_branch_hidden=False,
        min_confidence=min_confidence,
        keep_confidences=config.has_confidence_head,
    )
    eos_token_ids = [] if ignore_eos else target.eos_token_ids
    if is_replay and responses is None:
        responses = generate_responses(
            target,
            prompts,
            max_completion_length=max_completion_length,
            sampling=sampling,
            batch_size=batch_size,
            seed=seed,
            show_progress=show_progress,
        )
    done = _Decoded(
        on_rollout, None if target.tokenizer is None else token_classes(target.tokenizer, target.vocab_size)
    )
    with showing_progress(len(prompts), is_shown=show_progress, name="Prompts measured") as progress:
        for start in range(0, len(prompts), batch_size):
            batch, before = prompts[start : start + batch_size], done.num_tokens
            # By a prompt's number, so that the batch size changes no draw.
            keys = DrawKeys(seed, 0, range(start, start + len(batch)))
            if responses is not None:
                written = [response[:max_completion_length] for response in responses[start : start + batch_size]]
                done.add(replay_responses(target, drafter, batch, written, settings, keys), seconds=0.0)
                progress.add(len(batch), done.num_tokens - before)
                continue
            begun = time.perf_counter()
            rollout = rollout_live(
                target,
                drafter,
                batch,
                settings,
                keys,
                max_completion_length=max_completion_length,
                eos_token_ids=eos_token_ids,
            )
            done.add(rollout, seconds=time.perf_counter() - begun)
            if compare:
                begun = time.perf_counter()
                own = generate_responses(
                    target,
                    batch,
                    max_completion_length=max_completion_length,
                    sampling=sampling,
                    batch_size=batch_size,
                    seed=seed,
                    show_progress=False,
                )
                done.compare(rollout, own, first=start, seconds=time.perf_counter() - begun)
            progress.add(len(batch), done.num_tokens - before)
    report = _report(done, settings, batch_size, compare, num_resamples, seed)
    return replace(report, is_replay=is_replay, max_completion_length=max_completion_length, ignore_eos=ignore_eos)


def replay_responses(
    target: FrozenTarget,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    settings: DraftingSettings,
    keys: DrawKeys,
) -> Rollout:
    """Find the drafter's blocks along the target's responses."""
    return rollout_replay(
        target,
        drafter,
        join_responses(prompts, responses, keys.sample_ids, target.pad_token_id, target.device),
        settings,
        keys,
        segment_length=drafter.config.default_segment_length,
        chunk_bytes=default_chunk_bytes(target.device),
    )


@dataclass
class _Decoded:
    """What was decoded and counted so far."""

    on_rollout: Callable[[Rollout], None] | None
    classes: torch.Tensor | None
    counts: Counts = field(default_factory=Counts)
    rejections: dict[str, list[int]] = field(default_factory=dict)
    calibration: Calibration | None = None
    num_tokens: int = 0
    num_passes: int = 0
    speculative_seconds: float = 0.0
    plain_seconds: float = 0.0
    different: list[int] = field(default_factory=list)

    def add(self, rollout: Rollout, *, seconds: float) -> None:
        """Count a batch that was decoded with the drafter."""
        self.speculative_seconds += seconds
        self.counts += Counts.of_rollout(rollout)
        for name, added in rejection_sums(rollout, self.classes, TOKEN_CLASSES).items():
            held = self.rejections.get(name, [0, 0])
            self.rejections[name] = [held[0] + int(added[0]), held[1] + int(added[1])]
        if self.on_rollout is not None:
            self.on_rollout(rollout)
        if rollout.confidences is not None:
            own = Calibration.of_rollout(rollout)
            self.calibration = own if self.calibration is None else self.calibration + own
        self.num_tokens += int((rollout.lengths - rollout.prompt_lengths).sum())
        self.num_passes += int(rollout.num_rounds.sum()) + len(rollout.lengths)

    def compare(self, rollout: Rollout, own: list[list[int]], *, first: int, seconds: float) -> None:
        """Note which responses of the batch from prompt `first` on are not the target's own."""
        self.plain_seconds += seconds
        pairs = zip(rollout.responses(), own, strict=True)
        self.different += [first + row for row, (ours, theirs) in enumerate(pairs) if ours != theirs]


def _report(
    done: _Decoded, settings: DraftingSettings, batch_size: int, compare: bool, num_resamples: int, seed: int
) -> EvaluationReport:
    counts, num_prompts = done.counts, len(done.counts.blocks)
    if counts.num_blocks == 0:
        raise ValueError(
            f"No response among {num_prompts} prompts is longer than a block of {settings.num_drafts} drafts, so tau "
            "cannot be measured. Raise `max_completion_length`, lower `num_drafts`, or give other prompts."
        )
    low, high = counts.interval(num_resamples=num_resamples, seed=seed)
    can_compare_text = compare and settings.sampling.is_greedy
    return EvaluationReport(
        tau=counts.tau,
        tau_low=low,
        tau_high=high,
        # Divided in float32.
        acceptance_per_slot=(torch.tensor(counts.kept_at_slot) / counts.num_blocks).tolist(),
        tokens_per_target_forward=done.num_tokens / done.num_passes,
        speedup=done.plain_seconds / done.speculative_seconds if compare else None,
        num_different=len(done.different) if can_compare_text else None,
        different_prompts=done.different if can_compare_text else [],
        num_prompts=num_prompts,
        num_tokens=done.num_tokens,
        num_blocks=counts.num_blocks,
        num_drafts=settings.num_drafts,
        batch_size=batch_size,
        temperature=settings.sampling.temperature,
        accepted_sums=counts.accepted_sums,
        block_counts=list(counts.blocks),
        drafts_per_block=counts.drafts_per_block,
        kept_share=counts.kept_share,
        min_confidence=settings.min_confidence,
        calibration=None if done.calibration is None else done.calibration.report(),
        rejections=done.rejections,
        draft_sampling=settings.draft_sampling,
    )
