# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What was trained and measured, as one JSON file beside a drafter: the card is written from it, `verify` compares with it.

Nothing gets in that is not on a list: numbers, choices by name, Hub ids. No prompt, no path of a machine, no token.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, get_type_hints

from ..losses import LOSS_TYPES
from ..rollout.drafting import DRAFT_SAMPLING
from .record_checks import (
    CURVE_VALUES,
    RECORD_FILE,
    check_record,
    is_number,
    recorded_template_arguments,
)
from .source import hub_id_of


FORMAT_VERSION = 1
# Settings that say how a drafter was trained, and are numbers. A name that is in none of these lists is never published.
_NUMBERS = (
    "learning_rate warmup_steps weight_decay adam_beta1 adam_beta2 max_grad_norm num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps generation_batch_size seed bf16 fp16 max_length max_prompt_length max_completion_length accepted_weight "
    "rejected_weight supervised_weight slot_decay position_decay d_pace_floor num_anchors num_supervised_anchors num_drafts temperature "
    "top_k top_p regenerate completions_from_target"
).split()
# Settings that transformers turns into members of an enumeration.
_ENUMERATED = ("lr_scheduler_type", "optim")
# Settings that are a choice by name: any other text in them is left out, whatever it is.
_CHOICES = {
    "accepted_loss": LOSS_TYPES,
    "rejected_loss": LOSS_TYPES,
    "rejected_scope": ("first", "suffix"),
    "slot_weighting": ("decay", "d_pace"),
    "slot_scope": ("block", "until_fail"),
    "supervised_anchors": ("random", "error"),
    "rollout": ("replay", "live"),
    "draft_sampling": DRAFT_SAMPLING,
    "target_dtype": ("auto", "float32", "bfloat16", "float16"),
}
_PACKAGES = ("trl-draft-opd", "torch", "transformers", "trl", "accelerate", "datasets")


@dataclass(frozen=True)
class TargetFacts:
    """
    The target a drafter belongs to.

    Attributes:
        name (`str` or `None`): Its Hub id; `None` where only a local path was known.
        revision (`str` or `None`): Its revision.
        num_layers (`int`), vocab_size (`int`), hidden_size (`int`), max_position_embeddings (`int`): Its shape.
        num_parameters (`int` or `None`): Its parameters.
        dtype (`str` or `None`): Precision it was read in.
        chat_template_sha256 (`str` or `None`): Hash of the chat template that prompts were written with.
        chat_template_kwargs (`dict`): Its arguments that switch thinking.
    """

    name: str | None
    revision: str | None
    num_layers: int
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    num_parameters: int | None = None
    dtype: str | None = None
    chat_template_sha256: str | None = None
    chat_template_kwargs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetFacts:
    """
    Attributes:
        name (`str` or `None`): Hub id; `None` for local data.
        licence (`str` or `None`): As given by the user or the Hub.
        num_rows (`int` or `None`): Rows trained on.
        completions (`str`): `"target"`: the target wrote the text; `"dataset"`: it came with the data.
    """

    name: str | None
    licence: str | None
    num_rows: int | None
    completions: str


@dataclass(frozen=True)
class StageRecord:
    """
    One training run.

    Attributes:
        method (`str`): `"sft"` or `"opd"`.
        steps (`int`): Optimiser steps done.
        settings (`dict`): See [`recorded_settings`].
        dataset ([`DatasetFacts`]): What it was trained on.
        curve (`list[dict]`): Points with `step` and any of `loss`, `tau`, `eval_tau`, `eval_loss`.
    """

    method: str
    steps: int
    settings: dict
    dataset: DatasetFacts
    curve: list


