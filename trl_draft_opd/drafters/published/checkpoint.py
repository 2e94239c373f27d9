# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Read a published drafter from a folder or the Hub: its config, and its tensors under this package's names.

Nothing here runs code that comes with a checkpoint, or skips a tensor it does not know: whatever is not in the short
lists below and of its family is handed on, and loading reports it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...utils.loading import require_model
from .configs import ParsedConfig, parse_drafter_config, refuse_not_finite
from .family import FAMILIES, PublishedFamily


CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"

# Computed from the config, or used by a trainer only.
_NOT_LEARNED = re.compile(r"(.+\.)?rotary_emb\.(original_)?inv_freq")
_TRAINING_ONLY = re.compile(r"verifier_.+")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CheckpointSource:
    """A local folder or a repository on the Hub; fields as in `transformers`."""

    name_or_path: str
    revision: str | None = None
    subfolder: str = ""
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def __str__(self) -> str:
        return f"{self.name_or_path}/{self.subfolder}" if self.subfolder else self.name_or_path

    def places(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that say where the files are, besides the name."""
        return {place.name: getattr(self, place.name) for place in fields(self) if place.name != "name_or_path"}

    def is_same(self, other: "CheckpointSource") -> bool:
        """Whether two sources are one folder, or one revision of one repository."""
        here, there = Path(self.name_or_path, self.subfolder), Path(other.name_or_path, other.subfolder)
        if here.is_dir() and there.is_dir():
            return here.samefile(there)
        return (str(self), self.revision) == (str(other), other.revision)

    def find(self, filename: str) -> Path | None:
        """Return the path of a file, downloading it if need be, or `None` if folder or repository exist without it."""
        folder = Path(self.name_or_path)
        if self.name_or_path and folder.is_dir():
            path = folder / self.subfolder / filename
            return _inside(folder, path) if path.is_file() else None
        require_model(
            self.name_or_path, token=self.token, cache_dir=self.cache_dir, local_files_only=self.local_files_only
        )
        try:
            return Path(
                hf_hub_download(
                    self.name_or_path,
                    filename,
                    subfolder=self.subfolder or None,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                )
            )
        except LocalEntryNotFoundError:
            # Offline, only the presence of the snapshot tells a file that does not exist from one never downloaded.
            if filename != CONFIG_FILE and (self.local_files_only or is_offline_mode()) and self._is_cached():
                return None
            raise
        except EntryNotFoundError:
            return None

    def read_json(self, filename: str) -> dict[str, Any]:
        """Return the object in a JSON file."""
        path = self.find(filename)
        if path is None:
            raise FileNotFoundError(f"{str(self)!r} has no {filename}. If it is in a subfolder, pass `subfolder=`.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # of the encoding and of its depth, too
            raise ValueError(f"{filename} of {str(self)!r} is not valid JSON: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{filename} of {str(self)!r} holds no JSON object but a {type(content).__name__}.")
        refuse_not_finite(content, f"{filename} of {str(self)!r}")
        return content

    def weight_files(self) -> dict[str, list[str]] | None:
        """
        Return the safetensors files that hold the weights, each with the tensors that the index places in it: none
        where there is one file and no index. `None` if there are no such files.
        """
        if self.find(SAFETENSORS_FILE) is not None:
            return {SAFETENSORS_FILE: []}
        if self.find(INDEX_FILE) is None:
            return None
        weight_map = self.read_json(INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{INDEX_FILE} of {str(self)!r} has no `weight_map`.")
        files: dict[str, list[str]] = {}
        for name, file in sorted(weight_map.items(), key=lambda entry: str(entry[1])):
            # A path in an index could name any file of this machine.
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(file)):
                raise ValueError(
                    f"{INDEX_FILE} of {str(self)!r} names {file!r}, which is not a plain safetensors file name."
                )
            files.setdefault(file, []).append(name)
        return files

    def find_weights(self, file: str) -> Path:
        """Return the path of one of [`CheckpointSource.weight_files`], or raise `ValueError` if it is missing."""
        path = self.find(file)
        if path is None:
            raise ValueError(f"{INDEX_FILE} of {str(self)!r} names {file!r}, which is missing. Download it again.")
        return path

    def _is_cached(self) -> bool:
        name = f"{self.subfolder}/{CONFIG_FILE}" if self.subfolder else CONFIG_FILE
        return isinstance(try_to_load_from_cache(self.name_or_path, name, self.cache_dir, self.revision), str)


def _inside(folder: Path, path: Path) -> Path:
    """Return `path`, unless it is a link out of `folder`: what it leads to would be published as the drafter's."""
    file, root = path.resolve(), folder.resolve()
    # In the cache of the Hub, a snapshot's files are links to blobs in a sibling folder.
    if file.is_relative_to(root) or (root.parent.name == "snapshots" and file.parent == root.parents[1] / "blobs"):
        return path
    raise ValueError(f"{str(path)!r} is a link to {str(file)!r}, outside of its folder. Copy the file instead.")


def read_drafter_config(source: CheckpointSource, *, num_target_layers: int | None) -> ParsedConfig:
    """Read and parse the `config.json` of a checkpoint; see [`parse_drafter_config`]."""
    raw = source.read_json(CONFIG_FILE)
    return parse_drafter_config(raw, num_target_layers=num_target_layers, name=repr(str(source)))


def read_drafter_tensors(
    source: CheckpointSource, imported: ParsedConfig, *, allow_pickle_weights: bool
) -> dict[str, torch.Tensor]:
    """
    Read the weights of a checkpoint, on the CPU and in the precision of the file, under this package's names.

    Left out, because drafters here do not own them: the target's embedding (and its head, where the drafter has none
    of its own), rotary frequencies, `verifier_*` of the speculators format, and the vocabulary maps of a drafter over
    the full vocabulary.
    """
    family = FAMILIES[imported.family]
    for file, meaning in family.unread_files.items():
        if source.find(file) is not None:
            raise ValueError(f"{str(source)!r} has a {file}, which is not supported: {meaning}.")
    of_the_target = family.of_the_target(imported.arguments)
    tensors: dict[str, torch.Tensor] = {}
    published_names: dict[str, str] = {}
    vocab_size, hidden_size = (imported.arguments[key] for key in ("vocab_size", "hidden_size"))
    for published_name, tensor in _read_weights(source, allow_pickle_weights).items():
        name = _our_name(published_name, family)
        if _NOT_LEARNED.fullmatch(name) or (imported.layout == "speculators" and _TRAINING_ONLY.fullmatch(name)):
            continue
        if name in published_names:
            raise ValueError(
                f"{str(source)!r} holds {published_names[name]!r} and {published_name!r}, which are both {name!r}. "
                "Remove one."
            )
        published_names[name] = published_name
        if name in of_the_target:
            if tensor.shape != (vocab_size, hidden_size):
                raise ValueError(
                    f"{published_name!r} has shape {tuple(tensor.shape)}, but the target's would be "
                    f"{(vocab_size, hidden_size)}. A drafter with an embedding or head of its own is not supported."
                )
            continue
        if name not in ("d2t", "t2d"):
            check_weight(published_name, tensor)
        tensors[name] = tensor
    return family.completed(tensors, imported.arguments)


def check_tensors_fit(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], whose: str) -> None:
    """Raise `ValueError` unless `tensors` are those that are `wanted`, in names and shapes, of `whose` file."""
    faults = [f"{name!r} is missing" for name in sorted(wanted.keys() - tensors.keys())]
    faults += [f"{name!r} is unexpected" for name in sorted(tensors.keys() - wanted.keys())]
    faults += [
        f"{name!r} has shape {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in sorted(tensors.keys() & wanted.keys())
        if tensors[name].shape != wanted[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"The weights of {whose} do not fit its config: {'; '.join(faults[:5])}{more}. Check that config.json and "
            "the weights belong together, or save or download both again."
        )


def _our_name(published_name: str, family: PublishedFamily) -> str:
    name = published_name.removeprefix("model.")
    for beginning, ours in family.renamed.items():
        if name.startswith(beginning):
            return ours + name.removeprefix(beginning)
    return name


def check_weight(published_name: str, tensor: torch.Tensor) -> None:
    """Raise `ValueError` unless a tensor holds finite floating-point numbers."""
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"{published_name!r} has type {tensor.dtype}, which is no floating-point weight. Use the unquantised "
            "checkpoint."
        )
    # Through two numbers, which NaN and infinity pass into: nothing of the tensor's size is made.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise ValueError(f"{published_name!r} holds NaN or infinite values; the checkpoint is damaged.")


