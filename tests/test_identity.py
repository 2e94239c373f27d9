# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What tells two runs, targets and datasets apart: every row and every weight, and nothing about how they are kept. And
what each process of a resumed run goes on with.
"""

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from helpers.oracle import greedy_rows
from helpers.tiny import TINY_RUN, make_causal_lm, make_drafter, make_target
from trl_draft_opd import DraftSFTConfig, DraftSFTTrainer, FrozenTarget
from trl_draft_opd.runs import identity
from trl_draft_opd.runs.identity import _differing, _digest_rows
from trl_draft_opd.runs.run_state import RankState, RunState
from trl_draft_opd.target import fingerprint
from trl_draft_opd.target.fingerprint import fingerprint_weights


NUM_ROWS = 700
FEATURES = Features(
    {"input_ids": List(Value("int32")), "completion_mask": List(Value("int8")), "sample_id": Value("int64")}
)


def make_rows(change=None):
    rows = [
        {"input_ids": [row, row + 1, 7][: row % 3 + 1], "completion_mask": [0, 1, 1][: row % 3 + 1], "sample_id": row}
        for row in range(NUM_ROWS)
    ]
    if change is not None:
        change(rows)
    return Dataset.from_list(rows, features=FEATURES)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(identity, "_ROWS_AT_A_TIME", 64)


@pytest.mark.parametrize("row", [0, 1, 63, 64, 333, NUM_ROWS - 2, NUM_ROWS - 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda row: row["input_ids"].__setitem__(-1, 9999),
        lambda row: row["completion_mask"].__setitem__(0, 1),
        lambda row: row.__setitem__("sample_id", -1),
    ],
    ids=["a token", "a mark", "its number"],
)
def test_a_change_in_any_row_is_another_dataset(small_batches, row, change):
    assert _digest_rows(make_rows(lambda rows: change(rows[row]))) != _digest_rows(make_rows())


def test_rows_in_another_order_or_split_at_other_places_are_another_dataset(small_batches):
    def swap(rows):
        rows[100], rows[103] = rows[103], rows[100]

    def move_a_token(rows):
        # The same tokens in a row, but another one's.
        rows[2]["input_ids"].insert(0, rows[1]["input_ids"].pop())
        rows[2]["completion_mask"].insert(0, rows[1]["completion_mask"].pop())

    digests = {_digest_rows(make_rows(change)) for change in (None, swap, move_a_token, list.pop)}
    assert len(digests) == 4


def test_how_rows_are_kept_does_not_make_them_others(small_batches):
    rows, digest = make_rows(), _digest_rows(make_rows())
    halves = concatenate_datasets([rows.select(range(40)), rows.select(range(40, NUM_ROWS))])
    picked = concatenate_datasets([rows, rows]).select([*range(NUM_ROWS - 1), 2 * NUM_ROWS - 1])
    assert digest == _digest_rows(halves) == _digest_rows(picked) == _digest_rows(rows.with_format("torch"))


def test_rows_of_text_are_told_apart_too():
    kinds = [
        [{"text": "a"}, {"text": None}],
        [{"text": "a"}, {"text": ""}],
        [{"text": "a"}, {"text": "b"}],
    ]
    assert len({_digest_rows(Dataset.from_list(rows)) for rows in kinds}) == 3


def test_a_stream_is_known_by_its_first_rows():
    def stream(rows):
        return IterableDataset.from_generator(lambda: iter(rows))

    rows = make_rows().to_list()
    digest = _digest_rows(stream(rows))
    assert digest is not None and digest == _digest_rows(stream(rows))
    last_read = identity._HASHED_ROWS_OF_A_STREAM - 1
    for row in (0, 30, last_read):
        changed = make_rows(lambda rows, row=row: rows[row]["input_ids"].__setitem__(0, 9999)).to_list()
        assert _digest_rows(stream(changed)) != digest
    # No more of it is read than that.
    assert _digest_rows(stream(rows[: last_read + 1])) == digest


def test_a_change_in_any_element_of_any_weight_is_another_target(monkeypatch):
    monkeypatch.setattr(fingerprint, "_ELEMENTS_PER_PIECE", 1000)
    model = make_causal_lm()
    before = fingerprint_weights(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for place in {0, len(flat) - 1, int(torch.randint(len(flat), (), generator=generator))}:
            kept = flat[place].clone()
            flat[place] += 0.5
            assert fingerprint_weights(model) != before
            flat[place] = kept
    assert fingerprint_weights(model) == before


def test_elements_that_change_places_make_another_target():
    model = make_causal_lm()
    before = fingerprint_weights(model)
    weight = model.get_input_embeddings().weight.data
    weight[[3, 4]] = weight[[4, 3]]
    assert fingerprint_weights(model) != before


def test_the_fingerprint_of_a_target_is_taken_once(monkeypatch):
    target = FrozenTarget(make_causal_lm())
    first = target.weights_fingerprint
    monkeypatch.setattr("trl_draft_opd.target.frozen.fingerprint_weights", lambda model: pytest.fail("taken again"))
    assert target.weights_fingerprint == first


def test_a_run_on_a_stream_does_not_go_on_with_another_stream(tmp_path):
    target = make_target()
    rows = greedy_rows(target, 6, 8)

    def make_trainer(folder, rows, **changes):
        stream = IterableDataset.from_generator(lambda: iter(rows))
        options = TINY_RUN | {"save_strategy": "steps", "save_steps": 1, "max_steps": 1} | changes
        config = DraftSFTConfig(str(folder), **options, per_device_train_batch_size=1, max_completion_length=8)
        return DraftSFTTrainer(make_drafter("dflash", target), target, config, stream)

    make_trainer(tmp_path, rows.to_list()).train()
    make_trainer(tmp_path, rows.to_list(), max_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="these differ: the training data"):
        make_trainer(tmp_path, rows.to_list()[::-1], max_steps=3).train(resume_from_checkpoint=True)


# ---- what each process goes on with ---------------------------------------------------------------------------------


def test_other_processes_than_before_share_out_the_sums_once_and_the_mean_loss_stays():
    ranks = [
        RankState({"torch": "a"}, {"loss": [1.0, 2.0]}, 3.0),
        RankState({"torch": "b"}, {"loss": [4.0, 8.0], "tau": [1.0, 1.0]}, 5.0),
    ]
    state = RunState(None, {}, {}, None, 0, ranks, {})
    assert [state.rank(index, 2) for index in (0, 1)] == ranks
    sums = {"loss": [5.0, 10.0], "tau": [1.0, 1.0]}
    assert state.rank(0, 1) == RankState({"torch": "a"}, sums, 4.0)
    # A logged loss is the mean over processes: four of them, of which one holds four times as much.
    four = [state.rank(index, 4) for index in range(4)]
    assert four[0] == RankState({"torch": "a"}, sums, 16.0)
    assert four[1:] == [RankState({"torch": name}, {}, 0.0) for name in ("b", "a", "b")]
    assert ranks[0].sums == {"loss": [1.0, 2.0]}


def test_another_target_is_told_by_both_names_and_a_name_alone_is_no_difference():
    there = {"name": "org/a", "weights": "1" * 64}
    assert _differing(there, there | {"name": "org/b"}) == []
    assert _differing(there, {"name": "org/b", "weights": "2" * 64}) == [
        "name: 'org/a' there, 'org/b' here",
        "weights: 11111111 there, 22222222 here",
    ]
