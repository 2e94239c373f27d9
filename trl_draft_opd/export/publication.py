# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What is published: a drafter, its target, and what is known of both. Settings and card are written from it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.utils import validate_repo_id

from ..drafters.base import Drafter
from ..drafters.portable_config import PortableConfig
from .record import LICENCE, TrainingRecord
from .source import TargetOfExport


LAYOUTS = ("flat", "speculators", "transformers")


@dataclass(frozen=True)
class Publication:
    """
    A drafter as others will find it.

    Attributes:
        config ([`PortableConfig`]): The drafter's own config: its family and shape.
        num_drafts (`int`): Drafts per block it was trained for.
        dtype (`torch.dtype`): Precision of its stored weights.
        layouts (`tuple[str, ...]`): Layouts in the folder, the one at its root first.
        target ([`TargetOfExport`]): What is known of its target.
        repo_id (`str` or `None`): Hub id the folder will have.
        license (`str` or `None`): Its licence, as its author gives it; never guessed from data or target.
        record ([`TrainingRecord`] or `None`): What was trained and measured.

    Raises:
        ValueError: If an id is no Hub id, the licence no identifier, or the record is another drafter's or holds what
            must not be published.
    """

    config: PortableConfig
    num_drafts: int
    dtype: torch.dtype = torch.bfloat16
    layouts: tuple[str, ...] = LAYOUTS
    target: TargetOfExport = field(default_factory=TargetOfExport)
    repo_id: str | None = None
    license: str | None = None
    record: TrainingRecord | None = None

    def __post_init__(self) -> None:
        if self.record is not None:
            self.record.check()
            own = (self.family, self.config.vocab_size, self.config.target_hidden_size)
            other = (self.record.family, self.record.target.vocab_size, self.record.target.hidden_size)
            if own != other:
                raise ValueError(
                    f"The training record is another drafter's: family, vocabulary and target width are {other}, here "
                    f"they are {own}. Give the record of this drafter, or none."
                )
        for name in (self.target_id, self.repo_id):
            if name is not None:
                validate_repo_id(name)
        if self.license is not None and LICENCE.fullmatch(self.license) is None:
            raise ValueError(
                f"`license` must be an identifier such as 'apache-2.0' or 'cc-by-4.0', got {self.license!r}."
            )

    @classmethod
    def of(cls, drafter: Drafter, **facts: Any) -> "Publication":
        """Describe a drafter; `facts` are further attributes."""
        assert isinstance(drafter.config, PortableConfig)
        return cls(drafter.config, drafter.default_num_drafts, **facts)

    @property
    def family(self) -> str:
        """Key of the family."""
        return self.config.family

    @property
    def layer_ids(self) -> list[int]:
        """0-based ids of the target's layers that the drafter reads."""
        return list(self.config.target_layer_ids or ())

    @property
    def boundaries(self) -> list[int]:
        """The same as some engines count them: how many layers have run."""
        return [i + 1 for i in self.layer_ids]

    @property
    def target_id(self) -> str | None:
        """Hub id of the target, as given or as it was recorded in training."""
        return self.target.hub_id or (self.record.target.name if self.record is not None else None)

    @property
    def target_name(self) -> str:
        """The target in commands, or what stands for it there."""
        return self.target_id or "ORG/TARGET"

    @property
    def repo_name(self) -> str:
        """The repository in commands, or what stands for it there."""
        return self.repo_id or f"ORG/NAME-{self.config.exported.word}"

    @property
    def draws_drafts(self) -> bool:
        """Whether it was trained, at last, along drafts that were drawn: then its own distribution is what counts."""
        stages = self.record.stages if self.record is not None else []
        drawn = [stage.settings for stage in stages if stage.method == "opd"][-1:]
        return any(each.get("draft_sampling") == "sample" and each.get("temperature", 0) > 0 for each in drawn)

    @property
    def has_custom_generate(self) -> bool:
        """Whether the folder holds a decoding function, which reads the flat layout at its root."""
        return self.layouts[0] == "flat"
