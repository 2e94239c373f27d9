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
from ..target_shape import middle_layer_ids, refuse_misspelt


# First entry of `architectures` -> family and layout, for folders that are not in the speculators format.
_KNOWN = {
    "LlamaForCausalLMEagle3": ("eagle3", "flat"),
    "Eagle3LlamaForCausalLM": ("eagle3", "flat"),
    "LlamaForCausalLM": ("eagle3", "flat"),
    "DFlashDraftModel": ("dflash", "flat"),
    "DFlash2DraftModel": ("dflash2", "flat"),
    "MuseGlimmerAssistantModel": ("dflash", "transformers"),
}
# Ends of the names of what is no drafter, unless it is known as one.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_KNOWN_SPECULATORS = {"Eagle3DraftModel": "eagle3", "Eagle3Speculator": "eagle3", "DFlashDraftModel": "dflash"}

_DFLASH2 = "DFlash2 (convolutions and a candidate selector)"
_DSPARK = "DSpark (a Markov head, and slots that propose the next token)"
_DOMINO = "Domino (a recurrent head over the drafted prefix)"
_PEAGLE = "P-EAGLE (all drafts in one pass from a learned hidden state)"
_EAGLE1 = "EAGLE-1/2 (features of the last layer only)"
_QK_NORM = "EAGLE-3 with query and key norms (the Qwen3 layer)"
_UNSUPPORTED = {
    "Qwen3DSparkModel": _DSPARK,
    "DSparkDraftModel": _DSPARK,
    "DominoDraftModel": _DOMINO,
    "PEagleDraftModel": _PEAGLE,
    "PeagleLlamaForCausalLM": _PEAGLE,
    "PeagleQwen3ForCausalLM": _PEAGLE,
    "EagleLlamaForCausalLM": _EAGLE1,
    "LlamaForCausalLMEagle": _EAGLE1,
    "Eagle3Qwen3ForCausalLM": _QK_NORM,
    # The same variants as `speculators_model_type` and as `dflash_config.projector_type`.
    "dflash2": _DFLASH2,
    "dspark": _DSPARK,
    "domino": _DOMINO,
    "peagle": _PEAGLE,
    "eagle": _EAGLE1,
}

# Key -> values that change nothing, and what another value would mean.
_REFUSED = {
    "attention_bias": ((None, False), "biases in the attention projections"),
    "mlp_bias": ((None, False), "biases in the MLP"),
    "quantization_config": ((None,), "quantised weights"),
    "partial_rotary_factor": ((None, 1.0), "RoPE on a part of each head"),
    "rope_dim": ((None,), "RoPE on a part of each head"),
}
_REFUSED_EAGLE3 = _REFUSED | {
    "use_aux_hidden_state": ((None, True), "features of the last layer alone, as in EAGLE-1/2"),
    "parallel_drafting": ((None, False), _PEAGLE),
    "pard_token": ((None,), _PEAGLE),
    "embed_requires_grad": ((None, False), "a trained embedding of its own (drafters here read the target's)"),
}
_REFUSED_DFLASH = _REFUSED | {
    "use_swa": ((None, False), "sliding-window attention"),
    "attention_sink_bias": ((None, False), "attention sinks"),
    "attention_value_scale": ((None, 1.0), "scaled values"),
    "final_logit_softcapping": ((None,), "capped logits"),
    "output_multiplier": ((None, 1.0), "scaled hidden states"),
    "input_embedding_scale": ((None, 1.0), "scaled embeddings"),
    "sample_from_anchor": ((None, False), "an anchor slot that proposes a token"),
}

