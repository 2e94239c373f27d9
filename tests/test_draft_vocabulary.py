# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Tests of `trl_draft_opd/drafters/draft_vocabulary.py`, on a vocabulary of eight tokens."""

import pytest
import torch
from datasets import Dataset

from trl_draft_opd.drafters.draft_vocabulary import build_draft_vocabulary, count_tokens, coverage_elsewhere
from trl_draft_opd.drafters.published.vocabulary_maps import check_draft_vocabulary


COUNTS = torch.tensor([0, 5, 0, 2, 7, 2, 0, 4])  # 20 tokens; ids 3 and 5 tie


def test_only_supervised_tokens_are_counted():
    dataset = Dataset.from_list(
        [
            {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "sample_id": 0},
            {"input_ids": [3, 3], "completion_mask": [0, 1], "sample_id": 1},
            {"input_ids": [4, 4], "completion_mask": [0, 0], "sample_id": 2},
        ]
    )
    for rows in (dataset, dataset.to_iterable_dataset(), dataset.select([0, 1, 2] * 500)):
        counts = count_tokens(rows, vocab_size=5)
        assert counts.dtype == torch.int64
        scale = 500 if rows is not dataset and isinstance(rows, Dataset) else 1
        assert counts.tolist() == [0, 0, scale, 2 * scale, 0]


def test_rows_of_equal_length_are_counted_too():
    dataset = Dataset.from_list([{"input_ids": [1, 2], "completion_mask": [0, 1]}] * 3)
    assert count_tokens(dataset, vocab_size=3).tolist() == [0, 0, 3]


def test_a_counted_id_outside_the_vocabulary_is_an_error():
    dataset = Dataset.from_list([{"input_ids": [1, 9], "completion_mask": [0, 1]}])
    with pytest.raises(ValueError, match="Token id 9 is outside the target's vocabulary of 9"):
        count_tokens(dataset, vocab_size=9)


def test_coverage_of_other_responses_leaves_each_out_of_the_counts():
    # 1 is in both responses. 2 would be beaten by 4 without the first, and 4 by 2 without the second.
    rows = [[1, 2, 2, 2], [1, 4, 4], [5]]
    dataset = Dataset.from_dict({"input_ids": rows, "completion_mask": [[1] * len(row) for row in rows]})
    counts = count_tokens(dataset, 6)
    vocabulary = build_draft_vocabulary(counts, 3)
    assert vocabulary.token_ids.tolist() == [1, 2, 4] and vocabulary.coverage == 7 / 8
    # Without its own response, token 1 only equals the 5 that was left out, and so do none that got in.
    assert coverage_elsewhere(dataset, counts, vocabulary) == 0.0
    twice = Dataset.from_dict({"input_ids": rows * 2, "completion_mask": [[1] * len(row) for row in rows * 2]})
    counts = count_tokens(twice, 6)
    assert coverage_elsewhere(twice, counts, build_draft_vocabulary(counts, 3)) == 10 / 16


def test_coverage_of_other_responses_is_what_a_fresh_draw_has():
    generator = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, 401, dtype=torch.float64)

    def draw(num_rows: int) -> Dataset:
        rows = torch.multinomial(weights, 30 * num_rows, True, generator=generator).reshape(num_rows, 30).tolist()
        return Dataset.from_dict({"input_ids": rows, "completion_mask": [[1] * 30] * num_rows})

    mine, fresh = draw(200), draw(2000)
    counts, counts_fresh = count_tokens(mine, 400), count_tokens(fresh, 400)
    vocabulary = build_draft_vocabulary(counts, 100)
    found = float(counts_fresh[vocabulary.token_ids].sum() / counts_fresh.sum())
    assert vocabulary.coverage - found > 0.015
    assert coverage_elsewhere(mine, counts, vocabulary) == pytest.approx(found, abs=0.008)


def test_the_most_frequent_tokens_are_kept_and_ties_go_to_the_lowest_id():
    vocabulary = build_draft_vocabulary(COUNTS, 4)
    assert vocabulary.token_ids.tolist() == [1, 3, 4, 7]  # 7 + 5 + 4, then 3 before 5
    assert vocabulary.coverage == pytest.approx(18 / 20)


def test_d2t_holds_offsets_and_t2d_marks_the_same_tokens():
    vocabulary = build_draft_vocabulary(COUNTS, 4)
    assert vocabulary.d2t.tolist() == [1, 2, 2, 4]  # 1-0, 3-1, 4-2, 7-3
    assert vocabulary.t2d.nonzero().flatten().tolist() == [1, 3, 4, 7]
    assert (vocabulary.d2t.dtype, vocabulary.t2d.dtype, len(vocabulary.t2d)) == (torch.int64, torch.bool, 8)