@dataclass(frozen=True)
class Measurement:
    """
    Tau of the drafter on one set of prompts.

    Attributes:
        prompt_set (`str`): What the prompts are called.
        prompts_sha256 (`str`): See [`prompts_digest`].
        num_prompts (`int`), num_blocks (`int`), num_drafts (`int`), max_new_tokens (`int`), batch_size (`int`): Sizes.
        temperature (`float`), draft_sampling (`str`), ignore_eos (`bool`), target_dtype (`str`): How it was decoded.
        tau (`float`), tau_low (`float`), tau_high (`float`): Pooled accepted length, bonus counted, and its 95 % interval.
        acceptance_per_slot (`list[float]`): Share of blocks that keep at least `k` drafts.
        num_different (`int` or `None`): Outputs that differ from the target's own; `None` if not compared.
        after_steps (`int` or `None`): Optimiser steps of the last stage before it.
    """

    prompt_set: str
    prompts_sha256: str
    num_prompts: int
    temperature: float
    draft_sampling: str
    num_drafts: int
    max_new_tokens: int
    batch_size: int
    ignore_eos: bool
    tau: float
    tau_low: float
    tau_high: float
    acceptance_per_slot: list
    num_blocks: int
    num_different: int | None
    target_dtype: str
    after_steps: int | None = None

    @classmethod
    def from_report(
        cls,
        report: Any,
        *,
        prompt_set: str,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        target_dtype: Any,
        draft_sampling: str = "greedy",
        ignore_eos: bool = False,
        after_steps: int | None = None,
    ) -> "Measurement":
        """
        Return what is published of an evaluation.

        Args:
            report ([`EvaluationReport`]): The result.
            prompt_set (`str`): A name for the prompts: a Hub id, with `:split` behind it if you like, or one word.
            prompts (`Sequence[Sequence[int]]`): The prompts' token ids; their hash alone is kept.
            max_new_tokens (`int`), draft_sampling (`str`), ignore_eos (`bool`): As they were given to the evaluation.
            target_dtype (`torch.dtype` or `str`): Precision of the target.
            after_steps (`int`, *optional*): Optimiser steps of the last stage before it.
        """
        shared = "num_prompts temperature num_drafts batch_size tau tau_low tau_high acceptance_per_slot num_blocks num_different"
        return cls(
            prompt_set=prompt_set,
            prompts_sha256=prompts_digest(prompts),
            draft_sampling=draft_sampling,
            max_new_tokens=max_new_tokens,
            ignore_eos=ignore_eos,
            target_dtype=str(target_dtype).removeprefix("torch."),
            after_steps=after_steps,
            **{name: getattr(report, name) for name in shared.split()},
        )


@dataclass(frozen=True)
class TrainingRecord:
    """
    All that is published about a drafter's making.

    Attributes:
        target ([`TargetFacts`]), family (`str`): What it drafts for, and how.
        stages (`list[StageRecord]`): In the order they were run.
        measurements (`list[Measurement]`): Of the drafter as it is now.
        versions (`dict[str, str]`): Packages it was last trained with.
        format_version (`int`): Of this file.
    """

    target: TargetFacts
    family: str
    stages: list
    measurements: list
    versions: dict
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TrainingRecord":
        """
        Read what [`to_dict`] returned.

        Raises:
            ValueError: If the format is another one, a key is missing, unknown or of the wrong type, or a text is not of the
                form it must have.
        """
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{RECORD_FILE} has format_version {version!r}, this version of trl-draft-opd reads {FORMAT_VERSION}. Update the package, or "
                "delete the file: the drafter does not need it."
            )
        record = _build(cls, content, "")
        stages = [_build(StageRecord, stage, f"stages[{i}].") for i, stage in enumerate(record.stages)]
        record = replace(
            record,
            target=_build(TargetFacts, record.target, "target."),
            stages=[
                replace(s, dataset=_build(DatasetFacts, s.dataset, f"stages[{i}].dataset."))
                for i, s in enumerate(stages)
            ],
            measurements=[_build(Measurement, m, f"measurements[{i}].") for i, m in enumerate(record.measurements)],
        )
        check_record(record)
        return record


