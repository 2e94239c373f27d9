# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What makes a run this one and no other, and whether a checkpoint belongs to it.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from pyarrow.types import is_integer, is_large_list, is_list
from transformers import TrainingArguments

from ..drafters.base import Drafter
from ..export.record import recorded_settings
from ..responses.origin import hash_config, hash_tokenizer
from ..target.frozen import FrozenTarget
from ..utils.hashing import hash_json


# A stream may be slow, and is read again from its start.
_HASHED_ROWS_OF_A_STREAM = 64
_ROWS_AT_A_TIME = 1000
# Entries of a drafter's config that name it or its target and change nothing.
_NAMES = {
    "_name_or_path",
    "name_or_path",
    "target_model_name_or_path",
    "target_model_revision",
    "transformers_version",
}
# Settings beyond those of the training record that shape what is computed.
_FURTHER = ("adam_epsilon", "chat_template", "target_revision", "on_nonfinite")
# How an update's rows are dealt to batches and processes: their product is compared by itself.
_DEALING = {"per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size"}
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
    What makes two runs the same one: digests (of a stream, that of its first rows), and settings that shape what is
    computed.
    """

    method: str
    drafter: str
    target: str
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
        shape = {name: value for name, value in drafter.config.to_dict().items() if name not in _NAMES}
        trained = sorted(name for name, parameter in drafter.named_parameters() if parameter.requires_grad)
        tokenizer = None if target.tokenizer is None else hash_tokenizer(target.tokenizer)
        settings = recorded_settings(args) | {name: getattr(args, name) for name in _FURTHER}
        return cls(
            method=method,
            drafter=hash_json([shape, trained]),
            target=hash_json([hash_config(target.config), target.weights_fingerprint, tokenizer]),
            dataset=_digest_rows(dataset),
            rows_per_update=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            settings={name: value for name, value in settings.items() if name not in _DEALING},
        )

    def check_continues(self, stored: "RunIdentity", *, ignores_position: bool) -> list[str]:
        """
        Return how the settings differ from those of the run that wrote a checkpoint; raise `ValueError` if more does.

        `ignores_position` (`ignore_data_skip=True`): the data is read from its start again and may be another.
        """
        compared = _BINDING if ignores_position else _BINDING | _POSITION
        changed = [name for name in compared if getattr(self, name) != getattr(stored, name)]
        if changed:
            differences = "; ".join(
                f"{compared[name]} ({getattr(stored, name)!r} there, {getattr(self, name)!r} here)" for name in changed
            )
            fix = (
                "Use what the run was started with, or start a new run from the checkpoint's folder (`--drafter`, or "
                "`model`)."
            )
            if set(changed) <= set(_POSITION):
                fix += " `ignore_data_skip=True` continues with the new data or batches from their start."
            raise ValueError(
                f"This run cannot resume from that checkpoint, because these differ: {differences}. {fix}"
            )
        names = sorted(self.settings.keys() | stored.settings.keys())
        pairs = [(name, stored.settings.get(name), self.settings.get(name)) for name in names]
        return [f"{name}: {there!r} there, {here!r} here" for name, there, here in pairs if there != here]


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
