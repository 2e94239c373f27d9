# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Read a LoRA adapter, of a drafter or of a target, and merge it into the model it was trained on. PEFT does the sum;
what the folder states is checked before PEFT sees it: whatever does not fit is an error, nothing is filled up or left
out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from time import monotonic
from types import ModuleType
from typing import Any

import regex
import torch
from torch import nn

from .checkpoint import (
    INDEX_FILE,
    SAFETENSORS_FILE,
    CheckpointSource,
    check_weight,
    read_safetensors,
)


ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
# Fields of a `LoraConfig` that training, saving and merging here respect.
LORA_FIELDS = frozenset(
    "r lora_alpha lora_dropout target_modules exclude_modules modules_to_save bias use_rslora use_dora lora_bias "
    "init_lora_weights rank_pattern alpha_pattern layers_to_transform layers_pattern task_type peft_type "
    "peft_version auto_mapping base_model_name_or_path revision inference_mode".split()
)
# Further ones that only merging respects.
_MERGED_FIELDS = LORA_FIELDS | {
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "ensure_weight_tying",
}
# Say nothing without another field that is refused, and where a model came from.
_IDLE_FIELDS = {"megatron_core", "qalora_group_size"}
_UNUSED = frozenset(
    "base_model_name_or_path revision auto_mapping task_type peft_type peft_version inference_mode".split()
)
# The others rewrite the model's own weights before the adapter is added.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# PEFT takes these names for regular expressions too; those of a name alone cannot be slow.
_PLAIN_NAMES = ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
_PLAIN_NAME = regex.compile(r"\^?[\w.\\-]+\$?")
# Seconds for the regular expressions of one adapter, over all names of the model's modules.
_MATCHING_TIME = 5.0


def require_peft(need: str) -> ModuleType:
    """Return the module `peft`, or raise an `ImportError` that begins with what needs it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{need} needs PEFT: `pip install trl-draft-opd[peft]`.") from error
    return peft


def is_adapter(source: CheckpointSource) -> bool:
    """Whether a checkpoint is a PEFT adapter and no whole model; one that is both is refused."""
    if source.find(ADAPTER_CONFIG_FILE) is None:
        return False
    both = [name for name in (SAFETENSORS_FILE, INDEX_FILE) if source.find(name) is not None]
    if both:
        raise ValueError(
            f"{str(source)!r} holds an adapter ({ADAPTER_CONFIG_FILE}) and a whole model ({both[0]}). Move one away."
        )
    return True


def adapter_chain(source: CheckpointSource, *, base: str | None, fix: str) -> list[CheckpointSource]:
    """
    Return a checkpoint, and, while it is an adapter, the model that it was trained on, `base` or the one it names: the
    last is a whole model.

    `fix` says in errors how another base is given.

    Raises:
        OSError: If one of them does not exist.
        ValueError: If an adapter names no base, or one that leads back to itself.
    """
    chain = [source]
    while _is_adapter_under(chain, fix):
        last = chain[-1]
        name, revision = (base, None) if base is not None and len(chain) == 1 else _stated_base(last)
        if not name:
            raise ValueError(f"{ADAPTER_CONFIG_FILE} of {str(last)!r} names no `base_model_name_or_path`. {fix}")
        under = replace(last, name_or_path=name, revision=revision, subfolder="")
        chain.append(under)
        if any(each.is_same(under) for each in chain[:-1]):
            names = " -> ".join(repr(str(each)) for each in chain)
            raise ValueError(f"An adapter's base leads back to it: {names}. {fix}")
    return chain


def _is_adapter_under(chain: list[CheckpointSource], fix: str) -> bool:
    if len(chain) == 1:
        return is_adapter(chain[0])
    with naming_base(chain[-2], chain[-1], fix):
        return is_adapter(chain[-1])


@contextmanager
def naming_base(adapter: CheckpointSource, base: CheckpointSource, fix: str) -> Iterator[None]:
    """Have an error about a file that is missing say whose base it is."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"The adapter {str(adapter)!r} was trained on {str(base)!r}, which cannot be loaded: {error} {fix}"
        ) from error


