# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What commands share: how words become the fields of dataclasses, and the fields that several commands have. Every flag
is a field with a help text; it may be written with hyphens or underscores, and be a key in the file of `--config`.
"""

import argparse
import copy
import difflib
import inspect
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import yaml
from datasets import Dataset
from trl import TrlParser  # pyright: ignore[reportPrivateImportUsage]

from ..data.templates import read_template
from ..rollout.acceptance import SamplingSettings
from ..target.frozen import FrozenTarget
from ..target.lengths import Lengths, fit_lengths
from ..trainer.common_config import CHAT_TEMPLATE_HELP, PROMPT_LENGTH_HELP, DraftTrainingConfig
from ..utils.settings import check_at_least, check_settings
from .flag_table import INHERITED, words_of
from .rows import load_rows


# Stands in a command to paste for prompts that were not trained on.
HELD_OUT = "HELD_OUT.jsonl"
# Flags that some commands cannot have, and what to do.
_ELSEWHERE = {
    "draft-vocab-size": "only `init` and `sft` choose a drafter's vocabulary; afterwards, in Draft-OPD too, it stays"
}
# Help lists the choices of a flag up to this number.
_MAX_LISTED_CHOICES = 6


def flag(help: str, choices: list[str] | None = None, **default: Any) -> Any:
    """Return a field with a help text; without a `default` it is required."""
    return field(metadata={"help": help} | ({} if choices is None else {"choices": choices}), **default)


def read_bytes(text: str) -> int:
    """Return the number of bytes that a text names: `1500`, or with a unit, `10GB` (10^10) or `2GiB` (2 * 2^30)."""
    found = re.fullmatch(r"([\d_]+(?:\.\d+)?) *(?:([kmgt])(i?)b?|b)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes: write e.g. 1500000, 10GB or 2GiB")
    number, unit, is_binary = found.groups()
    power = 1 + "kmgt".index(unit.lower()) if unit else 0
    return round(float(number) * (1024 if is_binary else 1000) ** power)


def write_json(path: str | None, numbers: dict) -> None:
    """Write the numbers of a command to the file of `--json`, if it was given."""
    if path is not None:
        Path(path).write_text(json.dumps(numbers, indent=2), encoding="utf-8")


def print_next(command: str, **flags: str | int | bool | None) -> None:
    """Print the command that comes next, to be pasted; a flag without a value (`None`) is left out."""
    words = [command]
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    print(f"Next: trl-draft-opd {shlex.join(words)}")


def unless_default(settings: Any, name: str) -> Any:
    """Return a setting for [`print_next`], `None` where it is the default."""
    value = getattr(settings, name)
    return None if value == getattr(type(settings), name) else value


def default_of(function: Callable, name: str) -> Any:
    """Return the library's own default of a parameter, so that no command has another."""
    return inspect.signature(function).parameters[name].default


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each flag in one spelling, the one with hyphens, and marks those that are required."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [option for option in action.option_strings if "_" not in option]
        if len(list(action.choices or ())) > _MAX_LISTED_CHOICES:
            shown.metavar = action.dest.upper()
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings[0].startswith("--no_"):
            return f"Switch {action.option_strings[1].replace('no-', '', 1)} off."
        return f"{action.help} (required)" if action.required else super()._get_help_string(action)


class _Parser(TrlParser):
    """Lists the flags in groups, one for each class that a dataclass is made of, the most specific class first."""

    def _add_dataclass_arguments(self, dtype: type) -> None:
        types, unlisted = get_type_hints(dtype), {setting.name: setting for setting in fields(dtype) if setting.init}
        groups: dict[str, Any] = {}
        for owner in dtype.__mro__:
            is_ours = owner.__module__.startswith("trl_draft_opd")
            title = f"settings of {dtype.__name__}" if is_ours else INHERITED
            title = getattr(owner, "_argument_group_name", title)
            for name in [name for name in inspect.get_annotations(owner) if name in unlisted]:
                if title not in groups:
                    groups[title] = self.add_argument_group(title)
                setting = copy.copy(unlisted.pop(name))
                setting.type = types[name]
                if setting.type == bool | None and setting.default is None:
                    # As those that are off by default: without a value, it is on.
                    setting.metadata = MappingProxyType({**setting.metadata, "nargs": "?", "const": True})
                self._parse_dataclass_field(groups[title], setting)
                if setting.name.endswith("_bytes"):
                    self._actions[-1].type = read_bytes

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """As TRL's, but unknown keys are refused, before a required flag is missed."""
        rest = super().set_defaults_with_config(**kwargs)
        self.refuse_unknown(rest[::2], "the config file")
        return rest

    def is_unknown_flag(self, word: str) -> bool:
        """Whether a word has the form of a flag, and there is none of that name."""
        name = word.split("=")[0]
        return (
            word.startswith("--") and " " not in word and name not in {"--", "--config", *self._option_string_actions}
        )

    def refuse_unknown(self, words: Sequence[str], where: str) -> None:
        """Raise `ValueError` if there are words left over, with the flags that may have been meant."""
        known, hints = [option for option in self._option_string_actions if "_" not in option], []
        for name in [word.split("=")[0] for word in words if word.startswith("-")] or words:
            flag_name = name.replace("_", "-")
            near = difflib.get_close_matches(flag_name, known, n=1)
            hint = _ELSEWHERE.get(flag_name.removeprefix("--")) or (f"did you mean {near[0]}?" if near else None)
            hints.append(f"{name} ({hint})" if hint else name)
        fix = "`--help` lists all flags."
        if where != "the config file" and not any(word.startswith("-") for word in words):
            fix = "The flag before takes one value: quote a pattern of files, as in --dataset 'rows/*.jsonl'."
        if hints:
            raise ValueError(f"Unknown in {where}: {', '.join(hints)}. {fix}")


