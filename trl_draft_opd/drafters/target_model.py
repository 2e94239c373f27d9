# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Loads the target's model: a whole one, or a PEFT adapter merged into its base as a server would load it once merged and
saved. Knows no drafter.
"""

import copy
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..utils.loading import loading_whole
from ..utils.private_trl import create_model_from_path
from .published.adapter import (
    ADAPTER_CONFIG_FILE,
    Adapter,
    adapter_chain,
    merge_adapter,
    naming_base,
    read_adapter,
    refuse_tied,
    require_peft,
)
from .published.checkpoint import CONFIG_FILE, CheckpointSource
from .published.configs import is_drafter_config


if TYPE_CHECKING:
    from peft import PeftModel


TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# Where PEFT saves a copy of an embedding beside an adapter, behind the embedding's name.
_COPIES = ("", ".base_layer", ".token_adapter.base_layer")
_OTHER_BASE = f"Write where the base is into `base_model_name_or_path` of {ADAPTER_CONFIG_FILE}."


def merging_line(name: str) -> str:
    """Return the command that merges an adapter and saves the whole model, with its tokenizer."""
    code = (
        f"from trl_draft_opd import FrozenTarget; target = FrozenTarget.load({json.dumps(name, ensure_ascii=False)}); "
        'target.causal_lm.save_pretrained("MERGED"); target.tokenizer.save_pretrained("MERGED")'
    )
    return shlex.join(["python", "-c", code])


def target_chain(
    name: str, *, revision: str | None = None, options: Mapping[str, Any] | None = None
) -> list[CheckpointSource]:
    """
    Return where the files of a target are, and, while that is an adapter, those of what it was trained on; see
    [`adapter_chain`]. `options` are arguments of `from_pretrained`.
    """
    given = {"revision": revision, **(options or {})}
    places = {place.name: given[place.name] for place in fields(CheckpointSource) if place.name in given}
    source = CheckpointSource(name, **places)
    try:
        return adapter_chain(source, base=None, fix=_OTHER_BASE)
    except LocalEntryNotFoundError:
        # The Hub is out of reach: what is cached of the repository is a whole model, or transformers says so.
        return [source]


def load_target_model(
    chain: Sequence[CheckpointSource],
    *,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    init_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """
    Load a target's model from where [`target_chain`] found it; of a PEFT adapter, its base with the adapter merged in.

    The sum is taken in the precision of the base's own file and then cast to `dtype`, so that the weights are those of
    the merged model, saved and loaded again. Its `config.name_or_path` is the adapter's.

    Raises:
        OSError: If the files are not there.
        ValueError: If it is an adapter that cannot be merged; see [`merge_adapter`].
        ImportError: If it is an adapter and PEFT is not installed.
    """
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "device_map": None, **(init_kwargs or {})}
    *adapters, whole = chain
    if not adapters:
        return _load_whole(whole, options)
    name = str(adapters[0])
    require_peft(
        f"The target {name!r} is a PEFT adapter. Merge it where PEFT is installed, `{merging_line(name)}`, and give "
        "the merged folder; merging it here"
    )
    if options.get("quantization_config") is not None:
        raise ValueError(
            f"The target {name!r} is an adapter, and merging it into quantised weights would round it. Merge it "
            f"first, `{merging_line(name)}`, and quantise the merged model."
        )
    with naming_base(adapters[-1], whole, _OTHER_BASE):
        model = _load_whole(whole, options | {"dtype": "auto"})
    _refuse_quantized(model, repr(name))
    for source in reversed(adapters):
        adapter = read_adapter(source)
        _resize_vocabulary(model, adapter)
        model = _settled(merge_adapter(model, adapter), str(source))
    return _cast(model, options["dtype"])


def load_target_tokenizer(chain: Sequence[CheckpointSource], *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a target; of an adapter without one, its base's."""
    source = next((each for each in chain[:-1] if each.find(TOKENIZER_CONFIG_FILE) is not None), chain[-1])
    return AutoTokenizer.from_pretrained(source.name_or_path, trust_remote_code=trust_remote_code, **source.places())


def _load_whole(source: CheckpointSource, options: dict[str, Any]) -> PreTrainedModel:
    check_architecture(source)
    with loading_whole():
        return create_model_from_path(source.name_or_path, **options | source.places())


