# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A target without its body: what lies around the decoder layers is read from the files, the layers never exist. The
files alone know their weights, so the fingerprint is taken of the files.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..drafters.published.checkpoint import PICKLE_FILE, CheckpointSource, check_weight
from ..drafters.target_model import check_architecture, merging_line, parse_dtype
from ..drafters.target_shape import text_config
from ..utils.loading import loading_whole
from .checks import find_layers
from .fingerprint import as_saved, hash_tensors, layer_of, outlines, own_tensors, tied_names


GENERATION_CONFIG_FILE = "generation_config.json"
# Computed from the config; old files hold them.
_NOT_LEARNED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LISTED = 3


class SavedTensors:
    """
    The tensors in the safetensors files of a checkpoint, under the names that they have there.

    Args:
        source ([`CheckpointSource`]): Where the files are; of a repository, those are downloaded that are read.

    Raises:
        ValueError: If there are no such files, one is missing or is damaged.
    """

    def __init__(self, source: CheckpointSource):
        files = source.weight_files()
        if files is None:
            has_pickle = source.find(PICKLE_FILE) is not None or source.find(f"{PICKLE_FILE}.index.json") is not None
            why = f": its weights are in {PICKLE_FILE}, of which no part can be read alone" if has_pickle else ""
            raise ValueError(
                f"{str(source)!r} has no safetensors{why}. Load it with its body and save it again with "
                "`save_pretrained`, which writes safetensors."
            )
        self.source = source
        self._opened: dict[str, Any] = {}
        if Path(source.name_or_path).is_dir():
            for file in files:
                source.find_weights(file)
        self._places = {
            name: file for file, names in files.items() for name in (names or list(self._open(file).keys()))
        }

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._places))

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor."""
        return self._slice(name).get_shape()

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the precision of a tensor, or `None` of one that holds no numbers of at least 16 bits."""
        return _DTYPES.get(self._slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, as it lies in the file."""
        self._slice(name)
        return self._open(self._places[name]).get_tensor(name)

    def close(self) -> None:
        """Let go of the files; what is read next opens them again."""
        self._opened.clear()

    def _slice(self, name: str) -> Any:
        try:
            return self._open(self._places[name]).get_slice(name)
        except SafetensorError as error:
            raise ValueError(
                f"{str(self.source)!r} should have {name!r} in {self._places[name]}, where it is not. Save or "
                "download it again."
            ) from error

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = self.source.find_weights(file)
            try:
                self._opened[file] = safe_open(path, "pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{str(path)!r} is no whole safetensors file ({error}). Download or save it again."
                ) from error
        return self._opened[file]


@dataclass(frozen=True)
class WholeWeights:
    """
    What is known of the weights of a model of which only a part was loaded.

    Attributes:
        tensors ([`SavedTensors`]): The weights.
        names (`dict[str, str]`): Names there, by those that a saved copy of the model would use.
        shapes (`dict[str, list[int]]`): By the same names; of quantised layers, none.
        num_parameters (`int`): Parameters of the whole model; a tied head counts once.
    """

    tensors: SavedTensors
    names: Mapping[str, str]
    shapes: Mapping[str, Sequence[int]]
    num_parameters: int

    def fingerprint(self) -> str:
        """
        Return [`fingerprint_weights`] of the whole model, reading one tensor after another.

        Those of a quantised model count as they lie in the file. Where the quantiser repacks them on loading, as
        bitsandbytes does on a CPU, the whole model has another fingerprint.

        Raises:
            ValueError: If a file is damaged, or a tensor in it has another shape than the model's.
        """
        shapes = []
        for saved, name in sorted(self.names.items()):
            shapes.append((saved, self.tensors.shape(name)))
            self.require_shape(saved)
        try:
            return hash_tensors(shapes, (self.tensors.read(name) for _, name in sorted(self.names.items())))
        finally:
            self.tensors.close()

    def require_shape(self, saved: str) -> None:
        """Raise `ValueError` unless a tensor has the shape that the model's class gives it."""
        name, wanted = self.names[saved], self.shapes.get(saved)
        shape = self.tensors.shape(name)
        if wanted is not None and list(shape) != list(wanted):
            raise ValueError(
                f"{name!r} of {str(self.tensors.source)!r} has shape {tuple(shape)}, but by its config.json it should "
                f"have {tuple(wanted)}. Check that both belong together, or save or download both again."
            )


def load_without_body(
    chain: Sequence[CheckpointSource],
    *,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    init_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, WholeWeights]:
    """
    Return the model that [`target_chain`] found, without its decoder layers, and what is known of all its weights.

    Raises:
        OSError: If the files are not there.
        ValueError:
            If it is an adapter, has no safetensors, or they are not those of its config; if its embedding, norm or
            head is quantised or not finite.
    """
    *adapters, source = chain
    if adapters:
        name = str(adapters[0])
        raise ValueError(
            f"The target {name!r} is a PEFT adapter, which is merged into the body, and this run loads none. Merge it "
            f"first, `{merging_line(name)}`, and give the merged folder."
        )
    if beyond := sorted((init_kwargs or {}).keys() - source.places().keys()):
        raise ValueError(
            f"`target_init_kwargs` {beyond} are about the target's body, which this run does not load. Leave them out."
        )
    check_architecture(source)
    options = {"trust_remote_code": trust_remote_code, **source.places()}
    config = AutoConfig.from_pretrained(source.name_or_path, **options)
    config.name_or_path = source.name_or_path
    text_config(config)
    tensors = SavedTensors(source)
    model = _build_skeleton(config, _choose_dtype(dtype, config, tensors), trust_remote_code)
    weights = _match(model, tensors)
    # From here on the model is what lies around its layers.
    del find_layers(model.base_model, config)[:]
    _fill(model, weights)
    tensors.close()
    if model.can_generate() and source.find(GENERATION_CONFIG_FILE) is not None:
        model.generation_config = GenerationConfig.from_pretrained(source.name_or_path, **source.places())
    return model, weights


def _choose_dtype(dtype: str | torch.dtype, config: PreTrainedConfig, tensors: SavedTensors) -> torch.dtype:
    """Return the precision that `from_pretrained` would load the weights in."""
    if dtype not in ("auto", None):
        return parse_dtype(dtype)
    if (configured := config.dtype) is not None:
        return parse_dtype(configured)
    return next((found for name in tensors if (found := tensors.dtype(name)) is not None), torch.float32)


def _build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Return a whole model without weights; what it computes from its config is there."""
    found: Any = getattr(transformers, next(iter(config.architectures or []), ""), None)
    with loading_whole(), init_empty_weights(include_buffers=False):
        if found is not None:
            model = found._from_config(config, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model


def _match(model: PreTrainedModel, tensors: SavedTensors) -> WholeWeights:
    """
    Find the tensors of a model without weights in its files.

    Raises:
        ValueError: If one is missing, or a file holds one that is not the model's.
    """
    source, kind = str(tensors.source), type(model).__name__
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    wanted = as_saved(model, outlines(own_tensors(model)))
    layers = {layer_of(saved) for saved in wanted} - {""}
    modules = {_module_of(saved) for saved in wanted}
    stray = re.compile("|".join((*(model._keys_to_ignore_on_load_unexpected or ()), *_NOT_LEARNED)))
    prefix = f"{model.base_model_prefix}."
    names: dict[str, str] = {}
    unknown = []
    for name in tensors:
        spellings = (name, prefix + name, name.removeprefix(prefix))
        saved = next((each for each in spellings if each in wanted), None)
        if saved is None and is_quantized:
            # Scales, zero points and packed weights lie beside where the weight would be, or in its place.
            saved = next((each for each in spellings if layer_of(each) in layers or _module_of(each) in modules), None)
        if saved is not None:
            names[saved] = name
        elif stray.search(name) is None:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{source!r} holds {_listed(unknown)}, which {kind} of transformers {transformers.__version__} does not "
            "have. Load it with its body and save it again with `save_pretrained`."
        )
    tied = {
        _saved_name(model, name): _saved_name(model, first) for name, first in tied_names(own_tensors(model)).items()
    }
    for saved, first in tied.items():
        if saved in names and first not in names:
            names[first] = names.pop(saved)
        # As transformers does: what differs in the file is not tied, whatever the config says.
        elif saved in names and torch.equal(tensors.read(names[saved]), tensors.read(names[first])):
            del names[saved]
    is_packed = {_module_of(saved) for saved in names} if is_quantized else set()
    missing = [
        saved for saved in wanted if saved not in names and saved not in tied and _module_of(saved) not in is_packed
    ]
    if missing:
        raise ValueError(
            f"{source!r} has no {_listed(sorted(missing))}, which by its config.json it should have. Check that both "
            "belong together, or save or download both again."
        )
    shapes = {saved: list(each.shape) for saved, each in wanted.items() if not (is_quantized and layer_of(saved))}
    return WholeWeights(tensors, names, shapes, model.num_parameters())


def _fill(model: PreTrainedModel, weights: WholeWeights) -> None:
    """
    Read the weights that a model without its layers has.

    Raises:
        ValueError: If one is quantised, of another shape, or not finite.
    """
    dtype: Any = model.config.dtype
    kept = model._get_dtype_plan(dtype)
    tensors, held = weights.tensors, own_tensors(model)
    tied = tied_names(held)
    modules = {_module_of(_saved_name(model, name)) for name in held}
    for saved, name in weights.names.items():
        if saved not in weights.shapes and _module_of(saved) in modules:
            raise ValueError(
                f"{str(tensors.source)!r} holds {name!r}: its embedding, norm or head is quantised. Use a checkpoint "
                "that leaves them as they are, as most do."
            )
    # A name that comes first has its tensor before those that are tied to it.
    for name in sorted(held):
        saved = _saved_name(model, name)
        if saved not in weights.names:
            _put(model, name, own_tensors(model)[tied[name]])
            continue
        weights.require_shape(saved)
        tensor = tensors.read(weights.names[saved])
        if held[name].is_floating_point():
            check_weight(weights.names[saved], tensor)
            wanted = next((other for part, other in kept.items() if part in name), dtype)
            # As it was read a view of the file, as those of a whole target are: kernels round by where weights lie.
            tensor = tensor.to(wanted)
        is_parameter = isinstance(held[name], nn.Parameter)
        _put(model, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor.clone())


def _put(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> None:
    module, _, own = name.rpartition(".")
    setattr(model.get_submodule(module), own, tensor)


def _saved_name(model: PreTrainedModel, name: str) -> str:
    return next(iter(as_saved(model, outlines({name: own_tensors(model)[name]}))))


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more
