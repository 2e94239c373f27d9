# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The folder of stored readings: what goes in comes out to the last bit, whoever reads it; and what it refuses.
"""

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.tiny import VOCAB, make_causal_lm, make_prompts, make_target
from trl_draft_opd import FrozenTarget
from trl_draft_opd.readings import shards, write
from trl_draft_opd.readings.manifest import ReadingManifest
from trl_draft_opd.readings.store import ReadingStore
from trl_draft_opd.readings.write import write_readings
from trl_draft_opd.responses.audit import read_texts
from trl_draft_opd.responses.shards import prompt_key
from trl_draft_opd.target.reading import TextStates


LAYERS = [1, 3, 5]
TEXTS = make_prompts(11, longest=7)


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    return make_target()


@pytest.fixture(scope="module")
def bf16_target() -> FrozenTarget:
    return FrozenTarget(make_causal_lm().bfloat16())


def fill(path: Path, target: FrozenTarget, texts: Sequence[Sequence[int]] = TEXTS, **settings) -> ReadingStore:
    settings = {"layer_ids": LAYERS, "batch_size": 4, "show_progress": False} | settings
    return write_readings(target, texts, path, **settings)


def read_directly(
    target: FrozenTarget, layer_ids: Sequence[int], batch_size: int = 4, texts: Sequence[Sequence[int]] = TEXTS
) -> Iterable[tuple[Sequence[int], TextStates]]:
    """Yield each text with what the target makes of it, in the batches that [`fill`] reads."""
    for begin in range(0, len(texts), batch_size):
        batch = texts[begin : begin + batch_size]
        reading = read_texts(target, batch, layer_ids)
        lengths = reading.packing.lengths
        yield from zip(
            batch, map(TextStates, reading.features.split(lengths), reading.last_hidden.split(lengths)), strict=True
        )


def assert_same(found: TextStates, expected: TextStates) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# ---- what goes in comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["target", "bf16_target"])
def test_a_text_comes_back_bit_for_bit_in_the_targets_own_precision(
    tmp_path: Path, precision: str, request: pytest.FixtureRequest
):
    target = request.getfixturevalue(precision)
    fill(tmp_path / "store", target)
    store = ReadingStore.open_for(target, tmp_path / "store", LAYERS)
    assert len(store) == len(TEXTS) and store.num_tokens == sum(map(len, TEXTS))
    for text, states in read_directly(target, LAYERS):
        assert_same(store.fetch(text, LAYERS), states)


@pytest.mark.parametrize("layer_ids", [[], [1], [5], [1, 5], [3, 5]])
def test_some_of_the_layers_are_those_columns_alone(tmp_path: Path, target: FrozenTarget, layer_ids: list[int]):
    store = fill(tmp_path / "store", target)
    for text, states in read_directly(target, layer_ids):
        found = store.fetch(text, layer_ids)
        assert_same(found, states)
        assert store.num_bytes(len(text), len(layer_ids)) == sum(each.nbytes for each in found)


def test_bfloat16_of_a_float32_target_is_its_states_rounded(tmp_path: Path, target: FrozenTarget):
    store = fill(tmp_path / "store", target, dtype="bfloat16")
    assert store.manifest.target_dtype == "float32"
    for text, states in read_directly(target, LAYERS):
        assert_same(store.fetch(text, LAYERS), TextStates(*(each.bfloat16() for each in states)))


def test_an_entry_of_the_store_does_not_keep_its_file_in_memory(tmp_path: Path, target: FrozenTarget):
    store = fill(tmp_path / "store", target)
    states = store.fetch(TEXTS[0], LAYERS)
    expected = TextStates(*(each.clone() for each in states))
    (path,) = (tmp_path / "store").glob("*.safetensors")
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(states, expected)


def test_a_target_reads_the_same_text_from_the_store_as_by_itself(tmp_path: Path):
    target = make_target()
    expected = read_texts(target, TEXTS[:4], LAYERS)

    class Source:
        is_before_norm = False

        def __init__(self, store: ReadingStore):
            self.store = store

        def read(self, texts: Sequence[Sequence[int]], layer_ids: Sequence[int]) -> list[TextStates]:
            return [self.store.fetch(text, layer_ids) for text in texts]

        def expect(self, texts: Sequence[Sequence[int]]) -> None:
            raise AssertionError("not announced here")

    target.source = Source(fill(tmp_path / "store", target))
    before = target.num_forwards
    found = read_texts(target, TEXTS[:4], LAYERS)
    assert target.num_forwards == before
    assert torch.equal(found.features, expected.features) and torch.equal(found.last_hidden, expected.last_hidden)


def test_states_that_belong_to_another_token_are_refused():
    target, texts = make_target(), [[5, 6, 7], [8, 9, 10, 11]]
    whole = read_texts(target, texts, LAYERS)

    class Source:
        is_before_norm = False

        def read(self, texts: Sequence[Sequence[int]], layer_ids: Sequence[int]) -> list[TextStates]:
            # As many in all, of other texts.
            return [
                TextStates(*parts)
                for parts in zip(whole.features.split([4, 3]), whole.last_hidden.split([4, 3]), strict=True)
            ]

    target.source = Source()
    with pytest.raises(ValueError, match="delivers 4 and 4 states for a text of 3 tokens"):
        read_texts(target, texts, LAYERS)


def test_the_same_call_reads_only_what_is_missing(tmp_path: Path, target: FrozenTarget):
    fill(tmp_path / "store", target, TEXTS[:4])
    before = target.num_forwards
    store = fill(tmp_path / "store", target, [*TEXTS, *TEXTS])
    assert target.num_forwards - before == 2
    assert len(store) == len(TEXTS) and store.missing(TEXTS) == []
    before = target.num_forwards
    fill(tmp_path / "store", target, TEXTS)
    assert target.num_forwards == before and len(list((tmp_path / "store").glob("*.json"))) == 3
    assert store.missing([[9, 9], TEXTS[0], [9, 9]]) == [[9, 9]]
    assert TEXTS[0] in store and [9, 9] not in store


def test_a_shard_is_closed_when_it_is_full(tmp_path: Path, target: FrozenTarget, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 3000)
    store = fill(tmp_path / "store", target)
    a_batch = 4 * 7 * store.manifest.bytes_per_token()
    sizes = [path.stat().st_size for path in sorted((tmp_path / "store").glob("*.safetensors"))]
    assert len(sizes) == 3 and all(size >= 3000 for size in sizes[:-1]) and max(sizes) < 3000 + a_batch + 512
    for text, states in read_directly(target, LAYERS):
        assert_same(store.fetch(text, LAYERS), states)


def test_a_shard_is_closed_after_its_time(tmp_path: Path, target: FrozenTarget, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "_CLOSE_AFTER", -1.0)
    assert len(set(fill(tmp_path / "store", target, batch_size=1).shards_of(TEXTS).tolist())) == len(TEXTS)


def test_threads_read_what_one_thread_reads_with_few_files_open(
    tmp_path: Path, target: FrozenTarget, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "_CLOSE_AFTER", -1.0)
    monkeypatch.setattr("trl_draft_opd.readings.store._OPEN_SHARDS", 2)
    stored = fill(tmp_path / "store", target, batch_size=1)
    assert len(list(stored.path.glob("shard-*.json"))) == len(TEXTS)
    expected = [states for _, states in read_directly(target, LAYERS, batch_size=1)]
    rows = list(range(len(TEXTS))) * 20
    with ThreadPoolExecutor(4) as pool:
        for row, states in zip(rows, pool.map(lambda row: stored.fetch(TEXTS[row], LAYERS), rows), strict=True):
            assert_same(states, expected[row])
    assert len(stored._opened) == 2
    stored.close()
    assert_same(stored.fetch(TEXTS[0], LAYERS), expected[0])


def test_texts_as_arrays_are_the_texts_as_lists(tmp_path: Path, target: FrozenTarget):
    arrays = [np.array(text, dtype=np.int32) for text in TEXTS]
    store, expected = fill(tmp_path / "arrays", target, arrays), fill(tmp_path / "lists", target)
    for text, array in zip(TEXTS, arrays, strict=True):
        assert_same(store.fetch(text, LAYERS), expected.fetch(array, LAYERS))
    assert store.missing(arrays) == []
    arrays[1][0] = target.vocab_size
    with pytest.raises(ValueError, match="Text 1 holds a token id outside"):
        fill(tmp_path / "arrays", target, arrays)


# ---- order ----------------------------------------------------------------------------------------------------------


def test_the_order_by_shard_visits_each_shard_once_and_each_text_once(
    tmp_path: Path, target: FrozenTarget, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 5000)
    store = fill(tmp_path / "store", target, batch_size=1)
    texts = [*TEXTS, *TEXTS[:3]]
    shards_of_texts = store.shards_of(texts)
    order = store.order_by_shard(shards_of_texts, seed=3, epoch=1)
    assert sorted(order) == list(range(len(texts)))
    visits = [shard for shard, _ in itertools.groupby(shards_of_texts[order].tolist())]
    assert len(visits) == len(set(visits)) > 2
    again = ReadingStore.read_only(store.path)
    assert order == again.order_by_shard(again.shards_of(texts), seed=3, epoch=1)
    others = [store.order_by_shard(shards_of_texts, seed=seed, epoch=epoch) for seed, epoch in ((3, 2), (4, 1))]
    assert order not in others and others[0] != others[1]
    # Further shards leave the order of these texts as it was.
    fill(tmp_path / "store", target, make_prompts(5, seed=9))
    again = ReadingStore.read_only(store.path)
    assert order == again.order_by_shard(again.shards_of(texts), seed=3, epoch=1)
    with pytest.raises(ValueError, match="does not hold a text of 2 tokens"):
        store.shards_of([[9, 9]])


# ---- other sources --------------------------------------------------------------------------------------------------


class Elsewhere:
    """Fetches from a target of its own, as a server does; texts of `broken` fail."""

    def __init__(self, target: FrozenTarget, is_before_norm: bool = False, broken: Sequence[Sequence[int]] = ()):
        self.target, self.is_before_norm, self.broken = target, is_before_norm, broken
        self.layer_ids, self.digest, self.concurrency = tuple(LAYERS), "", 3
        self.num_at_once = self.most_at_once = self.num_fetched = 0
        self._lock = threading.Lock()

    def fetch(self, text: Sequence[int], layer_ids: Sequence[int]) -> TextStates:
        with self._lock:
            self.num_at_once += 1
            self.num_fetched += 1
            self.most_at_once = max(self.most_at_once, self.num_at_once)
        try:
            if text in self.broken:
                raise ValueError("its states are short")
            with self._lock:
                reading = read_texts(self.target, [text], layer_ids)
                if not self.is_before_norm:
                    return TextStates(reading.features, reading.last_hidden)
                before: list[torch.Tensor] = []
                handle = self.target.layers[-1].register_forward_hook(lambda *args: before.append(args[2]))
                read_texts(self.target, [text])
                handle.remove()
                output = before[0][0] if isinstance(before[0], tuple) else before[0]
                return TextStates(reading.features, output.reshape(len(text), -1))
        finally:
            with self._lock:
                self.num_at_once -= 1

    def num_bytes(self, num_tokens: int, num_layers: int) -> int:
        return num_tokens * (num_layers + 1) * 128

    def close(self) -> None:
        pass


@pytest.mark.parametrize("is_before_norm", [False, True])
def test_what_a_source_delivers_is_stored_as_the_input_of_the_head(
    tmp_path: Path, target: FrozenTarget, is_before_norm: bool
):
    source = Elsewhere(make_target(), is_before_norm)
    store = fill(tmp_path / "store", target, source=source, provenance={"engine": "elsewhere"})
    for text, states in read_directly(target, LAYERS, batch_size=1):
        assert_same(store.fetch(text, LAYERS), states)
    assert source.most_at_once <= 3


def test_a_text_that_fails_is_named_and_the_others_are_kept(tmp_path: Path, target: FrozenTarget):
    broken = [TEXTS[2], TEXTS[5]]
    source = Elsewhere(make_target(), broken=broken)
    with pytest.raises(ValueError, match=r"2 of 11 texts could not be read.*same command(?s:.*)text 2 .*are short"):
        fill(tmp_path / "store", target, source=source)
    store = ReadingStore.open_for(target, tmp_path / "store", LAYERS)
    assert store.missing(TEXTS) == broken
    assert fill(tmp_path / "store", target, source=Elsewhere(make_target())).missing(TEXTS) == []


def test_a_source_that_fails_for_good_is_not_asked_for_all(
    tmp_path: Path, target: FrozenTarget, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(write, "_GIVE_UP_AFTER", 3)
    source = Elsewhere(make_target(), broken=TEXTS[2:])
    with pytest.raises(ValueError, match="3 of 11 texts could not be read.*3 in a row.*the last 6 were not tried"):
        fill(tmp_path / "store", target, source=source)
    assert len(ReadingStore.read_only(tmp_path / "store")) == 2 and source.num_fetched < len(TEXTS)


def test_texts_that_fail_here_and_there_end_no_reading(
    tmp_path: Path, target: FrozenTarget, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(write, "_GIVE_UP_AFTER", 3)
    with pytest.raises(ValueError, match="3 of 11 texts could not be read"):
        fill(tmp_path / "store", target, source=Elsewhere(make_target(), broken=TEXTS[:6:2]))
    assert ReadingStore.read_only(tmp_path / "store").missing(TEXTS) == TEXTS[:6:2]


def test_what_is_under_way_keeps_no_process_alive(tmp_path: Path, target: FrozenTarget):
    source, are_daemons = Elsewhere(make_target()), []
    whole = source.fetch

    def fetch(text: Sequence[int], layer_ids: Sequence[int]) -> TextStates:
        are_daemons.append(threading.current_thread().daemon)
        return whole(text, layer_ids)

    source.fetch = fetch
    fill(tmp_path / "store", target, source=source)
    assert are_daemons == [True] * len(TEXTS)


@pytest.mark.parametrize("fault", ["short", "infinite", "narrow"])
def test_states_that_are_none_of_the_text_are_refused(tmp_path: Path, target: FrozenTarget, fault: str):
    source = Elsewhere(make_target())
    whole = source.fetch

    def fetch(text: Sequence[int], layer_ids: Sequence[int]) -> TextStates:
        features, last_hidden = whole(text, layer_ids)
        if text == TEXTS[3]:
            if fault == "short":
                return TextStates(features[1:], last_hidden[1:])
            if fault == "narrow":
                return TextStates(features[:, 32:], last_hidden)
            features[0, 5] = float("inf")
        return TextStates(features, last_hidden)

    source.fetch = fetch
    with pytest.raises(ValueError, match="1 of 11 texts could not be read"):
        fill(tmp_path / "store", target, source=source)
    assert ReadingStore.read_only(tmp_path / "store").missing(TEXTS) == [TEXTS[3]]


def test_a_text_that_the_target_reads_as_nan_costs_no_other(tmp_path: Path):
    target = make_target()
    with torch.no_grad():
        next(target.causal_lm.get_input_embeddings().parameters())[VOCAB - 1] = float("nan")
    texts = [*([i for i in text if i != VOCAB - 1] or [7] for text in TEXTS), [8, VOCAB - 1, 9]]
    with pytest.raises(ValueError, match=r"1 of 12 texts could not be read(?s:.*)text 11 .*NaN or infinite"):
        fill(tmp_path / "store", target, texts)
    assert ReadingStore.read_only(tmp_path / "store").missing(texts) == [texts[-1]]


# ---- what is refused before anything is read ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [([], "Text 1 is empty"), ([VOCAB], "Text 1 .*vocabulary of 64"), ([7] * 257, "Text 1 has 257 .*256 positions")],
)
def test_a_text_that_is_none_of_the_targets_is_refused(
    tmp_path: Path, target: FrozenTarget, text: list[int], message: str
):
    with pytest.raises(ValueError, match=message):
        fill(tmp_path / "store", target, [TEXTS[0], text])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("dtype, why", [("float16", "65,504"), ("float8_e4m3fn", "KL"), ("int8", "")])
def test_other_precisions_are_refused_with_the_reason(tmp_path: Path, target: FrozenTarget, dtype: str, why: str):
    with pytest.raises(ValueError, match=f"not stored in '{dtype}'.*{why}.*dtype='bfloat16'"):
        fill(tmp_path / "store", target, dtype=dtype)


def test_a_limit_refuses_before_it_starts_and_says_what_fits(tmp_path: Path, target: FrozenTarget):
    num_tokens = sum(map(len, TEXTS))
    needed = num_tokens * 512 + len(TEXTS) * 128
    before = target.num_forwards
    for limit, offer in (
        (needed - 1, r"bfloat16 \(.*\), or 2 of the 3 layers, or the first 10 of the texts"),
        (needed // 2 - 1, "1 of the 3 layers, or the first"),
        (10, "Make room"),
    ):
        with pytest.raises(
            ValueError, match=f"11 texts, {num_tokens} tokens.*`max_bytes` is.*Nothing was read.*{offer}"
        ):
            fill(tmp_path / "store", target, max_bytes=limit)
    assert target.num_forwards == before and not (tmp_path / "store").exists()
    fill(tmp_path / "store", target, max_bytes=needed)
    # Of the whole folder, not of each call.
    with pytest.raises(ValueError, match="beside .* that it holds"):
        fill(tmp_path / "store", target, [*TEXTS, [9, 9]], max_bytes=needed)


def test_a_disk_without_room_is_refused_before_it_starts(
    tmp_path: Path, target: FrozenTarget, monkeypatch: pytest.MonkeyPatch
):
    usage = write.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(ValueError, match="has 1,000 bytes free. Nothing was read"):
        fill(tmp_path / "new" / "store", target)
    assert not (tmp_path / "new").exists()


# ---- two writers ----------------------------------------------------------------------------------------------------


def test_two_writers_leave_one_store_with_all_texts(tmp_path: Path, target: FrozenTarget):
    halves = [TEXTS[:8], TEXTS[4:]]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=fill, args=(tmp_path / "store", target, half)) for half in halves]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    store = ReadingStore.open_for(target, tmp_path / "store", LAYERS)
    assert len(store) == len(TEXTS) and store.missing(TEXTS) == [] and not list(store.verify())
    assert store.num_tokens == sum(map(len, TEXTS))
    assert not [name for name in os.listdir(store.path) if name.startswith(".")]


def test_a_text_that_is_there_twice_is_read_from_the_first_shard_by_every_process(
    tmp_path: Path, target: FrozenTarget
):
    manifest = ReadingManifest.of(target, LAYERS)
    first, second = (ReadingStore.open(tmp_path / "store", manifest) for _ in range(2))
    for number, store in enumerate((first, second)):
        with store.writing_shard({}) as writer:
            writer.add([(prompt_key([7, 8]), torch.full((2, 4, 32), float(number)))])
    second.refresh()
    for store in (first, second, ReadingStore.read_only(tmp_path / "store")):
        store.refresh()
        assert len(store) == 1 and store.fetch([7, 8], [1]).features.eq(0).all()


def test_the_first_shard_counts_where_it_arrives_last_too(tmp_path: Path, target: FrozenTarget):
    manifest = ReadingManifest.of(target, LAYERS)
    first, second = (ReadingStore.open(tmp_path / "store", manifest) for _ in range(2))
    with first.writing_shard({}) as slow:
        slow.add([(prompt_key([7, 8]), torch.zeros(2, 4, 32))])
        with second.writing_shard({}) as quick:
            quick.add([(prompt_key([7, 8]), torch.ones(2, 4, 32))])
        assert second.fetch([7, 8], [1]).features.eq(1).all()
    second.refresh()
    assert second.fetch([7, 8], [1]).features.eq(0).all()


def test_a_living_writers_file_is_not_swept_and_a_dead_ones_is(tmp_path: Path, target: FrozenTarget):
    manifest = ReadingManifest.of(target, LAYERS)
    store = ReadingStore.open(tmp_path / "store", manifest)
    dead = [store.path / f"{dot}shard-{'0' * 20}-{'a' * 12}.safetensors" for dot in (".", "")]
    for path in dead:
        path.write_bytes(b"half")
    with store.writing_shard({}) as writer:
        writer.add([(prompt_key([7, 8]), torch.zeros(2, 4, 32))])
        ReadingStore.open(tmp_path / "store", manifest)
        assert not any(path.exists() for path in dead)
    assert len(store) == 1
