# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Stores of readings that were damaged, are another's, or whose writer met its end: a sentence each, and nothing lost.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from test_writing import content_of, files_of_at_most

from helpers.doomed import in_child, wait_for
from helpers.tiny import make_causal_lm, make_drafter, make_prompts, make_target
from trl_draft_opd import FrozenTarget, Origin, ResponseStore, SamplingSettings
from trl_draft_opd.readings import shards
from trl_draft_opd.readings.manifest import ReadingManifest
from trl_draft_opd.readings.store import ReadingStore
from trl_draft_opd.readings.write import write_readings
from trl_draft_opd.responses.shards import prompt_key


LAYERS = [1, 3]
TEXTS = make_prompts(8, longest=6)
AGAIN = "the same `trl-draft-opd read` then reads its texts again"


@pytest.fixture(scope="module")
def target():
    return make_target()


def fill(path, target, texts=TEXTS, **settings):
    settings = {"layer_ids": LAYERS, "batch_size": 2, "show_progress": False} | settings
    return write_readings(target, texts, path, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, target):
    """A store of two shards, to be copied."""
    path = tmp_path_factory.mktemp("whole") / "store"
    fill(path, target, TEXTS[:4])
    fill(path, target, TEXTS)
    return path


@pytest.fixture
def store_path(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "store"))


def states_of(path):
    return sorted(path.glob("shard-*.safetensors"))


def lists_of(path):
    return sorted(path.glob("shard-*.json"))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_folder_of_responses_is_told_from_one_of_readings_and_neither_is_touched(tmp_path, store_path, target):
    origin = Origin.of(target, sampling=SamplingSettings(temperature=0.0, top_k=0, top_p=1.0), max_completion_length=4)
    ResponseStore.open(tmp_path / "responses", origin)
    before = [content_of(folder) for folder in (tmp_path / "responses", store_path)]
    for opened in (ReadingStore.read_only, lambda path: fill(path, target)):
        with pytest.raises(ValueError, match="holds responses, which are text alone. Name it in `responses`"):
            opened(tmp_path / "responses")
    for opened in (ResponseStore.read_only, lambda path: ResponseStore.open(path, origin)):
        with pytest.raises(ValueError, match="holds readings, and no responses. Name the folder that"):
            opened(store_path)
    assert before == [content_of(folder) for folder in (tmp_path / "responses", store_path)]


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_found_when_its_text_is_read_and_by_verify(store_path, target):
    first, second = states_of(store_path)
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    store = ReadingStore.open_for(target, store_path, LAYERS)
    with pytest.raises(ValueError, match=f"{first.name} is not usable: its content has changed.*xxh3.*{AGAIN}"):
        store.fetch(TEXTS[3], LAYERS)
    # Others are as they were.
    store.fetch(TEXTS[0], LAYERS)
    store.fetch(TEXTS[4], LAYERS)
    (damage,) = store.verify()
    assert first.name in damage and "SHA-256" in damage and second.name not in damage
    # What the sentence says mends it.
    for path in store_path.glob(f"{first.stem}.*"):
        path.unlink()
    mended = fill(store_path, target)
    assert mended.missing(TEXTS) == [] and not list(mended.verify())


