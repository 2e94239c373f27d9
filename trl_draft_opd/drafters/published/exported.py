# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What is written of a family, and who reads it, stated in the family's own folder. The layouts themselves, and what all
families share in them, are made in `trl_draft_opd/export/`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar


#: Target classes that hand out no layers to a drafter in vLLM 0.33.
_NOT_IN_VLLM = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Phi3ForCausalLM")


@dataclass(frozen=True)
class Verdict:
    """
    Whether a reader can load a drafter as it is.

    Attributes:
        refusals (`list[str]`): Why it cannot; empty if it can.
        conditions (`list[str]`): Under which conditions it can.
    """

    refusals: list[str] = field(default_factory=list)
    conditions: list[str] = field(default_factory=list)


class ExportedFamily(ABC):
    """
    How one family is written. An instance holds nothing; `PortableConfig.exported` is the family's.

    What a family says of itself:

    - `word`: what a repository is called by, in names; vLLM finds `method` by it where none is given.
    - `method`: what vLLM calls the way it drafts, `algorithm` what SGLang does.
    - `flat_architecture`, `speculators_architecture`: first of `architectures` in these layouts.
    - `layer_type`: `model_type` of its layers.
    - `carries_embedding`: whether readers want a copy of the target's embedding in the drafter's file.
    - `not_counted`: what a count of its parameters leaves out.
    - `papers`: where it is described, as lines of Markdown.
    """

    word: ClassVar[str]
    method: ClassVar[str]
    algorithm: ClassVar[str]
    flat_architecture: ClassVar[str]
    speculators_architecture: ClassVar[str]
    layer_type: ClassVar[str]
    carries_embedding: ClassVar[bool] = False
    not_counted: ClassVar[str]
    papers: ClassVar[tuple[str, ...]]

    def names(self, layout: str) -> tuple[str, str | None]:
        """Return what a layout has first in `architectures`, and as `model_type`."""
        return (
            (self.speculators_architecture, None)
            if layout == "speculators"
            else (self.flat_architecture, self.layer_type)
        )

    @abstractmethod
    def find_refusal(self, config: Any, layout: str) -> str | None:
        """Return why a layout cannot express a drafter of this config, or `None`."""

    @abstractmethod
    def speculators_sections(
        self, flat: dict[str, Any], boundaries: list[int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Return what the speculators format holds beside what all families share, at its root and in the section of the
        layers, made out of the flat config; `boundaries` count the target layers that have run.
        """

    @abstractmethod
    def layer_id_places(self, layout: str, ids: list[int]) -> dict[tuple[str, ...], list[int]]:
        """Return where a layout names the target's layers, and what must stand there for the 0-based `ids`."""

    @abstractmethod
    def find_problems(self, layout: str, raw: dict[str, Any], shape: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """
        Yield what breaks the family's own rules in a written `config.json`: the rule, and the problem. `shape` is the
        section of the layers.
        """

    @abstractmethod
    def sglang_flags(self, config: Any, num_drafts: int) -> dict[str, Any]:
        """Return SGLang's flags of the family, after those that name algorithm and repository."""

    @abstractmethod
    def readers(self, config: Any, architectures: set[str]) -> dict[str, Verdict]:
        """Return who may load a drafter for a target of these `architectures`, by the files alone."""

    def needs_gpu_in_vllm(self, config: Any) -> str | None:
        """Return why vLLM 0.33 serves a drafter with its V2 runner alone, which has no CPU build; `None` if not."""
        return None

    @abstractmethod
    def facts(self, config: Any, num_drafts: int) -> list[tuple[str, Any]]:
        """Return the rows of a card that only this family has."""


def vllm_conditions(architectures: set[str]) -> list[str]:
    """Return the condition under which vLLM serves any drafter of a target."""
    if not architectures & set(_NOT_IN_VLLM):
        return []
    return ["with `--model-impl transformers`: its own class of this target hands out no layers"]


def vocabulary_fact(config: Any) -> tuple[str, str]:
    """Return the row of a card about what can be drafted."""
    part = config.draft_vocab_size if config.has_reduced_vocabulary else "all"
    return "draft vocabulary", f"{part} of {config.vocab_size} tokens"
