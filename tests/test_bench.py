# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The command `bench`, against servers in this process, and the served speed on a card."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_record import CANARIES, make_record

from helpers.files import save_target, write_rows
from helpers.streaming_server import streaming
from helpers.tiny import make_target
from trl_draft_opd import Eagle3DraftModel
from trl_draft_opd.cli import main
from trl_draft_opd.export import Publication, TargetOfExport, export_drafter
from trl_draft_opd.export.card import CARD_FILE, write_card
from trl_draft_opd.export.record import TrainingRecord, read_record
from trl_draft_opd.export.served import ServedLevel, ServedSpeed
from trl_draft_opd.export.serving import serving_settings


LEVEL = ServedLevel(1, 120.0, 80.0, 1.5, 1.4, 1.6, 2.5, 0.05, 0.008, 64, 64)
SERVED = ServedSpeed("gsm8k-test", "c" * 64, 64, "two CPU cores", "vllm", "0.32.0+cpu", 128, 0.0, False, 3, [LEVEL])
SLOWER = replace(LEVEL, concurrency=16, speedup=0.8, speedup_low=0.7, speedup_high=0.9, num_equal=63)


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{"question": f"w{8 + i} w9 w10", "answer": "w11"} for i in range(4)]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture
def words(target_folder: str, rows_file: str) -> list[str]:
    small = "--concurrency 1 2 --repeats 2 --warmup 0 --max-completion-length 12 --timeout 5".split()
    return ["bench", "--target", target_folder, "--dataset", rows_file, *small]


# ---- the command ----------------------------------------------------------------------------------------------------


def test_two_servers_become_tables_a_file_a_figure_and_a_row_of_the_card(words, target_folder, tmp_path, capsys):
    folder, target = tmp_path / "export", make_target()
    described = TargetOfExport("org/target", embedding=target.causal_lm.get_input_embeddings().weight)
    export_drafter(Eagle3DraftModel.from_target(target, ttt_steps=4), folder, target=described)
    numbers, figure = tmp_path / "speed.json", tmp_path / "speed.png"
    flags = ["--json", str(numbers), "--figure", str(figure), "--record", "gsm8k-test", "--drafter", str(folder)]
    with streaming(per_round=3, kept=2, delay=0.02) as drafted, streaming(delay=0.02) as plain:
        flags += ["--base-url", drafted.url, "--baseline-url", plain.url, "--machine", "two CPU cores"]
        assert main([*words, *flags]) == 0
        # Rows as everywhere: a chat, rendered by the target's template, as ids.
        assert drafted.bodies[0][1]["prompt"] == plain.bodies[0][1]["prompt"] == [1, 4, 8, 9, 10, 2, 1, 5]
    out = capsys.readouterr().out
    assert "8 runs, warm-ups included, of at most 120 s each, 4 prompts." in out
    assert "Against the baseline: " in out and "4 of 4" in out
    assert "baseline: the engine counts no drafts: it decodes plainly." in out
    content = json.loads(numbers.read_text())
    assert [level["tau"] for level in content["served"]["levels"]] == [3.0, 3.0]
    assert content["comparison"]["sentence"] in out
    assert figure.read_bytes()[:4] == b"\x89PNG"
    (served,) = read_record(folder).served
    assert (served.machine, served.engine, served.repeats, served.num_prompts) == ("two CPU cores", "vllm", 2, 4)
    # A third of the pieces, as far apart.
    assert [1.3 < level.speedup < 4 for level in served.levels] == [True, True]
    assert "## Served speed" in (folder / CARD_FILE).read_text("utf-8")


def test_two_files_are_joined_as_two_servers_are(words, tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("plain.json", "drafter.json")]
    for file, changes in zip(files, ({"delay": 0.02}, {"per_round": 3, "kept": 2, "delay": 0.02}), strict=True):
        with streaming(**changes) as server:
            assert main([*words, "--base-url", server.url, "--json", file]) == 0
    joined = tmp_path / "joined.json"
    assert main(["bench", "--compare", *files, "--json", str(joined)]) == 0
    content = json.loads(joined.read_text())
    assert f"Against the baseline: {content['comparison']['sentence']}." in capsys.readouterr().out
    assert content["comparison"]["levels"][0]["speedup"] > 1.3
    assert content["served"]["levels"][0]["tau"] == 3.0 and content["baseline"]["levels"][0]["tau"] is None


def test_texts_that_differ_are_counted(words, tmp_path, capsys):
    numbers = tmp_path / "speed.json"
    with streaming(change=1) as other, streaming() as plain:
        urls = ["--base-url", other.url, "--baseline-url", plain.url]
        assert main([*words, *urls, "--json", str(numbers)]) == 0
    assert json.loads(numbers.read_text())["comparison"]["levels"][0]["num_equal"] == 0
    assert "0 of 4" in capsys.readouterr().out


@pytest.mark.parametrize(("form", "path"), [("text", "/v1/completions"), ("chat", "/v1/chat/completions")])
def test_a_server_that_takes_no_ids_is_sent_text_or_chats(words, form, path):
    with streaming() as server:
        assert main([*words, "--base-url", server.url, "--form", form]) == 0
    assert {each for each, _ in server.bodies} == {path}
    body = server.bodies[0][1]
    if form == "text":
        assert body["prompt"] == "<s> user w8 w9 w10 </s> <s> assistant" and body["add_special_tokens"] is False
    else:
        assert body["messages"] == [{"role": "user", "content": "w8 w9 w10"}]