def test_a_byte_of_the_head_that_no_text_holds_is_found_by_verify(store_path, target):
    first, _ = states_of(store_path)
    data = bytearray(first.read_bytes())
    assert data[511:512] == b" "
    data[511:512] = b"\n"
    first.write_bytes(data)
    store = ReadingStore.open_for(target, store_path, LAYERS)
    store.fetch(TEXTS[0], LAYERS)
    assert [first.name in damage for damage in store.verify()] == [True]


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda states, listed: os.truncate(states, states.stat().st_size - 1), "bytes, not the"),
        (lambda states, listed: states.write_bytes(states.read_bytes() + b"x"), "bytes, not the"),
        (lambda states, listed: states.unlink(), "No such file"),
        (lambda states, listed: listed.write_text("{"), "not usable"),
        (lambda states, listed: listed.write_text("[]"), "not usable"),
        (lambda states, listed: listed.write_text("null"), "not usable"),
        (lambda states, listed: edit(listed, lambda c: c.pop("texts")), "'texts' is missing"),
        (lambda states, listed: edit(listed, lambda c: c.update(texts=[])), "not usable"),
        (lambda states, listed: edit(listed, lambda c: c["texts"][0].pop()), "not usable"),
        (lambda states, listed: edit(listed, lambda c: c["texts"].pop()), "bytes, not the"),
        (lambda states, listed: edit(listed, lambda c: c["texts"][0].__setitem__(1, 1)), "one after another"),
        (lambda states, listed: edit(listed, lambda c: c["texts"][0].__setitem__(1, -1)), "not usable"),
        (lambda states, listed: edit(listed, lambda c: c["texts"][0].__setitem__(2, 2**40)), "not usable"),
        (lambda states, listed: edit(listed, lambda c: c["texts"][0].__setitem__(0, "../../x")), "32 hex digits"),
        (lambda states, listed: edit(listed, lambda c: c["texts"][0].__setitem__(3, "x")), "not usable"),
        (lambda states, listed: edit(listed, lambda c: c.update(bytes=1)), "bytes, not the"),
        (lambda states, listed: edit(listed, lambda c: c.update(shard="../../../etc/passwd")), "of another shard"),
        (lambda states, listed: edit(listed, lambda c: c.update(manifest="0" * 64)), "of another store"),
    ],
)
def test_a_shard_that_is_not_what_its_list_says_is_refused_when_the_store_is_opened(
    store_path, target, damage, reason
):
    states, listed = states_of(store_path)[0], lists_of(store_path)[0]
    damage(states, listed)
    for again in (lambda: ReadingStore.open_for(target, store_path, LAYERS), lambda: fill(store_path, target)):
        with pytest.raises(ValueError, match=f"{listed.name} is not usable.*{AGAIN}") as error:
            again()
        assert reason in str(error.value)
    listed.unlink()
    assert fill(store_path, target).missing(TEXTS) == []


def test_the_list_of_another_shard_is_refused(store_path, target):
    first, second = lists_of(store_path)
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="it is the list of another shard"):
        ReadingStore.open_for(target, store_path, LAYERS)


def test_the_states_of_another_shard_are_found_by_their_checksums(tmp_path, target):
    texts = [[8, 9], [9, 8]]
    for text in texts:
        fill(tmp_path / "store", target, [text])
    first, second = states_of(tmp_path / "store")
    shutil.copy(first, second)
    store = ReadingStore.open_for(target, tmp_path / "store", LAYERS)
    store.fetch(texts[0], LAYERS)
    with pytest.raises(ValueError, match="xxh3"):
        store.fetch(texts[1], LAYERS)


def test_two_keys_that_changed_places_are_found_by_the_checksums(tmp_path, target):
    texts = [[8, 9], [9, 8]]
    fill(tmp_path / "store", target, texts)
    (listed,) = lists_of(tmp_path / "store")

    def swap(content):
        (first, *_), (second, *_) = content["texts"]
        content["texts"][0][0], content["texts"][1][0] = second, first

    edit(listed, swap)
    store = ReadingStore.open_for(target, tmp_path / "store", LAYERS)
    for text in texts:
        with pytest.raises(ValueError, match="xxh3"):
            store.fetch(text, LAYERS)


def test_a_shard_without_its_list_does_not_count_and_the_next_writer_removes_it(store_path, target):
    lists_of(store_path)[0].unlink()
    lost = states_of(store_path)[0]
    store = ReadingStore.open_for(target, store_path, LAYERS)
    assert store.missing(TEXTS) == TEXTS[:4] and lost.exists()
    store = fill(store_path, target)
    assert store.missing(TEXTS) == [] and not lost.exists()


@pytest.mark.parametrize(
    "head",
    [
        (2**62).to_bytes(8, "little"),
        (504).to_bytes(8, "little") + b"{" * 504,
        (504).to_bytes(8, "little") + json.dumps({"states": {"dtype": "F32"}}).encode().ljust(504),
    ],
)
def test_an_absurd_head_is_a_sentence(store_path, target, head):
    first, _ = states_of(store_path)
    data = first.read_bytes()
    first.write_bytes(head + data[len(head) :])
    store = ReadingStore.open_for(target, store_path, LAYERS)
    with pytest.raises(ValueError, match=f"{first.name} is not usable.*{AGAIN}"):
        store.fetch(TEXTS[0], LAYERS)
    assert len(list(store.verify())) == 1


