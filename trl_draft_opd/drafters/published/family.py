# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What is published of a family, stated in the family's own folder: the names it goes by, what its keys mean, what would
compute something else, and what its tensors are called. Layouts, and what all families share, are read in `configs`
and `checkpoint`.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, Qwen3Config

from .sections import Sections


#: Key -> values that change nothing, and what another value would mean.
Refused = dict[str, tuple[tuple[Any, ...], str]]


class PublishedFamily(ABC):
    """
    What is published of one family. An instance holds nothing; `PortableConfig.published` is the family's.

    What a family says of itself:

    - `family`: its key, the `speculators_model_type` too.
    - `architectures`: first entry of `architectures` -> layout, for folders that are not in the speculators format.
    - `speculators_architectures`: the same entry in the speculators format, where nothing else names the family.
    - `projector`: what `dflash_config.projector_type` says, where it says something.
    - `section`: the nested section of its own keys in a flat `config.json`.
    - `keys`: its own keys, in whatever section, so that a misspelt one is noticed.
    - `needs_rope_theta`: whether a flat config must state its base of RoPE, because readers fill in different ones.
    - `refused`: keys whose other values would compute something else, and what that would be.
    - `unread`: names of relatives that are not read -> what they are.
    - `renamed`: beginnings of published tensor names -> ours, after a leading `model.` is taken off.
    - `unread_files`: files beside the weights that would change what is computed -> what they are.
    """

    family: ClassVar[str]
    architectures: ClassVar[dict[str, str]]
    speculators_architectures: ClassVar[frozenset[str]]
    projector: ClassVar[str | None] = None
    section: ClassVar[str]
    keys: ClassVar[frozenset[str]]
    needs_rope_theta: ClassVar[bool] = False
    refused: ClassVar[Refused] = {}
    unread: ClassVar[dict[str, str]] = {}
    renamed: ClassVar[dict[str, str]] = {}
    unread_files: ClassVar[dict[str, str]] = {}

    def defaults(self, layout: str, shape: dict[str, Any]) -> type[PreTrainedConfig]:
        """Return the transformers class whose defaults stand for keys that `shape`, the layer's section, lacks."""
        return Qwen3Config

    @abstractmethod
    def arguments(self, sections: Sections, shared: dict[str, Any]) -> dict[str, Any]:
        """
        Return the arguments of the family's config class beside those that all families share; `None` is a value.

        Args:
            sections (`Sections`): The places of the `config.json`, values in `refused` looked at already.
            shared (`dict[str, Any]`): The arguments that all families share, `None` where nothing states one.

        Raises:
            ValueError: If a value would change what is computed, contradicts another, or is missing.
        """

    def of_the_target(self, arguments: dict[str, Any]) -> set[str]:
        """
        Return the names of tensors that are the target's own: copies in a drafter's file are not read. `arguments` are
        those of the config class.
        """
        return {"embed_tokens.weight"}

    def completed(self, tensors: dict[str, torch.Tensor], arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return a checkpoint's tensors, under our names, with what follows from them, without what says nothing."""
        return tensors


#: By family key; `drafters.auto` fills it with the families of its classes.
FAMILIES: dict[str, PublishedFamily] = {}


def find_family(name: str, kind: str | None, *, is_speculators: bool) -> tuple[PublishedFamily, str] | None:
    """
    Return family and layout of a drafter, or `None`: by the first of its `architectures`, and in the speculators
    format by the `kind` that it states there.
    """
    for family in FAMILIES.values():
        if not is_speculators and name in family.architectures:
            return family, family.architectures[name]
        if is_speculators and (family.family == kind or (kind is None and name in family.speculators_architectures)):
            return family, "speculators"
    return None
