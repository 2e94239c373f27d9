# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What holds tau down, and what training looks at: numbers from the greedy responses of a target and from which tokens a
drafter gets right from every anchor. Knows no models.

A response has R tokens. Anchor `a` in `0..R-2` is a token behind which the target wrote another; slot `k` proposes
token `a + k`, given that the drafts before it are the target's tokens.

Shape letters:  R = tokens of a response, A = R - 1 anchors, K = drafts per block
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_draft_opd.rollout.counts import Counts


TOKENS_PER_BUCKET = 32
TOP_PROB_EDGES = (0.0, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
SHORTEST_LOOP = 12  # tokens that repeat, behind the first time
CONFIDENT = 0.9
NUM_RESAMPLES = 2_000
OPD_DECAY = 0.8


@dataclass(frozen=True)
class Response:
    """
    A response of the target, and a drafter along it.

    Attributes:
        ids (`np.ndarray` of shape `(R,)`): Its tokens.
        entropy (`np.ndarray` of shape `(R,)`), top_prob (same shape):
            Of the target's distribution that each token was taken from; entropy in nats.
        outside (`np.ndarray` of shape `(R,)`): Probability that it gives to tokens outside the draft vocabulary.
        is_known (`np.ndarray` of shape `(R,)`): Whether the token is in the draft vocabulary.
        is_right (`np.ndarray` of shape `(A, K)`): Whether the drafter's argmax is the token; false behind the end.
        draft_prob (`np.ndarray` of shape `(A, K)`): The drafter's probability of the token; 0 behind the end.
    """

    ids: np.ndarray
    entropy: np.ndarray
    top_prob: np.ndarray
    outside: np.ndarray
    is_known: np.ndarray
    is_right: np.ndarray
    draft_prob: np.ndarray

    @property
    def num_drafts(self) -> int:
        """K."""
        return self.is_right.shape[1]

    @property
    def runs(self) -> np.ndarray:
        """Accepted drafts of a block at every anchor, `(A,)`."""
        return count_run(self.is_right)

    def slot_tokens(self) -> np.ndarray:
        """Return the index of every slot's token, `(A, K)`; R or more behind the end."""
        return np.arange(len(self.is_right))[:, None] + np.arange(1, self.num_drafts + 1)


def count_run(is_right: np.ndarray) -> np.ndarray:
    """Return the length of the leading run of true values of each row."""
    return np.cumprod(is_right, axis=1).sum(axis=1)


def follow_chain(runs: np.ndarray) -> np.ndarray:
    """Return the anchors that decoding meets: each lies behind what its block and the bonus committed."""
    anchors, anchor = [], 0
    while anchor < len(runs):
        anchors.append(anchor)
        anchor += int(runs[anchor]) + 1
    return np.array(anchors, dtype=int)


def counted_anchors(runs: np.ndarray, num_drafts: int) -> np.ndarray:
    """Return the chain's anchors whose whole block lies inside the response: tau counts these."""
    chain = follow_chain(runs)
    return chain[chain + num_drafts <= len(runs)]


def rounds_left(runs: np.ndarray) -> np.ndarray:
    """Return the rounds of decoding from each token to the end, `(R + 1,)`; 0 at the last token and behind it."""
    left = np.zeros(len(runs) + 2, dtype=int)
    for anchor in range(len(runs) - 1, -1, -1):
        left[anchor] = 1 + left[anchor + int(runs[anchor]) + 1]
    return left


def rounds_saved(response: Response, anchors: np.ndarray) -> np.ndarray:
    """
    Return the rounds that decoding would save if the first wrong draft of each block were right, with what the drafter
    makes of the slots behind it; 0 where nothing was wrong.
    """
    runs, left = response.runs, rounds_left(response.runs)
    saved = np.zeros(len(anchors))
    for index, anchor in enumerate(anchors):
        run = int(runs[anchor])
        first_wrong = anchor + run + 1
        if run == response.num_drafts or first_wrong >= len(response.ids):
            continue
        mended = response.is_right[anchor].copy()
        mended[run] = True
        saved[index] = left[first_wrong] - left[anchor + int(count_run(mended[None])[0]) + 1]
    return saved


def repeated_tokens(ids: np.ndarray) -> np.ndarray:
    """
    Return which tokens are in a loop, `(R,)`: they repeat what stood a period before, for at least two periods and
    `SHORTEST_LOOP` tokens on end. The first time is no repetition.
    """
    found = np.zeros(len(ids), dtype=bool)
    for period in range(1, len(ids) // 3 + 1):
        equal = np.concatenate([np.zeros(period, dtype=bool), ids[period:] == ids[:-period]])
        edges = np.flatnonzero(np.diff(np.concatenate([[0], equal.astype(int), [0]])))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            if stop - start >= max(2 * period, SHORTEST_LOOP):
                found[start:stop] = True
    return found


# -- the report -------------------------------------------------------------------------------------------------------


def tau_of(chains: Sequence[np.ndarray], num_drafts: int) -> dict[str, float | int]:
    """Return tau with its 95 % interval over prompts from the accepted drafts of each prompt's counted blocks."""
    counts = Counts.of_chains([chain.tolist() for chain in chains], num_drafts)
    if counts.num_blocks == 0:
        return {"blocks": 0}
    low, high = counts.interval(num_resamples=NUM_RESAMPLES, seed=0)
    return {"tau": counts.tau, "low": low, "high": high, "blocks": counts.num_blocks}


def describe(responses: Sequence[Response], sft_decay: float) -> dict[str, Any]:
    """
    Return everything the tables of `diagnose` print but for the comparison by kind of state.

    Args:
        responses (`Sequence[Response]`): Those of some prompts; at least one with two tokens.
        sft_decay (`float`): Weight decay per slot of supervised training.
    """
    num_drafts = responses[0].num_drafts
    counted = [counted_anchors(row.runs, num_drafts) for row in responses]
    chains = [row.runs[anchors] for row, anchors in zip(responses, counted, strict=True)]
    loops = [repeated_tokens(row.ids) for row in responses]
    runs = np.concatenate(chains)
    return {
        "num_drafts": num_drafts,
        "now": tau_of(chains, num_drafts),
        "slot_acceptance": [float((runs >= slot).mean()) for slot in range(1, num_drafts + 1)],
        "tokens": int(sum(len(row.ids) for row in responses)),
        "target_entropy": float(np.concatenate([row.entropy for row in responses]).mean()),
        "outside": {
            "tokens": float(1 - np.concatenate([row.is_known for row in responses]).mean()),
            "mass": float(np.concatenate([row.outside for row in responses]).mean()),
            "rejections": _rejections_outside(responses, counted),
        },
        "by_position": _by_position(chains, counted, num_drafts),
        "by_top_prob": _by_top_prob(responses),
        "loops": {
            "tokens": float(np.concatenate(loops).mean()),
            "responses": float(np.mean([loop.any() for loop in loops])),
            "with": tau_of([c for c, loop in zip(chains, loops, strict=True) if loop.any()], num_drafts),
            "without": tau_of([c for c, loop in zip(chains, loops, strict=True) if not loop.any()], num_drafts),
        },
        "limits": _limits(responses),
        "weights": _weights(responses, sft_decay),
        "owed": _owed(responses),
    }


def _rejections_outside(responses: Sequence[Response], counted: Sequence[np.ndarray]) -> float:
    """Return the share of the counted rejections whose right token cannot be drafted."""
    known = []
    for row, anchors in zip(responses, counted, strict=True):
        refused = anchors[row.runs[anchors] < row.num_drafts]
        known.append(row.is_known[refused + row.runs[refused] + 1])
    found = np.concatenate(known)
    return float(1 - found.mean()) if len(found) else 0.0


def _by_position(chains: Sequence[np.ndarray], counted: Sequence[np.ndarray], num_drafts: int) -> list[dict[str, Any]]:
    """Return tau of the blocks whose anchors lie in each stretch of the responses."""
    rows = []
    furthest = max((int(anchors[-1]) for anchors in counted if len(anchors)), default=-1)
    for start in range(0, furthest + 1, TOKENS_PER_BUCKET):
        stretch = [
            runs[(anchors >= start) & (anchors < start + TOKENS_PER_BUCKET)]
            for runs, anchors in zip(chains, counted, strict=True)
        ]
        rows.append({"from": start} | tau_of(stretch, num_drafts))
    return rows


def _by_top_prob(responses: Sequence[Response]) -> list[dict[str, float | None]]:
    """
    Return, by the target's probability of the first token behind an anchor: the share of all anchors and of the
    chain's, how often slot 1 is right at each, the drafter's mean probability of the token, and the share of all first
    wrong drafts of the chain; `None` where there are none.
    """
    of_anchor = np.concatenate([row.top_prob[1:] for row in responses])
    is_right = np.concatenate([row.is_right[:, 0] for row in responses])
    prob = np.concatenate([row.draft_prob[:, 0] for row in responses])
    is_chain = np.concatenate([_marked(len(row.runs), follow_chain(row.runs)) for row in responses])
    at_wrong = np.concatenate([row.top_prob[_first_wrong(row)] for row in responses])
    found = []
    for low, high in zip(TOP_PROB_EDGES, TOP_PROB_EDGES[1:], strict=False):
        inside, wrong = (_between(values, low, high) for values in (of_anchor, at_wrong))
        here = inside & is_chain
        found.append(
            {
                "from": low,
                "to": high,
                "anchors": float(inside.mean()),
                "chain_anchors": float(here.sum() / is_chain.sum()),
                "right": _mean(is_right[inside]),
                "right_in_chain": _mean(is_right[here]),
                "draft_prob": _mean(prob[inside]),
                "draft_prob_in_chain": _mean(prob[here]),
                "first_wrong": float(wrong.mean()) if len(wrong) else 0.0,
            }
        )
    return found


def _limits(responses: Sequence[Response]) -> dict[str, dict[str, float | int]]:
    """
    Return tau of drafters that do not exist: what each would reach says what the real one lacks.

    `confident`: the real one, right too wherever the target gives its token at least `CONFIDENT`. `known_confident`:
    the same, of tokens it can draft. `as_slot_1`: right at every slot where slot 1 of an anchor just before is.
    `vocabulary`: right wherever it can draft the token. `slots`: always right.
    """
    rules: dict[str, Callable[[Response], np.ndarray]] = {
        "confident": lambda row: row.top_prob >= CONFIDENT,
        "known_confident": lambda row: (row.top_prob >= CONFIDENT) & row.is_known,
        "as_slot_1": lambda row: np.concatenate([[False], row.is_right[:, 0]]),
        "vocabulary": lambda row: row.is_known,
        "slots": lambda row: np.ones(len(row.ids), dtype=bool),
    }
    found = {}
    for name, rule in rules.items():
        chains = []
        for row in responses:
            is_right = _at_slots(row, rule(row))
            if name.endswith("confident"):
                is_right |= row.is_right
            runs = count_run(is_right)
            chains.append(runs[counted_anchors(runs, row.num_drafts)])
        found[name] = tau_of(chains, responses[0].num_drafts)
    return found


def _weights(responses: Sequence[Response], sft_decay: float) -> dict[str, dict[str, float]]:
    """
    Return where the weight of a loss lies: the shares of slots that decoding reaches and that are right, that are the
    first wrong one, and that lie behind it; means of the target's entropy and of the drafter's probability of the
    token under that weight; and the slots that carry weight, per response.
    """
    methods: dict[str, Callable[[Response], tuple[np.ndarray, ...]]] = {
        "sft": lambda row: (_inside(row) * _decay(row, sft_decay),),
        "until_fail": lambda row: (_inside(row) * _reached(row) * _decay(row, sft_decay),),
        "chain_sft": lambda row: (_inside(row) * _on_chain(row) * _decay(row, sft_decay),),
        "opd_first": lambda row: (
            row.is_right * _reached(row) * _on_chain(row),
            _inside(row) * ~row.is_right * _reached(row) * _on_chain(row) * _decay(row, OPD_DECAY),
        ),
    }
    found = {}
    for name, method in methods.items():
        # Each stream has its own denominator and an equal share of the loss.
        streams = list(zip(*map(method, responses), strict=True))
        totals = [max(sum(float(part.sum()) for part in stream), 1e-12) * len(streams) for stream in streams]
        sums = dict.fromkeys(("right", "first_wrong", "behind", "target_entropy", "draft_prob"), 0.0)
        for stream, total in zip(streams, totals, strict=True):
            for row, weight in zip(responses, stream, strict=True):
                reached = _reached(row)
                values = (
                    reached & row.is_right,
                    reached & ~row.is_right,
                    ~reached,
                    _at_slots(row, row.entropy),
                    row.draft_prob,
                )
                for key, value in zip(sums, values, strict=True):
                    sums[key] += float((weight * value).sum()) / total
        num_slots = sum(int((part > 0).sum()) for stream in streams for part in stream)
        found[name] = sums | {"slots_per_response": num_slots / len(responses)}
    return found


def _owed(responses: Sequence[Response]) -> dict[str, Any]:
    """
    Return what mending the first wrong draft of a block of the chain would save, in rounds: the mean, the share that
    saves none, and both by the slot of that draft and by the target's probability of its token.
    """
    saved, slots, probs = [], [], []
    for row in responses:
        chain = follow_chain(row.runs)
        chain = chain[(row.runs[chain] < row.num_drafts) & (chain + row.runs[chain] + 1 < len(row.ids))]
        saved.append(rounds_saved(row, chain))
        slots.append(row.runs[chain] + 1)
        probs.append(row.top_prob[chain + row.runs[chain] + 1])
    all_saved, all_slots, all_probs = (np.concatenate(parts) for parts in (saved, slots, probs))

    def summary(mask: np.ndarray) -> dict[str, float | None]:
        part = all_saved[mask]
        return {"rejections": int(mask.sum()), "rounds_saved": _mean(part), "saves_none": _mean(part <= 0)}

    everything = np.ones(len(all_saved), dtype=bool)
    by_slot = {str(slot): summary(all_slots == slot) for slot in range(1, responses[0].num_drafts + 1)}
    by_prob = [
        {"from": low, "to": high} | summary(_between(all_probs, low, high))
        for low, high in zip(TOP_PROB_EDGES, TOP_PROB_EDGES[1:], strict=False)
    ]
    return summary(everything) | {"by_slot": by_slot, "by_top_prob": by_prob}


def _marked(length: int, places: np.ndarray) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    mask[places] = True
    return mask


def _between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return which values lie in `[low, high)`, or at the upper end of the scale."""
    return (values >= low) & ((values < high) | (high == TOP_PROB_EDGES[-1]))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _first_wrong(row: Response) -> np.ndarray:
    """Return the tokens at which the blocks of the chain are first wrong."""
    chain = follow_chain(row.runs)
    tokens = chain + row.runs[chain] + 1
    return tokens[(row.runs[chain] < row.num_drafts) & (tokens < len(row.ids))]


def _at_slots(row: Response, values: np.ndarray) -> np.ndarray:
    """Return values of tokens at the slots that propose them, `(A, K)`; 0 behind the end."""
    tokens = row.slot_tokens()
    inside = tokens < len(row.ids)
    return np.where(inside, values[np.where(inside, tokens, 0)], np.zeros((), values.dtype))


def _inside(row: Response) -> np.ndarray:
    return row.slot_tokens() < len(row.ids)


def _reached(row: Response) -> np.ndarray:
    """Return the slots up to the first wrong one, `(A, K)`."""
    return np.arange(row.num_drafts) <= row.runs[:, None]


def _on_chain(row: Response) -> np.ndarray:
    return _marked(len(row.runs), follow_chain(row.runs))[:, None]


def _decay(row: Response, decay: float) -> np.ndarray:
    return decay ** np.arange(row.num_drafts)
