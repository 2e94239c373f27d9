# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Small files that users' rows and templates look like, read with a real target's tokenizer under three templates: its
own, one that takes strings alone, and one that prints the date.
"""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from helpers.chats import ENCODES, JOINS, TAKES_BOTH, move_clock, noted
from trl_draft_opd.cli.rows import load_rows
from trl_draft_opd.data.text_reader import TextReader


OWN, STRINGS_ONLY, CLOCK = "its own", "strings_only.jinja", "clock.jinja"


@pytest.fixture(scope="module")
def cases(shared_dir: Path) -> Path:
    return shared_dir / "cases"


@pytest.fixture(scope="module")
def make_reader(shared_dir: Path):
    folder = shared_dir / "targets" / "gsm8k-qwen3-7m"
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)

    def make(template: str = OWN, **settings) -> TextReader:
        is_file = template in (STRINGS_ONLY, CLOCK)
        source = (shared_dir / "cases" / template).read_text("utf-8") if is_file else template
        source = None if template == OWN else source
        return TextReader(tokenizer, (tokenizer.eos_token_id,), config.vocab_size, chat_template=source, **settings)

    return make


def read(reader: TextReader, path: Path) -> list[dict]:
    return reader.read_texts(load_rows(str(path), None, "train")).to_list()


def supervised(reader: TextReader, row: dict) -> str:
    marked = [token for token, mark in zip(row["input_ids"], row["completion_mask"], strict=True) if mark]
    return reader.tokenizer.decode(marked)


def test_every_case_has_a_test(cases):
    here = Path(__file__).read_text("utf-8") + Path(__file__).with_name("test_lengths.py").read_text("utf-8")
    assert [path.name for path in cases.iterdir() if path.name != "README.md" and path.name not in here] == []


@pytest.mark.parametrize("template", [OWN, STRINGS_ONLY, CLOCK])
def test_contents_in_parts_give_the_ids_of_plain_strings(make_reader, cases, tmp_path, template):
    rows = [json.loads(line) for line in (cases / "content_parts.jsonl").read_text("utf-8").splitlines()]
    for message in (message for row in rows for message in row["messages"]):
        if not isinstance(message["content"], str):
            message["content"] = "".join(part["text"] for part in message["content"])
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    reader = make_reader(template)
    assert read(reader, cases / "content_parts.jsonl") == read(reader, plain)
    assert [supervised(reader, row) for row in read(reader, plain)] == ["4<|im_end|>", "8<|im_end|>"]


@pytest.mark.parametrize("template", [OWN, STRINGS_ONLY])
@pytest.mark.parametrize(
    "name, words",
    [
        ("content_image.jsonl", ["Row 0", "message 0", "part 0", "image"]),
        ("content_null.jsonl", ["Row 0", "message 1"]),
    ],
)
def test_contents_that_are_no_text_are_refused_by_row_and_message(make_reader, cases, template, name, words):
    with pytest.raises(ValueError) as refused:
        read(make_reader(template), cases / name)
    assert [word for word in words if word not in str(refused.value)] == []


def test_content_under_another_key_is_refused_by_row_and_message(make_reader, cases, tmp_path):
    (tmp_path / "second.jsonl").write_text((cases / "content_null.jsonl").read_text("utf-8").splitlines()[1], "utf-8")
    with pytest.raises(ValueError, match="Row 0.*message 0.*Rename its `text`"):
        read(make_reader(), tmp_path / "second.jsonl")


@pytest.mark.parametrize("template", [TAKES_BOTH, ENCODES, JOINS])
def test_tools_and_calls_reach_the_text_alike_from_lines_lists_and_parquet(make_reader, cases, tmp_path, template):
    reader = make_reader(template)
    from_lines = read(reader, cases / "tools.jsonl")
    rows = [json.loads(line) for line in (cases / "tools.jsonl").read_text("utf-8").splitlines()]
    listed = Dataset.from_list(rows)
    listed.to_parquet(tmp_path / "tools.parquet")
    read_again = [reader.read_texts(listed).to_list(), read(reader, tmp_path / "tools.parquet")]
    assert [[row["input_ids"] for row in again] for again in read_again] == [
        [row["input_ids"] for row in from_lines]
    ] * 2
    # The same, with arguments and tools as JSON text.
    (as_text,) = read(reader, cases / "tools_as_json_text.jsonl")
    assert as_text["input_ids"] == from_lines[0]["input_ids"]
    for row, name, arguments in zip(from_lines, ("weather", "add"), ({"city": "Rome"}, {"x": 1, "y": 2}), strict=True):
        whole, response = reader.tokenizer.decode(row["input_ids"]), supervised(reader, row)
        assert "null" not in whole and '"parameters"' in whole.removesuffix(response)
        assert name in response and f'"arguments": {json.dumps(arguments)}' in response


@pytest.mark.parametrize("template", [OWN, STRINGS_ONLY])
def test_a_template_that_writes_no_calls_refuses_them(make_reader, cases, template):
    with pytest.raises(ValueError, match="Row 0.*message 1 has `tool_calls` that the chat template does not write"):
        read(make_reader(template), cases / "tools.jsonl")


@pytest.mark.parametrize(
    "name, responses",
    [
        ("sharegpt.jsonl", ["Blue.<|im_end|>"]),
        ("question_answer.jsonl", ["12<|im_end|>"]),
        ("alpaca.jsonl", ["chat<|im_end|>", "7<|im_end|>"]),
        ("unicode.jsonl", ["你好 — ça va?<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("template", [OWN, STRINGS_ONLY, CLOCK])
def test_rows_of_other_conventions_are_read_as_what_they_are(make_reader, cases, template, name, responses):
    reader = make_reader(template)
    assert [supervised(reader, row) for row in read(reader, cases / name)] == responses


def test_control_tokens_in_a_text_are_read_and_counted_once(make_reader, cases):
    reader = make_reader()
    (row,), notes = noted(lambda: read(reader, cases / "control_tokens.jsonl"))
    assert supervised(reader, row).endswith("Hello.<|im_end|>")
    assert len([note for note in notes if "1 of 1 rows have special tokens" in note]) == 1


def test_a_template_with_a_clock_gives_the_same_ids_on_every_day(make_reader, cases, monkeypatch):
    # In memory, so that nothing of the first day comes out of a cache.
    rows = Dataset.from_list(load_rows(str(cases / "question_answer.jsonl"), None, "train").to_list())
    found = []
    for day in ("2026-11-28", "2031-05-17"):
        move_clock(monkeypatch, day)
        reader = make_reader(CLOCK)
        chat = [{"role": "user", "content": "hi"}]
        assert day in reader.tokenizer.apply_chat_template(chat, chat_template=reader.chat_template, tokenize=False)
        found.append(reader.read_texts(rows)["input_ids"][:])
    assert found[0] == found[1]
    reader = make_reader(CLOCK, chat_template_kwargs={"strftime_now": "2026-05-01"})
    assert "Today is 2026-05-01" in reader.tokenizer.decode(reader.read_texts(rows)["input_ids"][0])
