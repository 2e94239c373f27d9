# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Translate the `config.json` of a published drafter into this package's terms; opens no file, builds no model.

Whatever would compute something else than the drafters here do is refused with the reason. Layer ids are published in
two ways: a boundary `b` counts the target layers that have run, an id `b - 1` names the layer whose output is read.
This package always means the latter.
"""

from dataclasses import dataclass, fields
from typing import Any

from transformers import LlamaConfig, MuseGlimmerAssistantConfig, PreTrainedConfig, Qwen3Config
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...utils.settings import find_not_finite
from ..target_shape import refuse_misspelt
from .family import FAMILIES, PublishedFamily, Refused, find_family
from .sections import Sections, agreed, integer, mapping, number, refusal


# Ends of the names of what is no drafter, unless it is known as one.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")

# What no family reads.
_REFUSED: Refused = {
    "quantization_config": ((None,), "quantised weights"),
    "partial_rotary_factor": ((None, 1.0), "RoPE on a part of each head"),
    "rope_dim": ((None,), "RoPE on a part of each head"),
}

_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings"
).split()
_COPIED = ("hidden_act", "rms_norm_eps", "initializer_range")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Every name looked at for all families, in whatever section; a misspelt one would leave a default in its place.
_READ = {
    *(*_SIZES, *_COPIED, *_TOKEN_IDS, *_REFUSED),
    *(
        "architectures speculators_model_type speculators_config eagle_config dflash_config transformer_layer_config "
        "rope_parameters rope_scaling rope_theta num_target_layers target_hidden_size target_model_name_or_path "
        "target_model_revision draft_vocab_size layer_types use_sliding_window"
    ).split(),
}
# What transformers itself writes, read here or not.
_WRITTEN = {each.name for kind in (LlamaConfig, Qwen3Config, MuseGlimmerAssistantConfig) for each in fields(kind)}


@dataclass(frozen=True)
class ParsedConfig:
    """
    What a published `config.json` states.

    Attributes:
        family (`str`): Key of the family, as in `DRAFTER_CLASSES`.
        layout (`str`): `"flat"`, `"speculators"` or `"transformers"`.
        architectures (`list[str]`): As written.
        arguments (`dict[str, Any]`): Arguments of the family's config class; what is not stated is left out.
    """

    family: str
    layout: str
    architectures: list[str]
    arguments: dict[str, Any]


def refuse_not_finite(content: dict[str, Any], where: str) -> None:
    """Raise `ValueError` at a number that JSON does not have but Python's reader takes: NaN, Infinity, 1e999."""
    if (found := find_not_finite(content)) is not None:
        raise ValueError(f"{where} has {found[0]}={found[1]}; every number must be finite.")


