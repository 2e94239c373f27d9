# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A folder that takes another's place: at no moment is neither of the two there.
"""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trl_draft_opd.utils.atomic_files import (
    check_place,
    clear_leftovers,
    explaining_failure,
    leaving_no_empty_folder,
    making_folder,
    move_files,
    remove_folder,
    write_file,
    writing_files,
)


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


@pytest.mark.parametrize("write", [making_folder, lambda folder: writing_files(folder, "staged")])
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_that_is_moved_into_place_has_the_mode_of_the_umask(tmp_path, write, umask, mode):
    before = os.umask(umask)
    try:
        with write(tmp_path / "a") as staged:
            save_file({"weight": torch.zeros(2)}, staged / "model.safetensors")
            (staged / "model.safetensors").chmod(0o600)
            (staged / "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {mode}


def test_a_full_disk_under_safetensors_is_the_systems_own_number_and_reason():
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(OSError, match=r"^\[Errno 28\] A file could not be written \(No space left on device\)"):
        with explaining_failure("A file", "Make room"):
            raise full


def test_a_folder_that_another_process_makes_meanwhile_is_no_file(tmp_path, monkeypatch):
    folder, look = tmp_path / "made", Path.is_dir

    def is_dir(path):
        was_there = look(path)
        if path == folder:
            folder.mkdir(exist_ok=True)
        return was_there

    monkeypatch.setattr(Path, "is_dir", is_dir)
    check_place(folder, "`output_dir`")
    assert look(folder)


def test_what_fails_leaves_no_empty_folder_of_its_own(tmp_path):
    new, old, full = tmp_path / "new", tmp_path / "old", tmp_path / "full"
    old.mkdir()
    for folder in (new, old, full):
        with pytest.raises(ValueError, match="refused"), leaving_no_empty_folder(folder):
            folder.mkdir(exist_ok=True)
            if folder == full:
                (folder / "checkpoint").touch()
            raise ValueError("refused")
    assert not new.exists() and old.is_dir() and (full / "checkpoint").is_file()
    with leaving_no_empty_folder(new):
        new.mkdir()
    assert new.is_dir()
