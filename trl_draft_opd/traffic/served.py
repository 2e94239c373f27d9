# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whether a served drafter behaves as it was trained: the drafts that the server kept, round by round, against the chain
that the drafter makes along the same text by replay.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..drafters.base import Drafter
from ..evaluation import replay_responses
from ..parity.counting import anchors_of
from ..rollout.acceptance import SamplingSettings
from ..rollout.counts import Counts, interval, resampled_taus
from ..rollout.drafting import DraftingSettings
from ..rollout.keyed_random import DrawKeys
from ..target.frozen import FrozenTarget
from .reading import ServedResponse


_ROWS, _NUM_RESAMPLES = 8, 2000
# Other kernels break near ties otherwise, which moves tau both ways and by less.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class ServedComparison:
    """
    Rounds of a server beside those of a replay along the same text.

    Attributes:
        num_responses (`int`), num_rounds (`int`):
            Responses that were compared, and rounds of the server that lie inside of their text.
        num_unclear (`int`):
            Responses left out: their rounds do not add up to their text, or had fewer drafts than the others.
        num_drafts (`int`):
            Drafts per round, as served.
        served_tau (`float`), replayed_tau (`float`):
            Accepted length, with the bonus, over rounds inside of the text.
        gap (`float`), gap_low (`float`), gap_high (`float`):
            `served_tau / replayed_tau - 1` and its 95 % interval, by bootstrap over responses.
        num_other (`int` or `None`):
            Responses whose rounds are not all equal; `None` at a temperature above 0, where both are draws.
    """

    num_responses: int
    num_rounds: int
    num_unclear: int
    num_drafts: int
    served_tau: float
    replayed_tau: float
    gap: float
    gap_low: float
    gap_high: float
    num_other: int | None

    @property
    def differs(self) -> bool:
        """Whether tau differs by more than 2 %, and the interval leaves no chance that it does not."""
        return abs(self.gap) > _TOLERANCE and not self.gap_low <= 0 <= self.gap_high

    def describe(self) -> str:
        """Return what was found, in a few sentences."""
        other = "" if self.num_other is None else f"; {self.num_other} have other rounds"
        unclear = f" ({self.num_unclear} left out: their rounds do not add up)" if self.num_unclear else ""
        text = (
            f"Served tau {self.served_tau:.3f}, replayed {self.replayed_tau:.3f} ({self.gap:+.1%} "
            f"[{self.gap_low:+.1%}, {self.gap_high:+.1%}]) over {self.num_rounds} rounds of {self.num_responses} "
            f"responses{unclear}{other}."
        )
        if self.differs:
            text += (
                " The server does not draft as this drafter does: it serves another one, another export of it, or "
                "computes it otherwise. Compare with `trl-draft-opd verify`."
            )
        return text


def compare_served(
    target: FrozenTarget, drafter: Drafter, served: Sequence[ServedResponse], sampling: SamplingSettings
) -> ServedComparison:
    """
    Compare what a server kept of its drafts with what the target would keep of a drafter's.

    A round counts if all its slots lie inside of the text, chosen by geometry alone: an engine counts drafts behind
    the end of a response, and a replay does not know them.

    Args:
        target ([`FrozenTarget`]): The target, on the drafter's device.
        drafter ([`Drafter`]): The drafter that is said to be served.
        served (`Sequence[ServedResponse]`): Responses, of which those with rounds are looked at.
        sampling ([`SamplingSettings`]): Their distribution.

    Raises:
        ValueError: If no response has rounds that can be compared, or not all of the same number of drafts.
    """
    with_rounds = [(each, each.rounds) for each in served if each.rounds is not None]
    sizes = {rounds.num_drafts for _, rounds in with_rounds}
    if len(sizes) != 1:
        found = f"rounds of {sorted(sizes)} drafts" if sizes else "none"
        raise ValueError(
            "`--drafter` is compared with the accepted drafts that replies report, all of one number of drafts; there "
            f"are {found}. Serve with vLLM from 0.29 and `--per-request-spec-decode-metrics detailed` (streams: with "
            "`stream_options.include_usage`), one log for each setting."
        )
    (num_drafts,) = sizes
    clear = [
        (each, rounds.accepted)
        for each, rounds in with_rounds
        if rounds.is_whole and 1 + sum(rounds.accepted) + len(rounds.accepted) >= len(each.completion_ids)
    ]
    settings = DraftingSettings(num_drafts, sampling, "greedy", keep_branch_hidden=False)
    pairs: list[tuple[list[int], list[int]]] = []
    for start in range(0, len(clear), _ROWS):
        rows = clear[start : start + _ROWS]
        chains = _replay(target, drafter, [each for each, _ in rows], settings, start)
        for (each, accepted), chain in zip(rows, chains, strict=True):
            length = len(each.completion_ids)
            pairs.append((_inside(accepted, length, num_drafts), _inside(chain, length, num_drafts)))
    # A row that the replay refuses has no blocks, and a short text none that lies inside.
    pairs = [(theirs, own) for theirs, own in pairs if theirs and own]
    if not pairs:
        raise ValueError(
            f"Of {len(with_rounds)} responses with accepted drafts, none has a whole round of {num_drafts} drafts "
            "inside of its text that could be compared. Log longer ones."
        )
    server, replay = (Counts.of_chains(chains, num_drafts) for chains in zip(*pairs, strict=True))
    taus = [resampled_taus(counts.accepted_sums, counts.blocks, _NUM_RESAMPLES, 0) for counts in (server, replay)]
    low, high = interval(taus[0] / taus[1] - 1)
    return ServedComparison(
        num_responses=len(pairs),
        num_rounds=server.num_blocks,
        num_unclear=len(with_rounds) - len(clear),
        num_drafts=num_drafts,
        served_tau=server.tau,
        replayed_tau=replay.tau,
        gap=server.tau / replay.tau - 1,
        gap_low=low,
        gap_high=high,
        num_other=sum(theirs != own for theirs, own in pairs) if sampling.is_greedy else None,
    )


def _replay(
    target: FrozenTarget, drafter: Drafter, rows: Sequence[ServedResponse], settings: DraftingSettings, first: int
) -> list[list[int]]:
    """Return the accepted drafts of each block that the drafter makes along the responses."""
    keys = DrawKeys(0, 0, range(first, first + len(rows)))
    prompts, responses = ([list(each) for each in ids] for ids in zip(*map(_ids, rows), strict=True))
    rollout = replay_responses(target, drafter, prompts, responses, settings, keys)
    pairs = zip(rollout.accepted.tolist(), rollout.num_rounds.tolist(), strict=True)
    return [accepted[:num_rounds] for accepted, num_rounds in pairs]


def _ids(row: ServedResponse) -> tuple[list[int], list[int]]:
    return row.prompt_ids.tolist(), row.completion_ids.tolist()


def _inside(chain: Sequence[int], length: int, num_drafts: int) -> list[int]:
    """Return the rounds of a chain whose slots all lie inside of a response."""
    pairs = zip(chain, anchors_of(chain), strict=True)
    return [accepted for accepted, anchor in pairs if anchor + num_drafts <= length - 1]
