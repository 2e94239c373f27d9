# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What commands share: how words become the fields of dataclasses, and the fields that several commands have.

Every flag is a field of a dataclass with a help text and a default, accepted with hyphens and with underscores, and as a key of the
YAML file of `--config`.
"""

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from trl import TrlParser

from ..rollout.acceptance import SamplingSettings
from ..target.frozen import FrozenTarget
from ..trainer.common_config import DraftTrainingConfig
from . import COMMANDS
from .rows import load_rows


def flag(help: str, **default: Any) -> Any:
    """Return a field with a help text; without a `default` it is required."""
    return field(metadata={"help": help}, **default)


def default_of(function: Callable, name: str) -> Any:
    """Return the library's own default of a parameter, so that no command has another."""
    return inspect.signature(function).parameters[name].default


def parse(command: str, types: Sequence[type], argv: Sequence[str]) -> tuple:
    """
    Read the flags of a command, and the YAML file of `--config`, into dataclasses.

    Args:
        command (`str`): Its name.
        types (`Sequence[type]`): Dataclasses whose fields are the flags.
        argv (`Sequence[str]`): Words after the command's name.

    Raises:
        ValueError: If a flag or key is unknown (the message names the nearest one), or a value is out of range.
        OSError: If the file of `--config` cannot be read.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words[-1:] == ["--config"]:
        raise ValueError("`--config` needs the path of a YAML file.")
    parser = TrlParser(
        types,
        prog=f"trl-draft-opd {command}",
        usage=f"trl-draft-opd {command} [--config FILE.yaml] [FLAGS]",
        description=COMMANDS[command][1],
        allow_abbrev=False,
    )
    *parsed, config_rest, flags_rest = parser.parse_args_and_config(
        words, return_remaining_strings=True, separate_remaining_strings=True
    )
    known = [option for option in parser._option_string_actions if "_" not in option]
    _refuse_unknown(config_rest[::2], known, "the config file")
    _refuse_unknown(flags_rest, known, "the command line")
    return tuple(parsed)


def _refuse_unknown(unknown: Iterable[str], known: Sequence[str], where: str) -> None:
    words = list(unknown)
    names = [word.split("=")[0] for word in words if word.startswith("-")] or words
    hints = []
    for name in names:
        near = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
        hints.append(f"{name} (did you mean {near[0]}?)" if near else name)
    if hints:
        raise ValueError(f"Unknown in {where}: {', '.join(hints)}. `--help` lists what there is.")


@dataclass(kw_only=True)
class TargetArguments:
    """The target that a command loads."""

    target: str = flag("Hub id or path of the target.")
    target_dtype: str = flag(
        "Precision of the target; float32 where outputs must agree to the last token.",
        default=DraftTrainingConfig.target_dtype,
    )
    target_revision: str | None = flag("Revision of the target.", default=None)
    trust_remote_code: bool = flag("Run model code that comes with the target's repository.", default=False)

    def load_target(self) -> FrozenTarget:
        """Load the target."""
        return FrozenTarget.load(
            self.target,
            dtype=self.target_dtype,
            revision=self.target_revision,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(kw_only=True)
class RowsArguments:
    """The rows that a command reads prompts from."""

    dataset: str = flag("Prompts: Hub id, folder, or .json/.jsonl/.parquet/.csv file.")
    dataset_config: str | None = flag("Name of the dataset's configuration.", default=None)
    split: str = flag("Split of the dataset.", default="train")
    num_prompts: int | None = flag("Read this many rows; all of them if unset.", default=None)
    max_prompt_length: int = flag(
        "Prompts with more tokens are skipped.", default=DraftTrainingConfig.max_prompt_length
    )
    chat_template_kwargs: str | None = flag("Arguments of the chat template, as JSON.", default=None)

    def load_rows(self) -> Dataset:
        """Load the rows."""
        rows = load_rows(self.dataset, self.dataset_config, self.split)
        return rows if self.num_prompts is None else rows.select(range(min(self.num_prompts, len(rows))))

    def reading(self) -> dict[str, Any]:
        """Return what [`FrozenTarget.text_reader`] takes."""
        try:
            arguments = json.loads(self.chat_template_kwargs or "null")
        except json.JSONDecodeError as error:
            raise ValueError(f"`--chat-template-kwargs` is no JSON: {error}. Write '{{\"name\": value}}'.") from error
        return {"max_prompt_length": self.max_prompt_length, "chat_template_kwargs": arguments}

    def read_prompts(self, target: FrozenTarget) -> list[list[int]]:
        """Return the prompts as token ids."""
        return list(target.text_reader(**self.reading()).read_prompts(self.load_rows())["prompt_ids"])


@dataclass(kw_only=True)
class SamplingArguments:
    """The distribution that the target's tokens are drawn from."""

    temperature: float = flag(
        "Temperature of the target; 0 decodes greedily.", default=DraftTrainingConfig.temperature
    )
    top_k: int = flag("Keep the k most likely tokens; 0 keeps all.", default=DraftTrainingConfig.top_k)
    top_p: float = flag(
        "Keep the smallest set of tokens with this mass; 1.0 keeps all.", default=DraftTrainingConfig.top_p
    )

    def sampling_settings(self) -> SamplingSettings:
        """Return the distribution; raises `ValueError` when a value is out of range."""
        return SamplingSettings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


def accelerator_or_cpu() -> torch.device:
    """Return the accelerator of this process, or the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
