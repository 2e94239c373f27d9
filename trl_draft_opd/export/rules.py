# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The rules an exported folder keeps so that every engine reads the same drafter out of it, checked on the files only.

Engines report almost none of these: a missing tensor is left uninitialised, an unknown key is skipped, a layer id that
is one off costs most of the gain. Each problem begins with the name of its rule.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..drafters.auto import DRAFTER_CLASSES
from ..drafters.portable_config import PortableConfig
from ..drafters.published.checkpoint import CONFIG_FILE, SAFETENSORS_FILE
from ..drafters.published.configs import ParsedConfig, parse_drafter_config
from ..drafters.published.exported import ExportedFamily
from ..drafters.published.vocabulary_maps import check_draft_vocabulary
from .layouts import LAYOUT_OF
from .source import TargetOfExport


_EMBEDDING = "embed_tokens.weight"
# Keys of a target's config that change what engines compute in a drafter.
_LEFTOVERS = (
    "partial_rotary_factor mrope_section mrope_interleaved rope_dim quantization_config num_experts "
    "num_experts_per_tok final_logit_softcapping attn_logit_softcapping logits_scaling embedding_multiplier "
    "query_pre_attn_scalar auto_map"
).split()


@dataclass(frozen=True)
class _Files:
    """One layout's folder: its config read, its tensors' headers, and its embedding if the target's is known."""

    raw: dict[str, Any]
    parsed: ParsedConfig
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    maps: dict[str, torch.Tensor]
    embedding: torch.Tensor | None
    target: TargetOfExport

    @property
    def config_class(self) -> type[PortableConfig]:
        return DRAFTER_CLASSES[self.parsed.family].config_class

    @property
    def exported(self) -> ExportedFamily:
        return self.config_class.exported

    @property
    def layout(self) -> str:
        return self.parsed.layout

    @property
    def shape(self) -> dict[str, Any]:
        """The section that describes the decoder layer."""
        return self.raw["transformer_layer_config"] if self.layout == "speculators" else self.raw


def check_folder(folder: str | Path, target: TargetOfExport | None = None) -> list[str]:
    """
    Check one layout of an export: the folder that holds its `config.json` and `model.safetensors`.

    Returns problems, each beginning with its rule (`C1` to `C13`, or `files`). Rules about the target's config or
    embedding are skipped where `target` lacks them.
    """
    folder, target = Path(folder), target or TargetOfExport()
    try:
        files = _read(folder, target)
    except (OSError, ValueError, SafetensorError, AttributeError) as error:
        return [f"files: {str(folder)!r} cannot be read: {error}"]
    own = files.exported.find_problems(files.layout, files.raw, files.shape)
    found = [*own, *((rule, problem) for rule, find in _RULES.items() for problem in find(files))]
    return [f"{rule}: {problem}" for rule, problem in sorted(found, key=lambda each: int(each[0][1:]))]


