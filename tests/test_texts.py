# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The micro-batches of an optimiser step: prompts joined to responses, rows dealt out again by length.
"""

import torch

from trl_draft_opd.rollout.types import response_ends
from trl_draft_opd.trainer.texts import join_responses, regroup_by_length, responses_in_place


CPU = torch.device("cpu")


def rows_of(texts):
    """Every row without padding: its ids, its marks, its sample id."""
    rows = []
    for text in texts:
        for ids, mask, marks, sample in zip(
            text.input_ids, text.attention_mask.bool(), text.completion_mask, text.sample_ids, strict=True
        ):
            rows.append((ids[mask].tolist(), marks[mask].tolist(), sample))
            assert not marks[~mask].any()
    return rows


def test_a_text_is_its_prompt_and_its_response():
    text = join_responses([[5, 6], [7]], [[8], [9, 10, 11]], [3, 1], 0, CPU)
    assert text.input_ids.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert text.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert text.completion_mask.long().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert text.sample_ids == [3, 1]


def test_regrouping_keeps_every_row_and_pads_less():
    lengths = [[9, 2], [3, 8], [2]]
    texts = [
        join_responses([[4]] * len(part), [[5] * n for n in part], [10 * i + j for j in range(len(part))], 0, CPU)
        for i, part in enumerate(lengths)
    ]
    regrouped = regroup_by_length(texts, 0)
    assert sorted(rows_of(regrouped)) == sorted(rows_of(texts))
    assert [len(text.input_ids) for text in regrouped] == [2, 2, 1]
    assert [text.input_ids.shape[1] for text in regrouped] == [3, 9, 10]


def test_one_micro_batch_stays_as_it_is():
    text = join_responses([[4], [4]], [[5, 5], [5]], [0, 1], 0, CPU)
    assert regroup_by_length([text], 0) == [text]


def test_every_response_of_a_chat_comes_with_all_before_it():
    text = join_responses([[4, 5]], [[6, 7, 8, 9]], [0], 0, CPU)
    text.completion_mask[0, 3:5] = False
    assert responses_in_place(text) == [([4, 5], [6], [7, 8, 9]), ([4, 5, 6, 7, 8], [9], [])]


def test_a_run_ends_where_its_own_last_token_stands():
    marks = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]]).bool()
    ends = response_ends(marks)
    assert ends[marks].tolist() == [2, 2, 4, 0, 3]
