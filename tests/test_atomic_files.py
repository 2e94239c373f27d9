# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A folder that takes another's place: at no moment is neither of the two there.
"""

import os
import re

import pytest

from trl_draft_opd.utils.atomic_files import clear_leftovers, making_folder, move_files, remove_folder, write_file


def make(folder, text):
    with making_folder(folder) as staged:
        (staged / "file").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_takes_the_place_of_the_earlier_one_and_leaves_nothing_beside_it(tmp_path):
    make(tmp_path / "a", "first")
    make(tmp_path / "a", "second")
    assert (tmp_path / "a" / "file").read_text() == "second" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("is_stop", [True, False])
def test_the_earlier_folder_survives_an_end_between_the_two_renames(monkeypatch, tmp_path, is_stop):
    make(tmp_path / "a", "first")
    rename, seen = os.rename, []

    def stop(source, target):
        seen.append(target)
        if len(seen) == 2:
            # A stop runs none of our code any more, as far as a test can have it so; a failure is put right at once.
            raise SystemExit if is_stop else OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", stop)
    with pytest.raises((SystemExit, OSError)):
        make(tmp_path / "a", "second")
    monkeypatch.undo()
    if is_stop:
        assert not (tmp_path / "a").exists()
        clear_leftovers(tmp_path, re.compile("a"))
    assert (tmp_path / "a" / "file").read_text() == "first" and names(tmp_path) == ["a"]


def test_an_error_while_a_folder_is_filled_leaves_the_earlier_one(tmp_path):
    make(tmp_path / "a", "first")
    with pytest.raises(ValueError), making_folder(tmp_path / "a") as staged:
        (staged / "file").write_text("half")
        raise ValueError
    assert (tmp_path / "a" / "file").read_text() == "first" and names(tmp_path) == ["a"]


def test_a_folder_loses_its_name_before_its_files(monkeypatch, tmp_path):
    make(tmp_path / "a", "first")
    monkeypatch.setattr("shutil.rmtree", lambda folder: None)
    remove_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists() and names(tmp_path)[0].startswith(".deleting-a-")


def test_files_are_moved_whole_and_others_stay(tmp_path):
    write_file(tmp_path / "kept", b"theirs")
    (tmp_path / "staged").mkdir()
    write_file(tmp_path / "staged" / "file", b"new")
    move_files(tmp_path / "staged", tmp_path)
    assert (tmp_path / "file").read_bytes() == b"new" and (tmp_path / "kept").read_bytes() == b"theirs"
