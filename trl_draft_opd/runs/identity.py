# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What makes a run this one and no other, and whether a checkpoint belongs to it.
"""

import hashlib
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from pyarrow.types import is_integer, is_large_list, is_list
from transformers import TrainingArguments

from ..drafters.base import Drafter
from ..export.record import recorded_settings
from ..export.source import hub_id_of
from ..responses.origin import hash_config, hash_tokenizer
from ..target.frozen import FrozenTarget
from ..utils.hashing import hash_json


# A stream may be slow, and is read again from its start.
_HASHED_ROWS_OF_A_STREAM = 64
_ROWS_AT_A_TIME = 1000
# Entries of a drafter's config that name it or its target and change nothing, or that transformers sets in training.
_NAMES = {
    "_name_or_path",
    "name_or_path",
    "target_model_name_or_path",
    "target_model_revision",
    "transformers_version",
    "use_cache",
}
# Settings beyond those of the training record that shape what is computed.
_FURTHER = ("adam_epsilon", "chat_template", "target_revision", "on_nonfinite")
# Of an adapter's config: what makes its tensors others, or mean something else.
_OF_ADAPTERS = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora")
# How an update's rows are dealt to batches and processes: their product is compared by itself.
_DEALING = {"per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size"}
# Settings that are the optimizer's and the scheduler's, whose state is the checkpoint's.
_KEPT = {"learning_rate", "muon_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
# Where these differ, the stored state means something else in this run.
_BINDING = {
    "method": "the trainer's kind",
    "drafter": "the drafter's architecture or adapter",
    "target": "the target's weights, architecture or tokenizer",
}
# Where these differ, only the position in the data means something else.
_POSITION = {
    "dataset": "the training data",
    "rows_per_update": "rows per update (batch size times accumulation times processes)",
}


@dataclass(frozen=True)
class RunIdentity:
    """
    What makes two runs the same one: the drafter's shape; digests (of a stream, that of its first rows); and settings
    that shape what is computed.
    """

    method: str
    drafter: dict[str, Any]
    target: dict[str, str | None]
    dataset: str | None
    rows_per_update: int
    settings: dict[str, Any]

    @classmethod
    def of(
        cls,
        method: str,
        args: TrainingArguments,
        drafter: Drafter,
        target: FrozenTarget,
        dataset: Dataset | IterableDataset | None,
    ) -> "RunIdentity":
        """Describe a run; `drafter` is what is trained, adapter included, without its distributed wrapper."""
        # Its own settings alone: whatever else a config carries, a token even, is in no checkpoint.
        names = [setting.name for setting in fields(drafter.config) if setting.name not in _NAMES]
        shape = {name: getattr(drafter.config, name) for name in names}
        for name in _OF_ADAPTERS:
            value = getattr(getattr(drafter, "peft_config", {}).get("default"), name, None)
            shape[f"lora_{name}".replace("lora_lora_", "lora_")] = sorted(value) if isinstance(value, set) else value
        trained = sorted(name for name, parameter in drafter.named_parameters() if parameter.requires_grad)
        name = target.config.name_or_path or ""
        shape["names of the trained weights"] = hash_json(trained)
        settings = recorded_settings(args) | {name: getattr(args, name) for name in _FURTHER}
        if target.source is not None:
            # A note and no bond: whoever delivers the same target's readings, they differ by rounding alone.
            settings["readings"] = getattr(target.source, "digest", None)
            settings["shuffle_by_shard"] = getattr(args, "shuffle_by_shard", False) or None
        return cls(
            method=method,
            # Through JSON and back, so that it equals what a file gives back.
            drafter=json.loads(json.dumps(shape, default=str)),
            target={
                # Of a folder the last part alone: a checkpoint that is pushed tells no paths.
                "name": hub_id_of(name) or Path(name).name or None,
                "architecture": hash_config(target.config),
                "weights": target.weights_fingerprint,
                "tokenizer": None if target.tokenizer is None else hash_tokenizer(target.tokenizer),
            },
            dataset=_digest_rows(dataset),
            rows_per_update=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            settings={name: value for name, value in settings.items() if name not in _DEALING},
        )

    def check_continues(self, stored: "RunIdentity", *, ignores_position: bool) -> list[str]:
        """
        Return how the settings differ from those of the run that wrote a checkpoint; raise `ValueError` if more does,
        or if one of them trains with Muon and the other without.

        `ignores_position` (`ignore_data_skip=True`): the data is read from its start again and may be another.
        """
        compared = _BINDING if ignores_position else _BINDING | _POSITION
        parts = {name: _differing(getattr(stored, name), getattr(self, name)) for name in compared}
        changed = [name for name, differing in parts.items() if differing]
        if changed:
            differences = "; ".join(f"{compared[name]} ({', '.join(parts[name])})" for name in changed)
            fix = (
                "Use what the run was started with, or start a new run from the checkpoint's folder (`--drafter`, or "
                "`model`)."
            )
            if set(changed) <= set(_POSITION):
                fix += " `ignore_data_skip=True` continues with the new data or batches from their start."
            raise ValueError(
                f"This run cannot resume from that checkpoint, because these differ: {differences}. {fix}"
            )
        rate, own_rate = (each.settings.get("muon_learning_rate") for each in (stored, self))
        if (rate is None) != (own_rate is None):
            fix = "Leave it out" if rate is None else f"Set it to {rate!r}"
            raise ValueError(
                "This run cannot resume from that checkpoint, because one trains with Muon and the other without: "
                f"`muon_learning_rate` is {rate!r} there, {own_rate!r} here. {fix}, or start a new run from the "
                "checkpoint's folder (`--drafter`, or `model`)."
            )
        names = sorted(self.settings.keys() | stored.settings.keys())
        pairs = [(name, stored.settings.get(name), self.settings.get(name)) for name in names]
        return [
            f"{name}: {there!r} there, {here!r} here" + (" (the checkpoint's is kept)" if name in _KEPT else "")
            for name, there, here in pairs
            if there != here
        ]


def _differing(there: Any, here: Any) -> list[str]:
    """Return what differs, by name and both values where it has parts; a name alone is no difference."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return [] if there == here else [f"{_shown(there)} there, {_shown(here)} here"]
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if set(names) <= {"name"}:
        return []
    return [f"{name}: {_shown(there.get(name))} there, {_shown(here.get(name))} here" for name in names]


def _shown(value: Any) -> str:
    """Return a value for an error, of a digest its beginning."""
    is_digest = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    return value[:8] if is_digest else repr(value)


def _digest_rows(dataset: Dataset | IterableDataset | None) -> str | None:
    """Digest the columns and all rows; of a stream the first ones, which are read for it."""
    if dataset is None:
        return None
    if isinstance(dataset, IterableDataset):
        return hash_json(list(dataset.take(_HASHED_ROWS_OF_A_STREAM)))
    digest, columns = hashlib.sha256(), sorted(dataset.column_names)
    digest.update(hash_json([len(dataset), columns]).encode())
    arrow: Any = dataset.with_format("arrow")
    for table in arrow.iter(_ROWS_AT_A_TIME):
        for column in columns:
            _digest_values(digest, table.column(column).combine_chunks())
    return digest.hexdigest()


def _digest_values(digest: Any, values: Any) -> None:
    """Digest an Arrow array by what it holds: lists of token ids are never made Python's, which takes minutes."""
    while is_list(values.type) or is_large_list(values.type):
        digest.update(values.value_lengths().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        values = values.flatten()
    if is_integer(values.type) and not values.null_count:
        digest.update(values.to_numpy().tobytes())
    else:
        digest.update(hash_json(values.to_pylist()).encode())
