# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
`--dataset`: files of every usual ending, patterns and folders; and paths that are none, told at once.
"""

import bz2
import gzip
import json
import lzma
import subprocess
import sys

import pytest
from datasets import Dataset

from helpers.chats import noted
from trl_draft_opd.cli import rows as rows_module
from trl_draft_opd.cli.rows import load_rows


ROWS = [{"prompt": "w9", "completion": "w10"}, {"prompt": "w8 é", "completion": "w11"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = "prompt,completion\nw9,w10\nw8 é,w11\n".encode()


@pytest.fixture
def no_hub(monkeypatch):
    """Fail a test that takes a path for a Hub id."""
    load = rows_module.load_dataset

    def guarded(path, **options):
        assert path in ("json", "csv", "parquet", "arrow") or path.startswith("/"), f"asked the Hub for {path}"
        return load(path, **options)

    monkeypatch.setattr(rows_module, "load_dataset", guarded)


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl", LINES),
        ("rows.JSONL", LINES),
        ("rows.ndjson", LINES),
        ("rows.JSON", json.dumps(ROWS).encode()),
        # Without the time, which would give each worker other names of these tests.
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("rows.JSONL.GZ", gzip.compress(LINES, mtime=0)),
        ("my.rows.json.bz2", bz2.compress(LINES)),
        ("rows.jsonl.xz", lzma.compress(LINES)),
        ("rows.csv", TABLE),
        ("rows.CSV", TABLE),
        ("rows.csv.gz", gzip.compress(TABLE, mtime=0)),
        ("rows.tsv", TABLE.replace(b",", b"\t")),
    ],
)
def test_a_file_is_read_by_its_ending_in_any_case_compressed_or_not(tmp_path, no_hub, name, content):
    (tmp_path / name).write_bytes(content)
    assert load_rows(str(tmp_path / name), None, "train").to_list() == ROWS


@pytest.mark.parametrize("name", ["rows.parquet", "rows.PARQUET"])
def test_a_parquet_file_is_read_in_any_case(tmp_path, no_hub, name):
    Dataset.from_list(ROWS).to_parquet(tmp_path / name)
    assert load_rows(str(tmp_path / name), None, "train").to_list() == ROWS


def test_patterns_and_folders_of_files_are_read_in_order(tmp_path, no_hub):
    for number in (1, 0):
        (tmp_path / f"part-{number}.JSONL").write_bytes(LINES.splitlines(keepends=True)[number])
    for name in (f"{tmp_path}/part-*.JSONL", f"{tmp_path}/**/*.JSONL", str(tmp_path)):
        assert load_rows(name, None, "train").to_list() == ROWS, name
    (tmp_path / "odd[1].jsonl").write_bytes(LINES)
    assert load_rows(f"{tmp_path}/odd[1].jsonl", None, "train").num_rows == 2
    with pytest.raises(FileNotFoundError, match=r"No dataset file matches '.*\*.csv'"):
        load_rows(f"{tmp_path}/*.csv", None, "train")
    (tmp_path / "part-2.csv").write_bytes(TABLE)
    with pytest.raises(ValueError, match="holds files of several kinds"):
        load_rows(f"{tmp_path}/part-*", None, "train")


def test_an_existing_file_is_never_taken_for_a_hub_id(tmp_path, no_hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows", "rows.txt", "gz", "rows.gz", ".jsonl"):
        (tmp_path / name).write_bytes(LINES)
        with pytest.raises(ValueError, match=f"file '{name}' is of no known kind: its name must end with .json or"):
            load_rows(name, None, "train")


@pytest.mark.parametrize(
    "name", ["rowz.jsonl", "data/rowz", "./rowz", "/nowhere/rowz.parquet", "~/no/rowz", "rowz.JSONL.gz", "data/a/b"]
)
def test_a_path_that_does_not_exist_is_told_at_once(tmp_path, no_hub, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match="There is no dataset file"):
        load_rows(name, None, "train")


def test_a_mistyped_name_is_told_with_the_nearest_one(tmp_path, no_hub):
    (tmp_path / "prompts.jsonl").write_bytes(LINES)
    with pytest.raises(
        FileNotFoundError, match=rf"no dataset file '.*prompt.jsonl'. Did you mean '{tmp_path}/prompts"
    ):
        load_rows(f"{tmp_path}/prompt.jsonl", None, "train")


def test_the_home_folder_is_found(tmp_path, no_hub, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    assert load_rows("~/rows.jsonl", None, "train").num_rows == 2


def test_a_hub_dataset_that_cannot_be_reached_is_one_sentence():
    with pytest.raises(ValueError, match="There is no file or folder 'nobody/nothing' here, and as a Hub dataset"):
        load_rows("nobody/nothing", None, "train")


def test_the_line_of_a_damaged_file_is_named_when_it_is_compressed_or_one_of_many(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES + b'{"prompt": "w')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES + b'{"prompt": "w'))
    for name, words in (
        (f"{tmp_path}/b.jsonl.gz", "line 3, its last, ends in the middle"),
        (f"{tmp_path}/?.jsonl", "b.jsonl, line 3, its last, ends in the middle"),
    ):
        with pytest.raises(ValueError, match=f"cannot be read: {words}"):
            load_rows(name, None, "train")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINES * 99)[:-20])
    with pytest.raises(ValueError, match="cut.jsonl.gz' cannot be read: .*Fix or replace it"):
        load_rows(f"{tmp_path}/cut.jsonl.gz", None, "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, OSError), match="empty"):
        load_rows(f"{tmp_path}/empty", None, "train")


def test_of_a_folder_the_files_that_a_split_leaves_out_are_named(tmp_path):
    def read(split="train"):
        return noted(lambda: load_rows(str(tmp_path), None, split))

    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    rows, notes = read()
    assert rows.num_rows == 4 and not notes
    (tmp_path / "train.jsonl").write_bytes(LINES)
    for split in ("train", "train[:1]"):
        _, (note,) = read(split)
        assert "the split '" + split + "' is train.jsonl. Left out: a.jsonl, b.jsonl. To read others" in note
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.jsonl").unlink()
    assert read()[1] == []


def test_a_readme_without_settings_and_a_damaged_file_bring_no_line_of_the_libraries(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "README.md").write_text("# Rows", "utf-8")
    (tmp_path / "rows" / "rows.jsonl").write_bytes(LINES)
    (tmp_path / "cut.json").write_bytes(b"[" + LINES)
    code = (
        "import logging, sys\nfrom trl_draft_opd.cli.rows import load_rows\nlogging.basicConfig()\n"
        "for path in sys.argv[1:]:\n    load_rows(path, None, 'train')\n"
    )
    paths = [str(tmp_path / "rows"), str(tmp_path / "cut.json")]
    said = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True).stderr
    assert "cannot be read" in said and "Failed to load" not in said and "Repo card" not in said


@pytest.mark.parametrize("rest", [b"", b"\n", b"\r\n", b'\n{"prompt": "w7"}\n'])
def test_the_line_of_a_row_that_is_cut_short_is_its_own_with_or_without_an_end(tmp_path, rest):
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "w9"}\n{"prompt": "w8"' + rest)
    with pytest.raises(ValueError, match="cannot be read: line 2"):
        load_rows(str(tmp_path / "rows.jsonl"), None, "train")