def parse(command: str, types: Sequence[Any], argv: Sequence[str]) -> tuple:
    """Read the words behind a command, and the file of `--config`, into dataclasses whose fields are the flags."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words[-1:] == ["--config"]:
        raise ValueError("`--config` needs the path of a YAML file.")
    if "--config" in words and not Path(path := words[words.index("--config") + 1]).is_file():
        raise FileNotFoundError(f"`--config` names no file: there is none at {path!r}.")
    parser = _Parser(
        types,
        **words_of(command),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    # Before argparse misses a required one, which may be one of these.
    parser.refuse_unknown([word for word in words if parser.is_unknown_flag(word)], "the command line")
    try:
        *parsed, rest = parser.parse_args_and_config(words, return_remaining_strings=True)
    except yaml.YAMLError as error:
        raise ValueError(f"The file of `--config` is no YAML: {error}") from error
    parser.refuse_unknown(rest, "the command line")
    for settings in parsed:
        check_settings(settings)
    return tuple(parsed)


@dataclass(kw_only=True)
class TargetArguments:
    """The target that a command loads."""

    _argument_group_name = "target"

    target: str = flag("Hub id or path of the target.")
    target_dtype: str = flag(
        "Precision of the target; use float32 where outputs must agree to the last token.",
        default=DraftTrainingConfig.target_dtype,
    )
    target_revision: str | None = flag("Revision of the target.", default=None)
    trust_remote_code: bool = flag("Run model code that comes with the target's repository.", default=False)

    def load_target(self, *, body: bool = True) -> FrozenTarget:
        return FrozenTarget.load(
            self.target,
            dtype=self.target_dtype,
            revision=self.target_revision,
            trust_remote_code=self.trust_remote_code,
            body=body,
        )


@dataclass(kw_only=True)
class PromptArguments:
    """How a command reads prompts."""

    _argument_group_name = "prompts"

    max_prompt_length: int | None = flag(PROMPT_LENGTH_HELP, default=None)
    chat_template: str | None = flag(CHAT_TEMPLATE_HELP, default=None)
    chat_template_kwargs: str | None = flag("Arguments for the chat template, as JSON.", default=None)

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_prompt_length")
        # Refused before a target is loaded.
        read_template(self.chat_template)

    def reading(self, max_prompt_length: int) -> dict[str, Any]:
        """Return arguments of [`FrozenTarget.text_reader`]."""
        try:
            arguments = json.loads("null" if self.chat_template_kwargs is None else self.chat_template_kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(f"`--chat-template-kwargs` is not JSON: {error}. Write '{{\"name\": value}}'.") from error
        return {
            "max_prompt_length": max_prompt_length,
            "chat_template": self.chat_template,
            "chat_template_kwargs": arguments,
        }

    def fit_lengths(
        self, target: FrozenTarget, completion: int | None, *, num_drafts: int, defaults: Lengths
    ) -> Lengths:
        """Return the longest prompt and response, see [`fit_lengths`]."""
        return fit_lengths(
            target.num_positions,
            prompt=self.max_prompt_length,
            completion=completion,
            num_drafts=num_drafts,
            defaults=defaults,
        )


@dataclass(kw_only=True)
class RowsArguments(PromptArguments):
    """The rows that a command reads prompts from."""

    _argument_group_name = "prompts"

    dataset: str = flag("Prompts: Hub id, folder, or files (.jsonl, .parquet, .csv, ...; also a pattern).")
    dataset_config: str | None = flag("Name of the dataset's configuration.", default=None)
    split: str = flag("Split of the dataset.", default="train")
    num_prompts: int | None = flag("Rows to read; all of them if unset.", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "num_prompts")

    def load_rows(self) -> Dataset:
        rows = load_rows(self.dataset, self.dataset_config, self.split)
        return rows if self.num_prompts is None else rows.select(range(min(self.num_prompts, len(rows))))

    def read_prompts(self, target: FrozenTarget, max_prompt_length: int) -> list[list[int]]:
        """Return the prompts as token ids."""
        reader = target.text_reader(**self.reading(max_prompt_length))
        return list(reader.read_prompts(self.load_rows())["prompt_ids"])


@dataclass(kw_only=True)
class SamplingArguments:
    """The distribution that the target's tokens are drawn from."""

    _argument_group_name = "sampling"

    temperature: float = flag(
        "Temperature of the target; 0 decodes greedily.", default=DraftTrainingConfig.temperature
    )
    top_k: int = flag("Keep the k most likely tokens; 0 keeps all.", default=DraftTrainingConfig.top_k)
    top_p: float = flag(
        "Keep the smallest set of tokens with this probability; 1.0 keeps all.", default=DraftTrainingConfig.top_p
    )

    def sampling_settings(self) -> SamplingSettings:
        return SamplingSettings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