def test_what_was_measured_is_in_the_file_when_a_server_fails(words, tmp_path, capsys):
    numbers = tmp_path / "speed.json"
    key = tmp_path / "key"
    key.write_text("canary-0123\n")
    # Runs of four prompts: the third one fails.
    with streaming(fault=lambda number: "status" if number == 10 else None) as server:
        flags = ["--base-url", server.url, "--json", str(numbers), "--api-key-file", str(key)]
        assert main([*words, *flags]) == 2
    error = capsys.readouterr()
    assert re.search(r"2 at a time, repeat 1, prompt \d: status 503 .*busy; you sent Bearer \*\*\*", error.err)
    assert len(json.loads(numbers.read_text())["served"]["runs"]) == 2
    assert "canary" not in error.err + error.out + numbers.read_text()


def test_a_key_goes_to_the_server_it_was_given_for(words, tmp_path):
    key = tmp_path / "key"
    key.write_text("canary-0123")
    with streaming() as one, streaming() as other:
        urls = ["--base-url", one.url, "--baseline-url", other.url, "--api-key-file", str(key)]
        assert main([*words, *urls]) == 0
    assert {sent.get("Authorization") for sent in one.headers} == {"Bearer canary-0123"}
    assert {sent.get("Authorization") for sent in other.headers} == {None}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "needs `--base-url`, `--dataset` and `--target`"),
        (["--compare", "a.json"], "`--compare` takes two files"),
        (["--compare", "a.json", "b.json", "--base-url", "http://a"], "and no server"),
        (["--base-url", "http://a", "--dataset", "x"], "needs `--target`"),
        (["--compare", "a", "b", "--json", "no/such/place.json"], "lies in no folder that exists"),
        (["--compare", "a", "b", "--target", "t", "--record", "x"], "needs `--drafter`"),
        (
            ["--compare", "a", "b", "--target", "t", "--record", "x", "--drafter", ".", "--machine", "/home/me"],
            "A machine can be recorded as",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, reason, capsys):
    assert main(["bench", *flags]) == 2
    assert reason in capsys.readouterr().err


# ---- the card -------------------------------------------------------------------------------------------------------


@pytest.fixture
def card(tmp_path: Path):
    def write(*served: ServedSpeed) -> str:
        target = TargetOfExport("org/target")
        publication = Publication.of(
            Eagle3DraftModel.from_target(make_target(), ttt_steps=4),
            record=make_record(served=list(served)),
            repo_id="org/tiny-eagle3",
            target=target,
        )
        write_card(tmp_path, publication, serving_settings(publication))
        return (tmp_path / CARD_FILE).read_text("utf-8")

    return write


def test_a_card_without_served_speed_is_as_it_was(card):
    text = card()
    assert "Served" not in text and "served without" not in text
    assert "\n```\n\n## When it pays\n" in text
    assert "served" not in make_record().to_dict()


def test_the_card_has_a_row_per_load_and_warns_where_the_speed_up_vanishes(card):
    text = card(replace(SERVED, levels=[LEVEL, SLOWER]))
    assert (
        "vLLM 0.32.0+cpu on two CPU cores: 64 prompts of gsm8k-test, at most 128 tokens, temperature 0, 3 repeats."
        in text
    )
    head = (
        "requests at a time | tokens/s | plain tokens/s | speed-up | tau | first token | between tokens | equal texts"
    )
    assert f"| {head} |" in text
    assert "| 1 | 120.0 | 80.0 | 1.50x [1.40, 1.60] | 2.500 | 50 ms | 8.0 ms | 64 of 64 |" in text
    assert "**The speed-up does not hold at every load:** faster at 1 request at a time, slower at 16." in text


def test_the_card_of_a_drafter_that_is_faster_at_every_load_does_not_warn(card):
    text = card(SERVED)
    assert (
        "does not hold" not in text
        and "It was faster at 1 request at a time; beyond the last row nothing is known." in text
    )


def test_the_card_claims_no_speed_up_where_plain_decoding_was_not_measured(card):
    alone = replace(LEVEL, plain_tokens_per_second=None, speedup=None, speedup_low=None, speedup_high=None)
    text = card(replace(SERVED, levels=[replace(alone, num_equal=None, num_compared=None)]))
    assert "| requests at a time | tokens/s | tau | first token | between tokens |" in text
    assert "does not hold" not in text and "speed-ups are" not in text and "It was" not in text


@pytest.mark.parametrize("canary", [*CANARIES[:2], "http://10.0.0.1", "me@host"])
@pytest.mark.parametrize("name", ["machine", "prompt_set", "engine", "engine_version"])
def test_nothing_private_gets_into_the_record_of_a_served_speed(name, canary):
    record = make_record(served=[replace(SERVED, **{name: canary})])
    with pytest.raises(ValueError, match=rf"served\[0\]\.{name} (must be|looks like an access token)"):
        record.check()


def test_a_record_with_served_speed_comes_back_as_it_was():
    record = make_record(served=[replace(SERVED, levels=[LEVEL, SLOWER])])
    assert TrainingRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
