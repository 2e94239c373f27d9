# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Compare a consumer's outcome with the reference's: text to the last token, rounds block by block, tau. Every difference
gets a reason: a near tie, which other kernels break otherwise, or none, and then the consumer computes something else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..drafters.base import run_blocks
from ..rollout.counts import Counts
from .counting import anchors_of, first_difference
from .report import Row, Verdict
from .scene import Scene


# Float32 logits of two implementations differ by less; a choice between logits closer than this is a near tie.
NEAR_TIE = 1e-3
_NAMED = 3


@dataclass(frozen=True)
class Outcome:
    """
    What one consumer did with the prompts.

    Attributes:
        responses (`list[list[int]]` or `None`): What it wrote; `None` for a consumer that writes nothing.
        chains (`list[list[int]]` or `None`): Accepted drafts of every round that started within the counted tokens.
        counts ([`Counts`] or `None`): The consumer's own counters, where it has some.
    """

    name: str
    responses: list[list[int]] | None
    chains: list[list[int]] | None
    counts: Counts | None
    remark: str


@dataclass(frozen=True)
class Reference:
    """
    What consumers are checked against.

    Attributes:
        responses (`list[list[int]]`): The target's own, by plain decoding.
        chains (`list[list[int]]`): The rounds of our reference loop with the published drafter.
        is_exact (`bool`): Whether outputs must be equal; `False` where a consumer computes in less than float32.
    """

    responses: list[list[int]]
    chains: list[list[int]]
    is_exact: bool = True


def compare(scene: Scene, reference: Reference, outcome: Outcome, tolerance: float) -> Verdict:
    """Check a consumer against the reference; a relative gap in tau up to `tolerance` passes, as a note."""
    problems, notes, others = _compare_texts(scene, reference, outcome)
    counts, expected, num_other_chains = outcome.counts, Counts.of_chains(reference.chains, scene.num_drafts), None
    if outcome.chains is not None:
        # A text that left the target's own at a near tie has other blocks from there on, whatever the drafter.
        same = [row for row in range(len(scene.prompts)) if row not in others]
        counts, expected = (
            Counts.of_chains([chains[row] for row in same], scene.num_drafts)
            for chains in (outcome.chains, reference.chains)
        )
        num_other_chains = sum(outcome.chains[row] != reference.chains[row] for row in same)
    if counts is not None:
        found = _compare_rounds(scene, reference, outcome, counts, expected, tolerance)
        problems += found[0]
        notes += found[1]
    shown = counts or Counts()
    row = Row(
        outcome.name,
        shown.tau,
        shown.acceptance_per_slot,
        shown.num_blocks,
        None if outcome.responses is None else len(others),
        num_other_chains,
        outcome.remark,
    )
    return Verdict(row, problems, notes)


def _compare_texts(scene: Scene, reference: Reference, outcome: Outcome) -> tuple[list[str], list[str], set[int]]:
    """Return problems, notes, and the prompts whose response is not the target's own."""
    places = {}
    for row, other in enumerate(outcome.responses or ()):
        place = first_difference(
            reference.responses[row][: scene.max_completion_length], other[: scene.max_completion_length]
        )
        if place is not None:
            places[row] = place
    if not places:
        return [], [], set()
    gaps = {row: _target_gap(scene, row, reference.responses[row], place) for row, place in places.items()}
    told = "; ".join(
        f"response {row} from token {places[row]} on, where the target's two best logits are {gaps[row]:.2g} apart"
        for row in list(places)[:_NAMED]
    )
    text = f"{outcome.name}: {len(places)} of {len(scene.prompts)} outputs are not the target's own: {told}"
    if not reference.is_exact:
        return [], [f"{text}; it computes in less than float32, where close tokens may change places."], set(places)
    if max(gaps.values()) < NEAR_TIE:
        return [], [f"{text}; near ties, which kernels that add in another order break otherwise."], set(places)
    return [f"{text}: no near tie, so the consumer does not decode this target greedily."], [], set(places)


