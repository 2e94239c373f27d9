# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Prompts as messages, for a server that renders chats itself."""

from typing import Any

from datasets import Dataset

from .columns import PROMPT_FORMS, decode_contents, find_format, find_mixed, first_row, keep_texts
from .text_reader import read_turns


# Columns of a chat that a server would have to be sent beside its messages.
_BESIDE = ("tools", "chat_template_kwargs")


def read_chats(dataset: Dataset) -> list[list[dict[str, Any]]]:
    """
    Return the prompt of each row as messages; rows are read as [`TextReader.read_prompts`] reads them.

    Raises:
        ValueError: If a row is no chat, or has what the server would not be sent.
    """
    row_format = find_format(first_row(dataset), PROMPT_FORMS)
    mixed = find_mixed(dataset, row_format.form)
    rows = keep_texts(dataset, mixed) if mixed else dataset
    chats = []
    for number, row in enumerate(rows.with_format(None)):
        beside = [name for name in _BESIDE if row.get(name)]
        if beside:
            raise ValueError(f"Row {number} has {beside}, which are not sent with a chat. Send token ids or text.")
        decoded = decode_contents(row, mixed) if mixed else row
        turns = (
            None if row_format.form == ("prompt_ids",) else read_turns(row_format.convert(decoded), row_format.form)
        )
        if turns is None or isinstance(turns[0], str):
            raise ValueError(f"Row {number} is no chat, which a server could render. Send token ids or text.")
        chats.append(turns[0])
    return chats
