# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whose readings a store holds, of which layers and in which precision: what its `manifest.json` says. Knows no shard.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..costs.readings import bytes_per_token
from ..drafters.target_shape import check_layer_ids
from ..responses.origin import hash_config
from ..responses.shards import refuse_link
from ..responses.store import is_store
from ..target.frozen import FrozenTarget
from ..utils.atomic_files import explaining_failure, write_file
from ..utils.hashing import hash_json


MANIFEST = "manifest.json"
FORMAT_NAME = "trl-draft-opd readings"
_FORMAT = f"{FORMAT_NAME} 1"
# Precisions that states are stored in.
STORED_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# The one kind of last state that is stored: after the final norm, whoever computed it.
INPUT_OF_HEAD = "input of the head"


@dataclass(frozen=True)
class ReadingManifest:
    """
    Name the target that read the texts of a store, and what is kept of its readings. Engines are kept per shard.

    Attributes:
        target (`str` or `None`): Hub id or path, as far as known; not compared.
        config_hash (`str`), weights_fingerprint (`str`): As of [`Origin`].
        layer_ids (`tuple[int, ...]`): Tapped layers, ascending.
        target_dtype (`str`): Precision that the target computed in.
        dtype (`str`): Precision of what is stored: `"bfloat16"` or `"float32"`.
        hidden_size (`int`): H.
        last_state (`str`): What the last column is: `"input of the head"`.
    """

    target: str | None = field(compare=False)
    config_hash: str
    weights_fingerprint: str
    layer_ids: tuple[int, ...]
    target_dtype: str
    dtype: str
    hidden_size: int
    last_state: str = INPUT_OF_HEAD

    @classmethod
    def of(cls, target: FrozenTarget, layer_ids: Sequence[int], dtype: str = "auto") -> "ReadingManifest":
        """
        Describe the readings that a loaded target is about to write.

        Args:
            target ([`FrozenTarget`]): The target, with or without its body.
            layer_ids (`Sequence[int]`): Layers to keep, ascending.
            dtype (`str`, *optional*, defaults to `"auto"`):
                Precision to store them in; `"auto"` is the target's own.

        Raises:
            ValueError: If these are no layers of the target, or states are not stored in this precision.
        """
        check_layer_ids(list(layer_ids), target.num_layers)
        target_dtype = _name_of(target.causal_lm.dtype)
        return cls(
            target=target.config.name_or_path or target.causal_lm.config.name_or_path or None,
            config_hash=hash_config(target.config),
            weights_fingerprint=target.weights_fingerprint,
            layer_ids=tuple(layer_ids),
            target_dtype=target_dtype,
            dtype=check_dtype(target_dtype if dtype == "auto" else dtype),
            hidden_size=target.config.hidden_size,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of what is compared: equal iff two manifests are."""
        return hash_json({each.name: getattr(self, each.name) for each in fields(self) if each.compare})

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of what is stored."""
        return STORED_DTYPES[self.dtype]

    def bytes_per_token(self, num_layers: int | None = None) -> int:
        """Return the bytes of a token's states at so many layers, by default all that are stored, and at the last."""
        num_layers = len(self.layer_ids) if num_layers is None else num_layers
        return bytes_per_token(self.hidden_size, num_layers, self.torch_dtype.itemsize)

    def check_same(self, stored: "ReadingManifest", where: str) -> None:
        """
        Refuse to add readings to those of another target, layers or precision.

        Args:
            stored ([`ReadingManifest`]): Of the store.
            where (`str`): What to call it.

        Raises:
            ValueError: Naming each field that differs, both values, and the fix.
        """
        if self == stored:
            return
        raise ValueError(
            f"{where} are of other conditions:\n{_differences(stored, self)}Read with the target, layers and "
            f"precisions that they were read with (layers {' '.join(map(str, stored.layer_ids))}, dtype "
            f"{stored.dtype}, target_dtype {stored.target_dtype}), or give another folder."
        )

    def check_usable(self, target: FrozenTarget, layer_ids: Sequence[int], where: str) -> None:
        """
        Refuse to train with this store's readings where they are not those of the run's target at its layers.

        Raises:
            ValueError: Naming each field that differs, both values, and the fix.
        """
        lacking = sorted(set(layer_ids) - set(self.layer_ids))
        if lacking:
            raise ValueError(
                f"{where} hold the layers {list(self.layer_ids)} and lack {lacking}, which the drafter taps. Read the "
                "texts again into another folder, with `trl-draft-opd read --drafter` or `--target-layer-ids "
                f"{' '.join(str(i) for i in sorted({*self.layer_ids, *layer_ids}))}`, or train a drafter of the "
                "stored layers."
            )
        here = ReadingManifest.of(target, self.layer_ids, self.dtype) if self._fits(target) else None
        if here == self:
            return
        shown = "" if here is None else _differences(self, here)
        if here is None:
            shown = (
                f"  hidden_size: {self.hidden_size} there, {target.config.hidden_size} here\n"
                f"  layer_ids: {list(self.layer_ids)} there, {target.num_layers} layers here\n"
            )
        fix = "Train with the target that they were read by"
        if here is not None and self.target_dtype != here.target_dtype:
            fix += f" in its precision (`target_dtype={self.target_dtype!r}`)"
        raise ValueError(
            f"{where} are of another target:\n{shown}{fix}, or read the texts with this one into another folder with "
            "`trl-draft-opd read`."
        )

    def _fits(self, target: FrozenTarget) -> bool:
        return target.config.hidden_size == self.hidden_size and self.layer_ids[-1] < target.num_layers - 1

    def write(self, folder: Path) -> None:
        """Write the manifest into the folder of a store."""
        content = {"format": _FORMAT, "digest": self.digest, "readings": asdict(self)}
        with explaining_failure(f"The manifest of {str(folder)!r}", "Make room, or name another folder"):
            write_file(folder / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "ReadingManifest":
        """
        Read the manifest of a store.

        Raises:
            ValueError: If there is none, or it is not what was written.
        """
        path = folder / MANIFEST
        if not path.is_file():
            num_shards = len(list(folder.glob("shard-*.safetensors")))
            fix = "Write one with `trl-draft-opd read`."
            if num_shards:
                fix = f"It has {num_shards} shards: the same `trl-draft-opd read` takes them in and writes it anew."
            raise ValueError(f"There is no store of readings in {folder}: it has no {MANIFEST}. {fix}")
        refuse_responses(folder)
        try:
            content = json.loads(refuse_link(path).read_text("utf-8"))
            found = content.get("format") if isinstance(content, dict) else None
            if found != _FORMAT:
                raise ValueError(f"its format is {found!r}, this release reads {_FORMAT!r}")
            manifest = cls(**{**content["readings"], "layer_ids": tuple(content["readings"]["layer_ids"])})
            if content["digest"] != manifest.digest:
                raise ValueError("its fields were changed after it was written")
            check_dtype(manifest.dtype)
        except (ValueError, TypeError, KeyError) as error:
            reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise ValueError(
                f"The manifest {path} is not usable: {reason}. Where readings lie beside it, they are as they were: "
                "restore this file, or delete it alone and run the same `trl-draft-opd read` again, which takes in "
                "the shards that its target and settings wrote. Else give another folder."
            ) from error
        return manifest


def holds_readings(folder: Path) -> bool:
    """Whether a folder holds readings, in whatever state."""
    path = folder / MANIFEST
    return path.is_file() and f'"format": "{FORMAT_NAME}' in path.read_text("utf-8", errors="replace")


def refuse_responses(folder: Path) -> None:
    """Raise `ValueError` at a folder of responses, which is mistaken for a store of readings."""
    if is_store(folder):
        raise ValueError(
            f"{str(folder)!r} holds responses, which are text alone. Name it in `responses`; readings need a folder "
            "of their own, which `trl-draft-opd read --responses` writes."
        )


def check_dtype(dtype: str) -> str:
    """Return a precision that states are stored in, or raise `ValueError` with the reason and what to give."""
    if dtype in STORED_DTYPES:
        return dtype
    why = ""
    if dtype == "float16":
        why = ": the states of some targets outgrow its largest number, 65,504, and would be stored as infinite"
    elif "float8" in dtype or "fp8" in dtype:
        why = ": 8 bits change what the head makes of the states by more than training forgives (KL 3.6e-3)"
    raise ValueError(
        f"States are not stored in {dtype!r}{why}. Give `dtype='bfloat16'`, or `'float32'` with twice the bytes."
    )


def show_bytes(num_bytes: float) -> str:
    """Return a number of bytes for print."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB")):
        if num_bytes >= 1000**power:
            return f"{num_bytes / 1000**power:,.1f} {unit}"
    return f"{num_bytes:,.0f} bytes"


def _differences(there: ReadingManifest, here: ReadingManifest) -> str:
    pairs = [(each.name, getattr(there, each.name), getattr(here, each.name)) for each in fields(there)]
    return "".join(f"  {name}: {_shown(a)} there, {_shown(b)} here\n" for name, a, b in pairs if a != b)


def _shown(value: Any) -> str:
    """Return a value for print; of a SHA-256, the first digits tell it from another."""
    if isinstance(value, tuple):
        return str(list(value))
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return value[:8] if is_hash else repr(value)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
