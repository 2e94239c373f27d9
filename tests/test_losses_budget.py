# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Claims about the memory of logits: what a device is given by default."""

from types import SimpleNamespace

import pytest
import torch

from trl_draft_opd.losses import default_chunk_bytes


GIB = 2**30


@pytest.mark.parametrize(("card_bytes", "expected"), [(24 * GIB, 24 * GIB // 20), (80 * GIB, 4 * GIB), (16, 0)])
def test_a_card_gives_a_twentieth_of_its_memory_and_at_most_four_gib(monkeypatch, card_bytes, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=card_bytes))
    assert default_chunk_bytes("cuda:0") == expected


def test_every_other_device_gives_what_suits_a_cpu():
    assert default_chunk_bytes("cpu") == default_chunk_bytes(torch.device("meta")) == 64 * 2**20
