# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a run needs besides the drafter to continue as if it had never stopped: the optimizer's tensors, all else as JSON.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from .distributed.sharding import OptimizerState
from .identity import RunIdentity


SCHEMA_VERSION = 2
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"


@dataclass(frozen=True)
class RankState:
    """What each process keeps for itself: [`random_states`], and sums of metrics and losses since the last log."""

    random: dict[str, Any]
    sums: dict[str, list[float]]
    loss_since_log: float


@dataclass(frozen=True)
class RunState:
    """
    Everything but the tensors: `optimizer` holds the `values` of its [`OptimizerState`], `shared` what all processes
    hold alike.
    """

    identity: RunIdentity
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    scaler: dict[str, Any] | None
    last_logged_step: int
    ranks: list[RankState]
    shared: dict[str, Any]

    def write(self, folder: Path, optimizer_tensors: dict[str, torch.Tensor]) -> None:
        """Write the state into a checkpoint; raises `TypeError` naming a value that JSON cannot hold."""
        (folder / STATE_FILE).write_text(json.dumps({"schema_version": SCHEMA_VERSION} | asdict(self)), "utf-8")
        save_file(optimizer_tensors, folder / OPTIMIZER_FILE)

    @classmethod
    def read(cls, folder: Path) -> "RunState":
        """Read what [`RunState.write`] wrote, but for the tensors; raises `ValueError` if it cannot be."""
        path = folder / STATE_FILE
        try:
            values = json.loads(path.read_text("utf-8"))
            version = values.pop("schema_version", None)
            if version != SCHEMA_VERSION:
                raise ValueError(f"the state is of version {version!r}, this release reads version {SCHEMA_VERSION}")
            values["identity"] = RunIdentity(**values["identity"])
            values["ranks"] = [RankState(**rank) for rank in values["ranks"]]
            return cls(**values)
        except OSError as error:
            raise ValueError(
                f"Process {PartialState().process_index} cannot read {str(path)!r} ({error.strerror}). All machines "
                "need the same `output_dir`, on storage that they share."
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}.") from error

    def optimizer_state(self, folder: Path) -> OptimizerState:
        """Return the optimizer's state, with the tensors that the checkpoint in `folder` holds."""
        return OptimizerState(load_file(folder / OPTIMIZER_FILE), self.optimizer)

    def rank(self, index: int, count: int) -> RankState:
        """
        Return what process `index` of `count` continues with: its own, where there are as many processes as before.

        Otherwise the first takes all sums, and random states are handed out as far as they go: which rank draws what
        has no meaning then.
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


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators, and that of `device`, as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
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
