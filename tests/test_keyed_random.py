# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Keyed uniforms are uniform, independent of each other and functions of their keys alone.

Every statistical claim fails by chance with a probability of at most 1e-6, and with fixed keys not at all. Knows no
model.
"""

import math

import pytest
import torch

from trl_draft_opd.rollout.keyed_random import keyed_uniforms


ALPHA = 1e-6
# A standard normal leaves this interval with probability 6e-7.
MOST_DEVIATIONS = 5.0
NUM_SAMPLES, NUM_ANCHORS = 200, 500
KEYS = ("seed", "epoch", "sample_ids", "anchors", "slot", "purpose")


def draw(seed=0, epoch=0, sample_ids=7, anchors=40, slot=1, purpose=0) -> torch.Tensor:
    return keyed_uniforms(seed, epoch, torch.as_tensor(sample_ids), torch.as_tensor(anchors), slot, purpose)


def draw_table(**keys) -> torch.Tensor:
    """Return 1e5 draws, `(samples, anchors)`."""
    return draw(sample_ids=torch.arange(NUM_SAMPLES)[:, None], anchors=torch.arange(NUM_ANCHORS)[None], **keys)


def split_mix(*keys: int) -> float:
    """The same generator on Python's own integers, which never overflow."""
    limit = 2**64
    state = 0
    for key in keys:
        state = ((state + 0x9E3779B97F4A7C15) % limit) ^ (key % limit)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % limit
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % limit
        state ^= state >> 31
    return (state >> 11) / 2**53


def chi_square_p(counts: torch.Tensor) -> float:
    """P-value of equally likely cells."""
    expected = counts.sum() / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum().double()
    return float(torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2, dtype=torch.float64), statistic / 2))


# -- keyed uniforms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        (0, 0, 0, 0, 1, 0),
        (42, 3, 123_456, 2047, 15, 1),
        (2**63 - 1, 2**31, 2**62 + 5, 2**40, 7, 1),
        (-1, 0, -(2**63), 1, 1, 0),
    ],
)
def test_the_mixing_is_split_mix_on_64_bits(keys):
    assert float(draw(*keys)) == split_mix(*keys)


def test_a_table_of_draws_is_split_mix_entry_by_entry():
    sample_ids, anchors = torch.arange(5)[:, None] * 10**15, torch.arange(9)[None] + 2**33
    table = draw(seed=5, epoch=2, sample_ids=sample_ids, anchors=anchors, slot=3, purpose=1)
    assert table.shape == (5, 9) and table.dtype == torch.float64
    expected = [[split_mix(5, 2, s, a, 3, 1) for a in anchors[0].tolist()] for s in sample_ids[:, 0].tolist()]
    assert table.tolist() == expected


def test_draws_lie_between_zero_and_one():
    draws = draw_table()
    assert (draws >= 0).all() and (draws < 1).all()
    # The extremes of 1e5 draws are within 2e-4 of the ends but for one in 4e8 cases each.
    assert draws.min() < 2e-4 and draws.max() > 1 - 2e-4


def test_the_largest_pattern_still_gives_less_than_one(monkeypatch):
    monkeypatch.setattr("trl_draft_opd.rollout.keyed_random._mix", lambda bits: torch.full_like(bits, -1))
    assert float(draw()) == 1 - 2.0**-53


@pytest.mark.parametrize("name", KEYS)
def test_each_key_changes_every_draw(name):
    base = dict(seed=3, epoch=2, sample_ids=5, anchors=11, slot=4, purpose=1)
    draws = {float(draw(**base | {name: value})) for value in range(200)}
    assert len(draws) == 200


def test_keys_that_trade_places_give_other_draws():
    values = [3, 4, 5, 6, 7, 8]
    draws = {float(draw(*values))}
    for first in range(6):
        for second in range(first):
            swapped = list(values)
            swapped[first], swapped[second] = values[second], values[first]
            draws.add(float(draw(*swapped)))
    assert len(draws) == 16


def test_a_draw_does_not_depend_on_the_batch_it_is_made_in():
    sample_ids, anchors = torch.arange(12) % 4, torch.arange(12) // 4 + 30
    whole = draw(sample_ids=sample_ids, anchors=anchors)
    order = torch.randperm(12)
    assert torch.equal(draw(sample_ids=sample_ids[order], anchors=anchors[order]), whole[order])
    assert torch.equal(draw(sample_ids=torch.arange(4), anchors=torch.arange(30, 33)[:, None]).flatten(), whole)
    alone = [draw(sample_ids=s, anchors=a) for s, a in zip(sample_ids, anchors, strict=True)]
    assert torch.equal(torch.stack(alone), whole)
    assert torch.equal(draw(sample_ids=sample_ids[:0], anchors=anchors[:0]), whole[:0])


def test_ambient_random_state_is_neither_read_nor_moved():
    before, first = torch.get_rng_state(), draw_table()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(draw_table(), first)


@pytest.mark.parametrize(
    "keys", [{}, {"seed": 42}, {"epoch": 1}, {"slot": 15}, {"purpose": 1}], ids=lambda keys: "-".join(keys) or "zero"
)
def test_draws_fill_the_unit_interval_evenly(keys):
    draws = draw_table(**keys)
    assert chi_square_p(torch.histc(draws, 100, 0, 1)) > ALPHA
    # The lowest bits of 53, which a coarse histogram does not see.
    low_bits = (draws * 2**53).long() % 64
    assert chi_square_p(torch.bincount(low_bits.flatten(), minlength=64).double()) > ALPHA


NEIGHBOURS = {
    "anchors": lambda: (draw_table()[:, :-1], draw_table()[:, 1:]),
    "samples": lambda: (draw_table()[:-1], draw_table()[1:]),
    "slots": lambda: (draw_table(slot=1), draw_table(slot=2)),
    "purposes": lambda: (draw_table(purpose=0), draw_table(purpose=1)),
    "epochs": lambda: (draw_table(epoch=0), draw_table(epoch=1)),
    "seeds": lambda: (draw_table(seed=0), draw_table(seed=1)),
    "anchor-and-slot": lambda: (draw_table(slot=1)[:, 1:], draw_table(slot=2)[:, :-1]),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_draws_of_neighbouring_keys_are_independent(name):
    first, second = (draws.flatten() for draws in NEIGHBOURS[name]())
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < MOST_DEVIATIONS / math.sqrt(len(first))
    # All pairs of tenths are equally likely: correlation alone would miss a curve.
    cells = (first * 10).long() * 10 + (second * 10).long()
    assert chi_square_p(torch.bincount(cells, minlength=100).double()) > ALPHA


def test_the_checks_find_draws_that_are_uneven_or_dependent():
    draws = draw_table().flatten()
    assert chi_square_p(torch.histc(draws**1.05, 100, 0, 1)) < ALPHA
    mirrored = (draws + 0.5) % 1
    cells = (draws * 10).long() * 10 + (mirrored * 10).long()
    assert chi_square_p(torch.bincount(cells, minlength=100).double()) < ALPHA
    other = draw_table(slot=2).flatten()
    blended = 0.05 * draws + 0.95 * other
    correlation = float(torch.corrcoef(torch.stack([draws, blended]))[0, 1])
    assert correlation > MOST_DEVIATIONS / math.sqrt(len(draws))