_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings"
).split()
_COPIED = ("hidden_act", "rms_norm_eps", "initializer_range")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OF_DFLASH2 = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_NORM_FLAGS = ("fc_norm", "norm_output", "norm_before_fc", "norm_before_residual")
# Every name that is looked at, in whatever section; a misspelt one would leave a default in its place.
_READ = {
    *(*_SIZES, *_COPIED, *_TOKEN_IDS, *_OF_DFLASH2, *_NORM_FLAGS, *_REFUSED_EAGLE3, *_REFUSED_DFLASH),
    *(
        "architectures speculators_model_type speculators_config eagle_config dflash_config projector_type "
        "transformer_layer_config rope_parameters rope_scaling rope_theta num_target_layers target_hidden_size "
        "target_model_name_or_path target_model_revision eagle_aux_hidden_state_layer_ids num_aux_hidden_states "
        "aux_hidden_state_layer_ids target_layer_ids draft_vocab_size ttt_steps block_size mask_token_id layer_types "
        "use_sliding_window is_causal causal"
    ).split(),
}
# What transformers itself writes, read here or not.
_WRITTEN = {each.name for kind in (LlamaConfig, Qwen3Config, MuseGlimmerAssistantConfig) for each in fields(kind)}


@dataclass(frozen=True)
class ParsedConfig:
    """
    What a published `config.json` states.

    Attributes:
        family (`str`): `"eagle3"` or `"dflash"`.
        layout (`str`): `"flat"`, `"speculators"` or `"transformers"`.
        architectures (`list[str]`): As written.
        arguments (`dict[str, Any]`): Arguments of the family's config class; what is not stated is left out.
    """

    family: str
    layout: str
    architectures: list[str]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class _Sections:
    """The places of one `config.json`: all of it, the decoder layer's shape, and the family's own nested section."""

    layout: str
    raw: dict[str, Any]
    shape: dict[str, Any]
    nested: dict[str, Any]
    nested_name: str

    def stated(self, key: str) -> dict[str, Any]:
        return {key: self.raw.get(key), f"{self.nested_name}.{key}": self.nested.get(key)}


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
    nested_name = "eagle_config" if family == "eagle3" else "dflash_config"
    shape = _mapping(raw, "transformer_layer_config") if layout == "speculators" else raw
    sections = _Sections(layout, raw, shape, _mapping(raw, nested_name), nested_name)
    for section in (raw, shape, sections.nested):
        refuse_misspelt(set(section) - _READ - _WRITTEN, _READ, "config.json")
        for key, (accepted, meaning) in (_REFUSED_EAGLE3 if family == "eagle3" else _REFUSED_DFLASH).items():
            if section.get(key) not in accepted:
                raise _refusal(key, section[key], meaning)
    kwargs = _shared_kwargs(sections, num_target_layers, _class_of_defaults(family, sections), name)
    kwargs |= (_eagle3_kwargs if family == "eagle3" else _dflash_kwargs)(sections, kwargs)
    stated = {key: value for key, value in kwargs.items() if value is not None}
    return ParsedConfig(family, layout, list(raw.get("architectures") or []), stated)


def _decide(raw: dict[str, Any]) -> tuple[str, str]:
    """Return family and layout."""
    architectures = raw.get("architectures") or [""]
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        raise ValueError(f"config.json has architectures={architectures!r}; it must be a list of names.")
    name = architectures[0]
    kind = raw.get("speculators_model_type") or _mapping(raw, "speculators_config").get("algorithm")
    projector = _mapping(raw, "dflash_config").get("projector_type")
    for stated in (kind, projector):
        if not isinstance(stated, str | None):
            raise ValueError(f"config.json has the name {stated!r} for what the drafter is; it must be a string.")
    for stated in (name, kind, projector):
        if stated in _UNSUPPORTED:
            raise ValueError(f"{stated!r} is not supported: {_UNSUPPORTED[stated]}. {_readable()}")
    if projector not in (None, "dflash"):
        raise ValueError(f"dflash_config.projector_type={projector!r} is unknown and not supported. {_readable()}")
    if kind is not None or "speculators_config" in raw or "transformer_layer_config" in raw:
        family = kind or _KNOWN_SPECULATORS.get(name)
        if family not in ("eagle3", "dflash"):
            raise ValueError(f"Unknown drafter in the speculators format: {family or name!r}. {_readable()}")
        return family, "speculators"
    is_llama = name == "LlamaForCausalLM" and "draft_vocab_size" not in raw
    if is_llama or (name not in _KNOWN and name.endswith(_LANGUAGE_MODELS)):
        lacking = " without `draft_vocab_size`" if is_llama else ""
        raise ValueError(
            f"{name}{lacking} is a language model, not a drafter: a target, perhaps. Make a drafter for it with "
            "`trl-draft-opd init`, `Eagle3DraftModel.from_target(...)` or `DFlashDraftModel.from_target(...)`."
        )
    if name not in _KNOWN:
        raise ValueError(f"Unknown drafter architecture {name or None!r}. {_readable()}")
    return _KNOWN[name]


