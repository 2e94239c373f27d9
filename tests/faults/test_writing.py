# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Places where nothing can be written: a disk that is full, links, mount points, files in the place of folders. Each is a
sentence, and what was there before is there afterwards.
"""

import os
import resource
import shutil
from contextlib import contextmanager

import pytest
from datasets import Dataset
from test_export import export, make_variant

from helpers.tiny import TINY_RUN, make_drafter, make_target
from trl_draft_opd import (
    AutoDrafter,
    DraftSFTConfig,
    DraftSFTTrainer,
    Origin,
    ResponseStore,
    SamplingSettings,
)
from trl_draft_opd.cli import main, training
from trl_draft_opd.responses import StoredResponse
from trl_draft_opd.trainer import pair


ROWS = Dataset.from_dict({"prompt_ids": [[9, 10, 11], [12, 13], [14]], "completion_ids": [[20, 21, 22]] * 3})


@pytest.fixture(scope="module")
def target():
    return make_target()


@contextmanager
def files_of_at_most(num_bytes):
    """Have every write behind so many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_trainer(place, target, **settings):
    config = DraftSFTConfig(str(place), save_strategy="no", max_steps=1, warmup_steps=0, **TINY_RUN | settings)
    return DraftSFTTrainer(make_drafter("dflash", target), target, config, ROWS)


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_a_full_disk_leaves_the_earlier_export_and_says_so(tmp_path, target, family):
    drafter = make_variant(family, target)
    export(drafter, target, tmp_path / "out")
    before = content_of(tmp_path)
    for place in ("out", "new/er"):
        with (
            files_of_at_most(10_000),
            pytest.raises(OSError, match="export could not be written.*too large.*as it was"),
        ):
            export(make_variant(family, target), target, tmp_path / place)
    assert content_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"] and not list(
        (tmp_path / "new").iterdir()
    )


def test_a_full_disk_leaves_the_drafter_saved_before_and_the_one_in_memory(tmp_path, target):
    trainer = make_trainer(tmp_path / "out", target)
    trainer.save_model()
    before = content_of(tmp_path)
    trainer.train()
    with files_of_at_most(10_000), pytest.raises(OSError, match="drafter could not be written.*still in memory"):
        trainer.save_model()
    assert content_of(tmp_path) == before and AutoDrafter.from_pretrained(tmp_path / "out")
    trainer.save_model(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() != before["out/model.safetensors"]


def test_a_full_disk_costs_a_store_one_shard_and_the_same_call_goes_on(tmp_path, target):
    sampling = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
    origin = Origin.of(target, sampling=sampling, max_completion_length=8)
    rows = [StoredResponse([9, number], [20, 21], None, "length") for number in range(20, 24)]

    def come_in():
        """Have the disk full when half of the responses are there."""
        yield from rows[:2]
        with files_of_at_most(64):
            yield from rows[2:]

    store = ResponseStore.open(tmp_path / "store", origin)
    with pytest.raises(
        OSError, match="^[^:]*1 responses could not be written .*keeps the 2 that it holds.*same again"
    ):
        store.add_in_shards(come_in(), shard_size=1)
    assert sorted(path.suffix for path in (tmp_path / "store").iterdir()) == [".json", ".parquet", ".parquet"]
    store = ResponseStore.open(tmp_path / "store", origin)
    assert len(store) == 2 and store.add_in_shards(rows, shard_size=1) == 2
    with files_of_at_most(64), pytest.raises(OSError, match="manifest of .* could not be written"):
        ResponseStore.open(tmp_path / "other", origin)


def test_an_export_through_a_link_goes_where_it_leads_and_the_link_stays(tmp_path, target):
    for place in ("first", "second"):
        (tmp_path / "disk").mkdir(exist_ok=True)
        if not (tmp_path / "out").is_symlink():
            (tmp_path / "out").symlink_to(tmp_path / "disk")
        export(make_variant("dflash", target), target, tmp_path / "out")
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "config.json").is_file(), place
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_what_cannot_be_replaced_is_refused_and_nothing_is_touched(tmp_path, target, monkeypatch):
    export(make_variant("dflash", target), target, tmp_path / "out")
    before = content_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "out"))
        with pytest.raises(ValueError, match="'[^']*out' is a mount point.*inside it"):
            export(make_variant("dflash", target), target, tmp_path / "out")
    for here, name in (("out", "."), ("out/speculators", "..")):
        monkeypatch.chdir(tmp_path / here)
        with pytest.raises(ValueError, match="holds the working directory"):
            export(make_variant("dflash", target), target, name)
    assert content_of(tmp_path) == before