def _read(folder: Path, target: TargetOfExport) -> _Files:
    raw = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    layers = None
    if target.config is not None and not raw.get("num_target_layers"):
        # A wrong number of layers is reported by its rule below, an unwritten one is supplied here.
        layers = target.config.num_hidden_layers
    parsed = parse_drafter_config(raw, num_target_layers=layers)
    with safe_open(folder / SAFETENSORS_FILE, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        maps = {name: tensors.get_tensor(name) for name in ("d2t", "t2d") if name in shapes}
        is_wanted = target.embedding is not None and _EMBEDDING in shapes
        embedding = tensors.get_tensor(_EMBEDDING) if is_wanted else None
    return _Files(raw, parsed, shapes, dtypes, maps, embedding, target)


def _find_wrong_shape(files: _Files) -> Iterator[str]:
    architecture, model_type = files.exported.names(files.layout)
    if (files.raw.get("architectures") or [None])[0] != architecture:
        yield f"architectures is {files.raw.get('architectures')}, engines look for {architecture!r} first."
    if files.raw.get("model_type") != model_type:
        yield f"model_type is {files.raw.get('model_type')!r}, this layout has {model_type!r}."
    config = files.target.config
    if config is not None:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for name, wanted in (("head_dim", width), ("num_key_value_heads", config.num_key_value_heads)):
            if files.shape.get(name) != wanted:
                yield f"{name} is {files.shape.get(name)}, the target's is {wanted}; vLLM lays out both caches alike."


def _find_wrong_layer_ids(files: _Files) -> Iterator[str]:
    raw, ids = files.raw, files.parsed.arguments["target_layer_ids"]
    places = files.exported.layer_id_places(files.layout, ids)
    for (*section, key), wanted in places.items():
        found = (raw.get(section[0]) or {} if section else raw).get(key)
        if found != wanted:
            yield f"{'.'.join([*section, key])} is {found}; it must be {wanted} for the layers {ids}."
    stated = raw.get("num_target_layers")
    layers = files.target.config.num_hidden_layers if files.target.config is not None else stated
    if ids != sorted(set(ids)) or ids[0] < 0:
        yield f"layer ids {ids} are not ascending and unique; engines sort them, and fc's columns follow that order."
    if layers is None:
        yield "num_target_layers is not written, so the layer ids cannot be checked."
    elif ids[-1] >= layers - 1:
        yield f"layer id {ids[-1]} is the last of {layers}; engines disagree on whether the final norm comes before."
    if stated not in (None, layers):
        yield f"num_target_layers is {stated}, the target has {layers} layers."


def _find_wrong_rope(files: _Files) -> Iterator[str]:
    # Where all are there, reading the config has compared them.
    names = (
        ["rope_parameters"] if files.layout == "transformers" else ["rope_theta", "rope_scaling", "rope_parameters"]
    )
    missing = [name for name in names if name not in files.shape]
    if missing:
        yield f"{missing} must be written: EAGLE's code reads the old pair, SGLang and transformers 5 the new one."


def _find_ties(files: _Files) -> Iterator[str]:
    if files.raw.get("tie_word_embeddings") is not False:
        yield f"tie_word_embeddings is {files.raw.get('tie_word_embeddings')!r}, it must be false."


def _find_wrong_sizes(files: _Files) -> Iterator[str]:
    for name in ("vocab_size", "max_position_embeddings"):
        own, wanted = files.shape.get(name), getattr(files.target.config, name, None)
        if wanted is not None and own != wanted:
            yield f"{name} is {own}, the target's is {wanted}; engines refuse the pair or cut texts short."


def _find_wrong_dtypes(files: _Files) -> Iterator[str]:
    stated = {name: files.raw[name] for name in ("dtype", "torch_dtype") if name in files.raw}
    if set(stated.values()) != {"bfloat16"}:
        yield f"config.json has {stated or 'no dtype'}, it must be bfloat16."
    kept = ("d2t", "t2d", _EMBEDDING)
    other = [(name, dtype) for name, dtype in sorted(files.dtypes.items()) if name not in kept and dtype != "BF16"]
    if other:
        yield f"weights must be bfloat16, but {len(other)} are not, the first {other[0]}. Export again."


def _find_leftovers(files: _Files) -> Iterator[str]:
    sections = (files.raw, files.shape)
    found = [name for name in _LEFTOVERS if any(section.get(name) is not None for section in sections)]
    if found:
        yield f"{found} belong to a target, or name code; engines would apply them to the drafter."


def _find_wrong_speculators(files: _Files) -> Iterator[str]:
    if files.layout != "speculators":
        return
    section = files.raw.get("speculators_config") or {}
    methods = section.get("proposal_methods") or [{}]
    if not (section.get("verifier") or {}).get("name_or_path"):
        yield "speculators_config.verifier.name_or_path is empty; vLLM needs the target's Hub id there."
    if not isinstance(methods[0].get("speculative_tokens"), int) or methods[0]["speculative_tokens"] < 1:
        yield "speculators_config.proposal_methods[0].speculative_tokens must be a number of drafts."


def _find_wrong_vocabulary(files: _Files) -> Iterator[str]:
    vocabulary = files.shape["vocab_size"]
    size = files.raw.get("draft_vocab_size") or vocabulary
    if size == vocabulary and files.maps:
        yield f"the drafter has the full vocabulary, so {sorted(files.maps)} must be absent; vLLM refuses them."
    elif size != vocabulary and len(files.maps) < 2:
        yield f"a drafter over {size} of {vocabulary} tokens needs d2t and t2d; without them vLLM reads zeros."
    elif size != vocabulary:
        try:
            check_draft_vocabulary(files.maps["d2t"], files.maps["t2d"], vocabulary)
        except ValueError as error:
            yield str(error)


def _find_wrong_embedding(files: _Files) -> Iterator[str]:
    own, wanted = files.embedding, files.target.embedding
    if not files.exported.carries_embedding:
        return
    if _EMBEDDING not in files.shapes:
        yield f"{_EMBEDDING} is missing; speculators and EAGLE's code leave it uninitialised."
    elif own is not None and wanted is not None:
        if own.dtype != wanted.dtype or not torch.equal(own, wanted.to(own.device)):
            yield f"{_EMBEDDING} is not the target's embedding; vLLM would use it in place of the target's."


def _find_wrong_tensors(files: _Files) -> Iterator[str]:
    try:
        config = files.config_class(**files.parsed.arguments)
        with torch.device("meta"):
            expected = DRAFTER_CLASSES[files.parsed.family](config).state_dict()
    except ValueError as error:
        yield f"no drafter can be built from config.json: {error}"
        return
    if (reason := files.exported.find_refusal(config, files.layout)) is not None:
        yield f"the {files.layout} layout cannot express this drafter: {reason}."
        return
    # Missing or wrong ones are the two rules' before.
    spared = {_EMBEDDING, "d2t", "t2d"}
    shapes = {name: tuple(tensor.shape) for name, tensor in LAYOUT_OF[files.layout].tensors(expected).items()}
    if files.exported.carries_embedding:
        shapes[_EMBEDDING] = (files.shape["vocab_size"], files.shape["hidden_size"])
    missing = sorted(shapes.keys() - files.shapes.keys() - spared)
    unexpected = sorted(files.shapes.keys() - shapes.keys() - spared)
    misshapen = [
        f"{name} {files.shapes[name]} instead of {shapes[name]}"
        for name in sorted(shapes.keys() & files.shapes.keys())
        if shapes[name] != files.shapes[name]
    ]
    if missing or unexpected or misshapen:
        yield f"tensors do not fit: missing {missing}, unexpected {unexpected}, of wrong shape {misshapen}."


# C8 is the families' own. C10 is about the name of a repository, which no folder knows: see `validate_repo_id` in
# `hub.py`.
_RULES = {
    "C1": _find_wrong_shape,
    "C2": _find_wrong_layer_ids,
    "C3": _find_wrong_rope,
    "C4": _find_ties,
    "C5": _find_wrong_sizes,
    "C6": _find_wrong_dtypes,
    "C7": _find_leftovers,
    "C9": _find_wrong_speculators,
    "C11": _find_wrong_vocabulary,
    "C12": _find_wrong_embedding,
    "C13": _find_wrong_tensors,
}