def _readable() -> str:
    return (
        f"Drafters that can be read have `architectures` {sorted(_KNOWN)}, or `speculators_model_type` eagle3 or "
        f"dflash with {sorted(_KNOWN_SPECULATORS)}."
    )


def _refusal(key: str, value: Any, meaning: str) -> ValueError:
    return ValueError(
        f"config.json has {key}={value!r}: {meaning}, which is not supported. If the drafter was trained without it, "
        "remove the key from config.json."
    )


def _mapping(section: dict[str, Any], key: str) -> dict[str, Any]:
    value = section.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config.json has {key}={value!r}; it must be an object.")
    return value or {}


def _agreed(what: str, stated: dict[str, Any]) -> Any:
    """Return the one value that all places which state it have, or `None`."""
    present = {where: value for where, value in stated.items() if value is not None}
    values = list(present.values())
    if any(value != values[0] for value in values[1:]):
        raise ValueError(f"Contradiction about {what}: {present}. Remove the wrong one.")
    return values[0] if values else None


def _target_layers(sections: _Sections, given: int | None, name: str) -> int | None:
    """Return how many layers the target has, by the config or as it was `given`."""
    stated = _agreed("the target's layers", sections.stated("num_target_layers"))
    if None not in (given, stated) and given != stated:
        raise ValueError(
            f"{name} was trained for a target with {stated} layers; this one has {given}. Give its own target, or a "
            "drafter of this one."
        )
    return given if stated is None else stated


def _integer(key: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"config.json has {key}={value!r}; it must be an integer of at least {least}.")
    return value


def _class_of_defaults(family: str, sections: _Sections) -> type[PreTrainedConfig]:
    """Return the transformers class whose defaults stand for keys that are not written."""
    if sections.layout == "transformers":
        return MuseGlimmerAssistantConfig
    if sections.layout == "flat":
        return LlamaConfig if family == "eagle3" else Qwen3Config
    model_type = sections.shape.get("model_type", {"eagle3": "llama", "dflash": "qwen3"}[family])
    if family == "eagle3" and model_type == "qwen3":
        raise _refusal("transformer_layer_config.model_type", "qwen3", _QK_NORM)
    if model_type not in ("llama", "qwen3"):
        raise _refusal("transformer_layer_config.model_type", model_type, "a layer that is neither llama nor qwen3")
    return LlamaConfig if model_type == "llama" else Qwen3Config


def _shared_kwargs(
    sections: _Sections, num_target_layers: int | None, defaults: type[PreTrainedConfig], name: str
) -> dict[str, Any]:
    """Return what both families' configs take; `defaults` supplies what is not written."""
    raw, shape = sections.raw, sections.shape
    missing = [key for key in _REQUIRED if key not in shape]
    if missing and sections.layout != "speculators":
        raise ValueError(f"config.json does not say {missing}. Add them; `vocab_size` is the target's.")
    kwargs = {key: shape.get(key, getattr(defaults, key, None)) for key in (*_SIZES, *_COPIED)}
    if kwargs["num_key_value_heads"] is None:
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"]
    for key in _SIZES:
        if key != "head_dim" or kwargs[key] is not None:
            _integer(key, kwargs[key], 1)
    _check_kinds(raw, shape, kwargs)
    width = raw.get("target_hidden_size")
    if width not in (None, kwargs["hidden_size"]):
        raise ValueError(
            f"config.json has target_hidden_size={width} and hidden_size={kwargs['hidden_size']}; drafters here read "
            "the target's embedding, so they must agree."
        )
    dtype = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    # In the speculators format, the target is named in a section of its own.
    target = _mapping(_mapping(raw, "speculators_config"), "verifier").get("name_or_path")
    return kwargs | {
        **{key: shape.get(key) if raw.get(key) is None else raw[key] for key in _TOKEN_IDS},
        "rope_parameters": _checked_rope(_rope_parameters(shape, defaults.default_theta)),
        "num_target_layers": _target_layers(sections, num_target_layers, name),
        "target_model_name_or_path": raw.get("target_model_name_or_path", target),
        "target_model_revision": raw.get("target_model_revision"),
        "dtype": dtype if dtype in _DTYPES else None,
    }