def in_the_way(tmp_path):
    """Return places that cannot be folders, and why."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    return {
        "file": "'[^']*file' is a file",
        "file/below": "'[^']*file' is a file",
        "link": "is a link that leads nowhere",
        "link/below": "is a link that leads nowhere",
    }


def test_a_file_in_the_place_of_a_folder_is_named_before_anything_is_loaded(tmp_path, target, monkeypatch, capsys):
    for module in (pair, training):
        monkeypatch.setattr(module, "load_target", lambda *_: pytest.fail("loaded"))
    for name, reason in in_the_way(tmp_path).items():
        place = tmp_path / name
        with pytest.raises(ValueError, match=reason):
            make_trainer(place, target)
        with pytest.raises(ValueError, match=reason):
            export(make_variant("dflash", target), target, place)
        pairs = ["--target", "no/target", "--drafter", "no/drafter"]
        for words in (
            ["export", *pairs, "--output", str(place)],
            ["generate", *pairs[:2], "--dataset", "none.jsonl", "--output", str(place)],
            ["init", *pairs[:2], "--family", "dflash", "--output", str(place)],
            ["sft", *pairs, "--dataset", "none.jsonl", "--use-cpu", "--output-dir", str(place)],
            ["opd", *pairs, "--dataset", "none.jsonl", "--use-cpu", "--output-dir", str(place)],
        ):
            assert main(words) == 2
            assert "cannot be a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "link").is_symlink()


def test_a_file_that_came_into_the_way_while_training_costs_no_drafter(tmp_path, target):
    trainer = make_trainer(tmp_path / "out", target)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        trainer.save_model()
    trainer.save_model(tmp_path / "elsewhere")
    assert (tmp_path / "out").read_text() == "mine" and AutoDrafter.from_pretrained(tmp_path / "elsewhere")


def test_a_command_whose_last_save_fails_keeps_the_drafter_elsewhere(tmp_path, target, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    target.causal_lm.save_pretrained(tmp_path / "target")
    target.tokenizer.save_pretrained(tmp_path / "target")
    make_drafter("dflash", target).save_pretrained(tmp_path / "drafter")
    ROWS.to_json(tmp_path / "rows.jsonl")
    save = DraftSFTTrainer.save_model

    def save_on_full_disk(trainer, place, **options):
        with files_of_at_most(10_000 if place.endswith("run") else resource.RLIM_INFINITY):
            save(trainer, place, **options)

    monkeypatch.setattr(DraftSFTTrainer, "save_model", save_on_full_disk)
    words = "--max-steps 1 --warmup-steps 0 --use-cpu --report-to none --save-strategy no --disable-tqdm true".split()
    pairs = {"target": "target", "drafter": "drafter", "dataset": "rows.jsonl", "output-dir": "run"}
    words += [word for flag, name in pairs.items() for word in (f"--{flag}", str(tmp_path / name))]
    assert main(["sft", *words]) == 2
    said = capsys.readouterr().err
    (rescued,) = tmp_path.glob("drafter-*")
    assert f"It was saved in {str(rescued)!r} instead" in said and AutoDrafter.from_pretrained(rescued)
    assert not list((tmp_path / "run").glob("*.safetensors"))
