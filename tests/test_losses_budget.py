# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Claims about the memory of logits: what a device is given by default."""

from types import SimpleNamespace

import pytest
import torch

from trl_draft_opd.losses import default_chunk_bytes
from trl_draft_opd.trainer.draft_trainer import DraftTrainer


GIB = 2**30


@pytest.mark.parametrize(("card_bytes", "expected"), [(24 * GIB, 24 * GIB // 20), (80 * GIB, 4 * GIB), (16, 0)])
def test_a_card_gives_a_twentieth_of_its_memory_and_at_most_four_gib(monkeypatch, card_bytes, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=card_bytes))
    assert default_chunk_bytes("cuda:0") == expected


def test_every_other_device_gives_what_suits_a_cpu():
    assert default_chunk_bytes("cpu") == default_chunk_bytes(torch.device("meta")) == 64 * 2**20


@pytest.mark.parametrize(("setting", "expected"), [(None, 64 * 2**20), (1000, 1000)])
def test_a_trainer_takes_the_setting_or_else_what_suits_its_device(setting, expected):
    args = SimpleNamespace(loss_chunk_bytes=setting, device=torch.device("cpu"))
    assert DraftTrainer._chunk_bytes.fget(SimpleNamespace(args=args)) == expected