def is_drafter_config(raw: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of a drafter that can be read, judged by what names its kind."""
    try:
        _decide(raw)
    except ValueError:
        return False
    return True


def parse_drafter_config(
    raw: dict[str, Any], *, num_target_layers: int | None, name: str = "The drafter"
) -> ParsedConfig:
    """
    Translate the content of a published `config.json`.

    `architectures` and the speculators keys decide, never `model_type`: published folders have llama or qwen3 there.

    Args:
        raw (`dict[str, Any]`): The content.
        num_target_layers (`int` or `None`): Layers of the target, for EAGLE-3 configs that name no layer ids.
        name (`str`, *optional*, defaults to `"The drafter"`): What errors call it.

    Raises:
        ValueError: If the architecture is unknown or not supported, a value would change what is computed, two keys
            contradict each other, a key is misspelt, or something is missing.
    """
    refuse_not_finite(raw, "config.json")
    family, layout = _decide(raw)
    shape = mapping(raw, "transformer_layer_config") if layout == "speculators" else raw
    defaults = _class_of_defaults(family, layout, shape)
    sections = Sections(layout, raw, shape, mapping(raw, family.section), family.section, defaults)
    known = _READ.union(*({*each.keys, *each.refused} for each in FAMILIES.values()))
    for section in (raw, shape, sections.nested):
        refuse_misspelt(set(section) - known - _WRITTEN, known, "config.json")
        for key, (accepted, meaning) in (_REFUSED | family.refused).items():
            if section.get(key) not in accepted:
                raise refusal(key, section[key], meaning)
    default_theta = None if layout == "flat" and family.needs_rope_theta else defaults.default_theta
    shared = _shared_arguments(sections, num_target_layers, name, default_theta)
    arguments = {key: value for key, value in shared.items() if value is not None} | family.arguments(sections, shared)
    return ParsedConfig(family.family, layout, list(raw.get("architectures") or []), arguments)


def _decide(raw: dict[str, Any]) -> tuple[PublishedFamily, str]:
    """Return family and layout."""
    architectures = raw.get("architectures") or [""]
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        raise ValueError(f"config.json has architectures={architectures!r}; it must be a list of names.")
    name = architectures[0]
    kind = raw.get("speculators_model_type") or mapping(raw, "speculators_config").get("algorithm")
    projector = mapping(raw, "dflash_config").get("projector_type")
    unread = {alias: meaning for family in FAMILIES.values() for alias, meaning in family.unread.items()}
    for stated in (name, kind, projector):
        if not isinstance(stated, str | None):
            raise ValueError(f"config.json has the name {stated!r} for what the drafter is; it must be a string.")
        if stated in unread:
            raise ValueError(f"{stated!r} is not supported: {unread[stated]}. {_readable()}")
    is_speculators = kind is not None or "speculators_config" in raw or "transformer_layer_config" in raw
    is_llama = not is_speculators and name == "LlamaForCausalLM" and "draft_vocab_size" not in raw
    found = None if is_llama else find_family(name, kind, is_speculators=is_speculators)
    if found is not None:
        if projector not in (None, found[0].projector):
            raise ValueError(f"dflash_config.projector_type={projector!r} is unknown and not supported. {_readable()}")
        return found
    if is_speculators:
        raise ValueError(f"Unknown drafter in the speculators format: {kind or name!r}. {_readable()}")
    if name.endswith(_LANGUAGE_MODELS):
        lacking = " without `draft_vocab_size`" if is_llama else ""
        raise ValueError(
            f"{name}{lacking} is a language model, not a drafter: a target, perhaps. Make a drafter for it with "
            "`trl-draft-opd init`, `Eagle3DraftModel.from_target(...)` or `DFlashDraftModel.from_target(...)`."
        )
    raise ValueError(f"Unknown drafter architecture {name or None!r}. {_readable()}")


def _readable() -> str:
    flat = sorted({name for family in FAMILIES.values() for name in family.architectures})
    speculators = sorted({name for family in FAMILIES.values() for name in family.speculators_architectures})
    return (
        f"Drafters that can be read have `architectures` {flat}, or `speculators_model_type` "
        f"{' or '.join(sorted(FAMILIES))} with {speculators}."
    )


def _target_layers(sections: Sections, given: int | None, name: str) -> int | None:
    """Return how many layers the target has, by the config or as it was `given`."""
    stated = agreed("the target's layers", sections.stated("num_target_layers"))
    if None not in (given, stated) and given != stated:
        raise ValueError(
            f"{name} was trained for a target with {stated} layers; this one has {given}. Give its own target, or a "
            "drafter of this one."
        )
    return given if stated is None else stated


def _class_of_defaults(family: PublishedFamily, layout: str, shape: dict[str, Any]) -> type[PreTrainedConfig]:
    default = family.defaults(layout, shape)
    if layout != "speculators":
        return default
    model_type = shape.get("model_type", default.model_type)
    if model_type not in ("llama", "qwen3"):
        raise refusal("transformer_layer_config.model_type", model_type, "a layer that is neither llama nor qwen3")
    return LlamaConfig if model_type == "llama" else Qwen3Config


def _shared_arguments(
    sections: Sections, num_target_layers: int | None, name: str, default_theta: float | None
) -> dict[str, Any]:
    """Return what the configs of all families take."""
    raw, shape = sections.raw, sections.shape
    missing = [key for key in _REQUIRED if key not in shape]
    if missing and sections.layout != "speculators":
        raise ValueError(f"config.json does not say {missing}. Add them; `vocab_size` is the target's.")
    kwargs = {key: shape.get(key, getattr(sections.defaults, key, None)) for key in (*_SIZES, *_COPIED)}
    if kwargs["num_key_value_heads"] is None:
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]
    for key in _SIZES:
        if key != "head_dim" or kwargs[key] is not None:
            integer(key, kwargs[key], 1)
    _check_kinds(raw, shape, kwargs)
    width = raw.get("target_hidden_size")
    if width not in (None, kwargs["hidden_size"]):
        raise ValueError(
            f"config.json has target_hidden_size={width} and hidden_size={kwargs['hidden_size']}; drafters here read "
            "the target's embedding, so they must agree."
        )
    dtype = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    # In the speculators format, the target is named in a section of its own.
    target = mapping(mapping(raw, "speculators_config"), "verifier").get("name_or_path")
    return kwargs | {
        **{key: shape.get(key) if raw.get(key) is None else raw[key] for key in _TOKEN_IDS},
        "rope_parameters": _checked_rope(_rope_parameters(shape, default_theta)),
        "num_target_layers": _target_layers(sections, num_target_layers, name),
        "target_model_name_or_path": raw.get("target_model_name_or_path", target),
        "target_model_revision": raw.get("target_model_revision"),
        "dtype": dtype if dtype in _DTYPES else None,
    }


def _check_kinds(raw: dict[str, Any], shape: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Refuse values that are no number, name or id where one must stand."""
    number("rms_norm_eps", kwargs["rms_norm_eps"])
    # transformers' own layout has none.
    if kwargs["initializer_range"] not in (None, 0):
        number("initializer_range", kwargs["initializer_range"])
    if not isinstance(kwargs["hidden_act"], str) or kwargs["hidden_act"] not in ACT2FN:
        raise ValueError(f"config.json has hidden_act={kwargs['hidden_act']!r}, which transformers does not know.")
    for key in ("target_model_name_or_path", "target_model_revision"):
        if not isinstance(raw.get(key), str | None):
            raise ValueError(f"config.json has {key}={raw[key]!r}; it must be a string or null.")
    for key, value in ((key, section.get(key)) for section in (raw, shape) for key in _TOKEN_IDS):
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None:
                # Some write -1 for none.
                integer(key, token_id, -1)


def _checked_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return parameters of RoPE; refuse a kind that transformers does not know, and what is no number."""
    kind = parameters["rope_type"]
    if not isinstance(kind, str) or kind not in {"default", *ROPE_INIT_FUNCTIONS}:
        raise ValueError(f"config.json has rope_type={kind!r}, which transformers does not know.")
    for key, value in parameters.items():
        if key != "rope_type" and not isinstance(value, bool | None):
            for each in value if isinstance(value, list) else [value]:
                number(f"{key} of RoPE", each)
    number("rope_theta", parameters["rope_theta"])
    return parameters


def _rope_parameters(shape: dict[str, Any], default_theta: float | None) -> dict[str, Any]:
    """
    Return RoPE in the one form of transformers 5; `rope_theta` and `rope_scaling` are its legacy pair. Without a
    default, the base must be stated.
    """

    def normalised(key: str) -> dict[str, Any]:
        parameters = mapping(shape, key)
        # Some families keep one set of parameters per layer type.
        parameters = dict(parameters.get("full_attention", parameters))
        for part in ("partial_rotary_factor", "rope_dim"):
            accepted, meaning = _REFUSED[part]
            if parameters.get(part) not in accepted:
                raise refusal(f"{key}.{part}", parameters[part], meaning)
        if parameters and "rope_type" not in parameters:
            parameters["rope_type"] = parameters.get("type", "default")
        if parameters.get("rope_type") == "mrope":
            parameters["rope_type"] = "default"
        # On text, all sections of multimodal RoPE hold the same position.
        dropped = ("type", "partial_rotary_factor", "rope_dim", "mrope_section", "mrope_interleaved")
        return {name: value for name, value in parameters.items() if name not in dropped}

    new, legacy = normalised("rope_parameters"), normalised("rope_scaling")
    thetas = {
        "rope_parameters.rope_theta": new.pop("rope_theta", None),
        "rope_scaling.rope_theta": legacy.pop("rope_theta", None),
        "rope_theta": shape.get("rope_theta"),
    }
    theta = agreed("rope_theta", thetas)
    if theta is None and default_theta is None:
        raise ValueError(
            "config.json does not say `rope_theta`, and readers fill in different ones: transformers' class of the "
            "layer 10000, vLLM's layer 1000000. Add what the drafter was trained with, most often the target's."
        )
    scaling = agreed("RoPE scaling", {"rope_parameters": new or None, "rope_scaling": legacy or None})
    return {"rope_type": "default", **(scaling or {}), "rope_theta": default_theta if theta is None else theta}
