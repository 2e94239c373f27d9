# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Metrics as sums: numerators and denominators are added over micro-batches, steps and ranks, and divided once."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelerate.utils import gather_object

from ..rollout.counts import Counts
from ..rollout.types import Rollout


def is_loss(metric: str) -> bool:
    """Whether an evaluation metric is better when it is smaller."""
    return metric.split("/")[0].endswith("loss")


def best_model_metrics(streams: Sequence[str], num_drafts: int | None) -> list[str]:
    """
    Return the evaluation metrics that a best checkpoint can be chosen by; `num_drafts` is `None` where no prompt is
    decoded.
    """
    names = ["loss", *(f"loss/{stream}" for stream in streams)]
    if num_drafts is not None:
        names += ["tau", "tau_low", "tau_high", *(f"acceptance/slot_{slot}" for slot in range(1, num_drafts + 1))]
    return names


class MetricSums:
    """Running numerators and denominators by metric name."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, sums: Mapping[str, Sequence[float]]) -> None:
        """Add numerators and denominators."""
        for name, (numerator, denominator) in sums.items():
            self._sums[name][0] += numerator
            self._sums[name][1] += denominator

    def state(self) -> dict[str, list[float]]:
        """Return this rank's numerators and denominators, for a checkpoint."""
        return {name: list(sums) for name, sums in self._sums.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        """Continue from the sums of a checkpoint."""
        self._sums.clear()
        self.add(state)

    def pop(self) -> dict[str, float]:
        """Return the ratios over all ranks and start anew; metrics whose denominator is 0 are left out. Collective."""
        merged = MetricSums()
        for sums in gather_object([self.state()]):
            merged.add(sums)
        self._sums.clear()
        return {name: sums[0] / sums[1] for name, sums in sorted(merged._sums.items()) if sums[1]}


def rollout_sums(rollout: Rollout, eos_token_ids: Sequence[int]) -> dict[str, tuple[float, float]]:
    """
    Return tau, acceptance per slot and lengths of a rollout as sums; `eos_token_ids` are what ends a response.

    tau counts the bonus and uses the blocks that lie inside the text by geometry: `sum (r + 1) / blocks`.
    """
    counts, num_rows = Counts.of_rollout(rollout), float(len(rollout.anchors))
    # The last token of every response: of a chat, there are several in a row.
    is_written = rollout.completion_mask
    is_last = is_written.clone()
    is_last[:, :-1] &= ~is_written[:, 1:]
    last_ids = rollout.input_ids[is_last].tolist()
    num_cut = sum(token not in eos_token_ids for token in last_ids)
    num_blocks = float(counts.num_blocks)
    sums = {
        "tau": (float(sum(counts.accepted_sums)), num_blocks),
        "response_length": (float(rollout.completion_mask.sum()), num_rows),
        "rounds": (float(rollout.num_rounds.sum()), num_rows),
        "refused_responses": (float(rollout.num_refused), num_rows),
        "truncated_responses": (float(num_cut), float(len(last_ids))),
        # A text that ends with its first token has nothing to draft.
        "empty_responses": (float((rollout.completion_mask.sum(dim=1) <= 1).sum()), num_rows),
    }
    slots = enumerate(counts.kept_at_slot, 1)
    return sums | {f"acceptance/slot_{slot}": (float(kept), num_blocks) for slot, kept in slots}


@dataclass(frozen=True)
class DecodedPrompt:
    """
    What one evaluation prompt adds to a measurement: its row in the dataset, its tokens, the counts of its blocks.
    """

    sample_id: int
    ids: list[int]
    counts: Counts


def decoded_prompts(rollout: Rollout, sample_ids: Sequence[int]) -> list[DecodedPrompt]:
    """Return what each row of a live rollout adds to a measurement."""
    counts, lengths = Counts.of_rollout(rollout), rollout.prompt_lengths.tolist()
    rows = zip(sample_ids, rollout.input_ids.tolist(), lengths, strict=True)
    return [DecodedPrompt(number, ids[:length], counts.row(i)) for i, (number, ids, length) in enumerate(rows)]