def _stated_base(source: CheckpointSource) -> tuple[str | None, str | None]:
    raw = source.read_json(ADAPTER_CONFIG_FILE)
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(raw.get(key), str | None):
            raise ValueError(
                f"{ADAPTER_CONFIG_FILE} of {str(source)!r} has {key}={raw[key]!r}; it must be a string or null."
            )
    return raw.get("base_model_name_or_path"), raw.get("revision")


@dataclass(frozen=True)
class Adapter:
    """
    A LoRA adapter as its folder states it.

    Attributes:
        name (`str`): Where it was read.
        settings (`dict`): Its config.
        tensors (`dict[str, torch.Tensor]`): Its weights, finite, by the names in its file.
    """

    name: str
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def read_adapter(source: CheckpointSource) -> Adapter:
    """
    Read an adapter from a folder or the Hub.

    Raises:
        FileNotFoundError: If it has no weights in safetensors.
        ValueError: If it is no LoRA adapter, or its weights are damaged or not finite.
    """
    raw = source.read_json(ADAPTER_CONFIG_FILE)
    if raw.get("peft_type") != "LORA":
        raise ValueError(
            f"{ADAPTER_CONFIG_FILE} of {str(source)!r} has peft_type={raw.get('peft_type')!r}; LoRA adapters alone "
            "are read. Merge another kind with PEFT (`merge_and_unload()`) and save the whole model."
        )
    weights = source.find(ADAPTER_WEIGHTS_FILE)
    if weights is None:
        raise FileNotFoundError(
            f"{str(source)!r} has no {ADAPTER_WEIGHTS_FILE}. Adapters are read from safetensors alone, because "
            "pickled ones can carry code: save it again with `save_pretrained`."
        )
    tensors = read_safetensors(weights)
    for name, tensor in tensors.items():
        check_weight(name, tensor)
    return Adapter(str(source), raw, tensors)


def merge_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """
    Return a model with an adapter merged into it, in the precision of the model, which is used up.

    Raises:
        ValueError: If the adapter was not made for this model, names its layers by an expression that takes too long
            to match, or changes one of two tensors that the model shares.
        ImportError: If PEFT is not installed.
    """
    peft = require_peft(f"Merging the adapter {adapter.name!r}")
    settings = _checked_settings(adapter, model, peft)
    try:
        # The draws, which the file's tensors replace, must not move those of whatever comes next.
        with torch.random.fork_rng(devices=[]):
            adapted = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type=None, inference_mode=True))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"The adapter {adapter.name!r} does not fit a {type(model).__name__}: {error}") from error
    _fill(adapted, adapter, peft)
    refuse_tied(adapted, repr(adapter.name))
    return adapted.merge_and_unload()


def _checked_settings(adapter: Adapter, model: nn.Module, peft: ModuleType) -> dict[str, Any]:
    """Return arguments of a `LoraConfig`, no expression among them; raise `ValueError` at what is not respected."""
    where, raw = f"{ADAPTER_CONFIG_FILE} of {adapter.name!r}", adapter.settings
    defaults = {field.name: getattr(peft.LoraConfig(), field.name) for field in fields(peft.LoraConfig)}
    read = _MERGED_FIELDS | _IDLE_FIELDS
    # Newer versions write settings that older ones lack, switched off.
    unknown = sorted(name for name, value in raw.items() if name not in read and value and value != defaults.get(name))
    if unknown:
        raise ValueError(
            f"{where} sets {unknown}, which is not respected here. Merge it with PEFT and save the model."
        )
    if raw.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise ValueError(
            f"{where} has init_lora_weights={raw['init_lora_weights']!r}, which rewrites the model's own weights. "
            "Convert it to plain LoRA with PEFT's `path_initial_model_for_weight_conversion`."
        )
    _check_numbers(adapter, where)
    for name in _PLAIN_NAMES:
        stated: Any = raw.get(name) or []
        names = [stated] if isinstance(stated, str) else stated
        if not isinstance(names, list | dict):
            raise ValueError(f"{where} has {name}={stated!r}; it must name layers.")
        wrong = [each for each in names if not _PLAIN_NAME.fullmatch(str(each))]
        if wrong:
            raise ValueError(f"{where} has {name}={wrong[0]!r}, which is no name of a layer. Write names in full.")
    settings = {name: raw[name] for name in raw if name in _MERGED_FIELDS & defaults.keys() - _UNUSED}
    # Its tensors replace whatever is drawn.
    settings["init_lora_weights"] = True
    names = [name for name, _ in model.named_modules() if name]
    for name in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(name), str) and settings[name].lower() != "all-linear":
            stated = f"{where} has {name}={settings[name]!r}"
            settings[name] = _match(settings[name], names, stated)
            if name == "target_modules" and not settings[name]:
                raise ValueError(f"{stated}, which no layer of a {type(model).__name__} matches.")
    return settings