def _read_weights(source: CheckpointSource, allow_pickle_weights: bool) -> dict[str, torch.Tensor]:
    """Read the weights from the safest files there are."""
    files = source.weight_files()
    if files is None:
        path = source.find(PICKLE_FILE)
        if path is None:
            raise FileNotFoundError(
                f"{str(source)!r} has no weights: neither {SAFETENSORS_FILE}, {INDEX_FILE} nor {PICKLE_FILE}."
            )
        if not allow_pickle_weights:
            raise ValueError(
                f"{str(source)!r} has its weights in {PICKLE_FILE} only, a format that can carry code. Convert it to "
                "safetensors, or pass `allow_pickle_weights=True` to read its tensors alone."
            )
        return _read_pickle(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        held = read_safetensors(source.find_weights(file))
        twice = sorted(set(held) & set(tensors))
        if twice:
            raise ValueError(f"{file!r} of {str(source)!r} repeats {twice} of an earlier shard.")
        tensors |= held
    absent = sorted(name for names in files.values() for name in names if name not in tensors)
    if absent:
        raise ValueError(f"{INDEX_FILE} of {str(source)!r} lists {absent}, which no shard holds.")
    return tensors


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of one file, on the CPU; a damaged file is a `ValueError`."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is no whole safetensors file ({error}). Download or save it again."
        ) from error


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    # Looks at the instructions of the pickle without following them, so that the refusal can name what it would run.
    try:
        unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read safely: {error}. Convert it to safetensors.") from error
    if unsafe:
        raise ValueError(f"{path.name} holds more than tensors: {unsafe}. It could run code, so it is not read.")
    content = torch.load(path, weights_only=True, map_location="cpu")  # noqa: TID251
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path.name} is no table of tensors; give the file that holds only the drafter's state.")
    return content
