# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What the texts and numbers of a record may be: never a path, an address, a sentence or a key."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from huggingface_hub.utils import HFValidationError, validate_repo_id


NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
VERSION = re.compile(r"[\w.+!-]{1,48}")


class Form(NamedTuple):
    """What the values of a field, null aside, must fulfil; `wanted` describes it in errors."""

    fits: Callable[[Any], bool]
    wanted: str


def text_form(pattern: str | re.Pattern[str], wanted: str) -> Form:
    """Return the form of a text that matches a pattern as a whole."""
    return Form(lambda text: re.fullmatch(pattern, text) is not None, wanted)


def one_of(choices: Sequence[str]) -> Form:
    """Return the form of a choice by name."""
    return Form(lambda text: text in choices, f"one of {tuple(choices)}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def matches(pattern: re.Pattern[str], value: Any) -> bool:
    """Whether a value is a text that matches a pattern as a whole."""
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_hub_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


HUB_ID = Form(_is_hub_id, "a Hub id or null")
DIGEST = text_form("[0-9a-f]{64}", "64 hexadecimal digits")
DTYPE = text_form(NAME, "a short lower-case name")
PROMPT_SET = text_form(
    r"(?!.*\.(json|jsonl|csv|txt|parquet|arrow)$)([\w-]+/)?[A-Za-z0-9][\w.+-]{0,63}(:[\w.-]{1,32})?",
    "a Hub id, with `:split` if you like, or one word; no file",
)
MACHINE = text_form(
    r"[A-Za-z0-9][A-Za-z0-9 ,.()+-]{0,79}", "a machine in plain words, like `one H100 80GB`; no address"
)