def test_a_head_of_another_shape_or_precision_is_refused(store_path, target):
    first, _ = states_of(store_path)
    data = first.read_bytes()
    for old, new in ((b'"F32"', b'"I32"'), (b", 3, 32]", b", 6, 16]")):
        assert data.count(old) == 1
        first.write_bytes(data.replace(old, new))
        with pytest.raises(ValueError, match="not usable: it holds"):
            ReadingStore.open_for(target, store_path, LAYERS).fetch(TEXTS[0], LAYERS)


@pytest.mark.parametrize("kind", ["states", "list", "manifest"])
def test_a_link_out_of_the_folder_is_refused(store_path, tmp_path, target, kind):
    path = {"states": states_of, "list": lists_of, "manifest": lambda p: [p / "manifest.json"]}[kind](store_path)[0]
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    with pytest.raises(ValueError, match="outside of its folder"):
        ReadingStore.open_for(target, store_path, LAYERS)


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"layer_ids": [1, 2]}, {"dtype": "float16"}, {"new": 1}])
def test_a_manifest_that_was_changed_is_refused(store_path, target, change):
    edit(store_path / "manifest.json", lambda content: content["readings"].update(change))
    with pytest.raises(ValueError, match="manifest.json is not usable.*restore this file"):
        ReadingStore.open_for(target, store_path, LAYERS)


def test_a_lost_manifest_comes_back_under_the_same_settings_alone(store_path, target):
    before = (store_path / "manifest.json").read_bytes()
    (store_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="has no manifest.json"):
        ReadingStore.open_for(target, store_path, LAYERS)
    with pytest.raises(ValueError, match="of another store"):
        fill(store_path, target, dtype="bfloat16")
    num_forwards = target.num_forwards
    assert len(fill(store_path, target)) == len(TEXTS) and target.num_forwards == num_forwards
    assert (store_path / "manifest.json").read_bytes() == before


# ---- another's ------------------------------------------------------------------------------------------------------


def bf16_target():
    return FrozenTarget(make_causal_lm().bfloat16())


@pytest.mark.parametrize(
    "make, layer_ids, said",
    [
        (lambda: make_target(seed=1), LAYERS, "another target:\n  weights_fingerprint: .* there, .* here\nTrain with"),
        (lambda: make_target("llama"), LAYERS, "config_hash: .*\n  weights_fingerprint: "),
        (bf16_target, LAYERS, "target_dtype: 'float32' there, 'bfloat16' here\n.*`target_dtype='float32'`"),
        (make_target, [1, 2, 3], r"hold the layers \[1, 3\] and lack \[2\].*--target-layer-ids 1 2 3`"),
    ],
)
def test_a_run_of_another_target_precision_or_layers_is_told_what_differs(store_path, make, layer_ids, said):
    with pytest.raises(ValueError, match=said):
        ReadingStore.open_for(make(), store_path, layer_ids)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"layer_ids": [1, 2, 3]}, r"layer_ids: \[1, 3\] there, \[1, 2, 3\] here"),
        ({"dtype": "bfloat16"}, "dtype: 'float32' there, 'bfloat16' here"),
    ],
)
def test_a_writer_with_other_settings_is_told_what_differs_and_changes_nothing(store_path, target, settings, said):
    before = content_of(store_path)
    with pytest.raises(ValueError, match=f"{said}\nRead with .*layers 1 3, dtype float32.*another folder"):
        fill(store_path, target, **settings)
    assert content_of(store_path) == before


def test_a_text_of_another_tokenizer_is_not_there_and_the_error_says_why(store_path, target):
    with pytest.raises(ValueError, match="another tokenizer, chat template, longest length or response"):
        ReadingStore.open_for(target, store_path, LAYERS).fetch([60, 61, 62], LAYERS)


