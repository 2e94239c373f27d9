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

from ..drafters.dflash import DFlashDraftConfig, DFlashDraftModel
from ..drafters.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from ..drafters.published.checkpoint import CONFIG_FILE, SAFETENSORS_FILE
from ..drafters.published.configs import ParsedConfig, parse_drafter_config
from ..drafters.published.vocabulary_maps import check_draft_vocabulary
from .native import native_tensors
from .serving import NORM_FLAGS
from .source import TargetOfExport
from .speculators import speculators_tensors


_IDS = "eagle_aux_hidden_state_layer_ids"
# Keys of a target's config that change what engines compute in a drafter.
_LEFTOVERS = (
    "partial_rotary_factor mrope_section mrope_interleaved rope_dim quantization_config num_experts "
    "num_experts_per_tok final_logit_softcapping attn_logit_softcapping logits_scaling embedding_multiplier "
    "query_pre_attn_scalar auto_map"
).split()
_ARCHITECTURES = {
    ("eagle3", "flat"): "LlamaForCausalLMEagle3",
    ("dflash", "flat"): "DFlashDraftModel",
    ("eagle3", "speculators"): "Eagle3DraftModel",
    ("dflash", "speculators"): "DFlashDraftModel",
    ("dflash", "transformers"): "MuseGlimmerAssistantModel",
}
_MODEL_TYPES = {
    ("eagle3", "flat"): "llama",
    ("dflash", "flat"): "qwen3",
    ("dflash", "transformers"): "muse_glimmer_assistant",
}
_CLASSES = {"eagle3": (Eagle3DraftConfig, Eagle3DraftModel), "dflash": (DFlashDraftConfig, DFlashDraftModel)}
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class _Files:
    """One layout's folder, its config read and its tensors' headers."""

    raw: dict[str, Any]
    parsed: ParsedConfig
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    maps: dict[str, torch.Tensor]
    embedding: torch.Tensor | None
    target: TargetOfExport

    @property
    def kind(self) -> tuple[str, str]:
        return self.parsed.family, self.parsed.layout

    @property
    def shape(self) -> dict[str, Any]:
        """The section that describes the decoder layer."""
        return self.raw["transformer_layer_config"] if self.parsed.layout == "speculators" else self.raw

    @property
    def ids(self) -> list[int]:
        return self.parsed.arguments["target_layer_ids"]


def check_folder(folder: str | Path, target: TargetOfExport | None = None) -> list[str]:
    """
    Check one layout of an export: the folder that holds its `config.json` and `model.safetensors`.

    Args:
        folder (`str` or `Path`): The folder.
        target ([`TargetOfExport`], *optional*):
            Its target; rules about its config or embedding are skipped without them.

    Returns:
        `list[str]`: Problems, each beginning with its rule (`C1` to `C13`, or `files`); empty when all is well.
    """
    folder, target = Path(folder), target or TargetOfExport()
    try:
        raw = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        # A wrong number of layers is reported by its rule below, an unwritten one is supplied here.
        is_supplied = target.config is not None and not raw.get("num_target_layers")
        layers = target.config.num_hidden_layers if is_supplied else None
        files = _read(folder, raw, parse_drafter_config(raw, num_target_layers=layers), target)
    except (OSError, ValueError, SafetensorError, AttributeError) as error:
        return [f"files: {str(folder)!r} cannot be read: {error}"]
    if files.kind not in _ARCHITECTURES:
        return [f"files: a drafter of family {files.kind[0]} has no layout {files.kind[1]!r}."]
    return [problem for rule in _RULES for problem in rule(files)]


