# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What the laboratory works on, in miniature: a folder laid out as `--shared` is, and a pair for the target in it."""

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.lab.plan import Pair, PromptSet
from helpers.files import save_target, write_rows
from helpers.tiny import VOCAB


def write_shared(folder: Path, num_rows: int) -> None:
    """Write a tiny target and prompts; a longer file begins as a shorter one."""
    save_target(folder / "targets" / "tiny")
    (folder / "data").mkdir()
    ids = torch.randint(7, VOCAB, (num_rows, 5), generator=torch.Generator().manual_seed(0)).tolist()
    rows = ({"question": " ".join(f"w{i}" for i in row), "more": "w9"} for row in ids)
    write_rows(folder / "data" / "words.jsonl", rows)


def make_eagle3_pair(*, num_tests: int, **fields) -> Pair:
    """Return the plan of an EAGLE-3: four prompts to train on; at the end of the file two of dev, and tests before."""
    words = PromptSet(field="question", count=4, file="data/words.jsonl")
    return Pair(
        family="eagle3",
        target="targets/tiny",
        drafter={"ttt_steps": 3},
        max_completion_length=16,
        prompts_per_update=2,
        train=[words],
        dev=[replace(words, count=2, start=-2)],
        tests={"words": replace(words, count=num_tests, start=-2 - num_tests)},
        **fields,
    )
