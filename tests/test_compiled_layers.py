# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Compiled feed-forward and norm layers serve texts and blocks of every number, once compiled.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from helpers.tiny import FAMILIES, TINY_RUN, VOCAB, make_drafter, make_target
from trl_draft_opd import DraftSFTConfig
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.trainer.pair import compile_drafter


TARGET = make_target()


@pytest.mark.parametrize("is_mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_later_shapes_compile_nothing(tmp_path, family, is_mixed):
    drafter = make_drafter(family, TARGET).train()
    torch._dynamo.reset()
    counters.clear()
    compile_drafter(
        drafter, DraftSFTConfig(str(tmp_path), torch_compile=True, torch_compile_backend="eager", **TINY_RUN)
    )
    generator, graphs = torch.Generator().manual_seed(0), []
    for length, num_blocks in ((60, 20), (90, 33), (200, 150), (41, 7)):
        ids = torch.randint(7, VOCAB, (1, length), generator=generator)
        features = torch.randn(1, length, drafter.fc.in_features, generator=generator)
        anchors = 1 + torch.randperm(length - 1, generator=generator)[None, :num_blocks]
        drafts = torch.randint(7, VOCAB, (1, num_blocks, 4), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            hidden = run_blocks(drafter, features, ids, anchors, drafts, TARGET.embed, torch.zeros_like(ids))
        hidden.float().sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] <= 8 and graphs == graphs[:1] * 4