def _read(folder: Path, raw: dict[str, Any], parsed: ParsedConfig, target: TargetOfExport) -> _Files:
    with safe_open(folder / SAFETENSORS_FILE, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        maps = {name: tensors.get_tensor(name) for name in ("d2t", "t2d") if name in shapes}
        is_wanted = target.embedding is not None and "embed_tokens.weight" in shapes
        own = tensors.get_tensor("embed_tokens.weight") if is_wanted else None
    return _Files(raw, parsed, shapes, dtypes, maps, own, target)


def _c1_shape(files: _Files) -> Iterator[str]:
    family, raw = files.parsed.family, files.raw
    if (raw.get("architectures") or [None])[0] != _ARCHITECTURES[files.kind]:
        yield (
            f"C1: architectures is {raw.get('architectures')}, engines look for {_ARCHITECTURES[files.kind]!r} first."
        )
    if raw.get("model_type") != _MODEL_TYPES.get(files.kind):
        yield f"C1: model_type is {raw.get('model_type')!r}, this layout has {_MODEL_TYPES.get(files.kind)!r}."
    if files.shape.get("attention_bias") not in (False, None):
        yield "C1: attention_bias is set; SGLang and EAGLE's code have no such tensors."
    if family == "eagle3":
        missing = [flag for flag in NORM_FLAGS if not isinstance(raw.get(flag), bool)]
        if missing:
            yield f"C1: {missing} must be written as true or false; engines take different values when they are not."
        if files.shape.get("num_hidden_layers") != 1:
            yield f"C1: an EAGLE-3 drafter has 1 layer, not {files.shape.get('num_hidden_layers')}."
    if files.target.config is not None:
        heads = files.target.config.num_key_value_heads
        width = (
            getattr(files.target.config, "head_dim", None)
            or files.target.config.hidden_size // files.target.config.num_attention_heads
        )
        for name, wanted in (("head_dim", width), ("num_key_value_heads", heads)):
            if files.shape.get(name) != wanted:
                yield (
                    f"C1: {name} is {files.shape.get(name)}, the target's is {wanted}; vLLM keeps both caches in one "
                    "layout."
                )


def _c2_layer_ids(files: _Files) -> Iterator[str]:
    raw, ids = files.raw, files.ids
    boundaries = [i + 1 for i in ids]
    nested = {
        ("eagle3", "flat"): {_IDS: boundaries, f"eagle_config.{_IDS}": ids},
        ("eagle3", "speculators"): {_IDS: boundaries},
        ("dflash", "flat"): {"target_layer_ids": ids, "dflash_config.target_layer_ids": ids},
        ("dflash", "speculators"): {"aux_hidden_state_layer_ids": boundaries},
        ("dflash", "transformers"): {"target_layer_ids": ids},
    }[files.kind]
    for key, wanted in nested.items():
        section = raw
        for part in key.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        if section != wanted:
            yield f"C2: {key} is {section}; it must be {wanted} for the layers {ids}."
    layers = files.target.config.num_hidden_layers if files.target.config is not None else raw.get("num_target_layers")
    if ids != sorted(set(ids)) or ids[0] < 0:
        yield (
            f"C2: layer ids {ids} are not ascending and unique; engines sort them, and the columns of fc follow that "
            "order."
        )
    if layers is None:
        yield "C2: num_target_layers is not written, so the layer ids cannot be checked."
    elif ids[-1] >= layers - 1:
        yield (
            f"C2: layer id {ids[-1]} is the last of the target's {layers} layers; engines disagree on whether it is "
            "read before the final norm."
        )
    if raw.get("num_target_layers") not in (None, layers):
        yield f"C2: num_target_layers is {raw['num_target_layers']}, the target has {layers} layers."


def _c3_rope(files: _Files) -> Iterator[str]:
    if files.parsed.layout == "transformers":
        if not isinstance(files.raw.get("rope_parameters"), dict):
            yield "C3: rope_parameters is not written."
        return
    missing = [name for name in ("rope_theta", "rope_scaling", "rope_parameters") if name not in files.shape]
    if missing:
        # Where all are there, reading the config has compared them.
        yield f"C3: {missing} must be written: EAGLE's code reads the old pair, SGLang and transformers 5 the new one."


def _c4_ties(files: _Files) -> Iterator[str]:
    if files.raw.get("tie_word_embeddings") is not False:
        yield f"C4: tie_word_embeddings is {files.raw.get('tie_word_embeddings')!r}, it must be false."


def _c5_sizes(files: _Files) -> Iterator[str]:
    for name in ("vocab_size", "max_position_embeddings"):
        if files.target.config is not None and files.shape.get(name) != getattr(files.target.config, name):
            yield (
                f"C5: {name} is {files.shape.get(name)}, the target's is {getattr(files.target.config, name)}; "
                "engines refuse the pair or cut texts short."
            )


def _c6_dtype(files: _Files) -> Iterator[str]:
    stated = {name: files.raw[name] for name in ("dtype", "torch_dtype") if name in files.raw}
    if set(stated.values()) != {"bfloat16"}:
        yield f"C6: config.json has {stated or 'no dtype'}, it must be bfloat16."
    other = {
        name: _DTYPE_NAMES.get(dtype, dtype)
        for name, dtype in sorted(files.dtypes.items())
        if name not in ("d2t", "t2d", "embed_tokens.weight") and dtype != "BF16"
    }
    if other:
        yield (
            f"C6: weights must be bfloat16, but {len(other)} are not, the first {next(iter(other.items()))}. Export "
            "again from the checkpoint."
        )


def _c7_leftovers(files: _Files) -> Iterator[str]:
    found = sorted(
        {name for section in (files.raw, files.shape) for name in _LEFTOVERS if section.get(name) is not None}
    )
    if found:
        yield f"C7: {found} belong to a target, or name code; engines would apply them to the drafter."


def _c8_dflash(files: _Files) -> Iterator[str]:
    if files.parsed.family != "dflash":
        return
    raw, shape = files.raw, files.shape
    if files.parsed.layout != "transformers" and shape.get("is_causal") is not False:
        yield f"C8: is_causal is {shape.get('is_causal')!r}; without false, engines may hide later slots of a block."
    if shape.get("layer_types") != ["full_attention"] * shape["num_hidden_layers"]:
        yield f"C8: layer_types is {shape.get('layer_types')}, it must list full_attention once per layer."
    if files.parsed.layout == "flat":
        section = raw.get("dflash_config") or {}
        for name in ("block_size", "mask_token_id"):
            if raw.get(name) is None or section.get(name) != raw.get(name):
                yield (
                    f"C8: {name} must stand at the top level and in dflash_config, got {raw.get(name)} and "
                    f"{section.get(name)}."
                )
        if _IDS in raw:
            yield f"C8: {_IDS} is written; vLLM reads it before dflash_config."
    mask, vocabulary = raw.get("mask_token_id"), shape["vocab_size"]
    if not isinstance(mask, int) or not 0 <= mask < vocabulary:
        yield f"C8: mask_token_id is {mask}, it must lie in 0..{vocabulary - 1}."


def _c9_speculators(files: _Files) -> Iterator[str]:
    if files.parsed.layout != "speculators":
        return
    raw = files.raw
    section = raw.get("speculators_config") or {}
    target = (section.get("verifier") or {}).get("name_or_path")
    methods = section.get("proposal_methods") or [{}]
    if not target:
        yield "C9: speculators_config.verifier.name_or_path is empty; vLLM needs the target's Hub id there."
    if not isinstance(methods[0].get("speculative_tokens"), int) or methods[0]["speculative_tokens"] < 1:
        yield "C9: speculators_config.proposal_methods[0].speculative_tokens must be a number of drafts."
    if files.parsed.family == "dflash" and raw.get("sliding_window_non_causal") is not True:
        yield "C9: sliding_window_non_causal must be true; vLLM turns false into causal attention in every layer."


def check_repo_name(repo_id: str, family: str) -> list[str]:
    """Return what is wrong with the name of a repository of a drafter of `family`, as [`check_folder`] does."""
    name, problems = repo_id.rsplit("/", 1)[-1].lower(), []
    if "eagle-" in name:
        problems.append(f"C10: {repo_id!r} contains 'eagle-', by which vLLM takes a drafter for EAGLE-1.")
    if family not in name:
        problems.append(
            f"C10: {repo_id!r} does not contain {family!r}, by which vLLM tells the method when none is named."
        )
    return problems


def _c11_vocabulary(files: _Files) -> Iterator[str]:
    if files.parsed.family != "eagle3":
        return
    size, vocabulary = files.raw.get("draft_vocab_size"), files.shape["vocab_size"]
    if size is None:
        yield "C11: draft_vocab_size is not written; SGLang and TensorRT-LLM need it."
    elif size == vocabulary and files.maps:
        yield f"C11: the drafter has the full vocabulary, so {sorted(files.maps)} must be absent; vLLM refuses them."
    elif size != vocabulary and len(files.maps) < 2:
        yield f"C11: a drafter over {size} of {vocabulary} tokens needs d2t and t2d; without them vLLM reads zeros."
    elif size != vocabulary:
        try:
            check_draft_vocabulary(files.maps["d2t"], files.maps["t2d"], vocabulary)
        except ValueError as error:
            yield f"C11: {error}"


def _c12_embedding(files: _Files) -> Iterator[str]:
    is_there = "embed_tokens.weight" in files.shapes
    if files.parsed.family == "dflash":
        return
    if not is_there:
        yield "C12: embed_tokens.weight is missing; speculators and EAGLE's code leave it uninitialised."
    elif files.target.embedding is not None:
        wanted = files.target.embedding.to(files.embedding.device)
        if files.embedding.dtype != wanted.dtype or not torch.equal(files.embedding, wanted):
            yield "C12: embed_tokens.weight is not the target's embedding; vLLM would use it in place of the target's."


def _c13_keys(files: _Files) -> Iterator[str]:
    config_class, model_class = _CLASSES[files.parsed.family]
    try:
        with torch.device("meta"):
            expected = model_class(config_class(**files.parsed.arguments)).state_dict()
    except ValueError as error:
        yield f"C13: no drafter can be built from config.json: {error}"
        return
    if files.parsed.family == "eagle3":
        expected["embed_tokens.weight"] = torch.empty(
            files.shape["vocab_size"], files.shape["hidden_size"], device="meta"
        )
    rename = {"speculators": speculators_tensors, "transformers": native_tensors, "flat": dict}[files.parsed.layout]
    shapes = {name: tuple(tensor.shape) for name, tensor in rename(expected).items()}
    # A missing embedding is C12's matter, maps are C11's.
    spared = {"embed_tokens.weight", "d2t", "t2d"}
    missing = sorted(set(shapes) - set(files.shapes) - spared)
    unexpected = sorted(set(files.shapes) - set(shapes) - spared)
    misshapen = [
        f"{name} {files.shapes[name]} instead of {shapes[name]}"
        for name in sorted(set(shapes) & set(files.shapes))
        if shapes[name] != files.shapes[name]
    ]
    if missing or unexpected or misshapen:
        yield f"C13: tensors do not fit: missing {missing}, unexpected {unexpected}, of wrong shape {misshapen}."


_RULES = (
    _c1_shape,
    _c2_layer_ids,
    _c3_rope,
    _c4_ties,
    _c5_sizes,
    _c6_dtype,
    _c7_leftovers,
    _c8_dflash,
    _c9_speculators,
    _c11_vocabulary,
    _c12_embedding,
    _c13_keys,
)
