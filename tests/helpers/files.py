# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What a command reads from the disk: a tiny target, and rows in its words."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.tiny import make_causal_lm, make_tokenizer


def save_target(folder: Path) -> str:
    """Save the tiny target and its tokenizer; return the folder as a flag takes it."""
    make_causal_lm().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write a JSONL file; return its path as a flag takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def make_word_rows() -> list[dict[str, str]]:
    """Return six prompts with their completions."""
    return [
        {"prompt": f"w{8 + i} w9 w10", "completion": " ".join(f"w{10 + i + j}" for j in range(12))} for i in range(6)
    ]
