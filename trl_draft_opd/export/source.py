# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What an export needs of the target: its id, its config and its embedding. The target's model is never built: one tensor
of its files is read.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig

from ..drafters.published.adapter import is_adapter
from ..drafters.published.checkpoint import CheckpointSource
from ..drafters.target_model import merging_line
from ..drafters.target_shape import text_config


# How families name their input embedding; the head and position embeddings have other names.
_EMBEDDING_NAME = re.compile(r"(.+\.)?(embed_tokens|wte|embed_in|tok_embeddings|word_embeddings)\.weight")
# Config entries by which a family scales its embeddings, and the family that does so without one.
_SCALES = ("embedding_multiplier", "scale_emb", "input_embedding_scale")
_SCALED_FAMILIES = ("gemma", "recurrent_gemma")


@dataclass(frozen=True)
class TargetOfExport:
    """
    What an export takes from the target. What is not known is left out, and what needs it is refused or not checked.

    Attributes:
        hub_id (`str` or `None`): Its Hub id, to be named in configs and card; `None` if only a local path is known.
        config ([`~transformers.PreTrainedConfig`] or `None`): Its config, which the drafter is checked against.
        embedding (`torch.Tensor` of shape `(V, H)` or `None`): Its input embedding, in the precision of its file.
    """

    hub_id: str | None = None
    config: PreTrainedConfig | None = None
    embedding: torch.Tensor | None = None

    @property
    def architectures(self) -> list[str]:
        """Names of the model classes in its config."""
        return list(getattr(self.config, "architectures", None) or [])

    @property
    def embedding_scale(self) -> str | None:
        """How its family scales embeddings, or `None`: engines hand drafters the bare rows."""
        for name in _SCALES:
            if getattr(self.config, name, None) not in (None, 1, 1.0):
                return f"{name}={getattr(self.config, name)}"
        if self.config is not None and self.config.model_type.startswith(_SCALED_FAMILIES):
            return f"model_type={self.config.model_type}"
        return None


def hub_id_of(name_or_path: str | None) -> str | None:
    """Return `name_or_path` if it can be a Hub id and is no path of this machine, else `None`."""
    if not name_or_path or Path(name_or_path).exists() or name_or_path.startswith((".", "/", "~")):
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def read_target(
    name_or_path: str | Path, *, target_id: str | None = None, revision: str | None = None, token: str | None = None
) -> TargetOfExport:
    """
    Read config and embedding of a target.

    Args:
        name_or_path (`str` or `Path`): Hub id or local folder.
        target_id (`str`, *optional*): Hub id to name in what is published; by default `name_or_path` if it is one.
        revision (`str`, *optional*), token (`str`, *optional*): As in `transformers`.

    Raises:
        OSError: If there is no such target.
        ValueError: If it is an adapter, its weights are pickled, or its embedding is not found.
    """
    name = str(name_or_path)
    source = CheckpointSource(name, revision, token=token)
    if is_adapter(source):
        raise ValueError(
            f"The target {name!r} is a PEFT adapter, which no server loads as a model. Merge it, "
            f"`{merging_line(name)}`, and give the merged folder as target."
        )
    config = text_config(AutoConfig.from_pretrained(name, revision=revision, token=token, trust_remote_code=False))
    embedding = _read_embedding(source, (config.vocab_size, config.hidden_size))
    return TargetOfExport(target_id or hub_id_of(name), config, embedding)


def _read_embedding(source: CheckpointSource, shape: tuple[int, int]) -> torch.Tensor:
    files = source.weight_files()
    if files is None:
        raise ValueError(
            f"The target {str(source)!r} has none of what is read here, safetensors files alone: pickled ones can "
            "carry code. Convert it with `save_pretrained`."
        )
    found = {}
    for file, names in files.items():
        # Of a target in several files, only those that can hold the embedding are downloaded.
        if names and not any(map(_EMBEDDING_NAME.fullmatch, names)):
            continue
        with safe_open(source.find_weights(file), framework="pt") as tensors:
            for name in filter(_EMBEDDING_NAME.fullmatch, tensors.keys()):
                if tuple(tensors.get_slice(name).get_shape()) == shape:
                    found[name] = tensors.get_tensor(name)
    if len(found) != 1:
        raise ValueError(
            f"The target {str(source)!r} has {sorted(found) or 'no tensor'} that could be its embedding of shape "
            f"{shape}. Load the target and pass "
            "`target=TargetOfExport(embedding=model.get_input_embeddings().weight)` to `export_drafter`."
        )
    return next(iter(found.values()))
