# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a run needs beside the drafter to go on as if it had never stopped, as tensors and JSON; and what a run is.

Knows no files and no trainer: values in, values out.
"""

import hashlib
import json
import random
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset


SCHEMA_VERSION = 1
_HASHED_ROWS = 256
# Differences under which a stored position or state means something else in this run.
_BINDING = {
    "method": "the trainer's kind",
    "drafter": "the drafter's architecture or adapter",
    "target": "the target's weights, architecture or tokenizer",
}
# Differences under which only the position in the data means something else.
_POSITION = {
    "dataset": "the training data",
    "rows_per_update": "rows per update (batch size times accumulation times processes)",
}


@dataclass(frozen=True)
class RunIdentity:
    """
    What makes two runs the same one.

    Attributes:
        method (`str`): `"sft"` or `"opd"`.
        drafter (`str`), target (`str`), dataset (`str` or `None`): Digests; a stream has none.
        rows_per_update (`int`): Rows of one optimiser step, over all processes.
        settings (`dict`): Settings that shape what is computed.
    """

    method: str
    drafter: str
    target: str
    dataset: str | None
    rows_per_update: int
    settings: dict[str, Any]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunIdentity":
        """Read what `dataclasses.asdict` made; raises `ValueError` if fields are missing or unknown."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"the run's fields {sorted(set(values) ^ names)} are missing or unknown")
        return cls(**values)

    def check_goes_on(self, stored: "RunIdentity", *, ignores_position: bool) -> list[str]:
        """
        Hold this run to the one that wrote a checkpoint.

        Args:
            stored ([`RunIdentity`]): The run that wrote it.
            ignores_position (`bool`): Whether the data is read from its start again (`ignore_data_skip=True`).

        Returns:
            `list[str]`: settings that differ and may, with both values.

        Raises:
            ValueError: Naming what differs and may not, and the way out.
        """
        binding = _BINDING if ignores_position else _BINDING | _POSITION
        changed = [name for name in binding if getattr(self, name) != getattr(stored, name)]
        if changed:
            told = "; ".join(
                f"{binding[name]} ({getattr(stored, name)!r} there, {getattr(self, name)!r} here)" for name in changed
            )
            way = "Use what the run was started with, or start a new run from the checkpoint's drafter: give its folder as `model`."
            if set(changed) <= set(_POSITION):
                way += " `ignore_data_skip=True` goes on with the new data or batches from their start."
            raise ValueError(f"This run cannot go on from that checkpoint, because these differ: {told}. {way}")
        names = sorted(set(self.settings) | set(stored.settings))
        return [
            f"{name}: {stored.settings.get(name)!r} there, {self.settings.get(name)!r} here"
            for name in names
            if self.settings.get(name) != stored.settings.get(name)
        ]


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def dataset_digest(dataset: Dataset | IterableDataset | None) -> str | None:
    """Return a digest of the number of rows, the columns and up to 256 evenly spaced rows; `None` for a stream, which is not read."""
    if not isinstance(dataset, Dataset):
        return None
    count = min(_HASHED_ROWS, len(dataset))
    places = [number * (len(dataset) - 1) // max(count - 1, 1) for number in range(count)]
    return digest_of([len(dataset), sorted(dataset.column_names), [dataset[place] for place in places]])


# ---- random numbers ---------------------------------------------------------------------------------------------------


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators, and that of `device`, as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": _to_hex(torch.get_rng_state()),
    }
    if device.type == "cuda":
        states["cuda"] = _to_hex(torch.cuda.get_rng_state(device))
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put the generators where [`random_states`] found them."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(_from_hex(states["cuda"]), device)


def _to_hex(state: torch.Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


# ---- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankState:
    """
    What each process keeps for itself.

    Attributes:
        random (`dict`): See [`random_states`].
        sums (`dict[str, list[float]]`): Numerators and denominators of metrics since the last log.
        loss_since_log (`float`): Sum of losses since the last log.
    """

    random: dict[str, Any]
    sums: dict[str, list[float]]
    loss_since_log: float


@dataclass(frozen=True)
class RunState:
    """
    Everything but the drafter's and the optimiser's tensors.

    Attributes:
        identity ([`RunIdentity`]): The run.
        optimizer (`dict`): What is no tensor of a parameter's size.
        scheduler (`dict`): Of the learning rate.
        scaler (`dict` or `None`): Of float16's loss scale.
        last_logged_step (`int`): Step of the last log.
        ranks (`list[RankState]`): One per process.
        shared (`dict`): What all processes hold alike.
    """

    identity: RunIdentity
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    last_logged_step: int
    ranks: list[RankState]
    shared: dict[str, Any]

    def to_json(self) -> str:
        """Return the state as JSON text; raises `TypeError` naming a value that JSON cannot hold."""
        return json.dumps({"schema_version": SCHEMA_VERSION} | asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RunState":
        """
        Read what [`RunState.to_json`] wrote.

        Raises:
            ValueError: If the layout is another version's, or fields are missing or unknown.
        """
        values = json.loads(text)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"the state is of version {version!r}, this release reads version {SCHEMA_VERSION}")
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"the state's fields {sorted(set(values) ^ names)} are missing or unknown")
        values["identity"] = RunIdentity.from_dict(values["identity"])
        values["ranks"] = [RankState(**rank) for rank in values["ranks"]]
        return cls(**values)

    def rank(self, index: int, count: int) -> RankState:
        """
        Return what process `index` of `count` goes on with.

        With as many processes as before each takes its own. Otherwise the first takes all sums, and random states are handed out as
        far as they go: which rank draws what has no meaning then.
        """
        own = self.ranks[index % len(self.ranks)]
        if count == len(self.ranks):
            return own
        if index > 0:
            return RankState(own.random, {}, 0.0)
        merged: dict[str, list[float]] = {}
        for rank in self.ranks:
            for name, (numerator, denominator) in rank.sums.items():
                total = merged.setdefault(name, [0.0, 0.0])
                total[0] += numerator
                total[1] += denominator
        # The logged loss is a mean over processes.
        mean = sum(rank.loss_since_log for rank in self.ranks) / len(self.ranks)
        return RankState(own.random, merged, mean * count)
