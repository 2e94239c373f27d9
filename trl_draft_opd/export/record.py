# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What was trained and measured, as one JSON file next to a drafter: the card is written from it, `verify` compares with
it.

A record is published, so it holds only numbers, choices by name and Hub ids: no prompt, no path of a machine, no
token. Each field states what it may hold; everything else is refused when a record is written and when it is read.
"""

import importlib.metadata
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from ..drafters.auto import DRAFTER_CLASSES
from ..evaluation import EvaluationReport
from ..losses import LOSS_TYPES
from ..rollout.drafting import DRAFT_SAMPLING
from .record_forms import (
    DIGEST,
    DTYPE,
    HUB_ID,
    NAME,
    PROMPT_SET,
    VERSION,
    Form,
    is_number,
    matches,
    one_of,
    text_form,
)
from .served import ServedSpeed
from .source import hub_id_of


RECORD_FILE = "training_record.json"
FORMAT_VERSION = 1
METHODS = ("sft", "opd")
# Settings that describe the training, and are numbers. A name that is in none of these lists is never published.
_NUMBERS = (
    "learning_rate muon_learning_rate warmup_steps weight_decay adam_beta1 adam_beta2 max_grad_norm num_train_epochs "
    "max_steps per_device_train_batch_size gradient_accumulation_steps generation_batch_size seed bf16 fp16 "
    "max_length max_prompt_length max_completion_length accepted_weight rejected_weight supervised_weight slot_decay "
    "position_decay d_pace_floor num_anchors num_supervised_anchors num_drafts temperature top_k top_p regenerate "
    "completions_from_target confidence_loss_weight selector_loss_weight"
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
_CURVE_VALUES = ("loss", "tau", "eval_loss", "eval_tau", "eval_tau_low", "eval_tau_high")
# Arguments of chat templates that switch thinking, and the words they are switched with.
_TEMPLATE_ARGUMENTS = ("enable_thinking", "thinking", "reasoning_effort", "reasoning")
_TEMPLATE_WORDS = ("none", "minimal", "low", "medium", "high", "max", "on", "off", "auto")
# What texts of a record look like: never a path, an address, a sentence or a key.
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_SECRET = re.compile(r"(hf_|api_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{16,}")


# ---- what a field may hold ------------------------------------------------------------------------------------------


def _are_settings(settings: Mapping[Any, Any]) -> bool:
    return all(
        matches(NAME, name) and (isinstance(value, bool | int | float) or matches(NAME, value))
        for name, value in settings.items()
    )


def _are_points(curve: list[Any]) -> bool:
    return all(
        isinstance(point, Mapping)
        and isinstance(point.get("step"), int)
        and all(name in ("step", *_CURVE_VALUES) and is_number(value) for name, value in point.items())
        for point in curve
    )


def recorded_template_arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return those arguments of a chat template that switch thinking; others may hold anything."""
    found = {}
    for name in _TEMPLATE_ARGUMENTS:
        value = (arguments or {}).get(name)
        if isinstance(value, bool) or value in _TEMPLATE_WORDS:
            found[name] = value
    return found


# ---- the record -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetFacts:
    """
    The target a drafter belongs to.

    Attributes:
        name (`str` or `None`): Its Hub id; `None` where only a local path was known.
        revision (`str` or `None`): Its revision.
        num_layers (`int`), vocab_size (`int`), hidden_size (`int`), max_position_embeddings (`int`),
        num_parameters (`int` or `None`): Its shape.
        dtype (`str` or `None`): Precision it was read in.
        chat_template_sha256 (`str` or `None`): Hash of the chat template that prompts were written with.
        chat_template_kwargs (`dict`): Its arguments that switch thinking.
    """

    name: Annotated[str | None, HUB_ID]
    revision: Annotated[str | None, text_form(r"[A-Za-z0-9][\w./-]{0,99}", "a branch, tag or commit")]
    num_layers: int
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    num_parameters: int | None = None
    dtype: Annotated[str | None, DTYPE] = None
    chat_template_sha256: Annotated[str | None, DIGEST] = None
    chat_template_kwargs: Annotated[
        dict[str, Any],
        Form(
            lambda given: recorded_template_arguments(given) == given,
            f"true, false or one of {_TEMPLATE_WORDS} for {_TEMPLATE_ARGUMENTS}",
        ),
    ] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetFacts:
    """
    What a drafter was trained on.

    Attributes:
        name (`str` or `None`): Hub id; `None` for local data.
        licence (`str` or `None`): As given by the user or the Hub.
        num_rows (`int` or `None`): Rows trained on.
        completions (`str`): `"target"`: the target wrote the text; `"dataset"`: it came with the data.
    """

    name: Annotated[str | None, HUB_ID]
    licence: Annotated[str | None, text_form(LICENCE, "an identifier such as cc-by-4.0, or null")]
    num_rows: int | None
    completions: Annotated[str, one_of(("target", "dataset"))]