def _compare_rounds(
    scene: Scene, reference: Reference, outcome: Outcome, counts: Counts, expected: Counts, tolerance: float
) -> tuple[list[str], list[str]]:
    """Return problems and notes about rounds."""
    if counts.pooled() == expected.pooled() and outcome.chains in (None, reference.chains):
        return [], []
    gap = counts.tau / expected.tau - 1
    text = (
        f"{outcome.name}: tau is {counts.tau:.4f} instead of {expected.tau:.4f} ({gap:+.2%}), in {counts.num_blocks} "
        f"rounds instead of {expected.num_blocks}"
    )
    told, widest = "", float("inf")
    if outcome.chains is not None:
        told, widest = _first_blocks(scene, reference, outcome.chains)
    if widest < NEAR_TIE * 10:
        # However large the gap: of a few rounds, one that ends elsewhere is several per cent.
        return [], [f"{text}{told}; near ties of two drafts."]
    if not abs(gap) <= tolerance:
        return [f"{text}{told}. {_hint(counts, expected)}"], []
    if outcome.chains is None:
        return [], [f"{text}; within {tolerance:.0%}, and the consumer does not report in which rounds."]
    if reference.is_exact:
        return [f"{text}{told}. No near tie explains it, so the consumer computes something else."], []
    return [], [f"{text}{told}; within {tolerance:.0%}, of a consumer that computes in less than float32."]


def _first_blocks(scene: Scene, reference: Reference, chains: list[list[int]]) -> tuple[str, float]:
    """Describe the first blocks that end elsewhere, and return the widest gap between two best drafts there."""
    told, widest = [], 0.0
    for row, (own, other) in enumerate(zip(reference.chains, chains, strict=True)):
        index = first_difference(own, other)
        if index is None:
            continue
        if index >= min(len(own), len(other)):
            widest = float("inf")
            told.append(f"prompt {row}: {len(other)} rounds instead of {len(own)}")
            continue
        anchor, slot = anchors_of(own)[index], min(own[index], other[index]) + 1
        gap = _draft_gap(scene, row, reference.responses[row], anchor, slot)
        widest = max(widest, gap)
        told.append(
            f"prompt {row}, block at token {anchor}: {other[index]} drafts kept instead of {own[index]}, the two best "
            f"logits of slot {slot} are {gap:.2g} apart"
        )
    more = f"; and in {len(told) - _NAMED} more prompts" if len(told) > _NAMED else ""
    return (": " + "; ".join(told[:_NAMED]) + more if told else ""), widest


def _hint(counts: Counts, expected: Counts) -> str:
    """Name the likely cause of a gap in tau."""
    own, wanted = (each.kept_at_slot[0] / max(each.num_blocks, 1) for each in (counts, expected))
    if abs(own - wanted) > 0.02:
        return (
            f"Already the first draft is kept in {own:.1%} of rounds instead of {wanted:.1%}: look at the layer ids "
            "as this consumer counts them, at d2t, and at the embedding."
        )
    return (
        f"The first draft is kept as often as it should ({own:.1%}), later ones are not: look at what is fed back "
        "(norm_output), at the mask inside a block (is_causal), and at positions (rope)."
    )


@torch.no_grad()
def _target_gap(scene: Scene, row: int, response: Sequence[int], place: int) -> float:
    """Return how far apart the target's two best logits are for token `place` of its response."""
    ids = torch.tensor([[*scene.prompts[row], *response[:place]]], device=scene.target.device)
    logits = scene.target.project(scene.target.read_text(ids, torch.ones_like(ids), ()).padded().last_hidden[:, -1])
    best = logits[0].float().topk(2).values
    return float(best[0] - best[1])


@torch.no_grad()
def _draft_gap(scene: Scene, row: int, response: Sequence[int], anchor: int, slot: int) -> float:
    """Return how far apart the drafter's two best logits are for a slot of the block at token `anchor`."""
    target, drafter = scene.target, scene.drafter
    ids = torch.tensor([[*scene.prompts[row], *response]], device=target.device)
    features = target.read_text(ids, torch.ones_like(ids), drafter.config.target_layer_ids).padded().features
    place = len(scene.prompts[row]) + anchor
    anchors = torch.tensor([[place]], device=target.device)
    recorded = ids[:, place + 1 : place + 1 + scene.num_drafts][None]
    hidden = run_blocks(drafter, features, ids, anchors, recorded, target.embed)
    best = drafter.draft_logits(hidden, target.project)[0, 0, slot - 1].float().topk(2).values
    return float(best[0] - best[1])
