# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The folder of stored responses: what goes in comes out, several writers, and every way a file can be wrong.
"""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.response_rows import make_origin, make_rows
from helpers.tiny import EOS, VOCAB
from trl_draft_opd import ResponseStore
from trl_draft_opd.responses import StoredResponse, shards
from trl_draft_opd.responses.store import describe_filling


ORIGIN = make_origin()


@pytest.fixture
def store(tmp_path: Path) -> ResponseStore:
    return ResponseStore.open(tmp_path / "store", ORIGIN)


def _only_shard(store: ResponseStore) -> Path:
    (path,) = store.path.glob("shard-*.parquet")
    return path


def _replace_shard(store: ResponseStore, data: bytes) -> str:
    """Put a file in the place of the only shard, under a name that proves its content, and return that name."""
    old = _only_shard(store)
    digest = hashlib.sha256(data).hexdigest()[:32]
    path = old.rename(old.with_name(f"{old.stem.rpartition('-')[0]}-{digest}.parquet"))
    path.write_bytes(data)
    return path.name


def _reopened(store: ResponseStore) -> ResponseStore:
    return ResponseStore.open(store.path, ORIGIN)


# ---- what goes in comes out -----------------------------------------------------------------------------------------


def test_a_response_is_found_by_its_prompt_at_once_and_after_reopening(store: ResponseStore):
    rows = make_rows(5)
    assert store.add(rows) == 5
    for seen in (store, _reopened(store), ResponseStore.read_only(store.path)):
        assert len(seen) == 5
        assert [seen.find(row.prompt_ids) for row in rows] == [row.completion_ids for row in rows]
        assert seen.find([9, 9, 9, 9]) is None
        # A prompt is its ids, whatever container they come in.
        assert seen.find(np.array(rows[0].prompt_ids)) == rows[0].completion_ids


def test_reading_gives_back_log_probabilities_and_why_a_response_ended(store: ResponseStore):
    whole = StoredResponse([7, 8], [9, EOS], [-0.5, -0.25], "stop")
    cut = StoredResponse([8, 7], [9, 10], None, "length")
    store.add([whole, cut])
    assert _reopened(store).read([7, 8]) == whole
    assert _reopened(store).read([8, 7]) == cut
    assert store.read([7]) is None


def test_the_dataset_holds_every_row_in_order_and_reads_as_ids(store: ResponseStore):
    rows = make_rows(6)
    store.add(rows[:4])
    store.add(rows[4:])
    dataset = _reopened(store).to_dataset()
    assert dataset.column_names == ["prompt_ids", "completion_ids"]
    assert dataset["prompt_ids"][:] == [row.prompt_ids for row in rows]
    assert dataset["completion_ids"][:] == [row.completion_ids for row in rows]


def test_an_empty_store_gives_an_empty_dataset_with_columns(store: ResponseStore):
    assert store.to_dataset().column_names == ["prompt_ids", "completion_ids"]
    assert len(store.to_dataset()) == len(store) == 0


def test_a_prompt_keeps_its_first_response(store: ResponseStore):
    assert store.add([([7], [8, EOS], None, "stop"), ([7], [9, EOS], None, "stop")]) == 1
    assert store.add([([7], [10, EOS], None, "stop")]) == 0
    assert store.find([7]) == [8, EOS]
    assert len(list(store.path.glob("*.parquet"))) == 1


def test_missing_prompts_come_once_each_and_in_order(store: ResponseStore):
    store.add([([7], [8, EOS], None, "stop")])
    assert store.missing([[9], [7], [8, 8], [9]]) == [[9], [8, 8]]


def test_texts_are_spread_over_the_whole_store(store: ResponseStore):
    rows = make_rows(9)
    store.add(rows)
    assert [prompt for prompt, _ in store.texts(max_rows=3)] == [rows[i].prompt_ids for i in (0, 3, 6)]
    assert len(store.texts(max_rows=None)) == 9


def test_where_the_rows_came_from_stands_in_each_shard(store: ResponseStore):
    store.add(make_rows(1), {"engine": "vllm", "dtype": "bfloat16"})
    metadata = pq.read_schema(_only_shard(store)).metadata
    assert json.loads(metadata[b"provenance"]) == {"engine": "vllm", "dtype": "bfloat16"}


def test_full_shards_are_written_at_once_and_the_rest_when_something_fails(store: ResponseStore):
    def dying():
        yield from make_rows(3)
        assert len(_reopened(store)) == 2
        raise RuntimeError("the engine died")

    with pytest.raises(RuntimeError, match="the engine died"):
        store.add_in_shards(dying(), shard_size=2)
    assert len(_reopened(store)) == 3
    assert store.add_in_shards(make_rows(5, seed=1), shard_size=2) == 5
    assert len(list(store.path.glob("*.parquet"))) == 5
    with pytest.raises(ValueError, match="`shard_size` must be at least 1, got 0"):
        store.add_in_shards([], shard_size=0)


# ---- several writers, and readers while they write ------------------------------------------------------------------


def test_a_reader_sees_what_others_add_when_it_refreshes(store: ResponseStore):
    rows = make_rows(4)
    reader = ResponseStore.read_only(store.path)
    store.add(rows[:3])
    assert reader.find(rows[0].prompt_ids) is None
    assert reader.refresh() == 3
    assert reader.refresh() == 0
    _reopened(store).add(rows[3:])
    assert reader.refresh() == 1
    assert reader.find(rows[3].prompt_ids) == rows[3].completion_ids


def test_every_process_settles_on_the_same_of_two_responses(store: ResponseStore):
    late = _reopened(store)
    store.add([([7], [8, EOS], None, "stop")])
    late.add([([7], [9, EOS], None, "stop")])
    for each in (store, late):
        each.refresh()
        assert each.find([7]) == [8, EOS]
        assert len(each) == 1
        assert each.to_dataset()["completion_ids"][:] == [[8, EOS]]


def _write_some(path: str, rank: int) -> None:
    own = ResponseStore.open(path, ORIGIN)
    for row in make_rows(20, seed=rank):
        own.add([row])


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path: Path):
    path = str(tmp_path / "store")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_some, args=(path, rank)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    store = ResponseStore.open(path, ORIGIN)
    for rank in range(3):
        for row in make_rows(20, seed=rank):
            assert store.find(row.prompt_ids) is not None


def _write_without_end(path: str, first_seed: int, told: Connection) -> None:
    own = ResponseStore.open(path, ORIGIN)
    for seed in itertools.count(first_seed):
        own.add(make_rows(50, seed=seed))
        told.send(len(own))


def test_a_writer_killed_at_any_moment_leaves_whole_shards_only(tmp_path: Path):
    # Killed from outside, each a little later in its write; forked, because a fresh interpreter imports for seconds.
    context = multiprocessing.get_context("fork")
    for moment in range(6):
        heard, told = context.Pipe(duplex=False)
        writer = context.Process(target=_write_without_end, args=(str(tmp_path / "store"), 1000 * moment, told))
        writer.start()
        told.close()  # so that a writer which fails is an error here and no endless wait
        count = [heard.recv() for _ in range(3)][-1]
        time.sleep(moment * 0.002)
        writer.kill()
        writer.join(60)
        assert writer.exitcode == -signal.SIGKILL
        store = ResponseStore.open(tmp_path / "store", ORIGIN)
        assert len(store) >= count >= 100
        store.add([([7 + moment], [8, EOS], None, "stop")])
        assert store.find([7 + moment]) == [8, EOS]


def test_a_torn_shard_is_never_visible(store: ResponseStore, monkeypatch: pytest.MonkeyPatch):
    """The disk fills up before the shard has its name."""

    def failing(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        store.add(make_rows(3))
    monkeypatch.undo()
    assert len(store) == len(_reopened(store)) == 0
    assert not list(store.path.glob(".*")), "what could not be finished is removed"
    assert store.add(make_rows(3)) == 3
    assert len(_reopened(store)) == 3


# ---- rows that cannot be --------------------------------------------------------------------------------------------


BAD_ROWS = {
    "row 1 has an empty prompt": ([], [8, EOS], None, "stop"),
    "row 1 has an empty response": ([7], [], None, "length"),
    f"row 1 holds the token id {VOCAB}, outside the target's vocabulary of {VOCAB}": ([7, VOCAB], [8], None, "length"),
    "row 1 holds the token id -1": ([7], [8, -1], None, "length"),
    "row 1 holds the token id 8.5": ([7], [8.5], None, "length"),
    "row 1 holds the token id None": ([7], [None], None, "length"),
    "row 1 has a response of 9 tokens, more than `max_completion_length` 8": ([7], [8] * 9, None, "length"),
    "row 1 has 34 tokens, but the target has 32 positions": ([7] * 30, [8] * 4, None, "length"),
    "row 1 continues after an end-of-sequence id": ([7], [EOS, 8], None, "length"),
    "row 1 has the finish_reason 'stop', but its last token 8 means 'length'": ([7], [8], None, "stop"),
    f"row 1 has the finish_reason 'length', but its last token {EOS} means 'stop'": ([7], [8, EOS], None, "length"),
    "row 1 has the finish_reason 'abort'": ([7], [8], None, "abort"),
    "row 1 has 1 log-probabilities for 2 tokens": ([7], [8, EOS], [-0.1], "stop"),
    "row 1 holds the log-probability nan": ([7], [8], [float("nan")], "length"),
    "row 1 holds the log-probability -inf": ([7], [8], [float("-inf")], "length"),
    "row 1 holds the log-probability 0.5": ([7], [8], [0.5], "length"),
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_row_the_target_cannot_have_written_is_refused_by_number(store: ResponseStore, reason: str):
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        store.add([*make_rows(1), BAD_ROWS[reason]])
    assert len(store) == 0
    assert not list(store.path.glob("shard-*"))


def test_rows_a_foreign_program_wrote_are_held_to_the_same_rules(store: ResponseStore):
    """A shard of a right name and rows that cannot be: opening refuses it by name and row."""
    wrong = {
        "row 0 holds the token id 70": ([7], [8, 70], None, "length"),
        "row 0 holds the token id": ([7], [8, None], None, "length"),
        "row 0 holds the log-probability nan": ([7], [8], [None], "length"),
        "row 0 has the finish_reason None": ([7], [8], None, None),
        "": (None, [8], None, "length"),
    }
    for reason, row in wrong.items():
        table = pa.Table.from_pylist([StoredResponse(*row)._asdict()], shards.SCHEMA)
        name = shards.write_shard(store.path, table, ORIGIN, {})
        with pytest.raises(ValueError, match=f"{name} is not usable: {reason}"):
            _reopened(store)
        (store.path / name).unlink()


def test_a_prompt_without_room_for_a_response_is_refused_before_generating(store: ResponseStore):
    with pytest.raises(
        ValueError,
        match=r"Prompt 1 has 25 tokens; with `max_completion_length` 8 that exceeds .*`max_completion_length`",
    ):
        store.missing([[7], [7] * 25])
    with pytest.raises(ValueError, match="Prompt 0 is empty"):
        store.missing([[]])


# ---- files that are not what was written ----------------------------------------------------------------------------


def test_a_truncated_shard_is_refused_by_name(store: ResponseStore):
    store.add(make_rows(4))
    path = _only_shard(store)
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    with pytest.raises(ValueError, match=f"{path.name} is not usable: .*SHA-256 differs"):
        _reopened(store)


def test_any_flipped_bit_of_a_shard_is_refused_by_name(store: ResponseStore):
    store.add(make_rows(2))
    path = _only_shard(store)
    data = path.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 16)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(ValueError, match=f"{path.name} is not usable.*SHA-256 differs.*Delete"):
            _reopened(store)
    path.write_bytes(data)
    assert len(_reopened(store)) == 2


def test_a_shard_under_another_name_is_refused(store: ResponseStore):
    store.add(make_rows(2))
    path = _only_shard(store)
    path.rename(path.with_name("shard-1.parquet"))
    with pytest.raises(ValueError, match=r"shard-1.parquet is not usable: .*SHA-256 differs"):
        _reopened(store)


def test_a_shard_of_another_store_is_refused_by_name(store: ResponseStore, tmp_path: Path):
    other = ResponseStore.open(tmp_path / "other", make_origin(weights_fingerprint="w2"))
    other.add(make_rows(2))
    for path in other.path.glob("shard-*"):
        (store.path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"shard-.*is not usable: it is of another origin"):
        store.refresh()


def test_a_parquet_file_with_other_columns_is_refused(store: ResponseStore):
    store.add(make_rows(2))
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b"]}), buffer)
    name = _replace_shard(store, buffer.getvalue())
    with pytest.raises(ValueError, match=rf"{name} is not usable: .*columns \['text'\], not \['prompt_ids'"):
        _reopened(store)


def test_a_file_that_is_no_parquet_is_refused_and_runs_no_code(store: ResponseStore, tmp_path: Path):
    store.add(make_rows(2))
    name = _replace_shard(store, b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match=f"{name} is not usable"):
        _reopened(store)
    assert not (tmp_path / "ran").exists()


# ---- folders that are not this store --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights_fingerprint", "other"),
        ("config_hash", "other"),
        ("tokenizer_hash", "other"),
        ("chat_template_hash", "other"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("temperature", 1.0),
        ("max_completion_length", 9),
        ("eos_token_ids", (EOS, 3)),
        ("vocab_size", 65),
    ],
)
def test_a_store_of_another_origin_is_refused_naming_both_values(store: ResponseStore, field: str, value: Any):
    with pytest.raises(ValueError, match="written under other conditions") as refusal:
        ResponseStore.open(store.path, replace(ORIGIN, **{field: value}))
    message = str(refusal.value)
    assert f"{field}: {getattr(ORIGIN, field)!r} there, {value!r} here" in message
    assert "write them anew" in message
    assert message.count(" there, ") == 1, "only what differs is listed"


def test_a_store_without_a_response_says_that_it_can_be_deleted(tmp_path):
    ResponseStore.open(tmp_path, ORIGIN)
    with pytest.raises(ValueError, match="which are none yet .delete the folder to begin anew., were written under"):
        ResponseStore.open(tmp_path, replace(ORIGIN, max_completion_length=9))


def test_the_same_target_under_another_name_is_the_same(store: ResponseStore):
    store.add(make_rows(1))
    moved = ResponseStore.open(store.path, replace(ORIGIN, target="/elsewhere", revision="abc"))
    assert len(moved) == 1


def test_a_manifest_of_another_version_or_changed_by_hand_is_refused(store: ResponseStore):
    path = store.path / "manifest.json"
    content = json.loads(path.read_text("utf-8"))
    newer = content | {"format": "trl-draft-opd responses 2"}
    edited = content | {"origin": content["origin"] | {"temperature": 0.5}}
    for wrong, reason in (
        (newer, "'trl-draft-opd responses 2', this release reads 'trl-draft-opd responses 1'"),
        (edited, "changed after it was written"),
        (content | {"origin": {"eos_token_ids": [EOS]}}, "missing 13 required"),
        (content | {"origin": {}}, "the field 'eos_token_ids' is missing"),
        (content | {"origin": content["origin"] | {"seed": 1}}, "unexpected keyword argument 'seed'"),
        ({"format": "other"}, "its format is 'other'"),
        ([], "its format is None"),
        (content | {"origin": content["origin"] | {"vocab_size": "64"}}, "changed after it was written"),
    ):
        path.write_text(json.dumps(wrong))
        for opening in (lambda: _reopened(store), lambda: ResponseStore.read_only(store.path)):
            with pytest.raises(ValueError, match=f"manifest.json is not usable: .*{reason}"):
                opening()
    path.write_text("{")
    with pytest.raises(ValueError, match="manifest.json is not usable"):
        _reopened(store)


def test_a_store_that_lost_its_manifest_keeps_the_responses_of_the_same_target_alone(store: ResponseStore):
    store.add(make_rows(3))
    path = store.path / "manifest.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="responses beside it are as they were: .* delete it alone and run the same"):
        _reopened(store)
    path.unlink()
    with pytest.raises(ValueError, match="has lost its manifest.json, .* is of another origin"):
        ResponseStore.open(store.path, make_origin(temperature=0.5))
    assert not path.exists()
    assert len(_reopened(store)) == 3


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(ValueError, match=r"holds \['model.safetensors'\] and no manifest.json"):
        ResponseStore.open(tmp_path, ORIGIN)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_reading_where_there_is_no_store_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(ValueError, match="There is no response store in .*trl-draft-opd generate"):
        ResponseStore.read_only(tmp_path / "none")


def test_a_store_opened_for_reading_takes_no_rows(store: ResponseStore):
    with pytest.raises(ValueError, match="open for reading only"):
        ResponseStore.read_only(store.path).add(make_rows(1))


# ---- what is about to be added --------------------------------------------------------------------------------------


def test_a_new_store_is_told_with_the_one_that_may_have_been_meant_and_a_filled_one_with_its_number(tmp_path: Path):
    filled = ResponseStore.open(tmp_path / "respQ", ORIGIN)
    filled.add(make_rows(3))
    assert describe_filling(filled, 1200) == f"{tmp_path}/respQ holds 3 responses; the target adds 1,200 responses."
    (tmp_path / "respQ2").mkdir()  # which holds none
    new = ResponseStore.open(tmp_path / "respQQ", ORIGIN)
    said = describe_filling(new, 5)
    assert said.startswith(f"{tmp_path}/respQQ is new: the target writes 5 responses there. If you meant")
    assert f"'{tmp_path}/respQ', which holds responses" in said
    alone = ResponseStore.open(tmp_path / "elsewhere" / "store", ORIGIN)
    assert describe_filling(alone, None).endswith(
        "store is new: the target writes responses as training comes to them there."
    )