def check_architecture(source: CheckpointSource) -> None:
    """
    Raise `ValueError` at a drafter, and at a model that neither transformers nor code beside it can build;
    `FileNotFoundError` at a folder without a config.
    """
    if source.name_or_path and Path(source.name_or_path).is_dir() and source.find(CONFIG_FILE) is None:
        raise FileNotFoundError(f"{str(source)!r} has no {CONFIG_FILE}. Give the folder of a model, or a Hub id.")
    try:
        if source.find(CONFIG_FILE) is None:
            return
    except LocalEntryNotFoundError:
        return
    raw = source.read_json(CONFIG_FILE)
    if is_drafter_config(raw):
        raise ValueError(
            f"{str(source)!r} is a drafter, not a target; swap `--target` and `--drafter` (in Python: `target` and "
            "`model`), or give the model that it was trained for."
        )
    name = next(iter(raw.get("architectures") or []), None)
    if raw.get("auto_map") or (isinstance(name, str) and hasattr(transformers, name)):
        return
    what = f"is of architecture {name!r}, which" if name else "names no `architectures` in its config.json, by which"
    raise ValueError(
        f"{str(source)!r} {what} transformers {transformers.__version__} "
        f"{'does not have' if name else 'finds the class of a model'}. Give a decoder-only text model of transformers "
        "as target."
    )


def _refuse_quantized(model: PreTrainedModel, name: str) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"The base {model.config.name_or_path!r} of the adapter {name} is quantised, and merging would round the "
            "adapter. Write the unquantised model into its `base_model_name_or_path`."
        )


def _resize_vocabulary(model: PreTrainedModel, adapter: Adapter) -> None:
    """Give a base as many rows as the adapter's own copy of the embedding has, where tokens were added for it."""
    embedding = model.get_input_embeddings()
    names = [f"base_model.model.{name}" for name, module in model.named_modules() if module is embedding]
    for name in (f"{name}{part}.weight" for name in names for part in _COPIES):
        if name in adapter.tensors and adapter.tensors[name].shape[0] != model.config.vocab_size:
            model.resize_token_embeddings(adapter.tensors[name].shape[0], mean_resizing=False)


def _settled(model: Any, name: str) -> PreTrainedModel:
    """Return a merged model whose config speaks of it and not of its base."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        # Trained apart by the adapter; a reader of a saved copy would take one for the other.
        model.config.tie_word_embeddings = False
    model.config.name_or_path = name
    model.config._commit_hash = None
    return model


def _cast(model: PreTrainedModel, dtype: str | torch.dtype) -> PreTrainedModel:
    """Cast the weights that have the model's own precision, as loading in `dtype` would."""
    if dtype in ("auto", None):
        return model
    wanted, own = parse_dtype(dtype), model.dtype
    for parameter in model.parameters():
        if parameter.dtype == own:
            parameter.data = parameter.data.to(wanted)
    model.config.dtype = wanted
    return model


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the precision that a name or a precision stands for, other than `"auto"`."""
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype):
        raise ValueError(f"`target_dtype` must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}.")
    return wanted


def is_adapted_target(target: Any) -> "TypeGuard[PeftModel]":
    """Whether an instance is a [`~peft.PeftModel`], which is no transformers model itself."""
    return not isinstance(target, PreTrainedModel) and isinstance(getattr(target, "peft_config", None), dict)


def whole_model(target: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """
    Return a model as it is, and that of a [`~peft.PeftModel`] with its adapter merged into a copy.

    The `config.name_or_path` of the copy is empty: it is no model that could be found by a name.

    Raises:
        ValueError: If the adapter cannot be merged, or lies in the layers of what looks like a plain model.
    """
    if is_adapted_target(target):
        return _merged(target)
    for name, module in target.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            raise ValueError(
                f"The target has an adapter in its layers ({name!r}). Give the `PeftModel` itself, or the adapter's "
                "folder: it is merged then."
            )
    assert isinstance(target, PreTrainedModel)
    return target


def _merged(adapted: Any) -> PreTrainedModel:
    if not hasattr(adapted, "merge_and_unload") or not isinstance(adapted.get_base_model(), PreTrainedModel):
        kinds = sorted({str(config.peft_type) for config in adapted.peft_config.values()})
        raise ValueError(
            f"The target, a {type(adapted).__name__} of kind {kinds}, cannot be merged into one transformers model. "
            "Give a whole model."
        )
    _refuse_quantized(adapted.get_base_model(), "of the target")
    refuse_tied(adapted, "of the target")
    return _settled(copy.deepcopy(adapted).merge_and_unload(), "")