def test_uncounted_places_are_filled_with_the_lowest_ids():
    vocabulary = build_draft_vocabulary(COUNTS, 7)
    assert vocabulary.token_ids.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert vocabulary.coverage == 1.0


def test_tokens_to_include_push_out_the_rarest():
    vocabulary = build_draft_vocabulary(COUNTS, 3, always_include=(6, 4, 6))
    assert vocabulary.token_ids.tolist() == [1, 4, 6]
    assert vocabulary.coverage == pytest.approx(12 / 20)


def test_every_built_vocabulary_passes_the_check():
    for size in range(2, 8):
        vocabulary = build_draft_vocabulary(COUNTS, size, always_include=(2,))
        assert len(vocabulary.token_ids) == size
        assert 2 in vocabulary.token_ids
        check_draft_vocabulary(vocabulary.d2t, vocabulary.t2d, vocab_size=8)


@pytest.mark.parametrize(
    ("counts", "size", "always_include", "message"),
    [
        (COUNTS, 0, (), r"must lie in 1\.\.7 .*got 0"),
        (COUNTS, 9, (), r"must lie in 1\.\.7 .*got 9"),
        (COUNTS, 8, (), "For all of them, leave the vocabulary whole"),
        (COUNTS, 3, (8,), r"`always_include` holds \[8\]"),
        (COUNTS, 3, (-1,), r"`always_include` holds \[-1\]"),
        (COUNTS, 1, (1, 2), r"1 leaves no room for text: the tokens \[1, 2\] are kept"),
        (COUNTS, 1, (2,), r"1 leaves no room for text: .*must be above 1"),
        (COUNTS - 1, 3, (), "must not be negative, got -1 for token 0"),
        (COUNTS[None], 3, (), r"got shape \(1, 8\)"),
        (COUNTS.float(), 3, (), "torch.float32"),
        (COUNTS * 0, 3, (), "all zero"),
    ],
)
def test_bad_arguments_are_errors(counts, size, always_include, message):
    with pytest.raises(ValueError, match=message):
        build_draft_vocabulary(counts, size, always_include=always_include)


def make_maps(token_ids, vocab_size=8):
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[token_ids] = True
    return torch.tensor(token_ids) - torch.arange(len(token_ids)), t2d


def test_consistent_maps_pass_the_check():
    check_draft_vocabulary(*make_maps([1, 3, 7]), vocab_size=8)


def test_absolute_ids_in_place_of_offsets_are_found():
    d2t, t2d = make_maps([1, 3, 6])
    with pytest.raises(ValueError, match="leads to id 8, outside 0..7.*holds offsets"):
        check_draft_vocabulary(d2t + torch.arange(3), t2d, vocab_size=8)


@pytest.mark.parametrize(
    ("d2t", "t2d", "message"),
    [
        (make_maps([1, 3, 7])[0].int(), make_maps([1, 3, 7])[1], "`d2t` must be 1-D int64, is 1-D torch.int32"),
        (make_maps([1, 3, 7])[0], make_maps([1, 3, 7])[1].int(), "`t2d` must be bool"),
        (make_maps([1, 3])[0], make_maps([1, 3], 9)[1], r"of shape \(8,\), is torch.bool of shape \(9,\)"),
        (make_maps([3, 1, 7])[0], make_maps([1, 3, 7])[1], "do not increase strictly"),
        (make_maps([1, 3, 3])[0], make_maps([1, 3, 7])[1], "do not increase strictly"),
        (make_maps([1, 3, 7])[0], make_maps([1, 3])[1], "`t2d` marks 2 tokens, `d2t` has 3"),
        (make_maps([1, 3, 7])[0] - 2, make_maps([1, 3, 7])[1], "leads to id -1, outside"),
        (make_maps([1, 3, 7])[0], make_maps([1, 4, 7])[1], "`t2d` does not mark id 3"),
    ],
)
def test_inconsistent_maps_are_errors(d2t, t2d, message):
    with pytest.raises(ValueError, match=message):
        check_draft_vocabulary(d2t, t2d, vocab_size=8)


def test_all_faults_are_listed_at_once():
    with pytest.raises(ValueError, match="do not increase strictly.*marks 2 tokens.*does not mark id 5"):
        check_draft_vocabulary(make_maps([3, 1, 5])[0], make_maps([1, 3])[1], vocab_size=8)
