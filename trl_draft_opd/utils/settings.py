# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What no setting can be, whoever gives it: no number, one that is not finite or too small, or text that is empty."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def check_settings(settings: Any) -> None:
    """
    Refuse values of a dataclass that no setting can have: NaN, infinity, empty text that is not the default, and in a
    field of numbers alone what is none: text, a truth value, or a fraction where the field counts.

    Raises:
        ValueError: Naming the setting; inside of dictionaries and lists, the place too.
    """
    wanted = _numbers(type(settings))
    for each in fields(settings):
        value = getattr(settings, each.name)
        is_empty = value == "" or (isinstance(value, list) and "" in value)
        if is_empty and each.default != "":
            raise ValueError(f"`{each.name}` is empty. Give it a value, or leave it out.")
        if (found := find_not_finite(value, each.name)) is not None:
            raise ValueError(f"`{found[0]}` must be a finite number, got {found[1]}.")
        number = wanted.get(each.name)
        if number and value is not None and (isinstance(value, bool) or not isinstance(value, number)):
            kind = "an integer" if number is Integral else "a number"
            raise ValueError(f"`{each.name}` must be {kind}, got {value!r}.")


def _choices(hint: Any) -> set[Any]:
    """Return the types that a hint names; a list of numbers has an argument too, and is one type."""
    return set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}


@cache
def _numbers(settings: type) -> dict[str, type]:
    """Return the fields of a dataclass that hold nothing but a number or `None`, with what the number must be."""
    kinds = {name: _choices(hint) - {type(None)} for name, hint in get_type_hints(settings).items()}
    return {name: Real if float in kind else Integral for name, kind in kinds.items() if kind and kind <= {int, float}}


def check_at_least(settings: Any, least: int, *names: str) -> None:
    """Raise `ValueError` unless each of these settings is unset or at least `least`."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def find_not_finite(value: Any, place: str = "") -> tuple[str, float] | None:
    """Return where in a value of JSON's kinds, itself at `place`, a number is NaN or infinite, and which it is."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (place, value)
    inner: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        inner = [(f"{place}.{key}" if place else str(key), each) for key, each in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        inner = [(f"{place}[{index}]", each) for index, each in enumerate(value)]
    return next(filter(None, (find_not_finite(each, name) for name, each in inner)), None)
