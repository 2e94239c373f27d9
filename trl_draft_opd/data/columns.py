# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Which columns make a row, in this package's words and in those that people start from. Knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, Json


Form = tuple[str, ...]

# Columns that make a row; the first form whose columns are all present is read.
RESPONSE_FORMS: tuple[Form, ...] = (("prompt_ids", "completion_ids"), ("messages",), ("prompt", "completion"))
TEXT_FORMS: tuple[Form, ...] = (("input_ids", "completion_mask"), *RESPONSE_FORMS, ("text",))
PROMPT_FORMS: tuple[Form, ...] = (("prompt_ids",), ("messages",), ("prompt",))

# Names of columns elsewhere, by what they mean; first found, first read.
_QUESTIONS = ("question", "instruction", "query", "problem", "prompt", "user", "input")
_ANSWERS = ("answer", "output", "response", "completion", "solution", "assistant")
# Prompts in this package's words.
_OWN_PROMPTS = ("prompt_ids", "prompt")
# What belongs to the question too, and would be lost.
_CONTEXTS = ("input", "context", "passage", "choices", "options", "history")
_SYSTEMS = ("system", "system_prompt")


def _as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    return row


class RowFormat(NamedTuple):
    """The form of a dataset's rows, what turns them into it, and what to say about that."""

    form: Form
    convert: Callable[[dict[str, Any]], dict[str, Any]] = _as_it_is
    note: str | None = None


def find_format(columns: Iterable[str], forms: tuple[Form, ...]) -> RowFormat:
    """
    Return how rows with these columns are read: the first of `forms`, or what is unambiguously a chat.

    Raises:
        ValueError: If neither is there, with the line that makes rows of them where one can be told.
    """
    names = list(columns)
    for form in forms:
        if set(form) <= set(names):
            return RowFormat(form)
    if _extra(names, _OWN_PROMPTS):
        # Somebody made them, and what else is there need not be the response to them.
        raise ValueError(_explain(names, forms))
    if "conversations" in names and not _extra(names, _SYSTEMS):
        return RowFormat(("conversations",))
    wants_response = forms is not PROMPT_FORMS
    form = ("prompt", "completion") if wants_response else ("prompt",)
    if not _extra(names, (*_SYSTEMS, *_CONTEXTS[1:])):
        if "question" in names and "input" not in names and ("answer" in names or not wants_response):
            ending = ", `answer` as the assistant's" if wants_response else ""
            return RowFormat(form, partial(_read_question, wants_response), f"`question` as the user's turn{ending}")
        if "instruction" in names and "question" not in names and ("output" in names or not wants_response):
            question = "`instruction` and, under an empty line, `input`" if "input" in names else "`instruction`"
            ending = ", `output` as the assistant's" if wants_response else ""
            return RowFormat(
                form, partial(_read_instruction, wants_response), f"{question} as the user's turn{ending}"
            )
    raise ValueError(_explain(names, forms))


def _extra(names: list[str], others: tuple[str, ...]) -> bool:
    return any(name in names for name in others)


def _read_question(wants_response: bool, row: dict[str, Any]) -> dict[str, Any]:
    answer = row["answer"] if wants_response else None
    return {**row, **_pair(row["question"], answer, ("question", "answer"))}


def _read_instruction(wants_response: bool, row: dict[str, Any]) -> dict[str, Any]:
    question, further = row["instruction"], row.get("input") or ""
    if isinstance(question, str) and isinstance(further, str) and further.strip():
        question = f"{question}\n\n{further}"
    return {**row, **_pair(question, row["output"] if wants_response else None, ("instruction", "output"))}


def _pair(question: Any, answer: Any, names: tuple[str, str]) -> dict[str, Any]:
    """Return a question and its answer as chats; nothing where nothing is, which is told as for other rows."""
    for name, text in zip(names, (question, answer), strict=True):
        if not isinstance(text, str | None):
            raise ValueError(f"`{name}` must be a string, got {text!r:.200}.")
    return {
        "prompt": [{"role": "user", "content": question}] if question else [],
        "completion": [] if answer is None else [{"role": "assistant", "content": answer}],
    }


def _explain(names: list[str], forms: tuple[Form, ...]) -> str:
    """Return what to do about columns of no form."""
    line = find_line(names, wants_response=forms is not PROMPT_FORMS)
    has_prompts = _extra(names, _OWN_PROMPTS)
    if has_prompts and _extra(names, ("question", "instruction", "conversations")):
        # Which are then what the prompts were made of.
        further = "" if line is None else f" Other columns are not read beside `prompt`; to train on them: {line}"
    elif line is None and (has_prompts or _extra(names, _QUESTIONS)):
        further = ""
    else:
        further = None
    if forms is TEXT_FORMS and further is not None:
        return (
            f"The rows have prompts but no responses: their columns are {names}. Set `regenerate=True` "
            "(`--regenerate`) to have the target write them; in Draft-OPD, leave out `completions_from_target`."
            f"{further}"
        )
    # The simple forms stand last in `forms`, because token ids are read first where both are given.
    accepted = ", or ".join(" with ".join(f"`{column}`" for column in form) for form in reversed(forms))
    fix = "Rename or map them." if line is None else f"This line makes rows of them: {line}"
    return f"The dataset has columns {names}, but needs {accepted}. {fix}"