@dataclass(frozen=True)
class StageRecord:
    """
    One training run.

    Attributes:
        method (`str`): `"sft"` or `"opd"`.
        steps (`int`): Optimizer steps done.
        settings (`dict`): See [`recorded_settings`].
        dataset ([`DatasetFacts`]): What it was trained on.
        curve (`list[dict]`):
            Points with `step` and any of `loss`, `tau`, `eval_loss`, `eval_tau`, `eval_tau_low`, `eval_tau_high`.
    """

    method: Annotated[str, one_of(METHODS)]
    steps: int
    settings: Annotated[dict[str, Any], Form(_are_settings, "numbers and short names by setting")]
    dataset: DatasetFacts
    curve: Annotated[list[dict[str, Any]], Form(_are_points, f"objects with `step` and numbers for {_CURVE_VALUES}")]


@dataclass(frozen=True)
class Measurement:
    """
    Tau of the drafter on one set of prompts.

    Attributes:
        prompt_set (`str`): What the prompts are called.
        prompts_sha256 (`str`): See [`prompts_digest`].
        num_prompts (`int`), num_blocks (`int`), num_drafts (`int`), max_completion_length (`int`), batch_size
            (`int`): Sizes.
        temperature (`float`), draft_sampling (`str`), ignore_eos (`bool`), target_dtype (`str`): How it was decoded.
        tau (`float`), tau_low (`float`), tau_high (`float`):
            Pooled accepted length, bonus counted, and its 95 % interval.
        acceptance_per_slot (`list[float]`): Share of blocks that keep at least `k` drafts.
        num_different (`int` or `None`): Outputs that differ from the target's own; `None` if not compared.
        after_steps (`int` or `None`): Optimizer steps of the last stage before it.
        calibration_error (`float` or `None`), brier_score (`float` or `None`):
            Of a confidence head, over all slots; see [`Calibration`].
        is_replay (`bool`): Whether the blocks were found along the target's responses, and none was decoded live.
    """

    prompt_set: Annotated[str, PROMPT_SET]
    prompts_sha256: Annotated[str, DIGEST]
    num_prompts: int
    temperature: float
    draft_sampling: Annotated[str, one_of(DRAFT_SAMPLING)]
    num_drafts: int
    max_completion_length: int
    batch_size: int
    ignore_eos: bool
    tau: float
    tau_low: float
    tau_high: float
    acceptance_per_slot: Annotated[
        list[float],
        Form(lambda rates: all(is_number(rate) and 0 <= rate <= 1 for rate in rates), "numbers in [0, 1]"),
    ]
    num_blocks: int
    num_different: int | None
    target_dtype: Annotated[str, DTYPE]
    after_steps: int | None = None
    calibration_error: float | None = None
    brier_score: float | None = None
    is_replay: bool = False


@dataclass(frozen=True)
class TrainingRecord:
    """
    All that is published about how a drafter was made.

    Attributes:
        target ([`TargetFacts`]), family (`str`): What it drafts for, and how.
        stages (`list[StageRecord]`): In the order they were run.
        measurements (`list[Measurement]`): Of the drafter as it is now.
        served (`list[ServedSpeed]`): How fast a server wrote with it.
        versions (`dict[str, str]`): Packages it was last trained with.
        format_version (`int`): Of this file.
    """

    target: TargetFacts
    family: Annotated[str, one_of(tuple(DRAFTER_CLASSES))]
    stages: list[StageRecord]
    measurements: list[Measurement]
    versions: Annotated[
        dict[str, str],
        Form(
            lambda versions: all(matches(VERSION, text) for item in versions.items() for text in item),
            "version numbers by package",
        ),
    ]
    format_version: int = FORMAT_VERSION
    served: list[ServedSpeed] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; what was never measured through a server is not there."""
        content = asdict(self)
        return content if self.served else {name: value for name, value in content.items() if name != "served"}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TrainingRecord":
        """
        Read what [`to_dict`] returned.

        Raises:
            ValueError: If the format is another one, a key is missing, unknown or of the wrong type, a number is not
                finite, or a text is not of the form it must have.
        """
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{RECORD_FILE} has format_version {version!r}, this version of trl-draft-opd reads {FORMAT_VERSION}. "
                "Update the package, or delete the file: the drafter does not need it."
            )
        for where, value in _leaves(content, ""):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{RECORD_FILE}: {where} is {value}, which JSON cannot hold. Leave the point out.")
            if isinstance(value, str) and _SECRET.search(value):
                raise ValueError(f"{RECORD_FILE}: {where} looks like an access token. Its value is not repeated here.")
        return _read_object(cls, content, "")

    def check(self) -> None:
        """Raise `ValueError` if the record holds what must not be published; see [`TrainingRecord.from_dict`]."""
        self.from_dict(self.to_dict())


def _leaves(content: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield every value of nested JSON with the path to it."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _leaves(value, f"{where}.{name}" if where else str(name))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _leaves(value, f"{where}[{index}]")
    else:
        yield where, content


def _read_object(cls: Any, content: Any, where: str) -> Any:
    """Make a dataclass out of a JSON object, its fields checked against their types and against what they may hold."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{RECORD_FILE}: {where} must be an object, got {content!r}.")
    prefix = f"{where}." if where else ""
    hints = get_type_hints(cls, include_extras=True)
    unknown = sorted(set(content) - set(hints))
    if unknown:
        raise ValueError(f"{RECORD_FILE}: unknown {[prefix + name for name in unknown]}.")
    required = [held.name for held in fields(cls) if held.default is MISSING and held.default_factory is MISSING]
    missing = [prefix + name for name in required if name not in content]
    if missing:
        raise ValueError(f"{RECORD_FILE}: {missing} missing.")
    return cls(**{name: _read_value(hints[name], value, prefix + name) for name, value in content.items()})


