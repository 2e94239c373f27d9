# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whether a published drafter is the one that was trained: its layouts, its checkpoint and its record compared with it.

Without a checkpoint, two errors still give themselves away: other layers that suit the drafter better than those it
names, and a head whose rows are those of other tokens than its vocabulary states. Both leave the text right and only
slow it down.
"""

import json
import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ..drafters.base import Drafter
from ..drafters.published.checkpoint import CONFIG_FILE
from ..evaluation import evaluate_drafter
from ..export.record import Measurement, prompts_digest, read_record
from ..rollout.counts import Counts
from .compare import Outcome, Reference, compare
from .fingerprint import describe_gap, find_reasons, rounded_like, take_fingerprint
from .report import Row, VerificationReport
from .scene import Scene, replay


# Other layers must be better by so much: a drafter trained little cares little which layers it reads.
_GAIN, _LEAST_GAIN = 0.1, 0.02
# Prompts that are replayed with other layers, and how often a good export may be suspected by chance.
_NUM_PROMPTS, _FALSE_ALARMS = 32, 0.01
# Resampling fewer prompts than this gives an interval that is far too narrow: of one prompt, a point.
_INTERVAL_PROMPTS = 10
# Rows of the head compared with all of the target's.
_NUM_ROWS, _CHUNK = 256, 16384


def compare_with_training(
    scene: Scene, reference: Reference, checkpoint: str | Path | None, tolerance: float, report: VerificationReport
) -> None:
    """
    Compare the published drafter with what was trained, and the reference with what training would estimate; `report`
    takes in what is found.
    """
    report.problems += _compare_layouts(scene)
    if checkpoint is None:
        report.skipped["checkpoint"] = (
            "none was given (`--checkpoint`), so the export was not compared with what was trained"
        )
        estimator, whose = scene.drafter, "published"
        suspects = [_suspect_layer_ids(scene, reference.responses, report), _suspect_vocabulary(scene)]
        report.problems += [each for each in suspects if each is not None]
    else:
        estimator, problem = _compare_with_checkpoint(scene, scene.load(checkpoint))
        whose = "checkpoint's"
        report.problems += [problem] if problem is not None else []
    remark = f"replay of the target's text with the {whose} weights"
    estimate = Outcome("estimate", None, replay(scene, estimator, reference.responses), None, remark)
    report.add(compare(scene, reference, estimate, tolerance))
    _compare_with_record(scene, tolerance, report)


def _compare_layouts(scene: Scene) -> list[str]:
    """Compare the drafters of all layouts with the one at the root; return problems."""
    own = take_fingerprint(scene.target, scene.drafter, scene.num_drafts)
    root, *others = scene.layouts
    problems = []
    for name in others:
        try:
            other = scene.load(scene.layouts[name])
        except ValueError as error:
            problems.append(f"{name} layout: the drafter cannot be loaded: {error}")
            continue
        gap = describe_gap(own, take_fingerprint(scene.target, other, scene.num_drafts))
        if gap is not None:
            reasons = "; ".join(find_reasons(other, scene.drafter)).replace("the checkpoint", f"the {root} layout")
            problems.append(f"{name} layout: {gap} from the {root} layout: {reasons or 'no reason found'}.")
    return problems


def _compare_with_checkpoint(scene: Scene, trained: Drafter) -> tuple[Drafter, str | None]:
    """Return the checkpoint as the export should hold it, and how the export differs from it, or `None`."""
    reasons = "; ".join(find_reasons(scene.drafter, trained))
    if trained.config.family != scene.drafter.config.family:
        return scene.drafter, f"The checkpoint is no source of this export: {reasons}."
    config = json.loads((scene.folder / CONFIG_FILE).read_text("utf-8"))
    is_whole = "float32" in (config.get("dtype"), config.get("torch_dtype"))
    expected = trained if is_whole else rounded_like(trained, torch.bfloat16)
    own, wanted = (take_fingerprint(scene.target, each, scene.num_drafts) for each in (scene.drafter, expected))
    gap = describe_gap(own, wanted)
    if gap is None and not reasons:
        return expected, None
    cause = reasons or "settings and tensors are those of the checkpoint, rounded to bfloat16"
    return expected, f"The export is not its checkpoint: {cause}. ({gap or 'It drafts alike on a fixed text.'})"


# ---- without a checkpoint -------------------------------------------------------------------------------------------


def _suspect_layer_ids(scene: Scene, responses: list[list[int]], report: VerificationReport) -> str | None:
    """
    Replay prompts with each layer id one off, and with all of them; return which ids suit clearly better.

    Of a few prompts, the best of several ids does better by chance. So ids must do better by a margin over all prompts
    and, in a sign test, in more of the prompts than chance explains: if none of them is better by the margin in half
    of all prompts, a suspicion arises in at most 1 of 100 verifications (Bonferroni over the ids tried). Prompts are
    what is drawn, because blocks of one text are alike.
    """
    # The same prompt again is no evidence of its own.
    rows = list({tuple(prompt): row for row, prompt in enumerate(scene.prompts)}.values())[:_NUM_PROMPTS]
    named = list(scene.drafter.config.target_layer_ids)
    others = _neighbours(named, scene.target.num_layers)
    least_wins = _least_wins(len(rows), _FALSE_ALARMS / max(len(others), 1))
    if least_wins > len(rows):
        needed = next(n for n in count(1) if _least_wins(n, _FALSE_ALARMS / max(len(others), 1)) <= n)
        report.skipped["layer ids"] = (
            f"{len(rows)} different prompts cannot tell a wrong one from chance; give {needed} or more, or "
            "`--checkpoint`"
        )
        return None
    scene = replace(scene, prompts=[scene.prompts[row] for row in rows])
    texts = [responses[row] for row in rows]
    own = _counts_with(scene, texts, named)
    suspects = []
    for ids in others:
        other = _counts_with(scene, texts, ids)
        wins = sum(_is_clearly_more(other.row(row).tau, own.row(row).tau) for row in range(len(rows)))
        if wins >= least_wins and _is_clearly_more(other.tau, own.tau):
            suspects.append((other.tau, wins, ids))
    if not suspects:
        return None
    tau, wins, ids = max(suspects)
    return (
        f"The layer ids {named} look wrong: with {ids} tau is {tau:.3f} instead of {own.tau:.3f}, and clearly larger "
        f"in {wins} of {len(rows)} prompts."
    )


def _is_clearly_more(other: float, own: float) -> bool:
    """Whether one tau is larger than another by more than the margin, counted in accepted drafts."""
    return other - 1 > (1 + _GAIN) * (own - 1) + _LEAST_GAIN


def _least_wins(num_prompts: int, chance: float) -> int:
    """Return in how many of the prompts something must happen that a fair coin would give with this chance at most."""
    tail, wins = 0.0, num_prompts + 1
    while wins > 0 and tail + math.comb(num_prompts, wins - 1) / 2**num_prompts <= chance:
        wins -= 1
        tail += math.comb(num_prompts, wins) / 2**num_prompts
    return wins


def _counts_with(scene: Scene, responses: list[list[int]], ids: list[int]) -> Counts:
    config = scene.drafter.config
    named = config.target_layer_ids
    config.target_layer_ids = ids
    try:
        chains = replay(scene, scene.drafter, responses)
    finally:
        config.target_layer_ids = named
    return Counts.of_chains(chains, scene.num_drafts)


def _neighbours(ids: list[int], num_layers: int) -> list[list[int]]:
    tried = [[*ids[:place], ids[place] + step, *ids[place + 1 :]] for place in range(len(ids)) for step in (-1, 1)]
    tried += [[i + step for i in ids] for step in (-1, 1)]
    return [each for each in tried if each == sorted(set(each)) and each[0] >= 0 and each[-1] < num_layers - 1]


@torch.no_grad()
def _suspect_vocabulary(scene: Scene) -> str | None:
    """
    Compare rows of a reduced head with the target's, where training starts them: it is suspect if many resemble
    another token's clearly more than their own.
    """
    drafter: Any = scene.drafter
    output = scene.target.causal_lm.get_output_embeddings()
    if output is None or drafter.draft_token_ids is None:
        return None
    token_ids, head = drafter.draft_token_ids, output.weight
    if head.shape[1] != drafter.lm_head.weight.shape[1]:
        return None
    picks = torch.linspace(0, len(token_ids) - 1, min(_NUM_ROWS, len(token_ids))).long().unique().to(token_ids.device)
    rows = torch.nn.functional.normalize(drafter.lm_head.weight[picks].float(), dim=-1)
    best = torch.full((len(picks),), -1.0, device=rows.device)
    nearest = torch.zeros_like(picks)
    for start in range(0, len(head), _CHUNK):
        part = torch.nn.functional.normalize(head[start : start + _CHUNK].to(rows), dim=-1)
        likeness, index = (rows @ part.T).max(dim=-1)
        nearest = torch.where(likeness > best, index + start, nearest)
        best = torch.maximum(best, likeness)
    own = (rows * torch.nn.functional.normalize(head[token_ids[picks].to(head.device)].to(rows), dim=-1)).sum(dim=-1)
    is_other = (nearest != token_ids[picks]) & (best > own + 0.2) & (best > 0.5)
    if is_other.float().mean() <= 0.1:
        return None
    return (
        f"D2t looks stale: of {len(picks)} rows of the head, {int(is_other.sum())} resemble the target's row of "
        "another token than the one d2t names. Export again with the vocabulary the drafter was trained with."
    )


# ---- the record -----------------------------------------------------------------------------------------------------


def _compare_with_record(scene: Scene, tolerance: float, report: VerificationReport) -> None:
    """Measure again what the folder's training record states of these prompts."""
    try:
        record = read_record(scene.folder)
    except ValueError as error:
        report.problems.append(f"The training record cannot be read: {error}")
        return
    if record is None:
        report.skipped["record"] = "the folder holds no training record"
        return
    digest = prompts_digest(scene.prompts)
    matching = [m for m in record.measurements if m.prompts_sha256 == digest]
    if not matching:
        report.skipped["record"] = "none of its measurements is of these prompts"
        return
    greedy = [m for m in matching if m.temperature == 0 and m.draft_sampling == "greedy"]
    if not greedy:
        report.skipped["record"] = "it was measured with draws, which another run repeats in distribution alone"
    for measurement in greedy:
        _measure_again(scene, measurement, tolerance, report)


