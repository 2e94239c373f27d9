# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""`evaluate --readings`: tau along stored responses, without the target's decoder layers."""

import json
from pathlib import Path

import pytest

from helpers.files import save_target, write_rows
from trl_draft_opd import FrozenTarget
from trl_draft_opd.__main__ import main


LENGTH = ["--max-completion-length", "12"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a target, a drafter, rows, the target's responses and a store of its readings of them."""
    root = tmp_path_factory.mktemp("made")
    made = {name: str(root / name) for name in ("target", "drafter", "rows.jsonl", "responses", "readings")}
    save_target(root / "target")
    write_rows(root / "rows.jsonl", ({"prompt": f"w{8 + i} w9 w10"} for i in range(6)))
    rows = ["--target", made["target"], "--dataset", made["rows.jsonl"]]
    small = ["--num-hidden-layers", "1", "--block-size", "4", "--seed", "3"]
    assert main(["init", "--family", "dflash", "--target", made["target"], "--output", made["drafter"], *small]) == 0
    assert main(["generate", *rows, "--output", made["responses"], *LENGTH]) == 0
    texts = ["--responses", made["responses"], "--drafter", made["drafter"], "--output", made["readings"]]
    assert main(["read", *rows, *texts]) == 0
    return made


def evaluate(made: dict[str, str], *more: str, rows: str | None = None) -> int:
    words = ["--target", made["target"], "--drafter", made["drafter"], "--dataset", rows or made["rows.jsonl"]]
    return main(["evaluate", *words, *LENGTH, *more])


def test_without_its_body_a_drafter_has_the_tau_that_it_has_along_the_same_responses_in_process(
    made: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    found, load, loaded = [], FrozenTarget.load.__func__, []

    def load_noting(cls, *args, **kwargs):
        loaded.append(load(cls, *args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(FrozenTarget, "load", classmethod(load_noting))
    for more in ([], ["--readings", made["readings"]]):
        path = tmp_path / f"{len(more)}.json"
        assert evaluate(made, "--responses", made["responses"], "--json", str(path), *more) == 0
        found.append(json.loads(path.read_text("utf-8")))
        printed = " ".join(capsys.readouterr().out.split())
    assert found[0] == found[1] and found[1]["is_replay"] and found[1]["num_blocks"] > 0
    assert [target.has_body for target in loaded] == [True, False]
    assert loaded[1].source.delivered_bytes > 0
    assert "The target was loaded without its body: tau is measured by replay" in printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--readings", "there"], "Name their folder in `--responses`"),
        (["--shared-folder", "shared"], "Give the servers' `http://...` in `--readings`"),
        (["--readings", "http://127.0.0.1:9", "--responses", "there"], "Name it in `--shared-folder`"),
    ],
)
def test_readings_that_cannot_be_evaluated_on_are_refused_before_anything_is_loaded(
    made: dict[str, str], more: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(FrozenTarget, "load", None)
    assert evaluate(made, *more) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_prompts_without_a_response_or_without_a_reading_are_named(
    made: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    rows, sources = tmp_path / "rows.jsonl", ["--responses", made["responses"], "--readings", made["readings"]]
    more = json.dumps({"prompt": "w20 w21 w22"}) + "\n"
    rows.write_text(Path(made["rows.jsonl"]).read_text("utf-8") + more, "utf-8")
    assert evaluate(made, *sources, rows=str(rows)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert (
        "1 prompts of the dataset have no response" in error and "row 6" in error and "trl-draft-opd generate" in error
    )
    assert (
        main(["generate", "--target", made["target"], "--dataset", str(rows), "--output", made["responses"], *LENGTH])
        == 0
    )
    capsys.readouterr()
    assert evaluate(made, *sources, rows=str(rows)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "1 of 7 texts of the dataset are not in the store of readings, the first of them row 6" in error
