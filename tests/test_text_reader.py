# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of `trl_draft_opd/data/text_reader.py`. The tokenizer and its templates are built on the spot; every word is one
token.
"""

import warnings
from itertools import groupby

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trl_draft_opd.data.collators import RowCollator, left_pad_prompts
from trl_draft_opd.data.text_reader import TextReader


SPECIAL = ["<pad>", "<bos>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"]
WORDS = ["[UNK]", "\n", *"system user assistant tool None hi there add two four five sum hithere".split()]
VOCAB = {token: i for i, token in enumerate(SPECIAL + WORDS)}
EOS = VOCAB["<|im_end|>"]

TURN = "<|im_start|>{{ m['role'] }}\n{{ content }}<|im_end|>\n"
LOOP = "{% for m in messages %}{% set content = m['content'] %}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
CHATML = LOOP + TURN + PROMPT + "{% endif %}"
STRIPS = (
    "{% if m['role'] == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1] %}{% endif %}"
)
STRIPS_THINKING = LOOP + STRIPS + TURN + PROMPT + "{% endif %}"
OPTIONAL_THINKING = LOOP + TURN + PROMPT + "{% if not enable_thinking %}<think>\n</think>{% endif %}{% endif %}"
OPENS_THINKING = LOOP + TURN + PROMPT + "<think>{% endif %}"
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML


def make_tokenizer(template=CHATML, adds_bos=False):
    backend = Tokenizer(models.WordLevel(VOCAB, unk_token="[UNK]"))
    lines, words = pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Split(" ", "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    if adds_bos:
        special = [("<bos>", VOCAB["<bos>"])]
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<think>", "</think>"],
        chat_template=template,
    )


SETTINGS = {"eos_token_ids": (EOS,), "vocab_size": len(VOCAB)}


def make_reader(tokenizer=None, **changes):
    return TextReader(tokenizer or make_tokenizer(), **{**SETTINGS, **changes})


def as_dataset(rows):
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def read_texts(rows, tokenizer=None, **changes):
    return make_reader(tokenizer, **changes).read_texts(as_dataset(rows))


def read_prompts(rows, tokenizer=None, **changes):
    return make_reader(tokenizer, **changes).read_prompts(as_dataset(rows))


def read_responses(rows, tokenizer=None, **changes):
    return make_reader(tokenizer, **changes).read_responses(as_dataset(rows))


def tokens(token_ids):
    names = list(VOCAB)
    return " ".join(names[i].replace("\n", "/") for i in token_ids)


def written(row):
    """Return the supervised tokens of a row; `.` stands for every run of tokens that the target did not write."""
    marked = zip(row["input_ids"], row["completion_mask"], strict=True)
    runs = [(mark, tokens(token_id for token_id, _ in run)) for mark, run in groupby(marked, key=lambda pair: pair[1])]
    return " ".join(run if mark else "." for mark, run in runs)


def chat(*contents):
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(contents)]


# Prompts and completions


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("add two", " four", "add two four <|im_end|>"),
        ("add two", " four<|im_end|>\n five", "add two four <|im_end|>"),  # the target stops at its EOS
        ("hi", "there", "hi there <|im_end|>"),  # not the one token "hithere", which the target never read
    ],
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_string_completion_continues_its_prompt_and_ends_with_one_eos(prompt, completion, expected, adds_bos):
    row = read_texts([{"prompt": prompt, "completion": completion}], make_tokenizer(adds_bos=adds_bos))[0]
    assert tokens(row["input_ids"]) == ("<bos> " if adds_bos else "") + expected
    assert written(row) == ". " + expected.removeprefix(prompt).strip()
    assert row["sample_id"] == 0


def test_a_completion_without_eos_needs_a_tokenizer_with_eos():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="Row 0 .*no `eos_token`"):
        read_texts([{"prompt": "hi", "completion": " there"}], tokenizer)


def test_every_token_of_a_text_but_the_first_is_supervised():
    assert written(read_texts([{"text": "add two four"}])[0]) == ". two four"


def test_stored_ids_are_taken_as_they_are():
    masked = read_texts([{"input_ids": [7, 8, 9, 10], "completion_mask": [1, 0, 1, 1]}])[0]
    assert (masked["input_ids"], masked["completion_mask"]) == ([7, 8, 9, 10], [0, 0, 1, 1])
    assert read_texts([{"input_ids": [7, 8], "completion_mask": [False, True]}])["completion_mask"][:] == [[0, 1]]
    stored = read_texts([{"prompt_ids": [7, 8], "completion_ids": [9, EOS, 9]}])[0]
    assert (stored["input_ids"], stored["completion_mask"]) == ([7, 8, 9, EOS, 9], [0, 0, 1, 1, 1])
    pair = read_responses([{"prompt_ids": [7, 8], "completion_ids": [9, EOS, 9]}])[0]
    assert (pair["prompt_ids"], pair["completion_ids"]) == ([7, 8], [9, EOS, 9])


def test_other_columns_are_ignored_and_ids_come_before_text():
    row = read_texts([{"source": "a", "text": "hi there", "messages": chat("hi", "four"), "prompt": "five"}])[0]
    assert written(row) == ". four <|im_end|> ."
    assert set(row) == {"input_ids", "completion_mask", "sample_id"}
    row = read_texts([{"messages": chat("hi", "four"), "prompt_ids": [7], "completion_ids": [8]}])[0]
    assert row["input_ids"] == [7, 8]


# Chats


def test_an_assistant_turn_ends_with_its_eos_and_not_with_the_newline_behind_it():
    row = read_texts([{"messages": chat("hi", "there")}])[0]
    assert (
        tokens(row["input_ids"]) == "<|im_start|> user / hi <|im_end|> / <|im_start|> assistant / there <|im_end|> /"
    )
    assert written(row) == ". there <|im_end|> ."


@pytest.mark.parametrize("template", [CHATML, STRIPS_THINKING])
def test_every_assistant_turn_is_supervised(template):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = read_texts([{"messages": chat("hi", "there", "add two", "four")}], make_tokenizer(template))[0]
    assert written(row) == ". there <|im_end|> . four <|im_end|> ."


def test_what_stands_behind_the_last_answer_is_cut_and_an_opening_answer_is_not_supervised():
    greeting = {"role": "assistant", "content": "five"}
    row = read_texts([{"messages": [greeting, *chat("hi", "there", "add")]}])[0]
    assert written(row) == ". there <|im_end|> ."
    assert row["completion_mask"][-3:] == [1, 1, 0]


def test_of_a_chat_completion_only_the_completion_is_supervised():
    messages = chat("hi", "there", "add two", "four")
    row = read_texts([{"prompt": messages[:3], "completion": messages[3:]}])[0]
    assert written(row) == ". four <|im_end|> ."
    assert row["input_ids"] == read_texts([{"messages": messages}])[0]["input_ids"]


def test_a_template_that_rewrites_a_turn_leaves_only_the_last_turn_supervised():
    first = chat("hi", "<think> sum </think> there")
    rows = [{"messages": first + chat("add two", "four", "add", "<think> sum </think> five")}, {"messages": first}]
    with pytest.warns(
        UserWarning, match="^1 of 2 rows have assistant turns that the chat template rewrites"
    ) as caught:
        dataset = read_texts(rows, make_tokenizer(STRIPS_THINKING))
    assert len(caught) == 1
    assert written(dataset[0]) == ". <think> sum </think> five <|im_end|> ."
    assert tokens(dataset[0]["input_ids"]).count("<think>") == 1
    assert written(dataset[1]) == ". <think> sum </think> there <|im_end|> ."


@pytest.mark.parametrize(("enable_thinking", "end"), [(True, "/"), (False, "/ <think> / </think>")])
def test_a_template_and_its_variables_are_used(enable_thinking, end):
    settings = {"chat_template": OPTIONAL_THINKING, "chat_template_kwargs": {"enable_thinking": enable_thinking}}
    prompt = read_prompts([{"prompt": chat("hi")}], **settings)[0]
    assert tokens(prompt["prompt_ids"]).endswith("assistant " + end)
    rows = [{"messages": chat("hi", "<think>\n</think> there")}]
    row = read_texts(rows, **settings)[0]
    assert written(row) == (". <think> / </think> there <|im_end|> ." if enable_thinking else ". there <|im_end|> .")


def test_an_answer_that_does_not_continue_the_generation_prompt_is_skipped():
    tokenizer = make_tokenizer(OPENS_THINKING)
    plain, thinking = {"messages": chat("hi", "there")}, {"messages": chat("hi", "<think> sum </think> there")}
    with pytest.warns(UserWarning, match="Skipped 2 of 3 rows: 2 have a response that does not continue"):
        dataset = read_texts([plain, thinking, plain], tokenizer)
    assert dataset["sample_id"][:] == [1]
    assert written(dataset[0]) == ". sum </think> there <|im_end|> ."
    with pytest.raises(ValueError, match="No row is left: 1 has a response"):
        read_responses([plain], tokenizer)


def test_any_of_several_eos_ids_ends_a_turn_and_a_turn_without_eos_is_reported():
    row = read_texts([{"messages": chat("hi", "there <think> four")}], eos_token_ids=(EOS, VOCAB["<think>"]))[0]
    assert written(row) == ". there <think> ."
    with pytest.warns(UserWarning, match="^1 of 1 rows have an assistant turn without an EOS"):
        row = read_texts([{"messages": chat("hi", "there")}], eos_token_ids=(VOCAB["<bos>"],))[0]
    assert written(row) == ". there <|im_end|> /"


def test_keys_that_arrow_fills_with_none_do_not_reach_the_template():
    template = CHATML.replace("{{ content }}", "{{ content }}{% if 'name' in m %} {{ m['name'] }}{% endif %}")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there", "name": "five"}]
    row = read_texts([{"messages": messages}], make_tokenizer(template))[0]
    assert "None" not in tokens(row["input_ids"])
    assert written(row) == ". there five <|im_end|> ."


def test_what_the_template_refuses_names_the_row():
    rows = [{"prompt": chat("hi")}, {"prompt": [{"role": "system", "content": "hi"}]}]
    with pytest.raises(ValueError, match="Row 1 of the dataset: no system here"):
        read_prompts(rows, make_tokenizer(REFUSES_SYSTEM))


# Prompts


def test_a_chat_prompt_ends_with_the_generation_prompt_and_a_string_prompt_stays_as_it_is():
    row = read_prompts([{"prompt": chat("hi")}])[0]
    assert tokens(row["prompt_ids"]) == "<|im_start|> user / hi <|im_end|> / <|im_start|> assistant /"
    assert set(row) == {"prompt_ids", "sample_id"}
    row = read_prompts([{"prompt": "hi there"}], make_tokenizer(adds_bos=True))[0]
    assert tokens(row["prompt_ids"]) == "<bos> hi there"


@pytest.mark.parametrize("messages", [chat("hi", "there", "add two"), chat("hi", "there", "add two", "four")])
def test_the_prompt_of_a_chat_ends_with_its_last_user_turn(messages):
    row = read_prompts([{"messages": messages}])[0]
    assert row["prompt_ids"] == read_prompts([{"prompt": messages[:3]}])[0]["prompt_ids"]


TOOL_CHAT = [*chat("hi", "there"), {"role": "tool", "content": "two"}, {"role": "assistant", "content": "five"}]


@pytest.mark.parametrize(
    ("row", "prompt_end", "completion"),
    [
        ({"messages": chat("hi", "there", "add two", "four")}, "user / add two", "four <|im_end|>"),
        ({"messages": TOOL_CHAT}, "tool / two", "five <|im_end|>"),
        ({"prompt": TOOL_CHAT[:1], "completion": TOOL_CHAT[1:]}, "user / hi", "there <|im_end|>"),
    ],
)
def test_a_chat_is_split_into_a_prompt_and_the_one_turn_that_answers_it(row, prompt_end, completion):
    pair, text_ids = read_responses([row])[0], read_texts([row])[0]["input_ids"]
    assert tokens(pair["prompt_ids"]).endswith(prompt_end + " <|im_end|> / <|im_start|> assistant /")
    assert tokens(pair["completion_ids"]) == completion
    joined_ids = pair["prompt_ids"] + pair["completion_ids"]
    assert joined_ids == text_ids[: len(joined_ids)]


def test_completions_are_dropped_unless_they_are_to_be_kept():
    rows = [{"prompt": "add two", "completion": " four"}]
    row = read_responses(rows)[0]
    assert (tokens(row["prompt_ids"]), tokens(row["completion_ids"])) == ("add two", "four <|im_end|>")
    assert read_prompts(rows).to_list() == [{"prompt_ids": row["prompt_ids"], "sample_id": 0}]


def test_keeping_completions_of_a_dataset_without_any_is_an_error():
    with pytest.raises(ValueError, match=r"\['prompt'\].*`prompt_ids` with `completion_ids`"):
        read_responses([{"prompt": "hi"}])


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": chat("hi", "there")}, {"messages": chat("hi")}],
        [{"prompt": "hi", "completion": " there"}, {"prompt": "hi", "completion": None}],
        [{"prompt": chat("hi"), "completion": chat("hi", "there")[1:]}, {"prompt": chat("hi"), "completion": []}],
        [{"prompt_ids": [7], "completion_ids": [8]}, {"prompt_ids": [7], "completion_ids": []}],
    ],
)
def test_rows_without_a_completion_are_skipped_and_counted(rows):
    for read in (read_texts, read_responses):
        with pytest.warns(UserWarning, match="Skipped 1 of 2 rows: 1 have no (completion|supervised token)"):
            assert read(rows)["sample_id"][:] == [0]


# Lengths and skips


def test_a_text_is_cut_at_the_right():
    assert (
        written(read_texts([{"prompt": "add two", "completion": " four five sum"}], max_length=4)[0]) == ". four five"
    )


def test_rows_that_cannot_be_trained_on_are_skipped_and_counted_and_so_are_those_that_are_cut():
    rows = [
        {"prompt": "add two", "completion": " four"},
        {"prompt": "hi there add two", "completion": " four"},  # prompt of 4
        {"prompt": "hi there add", "completion": " four"},  # nothing left of the completion
        {"prompt": "hi", "completion": " there"},
    ]
    with pytest.warns(UserWarning) as caught:
        dataset = read_texts(rows, max_length=3, max_prompt_length=3)
    assert dataset["sample_id"][:] == [0, 3]
    assert [tokens(i) for i in dataset["input_ids"]] == ["add two four", "hi there <|im_end|>"]
    skipped, *noted = [str(w.message) for w in caught]
    assert skipped.startswith(
        "Skipped 2 of 4 rows: 1 have a prompt longer than `max_prompt_length` 3; 1 have no supervised"
    )
    assert sorted(noted)[0].startswith("1 of 4 rows are longer than `max_length` 3 and were cut there.")
    assert sorted(noted)[1].startswith("1 of 4 rows have no two supervised tokens in a row")


def test_a_prompt_at_the_limit_is_kept():
    with pytest.warns(UserWarning, match="Skipped 1 of 2 rows"):
        dataset = read_prompts([{"prompt": "hi there add"}, {"prompt": "hi there"}], max_prompt_length=2)
    assert dataset["sample_id"][:] == [1]


@pytest.mark.parametrize("row", [{"text": "hi"}, {"text": ""}, {"input_ids": [7, 8], "completion_mask": [1, 0]}])
def test_a_row_whose_only_supervised_token_has_no_context_is_not_trained_on(row):
    with pytest.raises(ValueError, match="No row is left: 1 has no supervised token"):
        read_texts([row])


# Bad input


@pytest.mark.parametrize("read", [read_texts, read_prompts])
def test_an_empty_dataset_is_an_error(read):
    stream = IterableDataset.from_generator(lambda: iter(()))
    for dataset in ([], Dataset.from_dict({"prompt": [], "completion": []}), stream):
        with pytest.raises(ValueError, match="The dataset is empty"):
            read(dataset)


@pytest.mark.parametrize("read", [read_texts, read_prompts])
def test_a_dataset_without_the_columns_is_told_what_is_there_and_what_is_read(read):
    with pytest.raises(ValueError, match=r"\['left', 'right'\].*`prompt`.*`messages`"):
        read([{"left": "hi", "right": "there"}])


def test_what_is_not_one_split_is_an_error():
    for dataset in ({"prompt": ["hi"]}, DatasetDict({"train": Dataset.from_list([{"prompt": "hi"}])})):
        with pytest.raises(ValueError, match=f"got `{type(dataset).__name__}`"):
            read_prompts(dataset)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"prompt": "hi", "completion": " there"}, {"prompt": "", "completion": " there"}),
        ({"prompt": "hi", "completion": " there"}, {"prompt": " ", "completion": " there"}),  # no token
        ({"prompt": "hi", "completion": " there"}, {"prompt": None, "completion": " there"}),
        ({"prompt": chat("hi"), "completion": chat("", "hi")[1:]}, {"prompt": [], "completion": chat("", "hi")[1:]}),
        ({"messages": chat("hi", "there")}, {"messages": []}),
        ({"messages": chat("hi", "there")}, {"messages": [{"role": "assistant", "content": "hi"}]}),
        ({"prompt_ids": [7], "completion_ids": [8]}, {"prompt_ids": [], "completion_ids": [8]}),
    ],
)
def test_an_empty_prompt_names_its_row(good, bad):
    for read in (read_texts, read_responses, read_prompts):
        with pytest.raises(ValueError, match="Row 1 of the dataset: the prompt is empty"):
            read([good, bad])


@pytest.mark.parametrize("token_id", [-1, len(VOCAB)])
@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
def test_stored_ids_outside_the_vocabulary_name_row_and_id(token_id, column):
    row = {"prompt_ids": [7], "completion_ids": [8]}
    rows = [row, {**row, column: [9, token_id]}]
    for read in (read_texts, read_responses):
        with pytest.raises(ValueError, match=f"Row 1 .*token id {token_id} in `{column}` is outside"):
            read(rows)


def test_ids_of_a_tokenizer_larger_than_the_target_are_an_error():
    vocab_size = VOCAB["there"]
    for read, row in ((read_texts, {"text": "hi there"}), (read_prompts, {"prompt": "hi there"})):
        with pytest.raises(ValueError, match=f"Row 0 .*token id {vocab_size} "):
            read([row], vocab_size=vocab_size)


@pytest.mark.parametrize("mask", [[0, 1], [0, 1, 2], None])
def test_a_mask_that_does_not_fit_its_ids_is_an_error(mask):
    types = Features({"input_ids": List(Value("int64")), "completion_mask": List(Value("int64"))})
    dataset = Dataset.from_list([{"input_ids": [7, 8, 9], "completion_mask": mask}], features=types)
    with pytest.raises(ValueError, match="Row 0 .*`completion_mask` must mark 3 tokens with 0 or 1"):
        read_texts(dataset)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3, "completion": "hi"}, "`prompt` must be a string or a list of messages, got 3"),
        ({"prompt": "hi", "completion": chat("hi")}, "`completion` must be a string"),
        ({"prompt": chat("hi"), "completion": "hi"}, "`completion` must be a list of messages"),
        ({"prompt": chat("hi", "there"), "completion": chat("hi")}, "`prompt` ends with an assistant turn"),
        ({"messages": [{"who": "human", "value": "hi"}]}, "`messages` must be a list of messages, each with a `role`"),
        ({"messages": "hi"}, "`messages` must be a list of messages"),
        ({"text": 3}, "`text` must be a string"),
        ({"prompt_ids": 3, "completion_ids": [7]}, "`prompt_ids` must be a list of token ids"),
    ],
)
def test_a_malformed_row_is_named(row, message):
    with pytest.raises(ValueError, match=f"Row 0 of the dataset: {message}"):
        read_texts([row])


# Datasets


def test_several_processes_give_the_same_rows_and_the_same_errors():
    rows = [{"prompt": "hi " * (1 + i % 3), "completion": "there"} for i in range(6)]
    with pytest.warns(UserWarning, match="Skipped 2 of 6 rows"):
        alone = read_texts(rows, max_prompt_length=2)
    with pytest.warns(UserWarning, match="Skipped 2 of 6 rows"):
        together = read_texts(rows, max_prompt_length=2, num_proc=2)
    assert together.to_list() == alone.to_list()
    with pytest.raises(ValueError, match="Row 5 of the dataset: the prompt is empty"):
        read_texts([*rows[:5], {"prompt": "", "completion": "there"}], num_proc=2)


def test_an_iterable_dataset_is_read_lazily_and_gives_the_same_rows():
    rows = [{"prompt": "hi " * (1 + i % 3), "completion": "there", "source": "a"} for i in range(6)]
    with pytest.warns(UserWarning, match="Skipped 2 of 6 rows"):
        expected = read_responses(rows, max_prompt_length=2).to_list()
    read = []
    stream = IterableDataset.from_generator(lambda: (read.append(row) or row for row in rows))
    lazy = read_responses(stream, max_prompt_length=2)
    assert len(read) == 1  # the first row tells the columns
    assert list(lazy) == expected


def test_a_column_of_the_same_name_is_replaced_in_a_stream_too():
    stream = Dataset.from_list([{"prompt_ids": [7, 8], "completion_ids": [9], "sample_id": 5}]).to_iterable_dataset()
    assert list(read_texts(stream)) == [{"input_ids": [7, 8, 9], "completion_mask": [0, 0, 1], "sample_id": 0}]
    assert list(read_prompts(stream)) == [{"prompt_ids": [7, 8], "sample_id": 0}]


def test_a_formatted_dataset_is_read_whole():
    dataset = Dataset.from_list([{"prompt_ids": [7, 8], "completion_ids": [9]}])
    assert read_texts(dataset.with_format("torch", columns=["prompt_ids"]))["input_ids"][:] == [[7, 8, 9]]


def test_a_cached_result_is_found_again(tmp_path):
    Dataset.from_list([{"messages": chat("hi", "there")}]).save_to_disk(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (read_texts(Dataset.load_from_disk(tmp_path)) for _ in range(2))
        other = read_texts(Dataset.load_from_disk(tmp_path), chat_template=OPENS_THINKING.replace("<think>", ""))
    assert first.cache_files == second.cache_files
    assert first.cache_files != other.cache_files


# Batches


def test_texts_are_padded_on_the_right_and_masks_follow_lengths():
    rows = [
        {"input_ids": [7, 8, EOS], "completion_mask": [0, 1, 1], "sample_id": 4},
        {"input_ids": [7, EOS], "completion_mask": [0, 1], "sample_id": 2},
    ]
    batch = RowCollator(pad_token_id=EOS)(rows)
    assert batch["input_ids"].tolist() == [[7, 8, EOS], [7, EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["completion_mask"].tolist() == [[False, True, True], [False, True, False]]
    assert batch["sample_ids"].tolist() == [4, 2]
    assert [tensor.dtype for tensor in batch.values()] == [torch.int64, torch.int64, torch.int64, torch.bool]


def test_the_collator_takes_the_rows_of_a_tokenized_dataset():
    texts = read_texts([{"text": "hi there"}, {"text": "add two four"}])
    assert RowCollator(pad_token_id=0)(list(texts))["input_ids"].shape == (2, 3)
    batch = RowCollator(pad_token_id=0)(list(read_prompts([{"prompt": "hi there"}, {"prompt": "add"}])))
    assert batch["input_ids"].tolist()[1][1] == batch["attention_mask"].tolist()[1][1] == 0
    assert set(batch) == {"input_ids", "attention_mask", "sample_ids"}


def test_prompts_are_padded_on_the_left_for_generation():
    input_ids, attention_mask = left_pad_prompts([[7, 0, 8], [9]], pad_token_id=0, device="cpu")
    assert input_ids.tolist() == [[7, 0, 8], [0, 0, 9]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