@pytest.mark.parametrize("kind", ["drafter", "responses", "file"])
def test_a_folder_that_holds_something_else_is_refused_and_stays_as_it_was(tmp_path, target, kind):
    place = tmp_path / "place"
    if kind == "drafter":
        make_drafter("dflash", target).save_pretrained(place)
    elif kind == "responses":
        place.mkdir()
        (place / "manifest.json").write_text('{"format": "trl-draft-opd responses 1"}')
    else:
        place.write_text("mine")
    before = content_of(tmp_path)
    with pytest.raises(
        ValueError, match="another folder|Give an empty or a new folder|Name another|need a folder of their own"
    ):
        fill(place, target)
    assert content_of(tmp_path) == before


# ---- the end --------------------------------------------------------------------------------------------------------


def read_all(path, target):
    store = ReadingStore.open_for(target, path, LAYERS)
    return {prompt_key(text): [part.tolist() for part in store.fetch(text, LAYERS)] for text in TEXTS if text in store}


@pytest.mark.parametrize("number, is_kept", [(signal.SIGKILL, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_writer_that_is_stopped_midway_is_resumed_to_the_same_content(tmp_path, target, number, is_kept, whole):
    path, mark = tmp_path / "store", tmp_path / "mark"
    original = shards.ShardWriter.add

    def add(self, texts):
        def up_to_the_sixth():
            for number, text in enumerate(texts, 1 + len(self._texts)):
                yield text
                if number == 5:
                    mark.touch()
                    time.sleep(60)

        original(self, up_to_the_sixth())

    def work():
        shards.ShardWriter.add = add
        fill(path, target)

    child = in_child(work, tmp_path / "log", wait=False)
    while not mark.exists():
        time.sleep(0.01)
    os.kill(child, number)
    code = wait_for(child)
    kept = read_all(path, target)
    expected = read_all(whole, target)
    # What is not whole never counts; a signal that can be caught loses no batch that is.
    assert len(kept) == (4 if is_kept else 0) and kept.items() <= expected.items()
    assert code == {signal.SIGKILL: 137, signal.SIGTERM: 143}.get(number, code) != 0
    if is_kept:
        said = (tmp_path / "log").read_text()
        assert "4 of 8 missing texts are read and stored" in said and "same command" in said
    else:
        assert [name for name in os.listdir(path) if name.startswith(".shard-")]
    fill(path, target)
    assert read_all(path, target) == expected
    assert not [name for name in os.listdir(path) if name.startswith(".")]


def test_a_full_disk_midway_is_a_sentence_and_the_same_call_reads_the_rest(tmp_path, target, whole):
    path = tmp_path / "store"
    # Room for the first three texts; the fourth is cut, and its batch goes.
    a_token = ReadingManifest.of(target, LAYERS).bytes_per_token()
    room = 512 + sum(map(len, TEXTS[:4])) * a_token - 1
    with (
        files_of_at_most(room),
        pytest.raises(
            OSError, match="A shard of readings.*could not be written.*too large.*Make room and run the same"
        ),
    ):
        fill(path, target)
    kept = read_all(path, target)
    assert list(kept) == [prompt_key(text) for text in TEXTS[:2]]
    assert not list(ReadingStore.read_only(path).verify())
    fill(path, target)
    assert read_all(path, target) == read_all(whole, target)


def test_a_disk_too_full_for_a_list_gives_up_the_last_text_for_it(tmp_path, target, monkeypatch):
    original, calls = shards.write_file, []

    def write_file(path, data):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        original(path, data)

    monkeypatch.setattr(shards, "write_file", write_file)
    store = fill(tmp_path / "store", target)
    assert store.missing(TEXTS) == TEXTS[-1:] and not list(store.verify())
    monkeypatch.setattr(shards, "write_file", fail)
    with pytest.raises(OSError, match="No space left.*keeps the shards before it"):
        fill(tmp_path / "store", target, [*TEXTS, [9, 9], [9, 9, 9]])
    assert sorted(content_of(tmp_path / "store")) == sorted(
        ["manifest.json", *(path.name for path in [*states_of(store.path), *lists_of(store.path)])]
    )
    assert len(states_of(store.path)) == len(lists_of(store.path)) == 1


def fail(path, data):
    raise OSError(28, "No space left on device")