def find_line(names: list[str], *, wants_response: bool) -> str | None:
    """Return the line of Python that makes rows that are read of a `dataset` with these columns, if it can be told."""
    questions = [name for name in _QUESTIONS if name in names]
    answer = next((name for name in _ANSWERS if name in names), None)
    if "conversations" in names and not _extra(names, _SYSTEMS):
        return _map_line('"messages": row["conversations"]')
    if "conversations" in names:
        system = _turn("system", next(name for name in _SYSTEMS if name in names))
        return _map_line(f'"messages": [{system}, *row["conversations"]]')
    if not questions:
        # A text has no prompt in it: the target can go on after all of it.
        return _map_line('"prompt": row["text"]') if "text" in names and not wants_response else None
    if wants_response and answer is None:
        return None
    further = [name for name in _CONTEXTS if name in names and name != questions[0]]
    turns = [_turn("system", name) for name in _SYSTEMS if name in names][:1]
    turns.append(_turn("user", questions[0], *further))
    if not wants_response:
        return _map_line(f'"prompt": [{", ".join(turns)}]')
    assert answer is not None
    return _map_line(f'"messages": [{", ".join([*turns, _turn("assistant", answer)])}]')


def _turn(role: str, *names: str) -> str:
    """Return the Python of a message whose content is that of one column, or of several under each other."""
    content = f'row["{names[0]}"]'
    if len(names) > 1:
        columns = ", ".join(f'"{name}"' for name in names)
        content = f'"\\n\\n".join(str(row[name]) for name in ({columns}) if row[name])'
    return f'{{"role": "{role}", "content": {content}}}'


def _map_line(entries: str) -> str:
    return f"dataset = dataset.map(lambda row: {{{entries}}}, remove_columns=dataset.column_names)"


def first_row(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """
    Return the first row of one split, with its columns.

    Raises:
        ValueError: If this is no split, or empty, or its rows come out of a function that must not run twice.
    """
    if isinstance(dataset, dict):
        name = next(iter(dataset), "train")
        kind = type(dataset).__name__
        raise ValueError(f"Expected one split, got `{kind}` of {list(dataset)}. Take `dataset[{name!r}]`.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(f"Expected one split, a `Dataset` or an `IterableDataset`, got `{type(dataset).__name__}`.")
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            "The dataset has a transform (`with_transform`, `set_transform`), which would not be applied. Apply it "
            "with `dataset.map(...)`."
        )
    try:
        row = next(iter(dataset.with_format(None)), {})
    except UnicodeDecodeError as error:  # Arrow takes bytes for text without a look.
        raise ValueError(f"Row 0 of the dataset: {error}. Mend its source or drop the row.") from error
    if not row:
        raise ValueError("The dataset is empty. Check its split and its filters.")
    return row


def find_mixed(dataset: Dataset | IterableDataset, form: Form) -> dict[str, str]:
    """Return those columns of messages whose contents are of mixed types, with the key of the content."""
    mixed = {}
    for column in form:
        message = getattr((dataset.features or {}).get(column), "feature", None)
        entries = message if isinstance(message, dict) else {}
        for key in ("content", "value"):
            if isinstance(entries.get(key), Json):
                mixed[column] = key
    return mixed


def keep_texts(dataset: Dataset | IterableDataset, mixed: dict[str, str]) -> Dataset | IterableDataset:
    """
    Leave contents of mixed types as the JSON that `datasets` stores.

    It stores a text that is JSON itself, like "8", as it is: decoded, it would be a number.
    """
    features = dict(dataset.features or {})
    for column, key in mixed.items():
        features[column] = type(features[column])(features[column].feature | {key: Json(decode=False)})
    return dataset.cast(Features(features))


def decode_contents(row: dict[str, Any], mixed: dict[str, str]) -> dict[str, Any]:
    """Return a row of [`keep_texts`] with contents that are strings or lists of parts."""
    decoded = dict(row)
    for column, key in mixed.items():
        decoded[column] = [_decode_message(message, key) for message in row[column] or []]
    return decoded


def _decode_message(message: dict[str, Any], key: str) -> dict[str, Any]:
    stored = message[key]
    try:
        value = json.loads(stored or "null")
    except json.JSONDecodeError:  # The reader of `datasets` takes more for JSON, like 007.
        return message
    is_parts = isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value)
    return message | {key: value if isinstance(value, str) or is_parts else stored}