def _read_value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return _read_object(hint, value, where)
    hint, *forms = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    options = [get_origin(option) or option for option in (get_args(hint) if isinstance(hint, UnionType) else (hint,))]
    # A whole number may stand where a fraction does.
    if type(value) not in [*options, *([int] if float in options else [])]:
        names = " or ".join(option.__name__ for option in options)
        raise ValueError(f"{RECORD_FILE}: {where} is {value!r}, which is no {names}.")
    if get_origin(hint) is list and is_dataclass(get_args(hint)[0]):
        return [_read_object(get_args(hint)[0], each, f"{where}[{index}]") for index, each in enumerate(value)]
    for form in forms:
        if value is not None and not form.fits(value):
            raise ValueError(f"{RECORD_FILE}: {where} must be {form.wanted}. Its value is not repeated here.")
    return value


def read_record(folder: str | Path) -> TrainingRecord | None:
    """Return the record next to a drafter, or `None`; a damaged one is a `ValueError`."""
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
    except ValueError as error:  # of the encoding, too
        raise ValueError(
            f"{str(path)!r} is not valid JSON: {error}. Delete it: the drafter does not need it."
        ) from error
    return TrainingRecord.from_dict(content)


def write_record(record: TrainingRecord, folder: str | Path) -> None:
    """Write the record next to a drafter, unless it holds what must not be published: a `ValueError`."""
    record.check()
    text = json.dumps(record.to_dict(), indent=2, allow_nan=False) + "\n"
    (Path(folder) / RECORD_FILE).write_text(text, encoding="utf-8")


def recorded_settings(args: Any) -> dict[str, Any]:
    """
    Return the settings of a training config that may be published: those on a list, as numbers or choices by name.
    """
    given = {name: getattr(args, name, None) for name in (*_NUMBERS, *_ENUMERATED, *_CHOICES)}
    # A plain string in place of a member was never looked up among them, and may be anything.
    enumerated = {name: value.value for name in _ENUMERATED if isinstance(value := given[name], Enum)}
    numbers = {name: given[name] for name in _NUMBERS if isinstance(given[name], bool) or is_number(given[name])}
    chosen = {name: given[name] for name, choices in _CHOICES.items() if given[name] in choices}
    return numbers | enumerated | chosen


def recorded_curve(log_history: Sequence[Mapping[str, Any]], max_points: int = 400) -> list[dict[str, Any]]:
    """
    Return the training curve out of a trainer's `log_history`: losses and taus by step, and nothing else of it.
    Longer curves than `max_points` are thinned evenly; evaluations and the last point stay.
    """
    points: dict[int, dict[str, Any]] = {}
    for entry in log_history:
        values = {name: entry[name] for name in _CURVE_VALUES if is_number(entry.get(name))}
        if values and isinstance(entry.get("step"), int):
            points.setdefault(entry["step"], {"step": entry["step"]}).update(values)
    curve = [points[step] for step in sorted(points)]
    stride = max(1, -(-len(curve) // max_points))
    return [
        point for index, point in enumerate(curve) if index % stride == 0 or point is curve[-1] or "eval_tau" in point
    ]


def check_prompt_set(name: str) -> None:
    """Raise `ValueError` unless a set of prompts can be called that in a record."""
    if not PROMPT_SET.fits(name):
        raise ValueError(f"Prompts can be recorded as {PROMPT_SET.wanted}, got {name!r}.")


def measurement_of(report: EvaluationReport, **conditions: Any) -> Measurement:
    """Return a report as it is recorded; `conditions` are the attributes of [`Measurement`] that it does not know."""
    names = (
        "num_prompts temperature num_drafts batch_size tau tau_low tau_high acceptance_per_slot num_blocks "
        "num_different is_replay max_completion_length ignore_eos draft_sampling"
    ).split()
    calibration = report.calibration or {}
    return Measurement(
        **{name: getattr(report, name) for name in names},
        calibration_error=calibration.get("error"),
        brier_score=calibration.get("brier"),
        **conditions,
    )


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
