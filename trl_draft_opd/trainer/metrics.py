# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Metrics as sums: numerators and denominators are added over micro-batches, steps and ranks, and divided once."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object

from ..data.token_classes import TOKEN_CLASSES
from ..rollout.calibration import Calibration
from ..rollout.counts import Counts
from ..rollout.rejections import rejection_sums
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


@dataclass(frozen=True)
class DeviceSums:
    """
    Numerators and denominators that are still on the device: to read each on its own would have the host wait for it.

    Attributes:
        names (`tuple[str, ...]`): The metrics.
        values (`torch.DoubleTensor` of shape `(len(names), 2)`): Their numerators and denominators.
    """

    names: tuple[str, ...]
    values: torch.Tensor

    @classmethod
    def of(cls, sums: Mapping[str, Sequence[float | torch.Tensor]], device: torch.device) -> "DeviceSums":
        """Gather numbers, and scalars of the device, as float64."""
        flat = [value for pair in sums.values() for value in pair]
        # One tensor for all equal numbers.
        numbers = {value for value in flat if not isinstance(value, torch.Tensor)}
        filled = {value: torch.full((), value, dtype=torch.float64, device=device) for value in numbers}
        scalars = [value.detach().double() if isinstance(value, torch.Tensor) else filled[value] for value in flat]
        return cls(tuple(sums), torch.stack(scalars).view(-1, 2))

    def read(self) -> dict[str, tuple[float, float]]:
        """Return the numbers by metric; the host waits for the device once."""
        return {name: (top, bottom) for name, (top, bottom) in zip(self.names, self.values.tolist(), strict=True)}


class MetricSums:
    """Running numerators and denominators by metric name. What is on a device stays there until it is asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._on_device: dict[tuple[str, ...], torch.Tensor] = {}

    def add(self, sums: Mapping[str, Sequence[float]] | DeviceSums) -> None:
        """Add numerators and denominators."""
        if isinstance(sums, DeviceSums):
            held = self._on_device.get(sums.names)
            self._on_device[sums.names] = sums.values if held is None else held + sums.values
            return
        for name, (numerator, denominator) in sums.items():
            self._sums[name][0] += numerator
            self._sums[name][1] += denominator

    def _read(self) -> None:
        """Fetch what is on a device, in one copy per set of metrics."""
        held, self._on_device = self._on_device, {}
        for names, values in held.items():
            self.add(DeviceSums(names, values).read())

    def state(self) -> dict[str, list[float]]:
        """Return this rank's numerators and denominators, for a checkpoint."""
        self._read()
        return {name: list(sums) for name, sums in self._sums.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        """Continue from the sums of a checkpoint."""
        self._sums.clear()
        self._on_device.clear()
        self.add(state)

    def pop(self) -> dict[str, float]:
        """Return the ratios over all ranks and start anew; metrics whose denominator is 0 are left out. Collective."""
        merged = MetricSums()
        for sums in gather_object([self.state()]):
            merged.add(sums)
        self._sums.clear()
        return merged.ratios()

    def ratios(self) -> dict[str, float]:
        """Return this rank's ratios, by name; metrics whose denominator is 0 are left out."""
        self._read()
        return {name: sums[0] / sums[1] for name, sums in sorted(self._sums.items()) if sums[1]}


class Pace:
    """How many tokens were trained on, and how long that took; counted on their device until they are asked for."""

    def __init__(self) -> None:
        self._counts: list[torch.Tensor] = []
        self._since = time.perf_counter()

    def add(self, masks: Sequence[torch.Tensor]) -> None:
        """Count the tokens that masks mark."""
        self._counts += [mask.sum() for mask in masks]

    def pop(self) -> tuple[float, float]:
        """Return tokens and seconds since it was last asked, and count anew."""
        tokens, since = float(sum(int(count) for count in self._counts)), self._since
        self._counts, self._since = [], time.perf_counter()
        return tokens, self._since - since


def rollout_sums(rollout: Rollout, eos_token_ids: Sequence[int]) -> DeviceSums:
    """
    Return tau, acceptance per slot and lengths of a rollout as sums; `eos_token_ids` are what ends a response.

    tau counts the bonus and uses the blocks that lie inside the text by geometry: `sum (r + 1) / blocks`. Where
    confidences were kept, what [`Calibration`] has of the slots that were reached is there too.
    """
    num_rows = float(len(rollout.anchors))
    # The last token of every response: of a chat, there are several in a row.
    is_written = rollout.completion_mask
    is_last = is_written.clone()
    is_last[:, :-1] &= ~is_written[:, 1:]
    is_cut = is_last
    for token_id in eos_token_ids:
        is_cut = is_cut & (rollout.input_ids != token_id)
    counted = rollout.is_counted
    slots = torch.arange(1, rollout.drafts.shape[-1] + 1, device=counted.device)
    kept = ((rollout.accepted[..., None] >= slots) & counted[..., None]).sum(dim=(0, 1), dtype=torch.float64)
    num_blocks = counted.sum(dtype=torch.float64)
    sums: dict[str, tuple[float | torch.Tensor, float | torch.Tensor]] = {
        "tau": (num_blocks + kept.sum(), num_blocks),
        "response_length": (is_written.sum(dtype=torch.float64), num_rows),
        "rounds": (rollout.num_rounds.sum(dtype=torch.float64), num_rows),
        "refused_responses": (float(rollout.num_refused), num_rows),
        "truncated_responses": (is_cut.sum(dtype=torch.float64), is_last.sum(dtype=torch.float64)),
        # A text that ends with its first token has nothing to draft.
        "empty_responses": ((is_written.sum(dim=1) <= 1).sum(dtype=torch.float64), num_rows),
    }
    sums |= {f"acceptance/slot_{slot}": (each, num_blocks) for slot, each in enumerate(kept.unbind(), 1)}
    if rollout.confidences is not None:
        num_reached, *totals = Calibration.of_rollout(rollout).sums.sum(dim=(0, 1))
        names = ("confidence/reached", "kept/reached", "brier/reached")
        sums |= {name: (float(total), float(num_reached)) for name, total in zip(names, totals, strict=True)}
    return DeviceSums.of(sums, counted.device)


@dataclass(frozen=True)
class DecodedPrompt:
    """
    What one evaluation prompt adds to a measurement: its row in the dataset, its tokens, the counts of its blocks, and
    where its drafts were rejected, see [`rejection_sums`].
    """

    sample_id: int
    ids: list[int]
    counts: Counts
    rejections: dict[str, tuple[float, float]]


def decoded_prompts(rollout: Rollout, sample_ids: Sequence[int], classes: torch.Tensor | None) -> list[DecodedPrompt]:
    """Return what each row of a rollout adds to a measurement; `classes` are [`token_classes`], where known."""
    counts, lengths = Counts.of_rollout(rollout), rollout.prompt_lengths.tolist()
    rows = zip(sample_ids, rollout.input_ids.tolist(), lengths, strict=True)
    return [
        DecodedPrompt(
            number, ids[:length], counts.row(i), rejection_sums(rollout.rows(i, i + 1), classes, TOKEN_CLASSES)
        )
        for i, (number, ids, length) in enumerate(rows)
    ]