def _check_kinds(raw: dict[str, Any], shape: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Refuse values that are no number, name or id where one must stand."""
    _number("rms_norm_eps", kwargs["rms_norm_eps"])
    # transformers' own layout has none.
    if kwargs["initializer_range"] not in (None, 0):
        _number("initializer_range", kwargs["initializer_range"])
    if not isinstance(kwargs["hidden_act"], str) or kwargs["hidden_act"] not in ACT2FN:
        raise ValueError(f"config.json has hidden_act={kwargs['hidden_act']!r}, which transformers does not know.")
    for key in ("target_model_name_or_path", "target_model_revision"):
        if not isinstance(raw.get(key), str | None):
            raise ValueError(f"config.json has {key}={raw[key]!r}; it must be a string or null.")
    for key, value in ((key, section.get(key)) for section in (raw, shape) for key in _TOKEN_IDS):
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None:
                # Some write -1 for none.
                _integer(key, token_id, -1)


def _number(key: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config.json has {key}={value!r}; it must be a number above 0.")


def _checked_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return parameters of RoPE; refuse a kind that transformers does not know, and what is no number."""
    kind = parameters["rope_type"]
    if not isinstance(kind, str) or kind not in {"default", *ROPE_INIT_FUNCTIONS}:
        raise ValueError(f"config.json has rope_type={kind!r}, which transformers does not know.")
    for key, value in parameters.items():
        if key != "rope_type" and not isinstance(value, bool | None):
            for number in value if isinstance(value, list) else [value]:
                _number(f"{key} of RoPE", number)
    _number("rope_theta", parameters["rope_theta"])
    return parameters


def _rope_parameters(shape: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """Return RoPE in the one form of transformers 5; `rope_theta` and `rope_scaling` are its legacy pair."""

    def normalised(key: str) -> dict[str, Any]:
        parameters = _mapping(shape, key)
        # Some families keep one set of parameters per layer type.
        parameters = dict(parameters.get("full_attention", parameters))
        for part in ("partial_rotary_factor", "rope_dim"):
            accepted, meaning = _REFUSED[part]
            if parameters.get(part) not in accepted:
                raise _refusal(f"{key}.{part}", parameters[part], meaning)
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
    theta = _agreed("rope_theta", thetas)
    scaling = _agreed("RoPE scaling", {"rope_parameters": new or None, "rope_scaling": legacy or None})
    return {"rope_type": "default", **(scaling or {}), "rope_theta": default_theta if theta is None else theta}


def _layer_ids(value: Any, where: str, offset: int) -> list[int] | None:
    """Return 0-based layer ids; `offset` is 1 where boundaries are written, else 0."""
    if value is None:
        return None
    if not isinstance(value, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in value):
        raise ValueError(f"config.json has {where}={value!r}; it must be a list of integers.")
    if offset == 1 and 0 in value:
        raise ValueError(f"config.json has {where}={value}, where 0 means the embeddings; only layers can be tapped.")
    return [i - offset for i in value]


def _eagle3_kwargs(sections: _Sections, shared: dict[str, Any]) -> dict[str, Any]:
    raw, nested, shape = sections.raw, sections.nested, sections.shape
    if shared["num_hidden_layers"] != 1:
        meaning = "an EAGLE-3 drafter with more than one layer, which engines read differently"
        raise _refusal("num_hidden_layers", shared["num_hidden_layers"], meaning)
    if shape.get("use_sliding_window") or "sliding_attention" in (shape.get("layer_types") or []):
        raise _refusal("use_sliding_window", True, "sliding-window attention in EAGLE-3")
    key = "eagle_aux_hidden_state_layer_ids"
    stated = {
        # vLLM counts how many layers have run; SGLang and SpecForge name the layer, in the nested section.
        f"{key}={raw.get(key)} (layers that have run)": _layer_ids(raw.get(key), key, 1),
        f"eagle_config.{key}={nested.get(key)} (0-based)": _layer_ids(nested.get(key), f"eagle_config.{key}", 0),
    }
    layer_ids = _agreed("layer ids (shown as 0-based ids)", stated)
    num_layers = shared["num_target_layers"]
    if layer_ids is None and num_layers is None:
        raise ValueError(
            "config.json names no layer ids, so they follow from the number N of the target's layers. Pass "
            "`num_target_layers=N`."
        )
    if layer_ids is None:
        layer_ids = middle_layer_ids(num_layers)
    count = raw.get("num_aux_hidden_states")
    if count not in (None, len(layer_ids)):
        raise ValueError(f"config.json has num_aux_hidden_states={count}, but the layer ids are {layer_ids}.")
    counts = {key: raw[key] for key in ("draft_vocab_size", "ttt_steps") if raw.get(key) is not None}
    return {
        "target_layer_ids": layer_ids,
        **{key: _integer(key, value, 1) for key, value in counts.items()},
        **{flag: _norm_flag(flag, sections) for flag in _NORM_FLAGS},
    }


def _norm_flag(flag: str, sections: _Sections) -> bool:
    value = _agreed(flag, sections.stated(flag))
    if value is None:
        # The speculators format's readers take this one for true when it is not written.
        return sections.layout == "speculators" and flag == "norm_before_residual"
    if not isinstance(value, bool):
        raise ValueError(f"config.json has {flag}={value!r}; it must be true or false.")
    return value


def _dflash_kwargs(sections: _Sections, shared: dict[str, Any]) -> dict[str, Any]:
    raw, shape = sections.raw, sections.shape
    layer_types = shape.get("layer_types")
    if layer_types is None and (sections.layout == "transformers" or shape.get("use_sliding_window")):
        raise _refusal("layer_types", None, "sliding-window attention by default")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        raise _refusal("layer_types", layer_types, "layers that do not see the whole context")
    if layer_types is not None and len(layer_types) != shared["num_hidden_layers"]:
        raise ValueError(f"config.json has {len(layer_types)} layer_types for {shared['num_hidden_layers']} layers.")
    # `sliding_window_non_causal` speaks of sliding layers only; full attention is not causal in the speculators
    # format.
    causal = {"is_causal": raw.get("is_causal"), "dflash_config.causal": sections.nested.get("causal")}
    if _agreed("causality", causal | {"transformer_layer_config.is_causal": shape.get("is_causal")}):
        raise _refusal("is_causal", True, "blocks whose slots see only earlier slots")
    if raw.get("draft_vocab_size") not in (None, shared["vocab_size"]):
        raise _refusal("draft_vocab_size", raw["draft_vocab_size"], "DFlash over a part of the target's vocabulary")
    aux, boundaries = "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"
    stated = {where: _layer_ids(ids, where, 0) for where, ids in sections.stated("target_layer_ids").items()}
    # vLLM reads the EAGLE-3 key even here, and before the others.
    for key in (aux, boundaries):
        stated[f"{key}={raw.get(key)} (layers that have run)"] = _layer_ids(raw.get(key), key, 1)
    found = {
        "target_layer_ids": _agreed("layer ids (shown as 0-based ids)", stated),
        "block_size": _agreed("block_size", sections.stated("block_size")),
        "mask_token_id": _agreed("mask_token_id", sections.stated("mask_token_id")),
    }
    missing = [key for key, value in found.items() if value is None]
    if missing:
        raise ValueError(
            f"config.json does not say {missing}, which the weights were trained with. Add them to its dflash_config."
        )
    _integer("block_size", found["block_size"], 2)
    _integer("mask_token_id", found["mask_token_id"], 0)
    if sections.raw.get("architectures") == ["DFlash2DraftModel"]:
        found |= {key: _integer(key, sections.nested.get(key), 1) for key in _OF_DFLASH2}
    return found