def _build(cls: type, content: Any, where: str) -> Any:
    """Make a dataclass out of a JSON object, holding keys and plain types to it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{RECORD_FILE}: {where.rstrip('.') or 'the file'} must be an object, got {content!r}.")
    hints = get_type_hints(cls)
    unknown = sorted(set(content) - set(hints))
    if unknown:
        raise ValueError(f"{RECORD_FILE}: unknown {[where + name for name in unknown]}.")
    plain = (str, int, float, bool, type(None), list, dict)
    for name, value in content.items():
        options = getattr(hints[name], "__args__", (hints[name],))
        options = tuple(option for option in options if option in plain)
        is_whole = isinstance(value, int) and not isinstance(value, bool) and float in options
        if options and not is_whole and type(value) not in options:
            raise ValueError(
                f"{RECORD_FILE}: {where}{name} is {value!r}, which is no {' or '.join(o.__name__ for o in options)}."
            )
    try:
        return cls(**content)
    except TypeError as error:
        missing = [f.name for f in fields(cls) if f.name not in content]
        raise ValueError(f"{RECORD_FILE}: {[where + name for name in missing]} missing: {error}.") from error


def read_record(folder: str | Path) -> TrainingRecord | None:
    """
    Return the record beside a drafter, or `None` if there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # of the encoding, too
        raise ValueError(
            f"{str(path)!r} is not valid JSON: {error}. Delete it: the drafter does not need it."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object.")
    return TrainingRecord.from_dict(content)


def write_record(record: TrainingRecord, folder: str | Path) -> None:
    """
    Write the record beside a drafter.

    Raises:
        ValueError: If it holds what must not be published, see [`check_record`]; nothing is written then.
    """
    TrainingRecord.from_dict(record.to_dict())
    text = json.dumps(record.to_dict(), indent=2, allow_nan=False) + "\n"
    (Path(folder) / RECORD_FILE).write_text(text, encoding="utf-8")


def recorded_settings(args: Any) -> dict[str, Any]:
    """
    Return the settings of a training config that may be published: those on a list, as numbers or choices by name.

    Args:
        args ([`DraftSFTConfig`] or [`DraftOPDConfig`]): The config.
    """
    found = {}
    for name in (*_NUMBERS, *_ENUMERATED, *_CHOICES):
        value = getattr(args, name, None)
        if name in _NUMBERS:
            is_known = isinstance(value, bool | int | float) and math.isfinite(value)
        elif name in _ENUMERATED:
            # A plain string here was never looked up among the members, and may be anything.
            is_known, value = isinstance(value, Enum), getattr(value, "value", None)
        else:
            is_known = value in _CHOICES[name]
        if is_known:
            found[name] = value
    return found


def recorded_curve(log_history: Sequence[Mapping[str, Any]], max_points: int = 400) -> list[dict[str, Any]]:
    """
    Return the training curve out of a trainer's log: losses and taus by step, and nothing else of it.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`.
        max_points (`int`, *optional*, defaults to 400): Longer curves are thinned evenly; evaluations and the last point stay.
    """
    points: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        values = {name: entry[name] for name in CURVE_VALUES if is_number(entry.get(name))}
        if values and isinstance(entry.get("step"), int):
            points.setdefault(entry["step"], {"step": entry["step"]}).update(values)
    curve = [points[step] for step in sorted(points)]
    stride = -(-len(curve) // max_points)
    return [
        point
        for index, point in enumerate(curve)
        if index % max(1, stride) == 0 or point is curve[-1] or "eval_tau" in point
    ]


def prompts_digest(prompts: Sequence[Sequence[int]]) -> str:
    """Return a hash of tokenized prompts, by which a later run knows them again without holding them."""
    return sha256(json.dumps([list(map(int, prompt)) for prompt in prompts]).encode()).hexdigest()


@cache
def describe_versions() -> dict[str, str]:
    """Return the versions of the packages that training rests on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # A source tree that was never installed has no metadata of its own.
            continue
    return versions


def describe_target(
    config: Any,
    *,
    name: str | None,
    revision: str | None,
    dtype: Any = None,
    num_parameters: int | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TargetFacts:
    """Return what is published of a target, given its config; a `name` that is a local path is left out."""
    return TargetFacts(
        name=hub_id_of(name),
        revision=revision,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_position_embeddings=config.max_position_embeddings,
        num_parameters=num_parameters,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        chat_template_sha256=None if chat_template is None else sha256(chat_template.encode()).hexdigest(),
        chat_template_kwargs=recorded_template_arguments(chat_template_kwargs),
    )
