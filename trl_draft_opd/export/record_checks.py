# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a training record may hold: numbers, choices by name, Hub ids. Everything else is refused when it is written and when it is
read, because what is in a record is published.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..rollout.drafting import DRAFT_SAMPLING


RECORD_FILE = "training_record.json"
CURVE_VALUES = ("loss", "tau", "eval_loss", "eval_tau")
_FAMILIES, _METHODS, _ORIGINS = ("eagle3", "dflash"), ("sft", "opd"), ("target", "dataset")
# What texts of a record look like: never a path, an address, a sentence or a key.
_CHOICE = re.compile(r"[a-z][a-z0-9_]{0,31}")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_PROMPT_SET = re.compile(
    r"(?!.*\.(json|jsonl|csv|txt|parquet|arrow)$)([\w-]+/)?[A-Za-z0-9][\w.+-]{0,63}(:[\w.-]{1,32})?"
)
_VERSION = re.compile(r"[\w.+!-]{1,48}")
_SECRET = re.compile(r"(hf_|api_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{16,}")
# Arguments of chat templates that switch thinking, and the words they are switched with.
TEMPLATE_ARGUMENTS = ("enable_thinking", "thinking", "reasoning_effort", "reasoning")
_TEMPLATE_WORDS = ("none", "minimal", "low", "medium", "high", "max", "on", "off", "auto")


def check_record(record: Any) -> None:
    """
    Refuse a record that holds what must not be published, or a number that is none.

    Args:
        record ([`TrainingRecord`]): The record.

    Raises:
        ValueError: If so. The message names the key and not the value, which may be private.
    """
    for where, holds, wanted in _claims(record):
        if not holds:
            raise ValueError(f"{RECORD_FILE}: {where} must be {wanted}. Its value is not repeated here.")
    for where, value in _leaves(record.to_dict(), ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{RECORD_FILE}: {where} is {value}, which JSON cannot hold. Leave the point out.")
        if isinstance(value, str) and _SECRET.search(value):
            raise ValueError(f"{RECORD_FILE}: {where} looks like an access token. Its value is not repeated here.")


def _claims(record: Any) -> Iterator[tuple[str, bool, str]]:
    """Yield a key, whether what stands there may be published, and what it must be."""
    target = record.target
    hub_id, choice, digest = "a Hub id or null", "a short lower-case name", "64 hexadecimal digits"
    yield "family", record.family in _FAMILIES, f"one of {_FAMILIES}"
    yield "target.name", target.name is None or _is_hub_id(target.name), hub_id
    yield "target.revision", _fits(_REVISION, target.revision), "a branch, tag or commit"
    yield "target.dtype", _fits(_CHOICE, target.dtype), choice
    yield "target.chat_template_sha256", _fits(_DIGEST, target.chat_template_sha256), digest
    arguments = recorded_template_arguments(target.chat_template_kwargs)
    yield (
        "target.chat_template_kwargs",
        arguments == target.chat_template_kwargs,
        f"true, false or one of {_TEMPLATE_WORDS} for {TEMPLATE_ARGUMENTS}",
    )
    for index, stage in enumerate(record.stages):
        where, data = f"stages[{index}].", stage.dataset
        yield f"{where}method", stage.method in _METHODS, f"one of {_METHODS}"
        yield f"{where}settings", all(map(_is_setting, stage.settings.items())), "numbers and short names by setting"
        yield f"{where}curve", all(map(_is_point, stage.curve)), f"objects with `step` and numbers for {CURVE_VALUES}"
        yield f"{where}dataset.name", data.name is None or _is_hub_id(data.name), hub_id
        yield f"{where}dataset.licence", _fits(_LICENCE, data.licence), "an identifier such as cc-by-4.0, or null"
        yield f"{where}dataset.completions", data.completions in _ORIGINS, f"one of {_ORIGINS}"
    for index, m in enumerate(record.measurements):
        where = f"measurements[{index}]."
        yield (
            f"{where}prompt_set",
            _fits(_PROMPT_SET, m.prompt_set),
            "a Hub id, with `:split` if you like, or one word; no file",
        )
        yield f"{where}prompts_sha256", _fits(_DIGEST, m.prompts_sha256), digest
        yield f"{where}draft_sampling", m.draft_sampling in DRAFT_SAMPLING, f"one of {DRAFT_SAMPLING}"
        yield f"{where}target_dtype", _fits(_CHOICE, m.target_dtype), choice
        rates = m.acceptance_per_slot
        yield f"{where}acceptance_per_slot", all(is_number(r) and 0 <= r <= 1 for r in rates), "numbers in [0, 1]"
    versions = record.versions.items()
    yield "versions", all(_fits(_VERSION, n) and _fits(_VERSION, v) for n, v in versions), "version numbers by package"


def _is_hub_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _fits(pattern: re.Pattern, value: Any) -> bool:
    """Whether a value is null or of a form; the dataclasses' types have said where null may stand."""
    return value is None or (isinstance(value, str) and pattern.fullmatch(value) is not None)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_setting(item: tuple[Any, Any]) -> bool:
    name, value = item
    return _fits(_CHOICE, name) and (
        isinstance(value, bool | int | float) or (value is not None and _fits(_CHOICE, value))
    )


def _is_point(point: Any) -> bool:
    if not isinstance(point, Mapping) or not isinstance(point.get("step"), int):
        return False
    return all(name in ("step", *CURVE_VALUES) and is_number(value) for name, value in point.items())


def _leaves(content: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield every value of nested JSON with the way to it."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, f"{where}.{name}" if where else str(name))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _leaves(value, f"{where}[{index}]")
    else:
        yield where, content


def recorded_template_arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return those arguments of a chat template that switch thinking; others may hold anything."""
    found = {}
    for name in TEMPLATE_ARGUMENTS:
        value = (arguments or {}).get(name)
        if isinstance(value, bool) or value in _TEMPLATE_WORDS:
            found[name] = value
    return found
