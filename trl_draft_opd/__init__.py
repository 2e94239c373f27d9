# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Imports the public names, which `__init__.pyi` lists, on first use: the package alone loads no torch."""

import ast
import importlib
from pathlib import Path
from typing import Any

from .utils.console import hide_useless_notes


# Before the libraries are imported: some of the notes come from there.
hide_useless_notes()

_HERE = Path(__file__).parent
__version__ = (_HERE / "VERSION").read_text(encoding="utf-8").strip()

# Public name -> module that defines it.
_PUBLIC = {
    alias.name: f"{__name__}.{node.module}"
    for node in ast.parse((_HERE / "__init__.pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trl_draft_opd' has no attribute {name!r}; public names are {sorted(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)  # noqa: TID251


def __dir__() -> list[str]:
    return sorted(__all__)
