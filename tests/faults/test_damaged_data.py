# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Damaged files, damaged text, chats out of order and templates that do not fit: named by file, line or row, or counted.
"""

import json
import warnings

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, IterableDataset

from helpers.tiny import EOS, PAD, TEMPLATE, VOCAB, make_target, make_tokenizer
from trl_draft_opd.cli import main
from trl_draft_opd.cli.rows import load_rows
from trl_draft_opd.data.collators import RowCollator
from trl_draft_opd.data.text_reader import TextReader
from trl_draft_opd.responses import write_responses
from trl_draft_opd.rollout.acceptance import SamplingSettings


GOOD = b'{"prompt": "w9", "completion": "w10 w11"}\n'


def as_dataset(rows):
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def make_reader(template=None, tokenizer=None, **settings):
    return TextReader(tokenizer or make_tokenizer(), (EOS,), VOCAB, chat_template=template, **settings)


def read_prompts(rows, template=None, tokenizer=None):
    return make_reader(template, tokenizer).read_prompts(as_dataset(rows))


def read_texts(rows, template=None, tokenizer=None):
    return make_reader(template, tokenizer, max_length=64).read_texts(as_dataset(rows))


READERS = pytest.mark.parametrize("read", [read_prompts, read_texts])


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def warnings_of(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(warning.message) for warning in caught if "trl_draft_opd" in warning.filename]


# -- files (faults 8 and 9) -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("cut.jsonl", GOOD * 5 + GOOD[:20], "line 6, its last, ends in the middle: its writer was interrupted"),
        ("cut.json", b"[" + GOOD[:-1] + b",\n" + GOOD[:20], "line 2, its last, ends in the middle"),
        (
            "nested.json",
            b'{\n "data": [\n  {"prompt": w9}\n ]\n}\n',
            r"line 3 is not JSON \(Expecting value at column 14\)",
        ),
        ("rows.json", GOOD * 2 + b"hello\n" + GOOD, "line 3 is not JSON"),
        ("word.jsonl", GOOD + b"hello\n" + GOOD, r"line 2 is not JSON \(Expecting value at column 1\)"),
        ("nul.jsonl", GOOD + GOOD.replace(b"w9", b"w\x009"), r"line 2 is not JSON \(Invalid control character"),
        ("latin.jsonl", GOOD + GOOD.replace(b"w9", b"w\xff9"), r"line 2 is not UTF-8 \(byte 0xff at 13\)"),
        ("half.jsonl", GOOD + GOOD.replace(b"w9", rb"w\ud83d9"), "line 2 holds half of a surrogate pair"),
        ("empty.jsonl", b"", "it has no rows"),
        ("cut.csv", b'prompt,completion\nw9,w10\nw9,"w1', "EOF inside string"),
        ("noise.parquet", b"PAR1" + bytes(90), "[Pp]arquet"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"The dataset '{path}' cannot be read: .*{reason}.*Fix or replace it"):
        load_rows(str(path), None, "train")


def test_the_command_line_says_it_in_one_line_and_does_nothing(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes(GOOD + GOOD[:20])
    flags = ["--drafter", "x", "--target", "y", "--output_dir", str(tmp_path / "out")]
    assert main(["opd", "--dataset", str(tmp_path / "rows.jsonl"), *flags, "--use_cpu"]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl' cannot be read: line 2, its last, ends in the middle" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_whole_file_reads_as_it_did(tmp_path):
    rows = [{"prompt": "w9 \U0001f600"}, {"prompt": "w10 é"}]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=i > 0) + "\n" for i, row in enumerate(rows))
    )
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert list(load_rows(str(tmp_path / "a.jsonl"), None, "train")) == rows
    assert list(load_rows(str(tmp_path / "a.json"), None, "train")) == rows


@READERS
def test_a_nul_in_a_text_names_row_and_place(read):
    rows = [{"prompt": "w9", "completion": "w10"}, {"prompt": "w9 w\x008", "completion": "w10"}]
    with pytest.raises(
        ValueError, match=r"Row 1 of the dataset: the text holds a NUL character at index 4: 'w9 w\\x008'"
    ):
        read(rows)
    rows = [chat(("user", "w9"), ("assistant", "w10")), chat(("user", "\0w9"), ("assistant", "w10"))]
    with pytest.raises(ValueError, match="Row 1 of the dataset: .*NUL character at index 0"):
        read(rows)


@READERS
@pytest.mark.parametrize("row", [0, 2])
def test_bytes_that_arrow_took_for_text_name_their_row(read, row):
    texts = [b"w9", b"w10", b"w11"]
    texts[row] = b"w\xff"
    column = pa.StringArray.from_buffers(3, *pa.array(texts, pa.binary()).buffers()[1:])
    rows = Dataset(pa.table({"prompt": column, "completion": ["w12"] * 3}))
    with pytest.raises(ValueError, match=f"Row {row} of the dataset: 'utf-8' codec can't decode byte 0xff"):
        read(rows)


def test_half_of_a_surrogate_pair_names_its_row():
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "w9"}, {"prompt": "w9 \ud83d"}]))
    with pytest.raises(
        ValueError, match=r"Row 1 of the dataset: the text holds half of a surrogate pair at index 3: .*ud83d"
    ):
        list(read_prompts(rows))


# -- rows that come twice (fault 10) ----------------------------------------------------------------------------------


def test_repeated_prompts_are_counted_and_every_row_stays():
    rows, notes = warnings_of(lambda: read_prompts([{"prompt": p} for p in ("w9", "w10", "w9", "w9")]))
    assert rows["prompt_ids"][:] == [[9], [10], [9], [9]]
    assert notes == [
        "2 of 4 rows repeat an earlier row's prompt: the target responds once, and each row trains on that response."
    ]


def test_repeated_texts_are_counted_and_answers_to_one_prompt_are_none():
    rows = [{"prompt": "w9", "completion": c} for c in ("w10", "w11", "w10")]
    _, notes = warnings_of(lambda: read_texts(rows))
    assert notes == [
        "1 of 3 rows repeat an earlier row token by token, and are trained on again. Drop them if that is not meant."
    ]


def test_a_store_keeps_the_first_response_to_a_prompt_and_counts_the_others(tmp_path):
    rows = [{"prompt_ids": [9], "completion_ids": [c, EOS]} for c in (10, 11, 12)] + [
        {"prompt_ids": [8], "completion_ids": [10, EOS]}
    ]
    distribution = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
    store, notes = warnings_of(
        lambda: write_responses(
            make_target(),
            Dataset.from_list(rows),
            tmp_path,
            sampling=distribution,
            max_completion_length=8,
            engine="dataset",
        )
    )
    assert (store.find([9]), store.find([8])) == ([10, EOS], [10, EOS])
    assert notes == ["2 of 4 responses are to a prompt that has one before; the first of each was kept."]


def test_an_id_column_plays_no_part_because_rows_are_known_by_their_number():
    rows, notes = warnings_of(lambda: read_prompts([{"prompt": p, "id": 7, "sample_id": 7} for p in ("w9", "w10")]))
    assert rows["sample_id"][:] == [0, 1] and notes == []


# -- templates and chats (faults 11 and 15) ---------------------------------------------------------------------------


ONE_CHAT = [chat(("user", "w9"), ("assistant", "w10 w11"))]


@READERS
def test_chats_without_a_template_say_how_to_give_one(read):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match="The dataset holds chats, but the tokenizer has no chat template. Pass `chat_template="
    ):
        read(ONE_CHAT, tokenizer=tokenizer)
    assert len(read([{"prompt": "w9", "completion": "w10"}], tokenizer=tokenizer)) == 1


@READERS
def test_a_template_that_leaves_out_the_generation_prompt_is_refused_with_the_missing_part(read):
    template = TEMPLATE.partition("{% if add_generation_prompt %}")[0]
    with pytest.raises(
        ValueError, match="writes '<s> assistant' before a response but leaves it out.*if add_generation_prompt"
    ):
        read(ONE_CHAT, template)


@READERS
def test_a_template_that_writes_nothing_before_an_answer_needs_no_generation_prompt(read):
    inline = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    (row,) = read(ONE_CHAT, inline)
    assert row.get("prompt_ids", row.get("input_ids"))[:1] == [9]


@READERS
@pytest.mark.parametrize(
    "role, fix", [("gpt", "Rename it to 'assistant'"), ("narrator", r"Rename it to one of \('system'")]
)
def test_a_role_that_the_template_does_not_know_names_row_and_message(read, role, fix):
    rows = [*ONE_CHAT, chat(("user", "w9"), (role, "w10"), ("user", "w8"), ("assistant", "w11"))]
    with pytest.raises(ValueError, match=f"Row 1 of the dataset: message 1 has the role '{role}'.*{fix}"):
        read(rows)


@READERS
def test_a_role_that_the_template_names_is_read(read):
    template = "{% if messages[0]['role'] == 'narrator' %}w7 {% endif %}" + TEMPLATE
    assert len(read([chat(("narrator", "w9"), ("user", "w8"), ("assistant", "w11"))], template)) == 1


@READERS
@pytest.mark.parametrize(
    "turns",
    [
        [("user", "w9"), ("system", "w8")],
        [("user", "w9"), ("user", "w8")],
        [("assistant", "w7"), ("user", "w8")],
        [("system", "w7"), ("assistant", "w7"), ("user", "w8")],
    ],
)
def test_turns_out_of_order_are_counted(read, turns):
    rows = [chat(*turns, ("assistant", "w10 w11")), *ONE_CHAT]
    read_rows, notes = warnings_of(lambda: read(rows))
    assert len(read_rows) == 2
    assert [note for note in notes if note.startswith("1 of 2 rows have turns out of order")] == notes and notes


@READERS
def test_turns_in_order_are_not_counted(read):
    turns = [
        ("system", "w7"),
        ("user", "w9"),
        ("assistant", "w8"),
        ("tool", "w9"),
        ("tool", "w9"),
        ("assistant", "w8"),
    ]
    assert warnings_of(lambda: read([chat(*turns)]))[1] == []


# -- an end of sequence that also pads (fault 14) ---------------------------------------------------------------------


def test_an_eos_that_also_pads_is_read_and_supervised_where_it_is_text():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = read_texts(
        [{"prompt": "w9", "completion": "w10 w11"}, {"prompt": "w9 w8", "completion": "w10 w11 w12"}],
        tokenizer=tokenizer,
    )
    batches = {pad: RowCollator(pad)(list(rows)) for pad in (PAD, EOS)}
    assert batches[EOS]["input_ids"][0].tolist() == [9, 10, 11, EOS, EOS, EOS]
    for name in ("attention_mask", "completion_mask"):
        assert torch.equal(batches[EOS][name], batches[PAD][name])
    assert batches[EOS]["completion_mask"][0].tolist() == [False, True, True, True, False, False]