def _check_numbers(adapter: Adapter, where: str) -> None:
    """Refuse ranks that no tensor of the file has, before PEFT makes layers of that size, and scales of no number."""
    raw = adapter.settings
    ranks: dict[str, Any] = {"r": raw.get("r", 8)}
    scales: dict[str, Any] = {"lora_alpha": raw.get("lora_alpha", 8)}
    for found, name in ((ranks, "rank_pattern"), (scales, "alpha_pattern")):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"{where} has {name}={pattern!r}; it must be an object.")
        found |= {f"{name}.{key}": value for key, value in pattern.items()}
    largest = max((max(tensor.shape, default=0) for tensor in adapter.tensors.values()), default=0)
    for name, value in ranks.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= max(largest, 1):
            raise ValueError(f"{where} has {name}={value!r}, which is the rank of no tensor beside it.")
    for name, value in scales.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{where} has {name}={value!r}; it must be a number.")


def _match(pattern: str, names: list[str], stated: str) -> list[str]:
    """Return the names that an expression matches; refuse one that takes too long: some take years."""
    end = monotonic() + _MATCHING_TIME
    try:
        return [name for name in names if regex.fullmatch(pattern, name, timeout=max(end - monotonic(), 1e-3))]
    except TimeoutError as error:
        raise ValueError(f"{stated}, which takes too long to match. List the names of the layers instead.") from error
    except regex.error as error:
        raise ValueError(f"{stated}, which is no regular expression: {error}.") from error


def _fill(adapted: Any, adapter: Adapter, peft: ModuleType) -> None:
    """Load an adapter's tensors; raise `ValueError` unless its file holds all that is asked for, and no more."""
    wanted = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # Of an embedding or a head beside the adapter, PEFT saves the model's own tensor too, and what it trained twice.
    own, stored = adapted.state_dict(), dict(adapter.tensors)
    for name in stored.keys() - wanted.keys() - own.keys():
        if any(torch.equal(stored[name], stored[other]) for other in wanted.keys() & stored.keys()):
            del stored[name]
    faults = [f"{name!r} is missing" for name in sorted(wanted.keys() - stored.keys())]
    faults += [f"{name!r} is unexpected" for name in sorted(stored.keys() - wanted.keys() - own.keys())]
    for name in sorted(stored.keys() & (wanted.keys() | own.keys())):
        shape = wanted.get(name, own.get(name)).shape
        if shape != stored[name].shape:
            faults.append(f"{name!r} has shape {tuple(stored[name].shape)}, not {tuple(shape)}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"The weights of the adapter {adapter.name!r} do not fit its config and the model under it: "
            f"{'; '.join(faults[:5])}{more}. Check that the base is the one it was trained on, or save it again."
        )
    left = peft.set_peft_model_state_dict(adapted, stored).unexpected_keys
    assert not left, f"PEFT left {left} out"


def refuse_tied(adapted: nn.Module, name: str) -> None:
    """Refuse an adapter in one of two layers that share a weight: merging it would change the other too."""
    layers: dict[int, list[str]] = {}
    for place, module in adapted.named_modules():
        weight = module._parameters.get("weight")
        # Trained rows of new tokens are written into both.
        if weight is not None and "token_adapter" not in place:
            layers.setdefault(id(weight), []).append(place)
    for shared in layers.values():
        changed = [place.removeprefix("base_model.model.") for place in shared if place.endswith(".base_layer")]
        if changed and len(shared) > 1:
            raise ValueError(
                f"The adapter {name} changes {changed[0].removesuffix('.base_layer')!r}, whose weight the model "
                "shares with another layer (`tie_word_embeddings`), so it cannot be merged. Untie them before "
                "training it, or train the layer as a whole (`modules_to_save`)."
            )