def _measure_again(scene: Scene, recorded: Measurement, tolerance: float, report: VerificationReport) -> None:
    found = evaluate_drafter(
        scene.target,
        scene.drafter,
        scene.prompts,
        num_drafts=recorded.num_drafts,
        max_completion_length=recorded.max_completion_length,
        batch_size=recorded.batch_size,
        ignore_eos=recorded.ignore_eos,
        compare_with_target=False,
        num_resamples=200,
        show_progress=False,
    )
    remark = (
        f"the record has {recorded.tau:.4f} [{recorded.tau_low:.4f}, {recorded.tau_high:.4f}]. Counted as in training "
        f"and `evaluate`: blocks inside responses of up to {recorded.max_completion_length} tokens, where the other "
        "lines count on past an end of sequence"
    )
    report.rows.append(Row("recorded", found.tau, found.acceptance_per_slot, found.num_blocks, None, None, remark))
    gap = found.tau / recorded.tau - 1
    if abs(gap) <= tolerance:
        return
    text = f"Tau is {found.tau:.4f} from the published files, and {recorded.tau:.4f} was recorded before"
    text += f" ({gap:+.2%})"
    # Rounding to bfloat16, and a target in bfloat16 then and float32 now, move tau within its noise; a wrong export
    # moves it out.
    if recorded.tau_low <= found.tau <= recorded.tau_high:
        report.notes.append(
            f"{text}; it lies in the recorded interval. Weights were in float32 then, and the target in "
            f"{recorded.target_dtype}."
        )
    elif recorded.num_prompts < _INTERVAL_PROMPTS:
        report.notes.append(
            f"{text}; the interval of {recorded.num_prompts} prompts is too narrow to judge by. Record "
            f"{_INTERVAL_PROMPTS} or more."
        )
    else:
        report.problems.append(f"{text}, outside of the recorded interval: the export is not what was measured.")
