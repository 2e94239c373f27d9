# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The places in which a published `config.json` states something, and how one value is read out of several."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Sections:
    """
    The places of one `config.json`.

    Attributes:
        layout (`str`): `"flat"`, `"speculators"` or `"transformers"`.
        raw (`dict[str, Any]`): All of it.
        shape (`dict[str, Any]`): What describes the decoder layers; the same as `raw` but in the speculators format.
        nested (`dict[str, Any]`): The family's own section.
        nested_name (`str`): Its key.
        defaults (`type[PreTrainedConfig]`): The class of transformers whose defaults stand for what `shape` lacks.
    """

    layout: str
    raw: dict[str, Any]
    shape: dict[str, Any]
    nested: dict[str, Any]
    nested_name: str
    defaults: type[PreTrainedConfig]

    def stated(self, *keys: str) -> dict[str, Any]:
        """Return what stands under keys of one meaning, by place."""
        places = {"": self.raw, f"{self.nested_name}.": self.nested}
        if self.shape is not self.raw:
            places["transformer_layer_config."] = self.shape
        return {f"{place}{key}": section.get(key) for place, section in places.items() for key in keys}

    def flag(self, *keys: str) -> bool | None:
        """Return what keys of one meaning say, true or false, or `None` where none of them is written."""
        value = agreed(keys[0], self.stated(*keys))
        if not isinstance(value, bool | None):
            raise ValueError(f"config.json has {keys[0]}={value!r}; it must be true or false.")
        return value


def mapping(section: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the object under a key, empty where there is none."""
    value = section.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config.json has {key}={value!r}; it must be an object.")
    return value or {}


def agreed(what: str, stated: dict[str, Any]) -> Any:
    """Return the one value that all places which state it have, or `None`."""
    present = {where: value for where, value in stated.items() if value is not None}
    values = list(present.values())
    if any(value != values[0] for value in values[1:]):
        raise ValueError(f"Contradiction about {what}: {present}. Remove the wrong one.")
    return values[0] if values else None


def integer(key: str, value: Any, least: int) -> int:
    """Return an integer of at least `least`, or raise `ValueError`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"config.json has {key}={value!r}; it must be an integer of at least {least}.")
    return value


def number(key: str, value: Any) -> float:
    """Return a number above 0, or raise `ValueError`."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config.json has {key}={value!r}; it must be a number above 0.")
    return value


def layer_ids(value: Any, where: str, offset: int) -> list[int] | None:
    """Return 0-based layer ids; `offset` is 1 where boundaries are written, else 0."""
    if value is None:
        return None
    if not isinstance(value, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in value):
        raise ValueError(f"config.json has {where}={value!r}; it must be a list of integers.")
    if offset == 1 and 0 in value:
        raise ValueError(f"config.json has {where}={value}, where 0 means the embeddings; only layers can be tapped.")
    return [i - offset for i in value]


def refusal(key: str, value: Any, meaning: str) -> ValueError:
    """Return the error about a value that would compute something else than the drafters here do."""
    return ValueError(
        f"config.json has {key}={value!r}: {meaning}, which is not supported. If the drafter was trained without it, "
        "remove the key from config.json."
    )
