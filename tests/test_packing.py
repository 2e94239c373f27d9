# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of `RowPacking` of `trl_draft_opd/drafters/packing.py` against plain loops over rows.
"""

import pytest
import torch

from trl_draft_opd.drafters.packing import RowPacking


ROWS = {"mixed": [3, 5, 0, 1], "full": [4, 4], "one": [6], "shorter than the width": [2, 3]}


@pytest.fixture(params=ROWS)
def lengths(request):
    return ROWS[request.param]


def make(lengths, width):
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return RowPacking.of(mask), mask


def test_rows_lie_end_to_end_and_come_apart_again(lengths):
    packing, mask = make(lengths, 6)
    padded = torch.randn(len(lengths), 6, 3)
    packed = packing.pack(padded)
    assert torch.equal(packed, torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)]))
    assert torch.equal(packing.unpack(packed), padded * mask[..., None])
    assert torch.equal(packing.pack(padded[..., 0]), packed[:, 0]) and packing.num_tokens == sum(lengths)


def test_every_packed_token_knows_its_row_and_position(lengths):
    packing, mask = make(lengths, 6)
    rows, positions = mask.nonzero(as_tuple=True)
    assert torch.equal(packing.rows, rows) and torch.equal(packing.position_ids, positions)
    assert torch.equal(packing.index(rows, positions), torch.arange(packing.num_tokens))
    assert packing.lengths == tuple(lengths)
    assert packing.starts.tolist() == [sum(lengths[:row]) for row in range(len(lengths))]


def test_gradients_pass_both_ways(lengths):
    packing, mask = make(lengths, 6)
    padded = torch.randn(len(lengths), 6, 2, requires_grad=True)
    packing.unpack(packing.pack(padded)).sum().backward()
    assert torch.equal(padded.grad, mask[..., None].expand_as(padded).float())


def test_rows_of_one_length_are_views():
    packing, _ = make([4, 4], 4)
    padded = torch.randn(2, 4, 3)
    packed = packing.pack(padded)
    assert packed.data_ptr() == padded.data_ptr() == packing.unpack(packed).data_ptr()
