# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Readings from servers that extract hidden states: what is asked, what comes, and what the probe proves.

The server here is a thread that computes the states of a tiny target and writes them as vLLM does.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.extraction_server import serving
from helpers.tiny import make_target
from trl_draft_opd import FrozenTarget
from trl_draft_opd.readings.server import ReadingServers


LAYERS = (1, 4, 6)
TEXTS = [[7 + (3 * i + k) % 50 for i in range(5 + k)] for k in range(6)]


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    return make_target()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "states"
    made.mkdir()
    return made


def connect(target: FrozenTarget, urls: Any, folder: Path, layer_ids: Any = LAYERS, **settings: Any) -> ReadingServers:
    settings = {"timeout": 5.0, "max_retries": 2, "retry_wait": 0.01} | settings
    return ReadingServers.connect(target, urls, layer_ids, shared_folder=folder, **settings)


def in_process(target: FrozenTarget, text: list[int], layer_ids: Any) -> Any:
    ids = torch.tensor([text])
    return target.read_text(ids, torch.ones_like(ids), layer_ids)


def assert_right(target: FrozenTarget, readings: ReadingServers, texts: Any = TEXTS, layer_ids: Any = LAYERS) -> None:
    for text in texts:
        ours, theirs = in_process(target, text, layer_ids), readings.fetch(text, layer_ids)
        torch.testing.assert_close(theirs.features, ours.features, rtol=0, atol=0)
        torch.testing.assert_close(target.norm(theirs.last_hidden), ours.last_hidden, rtol=0, atol=0)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".alive"))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "moe", "gemma2"])
def test_served_states_are_those_of_the_target_and_no_file_is_left(kind: str, folder: Path):
    target = make_target(kind)
    with serving(target, LAYERS, folder) as server:
        readings = connect(target, server.url, folder)
        assert_right(target, readings)
        assert left_in(folder) == []
        readings.close()
    assert list(folder.iterdir()) == []
