# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Turn chats, prompts and stored responses into token ids and spans, and rows into padded batches.

Knows tokenizers, chat templates and datasets. Refuses to know any model, drafter or trainer: the target's vocabulary
size and EOS ids are arguments. Padding stands on the right, except in `left_pad_prompts`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .chats import check_generation_prompt, check_roles, check_text, is_out_of_order


# Columns that make a row; the first form whose columns are all present is read.
_RESPONSE_FORMS = (("prompt_ids", "completion_ids"), ("messages",), ("prompt", "completion"))
_SFT_FORMS = (("input_ids", "completion_mask"), *_RESPONSE_FORMS, ("text",))
_PROMPT_FORMS = (("prompt_ids",), ("messages",), ("prompt",))

_EMPTY_PROMPT = "the prompt is empty: the target has nothing to answer. Fill it or drop the row."
# Ends of sentences that begin with a number of rows.
_LONG_PROMPT = "have a prompt longer than `max_prompt_length`"
_NO_COMPLETION = "have no completion (none given, or no assistant turn that answers something)"
_NO_SUPERVISION = "have no supervised token behind a first token and within `max_length`"
_BROKEN_PROMPT = "have an answer that does not continue the chat template's generation prompt; pass it as token ids"
_HISTORY_REWRITTEN = "have assistant turns that the chat template rewrites later; only their last turn is supervised."
_ROLES_OUT_OF_ORDER = "have turns out of order (a late system turn, an opening answer, or two turns of one side in a row), read as the template writes them."
_REPEATED_PROMPT = "repeat an earlier row's prompt: the target answers it once, and each row trains on that answer."
_REPEATED_ROW = "repeat an earlier row token by token, and are trained on again. Drop them if that is not meant."
_EOS_MISSING = "have an assistant turn without an EOS, supervised to its end. Check `eos_token_ids` and the template."


class _Skip(Exception):
    """Leaves a row out; its one argument is the reason that is counted."""


class _Text(NamedTuple):
    """Token ids of one row, 0/1 marks on those the target wrote (supervised), and notes to count."""

    input_ids: list[int]
    completion_mask: list[int]
    notes: tuple[str, ...] = ()


def _join_ids(prompt_ids: list[int], completion_ids: list[int]) -> _Text:
    if not prompt_ids:
        raise ValueError(_EMPTY_PROMPT)
    return _Text(prompt_ids + completion_ids, [0] * len(prompt_ids) + [1] * len(completion_ids))


@dataclass(frozen=True)
class _Encoder:
    """The target's tokenizer, chat template and EOS ids: strings and messages in, ids and marks out."""

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    eos_token_ids: tuple[int, ...]
    # The cache of `datasets` knows this code by name only: raise it when the same row would give other ids or marks.
    cache_version: int = 2

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer(check_text(text), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def render(self, messages: list[dict], *, add_generation_prompt: bool) -> list[int]:
        return self._apply(messages, add_generation_prompt, tokenize=True, return_dict=True)["input_ids"]

    def _apply(self, messages: list[dict], add_generation_prompt: bool, **options: bool) -> Any:
        options |= {"chat_template": self.chat_template, **(self.chat_template_kwargs or {})}
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **options)

    def check_template(self) -> None:
        """Refuse a template that does not end prompts where answers begin."""
        if self.chat_template is None and self.tokenizer.chat_template is None:
            raise ValueError(
                "The dataset holds chats, but the tokenizer has no chat template. Pass `chat_template=` with the one the target is served "
                "with, or turn the chats into `prompt` and `completion` strings."
            )
        check_generation_prompt(partial(self._apply, tokenize=False))

    def check_chat(self, messages: list[dict]) -> tuple[str, ...]:
        """Refuse what the template would pass over, and return notes on the order of turns."""
        check_roles(messages, str(self.chat_template or self.tokenizer.chat_template))
        for message in messages:
            if isinstance(message.get("content"), str):
                check_text(message["content"])
        return (_ROLES_OUT_OF_ORDER,) if is_out_of_order(messages) else ()

    def find_end(self, input_ids: list[int], start: int) -> int:
        """Return the index behind the first EOS from `start` on: the target wrote nothing beyond it."""
        return next(
            (i + 1 for i in range(start, len(input_ids)) if input_ids[i] in self.eos_token_ids), len(input_ids)
        )

    def encode_pair(self, prompt: str, completion: str | None) -> _Text:
        """Tokenize a prompt and its completion, which ends with its first EOS, appended where it has none."""
        if completion is None:
            raise _Skip(_NO_COMPLETION)
        prompt_ids, joint_ids = self.tokenize(prompt), self.tokenize(prompt + completion)
        completion_ids = joint_ids[len(prompt_ids) :]
        if joint_ids[: len(prompt_ids)] != prompt_ids:  # A merge across the border: the target read unmerged ids.
            completion_ids = self.tokenize(completion, add_special_tokens=False)
        completion_ids = completion_ids[: self.find_end(completion_ids, 0)]
        if not completion_ids or completion_ids[-1] not in self.eos_token_ids:
            if self.tokenizer.eos_token_id is None:
                raise ValueError("the completion needs an EOS, but the tokenizer has no `eos_token`. Set it.")
            completion_ids.append(self.tokenizer.eos_token_id)
        return _join_ids(prompt_ids, completion_ids)

    def encode_chat(self, messages: list[dict], *, first_turn: int) -> _Text:
        """Render a chat and mark its assistant turns from message `first_turn` on, up to and including their EOS."""
        notes = {*self.check_chat(messages)}
        # An assistant turn that opens the chat answers nothing.
        turns = [i for i in range(max(first_turn, 1), len(messages)) if messages[i]["role"] == "assistant"]
        if not turns:
            raise _Skip(_NO_COMPLETION)
        input_ids = self.render(messages[: turns[-1] + 1], add_generation_prompt=False)
        spans = []
        for i in reversed(turns):
            prompt_ids = self.render(messages[:i], add_generation_prompt=True)
            turn_ids = input_ids if i == turns[-1] else self.render(messages[: i + 1], add_generation_prompt=False)
            start, end = len(prompt_ids), self.find_end(turn_ids, len(prompt_ids))
            # What the target read and what it wrote must both stand unchanged in the text that is trained on.
            if turn_ids[:start] != prompt_ids or turn_ids[:end] != input_ids[:end]:
                if not spans:
                    raise _Skip(_BROKEN_PROMPT)
                spans, notes = spans[:1], notes | {_HISTORY_REWRITTEN}
                break
            spans.append((start, end))
            if turn_ids[end - 1] not in self.eos_token_ids:
                notes.add(_EOS_MISSING)
        completion_mask = [0] * len(input_ids)
        for start, end in spans:
            completion_mask[start:end] = [1] * (end - start)
        return _Text(input_ids, completion_mask, tuple(sorted(notes)))


def _check_ids(token_ids: Any, column: str, vocab_size: int) -> list[int]:
    if not isinstance(token_ids, list):
        raise ValueError(f"`{column}` must be a list of token ids, got {token_ids!r:.200}.")
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise ValueError(
            f"token id {next(i for i in token_ids if not 0 <= i < vocab_size)} in `{column}` is outside the target's "
            f"vocabulary of {vocab_size} tokens. Tokenize with the target's own tokenizer."
        )
    return token_ids


def _check_messages(messages: Any, column: str) -> list[dict]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") for m in messages):
        raise ValueError(f"`{column}` must be a list of messages, each with a `role`, got {messages!r:.200}.")
    # Arrow fills keys that a message lacks with None, which a template may print.
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _read_turns(row: dict, form: tuple[str, ...]) -> tuple[str, str | None] | tuple[list[dict], list[dict]]:
    """Return prompt and completion as strings or as messages; the prompt of a chat ends before its last answer."""
    if form == ("messages",):
        messages = _check_messages(row["messages"], "messages")
        end = max((i + 1 for i, message in enumerate(messages) if message["role"] != "assistant"), default=0)
        prompt, completion = messages[:end], messages[end:]
    else:
        prompt, completion = row["prompt"], row["completion"] if "completion" in form else None
    if prompt is None or prompt in ("", []):
        raise ValueError(_EMPTY_PROMPT)
    if isinstance(prompt, str):
        if not isinstance(completion, str | None):
            raise ValueError(f"`completion` must be a string like its `prompt`, got {completion!r:.200}.")
        return prompt, completion
    prompt = _check_messages(prompt, "prompt")
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            "`prompt` ends with an assistant turn. Move it to `completion`, or call the column `messages`."
        )
    return prompt, _check_messages(completion or [], "completion")


def _read_stored_response(row: dict, vocab_size: int) -> _Text:
    completion_ids = _check_ids(row["completion_ids"] or [], "completion_ids", vocab_size)
    return _join_ids(_check_ids(row["prompt_ids"], "prompt_ids", vocab_size), completion_ids)


def _read_text(row: dict, form: tuple[str, ...], encoder: _Encoder, vocab_size: int, every_turn: bool) -> _Text:
    """Read a row with all that the target wrote in it, or with the first answer to its prompt only."""
    if form == ("input_ids", "completion_mask"):
        input_ids, marks = _check_ids(row["input_ids"], "input_ids", vocab_size), row["completion_mask"] or []
        if len(marks) != len(input_ids) or not set(marks) <= {0, 1}:
            raise ValueError(f"`completion_mask` must mark {len(input_ids)} tokens with 0 or 1, got {marks!r:.200}.")
        return _Text(input_ids, [int(mark) for mark in marks])
    if form == ("prompt_ids", "completion_ids"):
        return _read_stored_response(row, vocab_size)
    if form == ("text",):
        if not isinstance(row["text"], str):
            raise ValueError(f"`text` must be a string, got {row['text']!r:.200}.")
        input_ids = encoder.tokenize(row["text"])
        return _Text(input_ids, [1] * len(input_ids))
    prompt, completion = _read_turns(row, form)
    if isinstance(prompt, str):
        return encoder.encode_pair(prompt, completion)
    first_turn = 0 if every_turn and form == ("messages",) else len(prompt)
    return encoder.encode_chat(prompt + (completion if every_turn else completion[:1]), first_turn=first_turn)


def _encode_sft_row(row, *, form, encoder, vocab_size, max_prompt_length, max_length) -> dict[str, Any]:
    text = _read_text(row, form, encoder, vocab_size, every_turn=True)
    input_ids = _check_ids(text.input_ids, "input_ids", vocab_size)
    # The first token is predicted from nothing, whoever wrote it.
    completion_mask = [0, *text.completion_mask[1:]]
    if 1 in completion_mask:
        _check_prompt_length(completion_mask.index(1), max_prompt_length)
    if 1 not in completion_mask[:max_length]:
        raise _Skip(_NO_SUPERVISION)
    return {"input_ids": input_ids[:max_length], "completion_mask": completion_mask[:max_length], "notes": text.notes}


def _encode_response_row(row, *, form, encoder, vocab_size, max_prompt_length) -> dict[str, Any]:
    text = _read_text(row, form, encoder, vocab_size, every_turn=False)
    input_ids = _check_ids(text.input_ids, "input_ids", vocab_size)
    if 1 not in text.completion_mask:
        raise _Skip(_NO_COMPLETION)
    start, length = text.completion_mask.index(1), sum(text.completion_mask)
    _check_prompt_length(start, max_prompt_length)
    return {"prompt_ids": input_ids[:start], "completion_ids": input_ids[start : start + length], "notes": text.notes}


def _encode_prompt_row(row, *, form, encoder, vocab_size, max_prompt_length) -> dict[str, Any]:
    notes = ()
    if form == ("prompt_ids",):
        prompt_ids = row["prompt_ids"]
    elif isinstance(prompt := _read_turns(row, form)[0], str):
        prompt_ids = encoder.tokenize(prompt)
    else:
        notes = encoder.check_chat(prompt)
        prompt_ids = encoder.render(prompt, add_generation_prompt=True)
    _check_prompt_length(len(_check_ids(prompt_ids, "prompt_ids", vocab_size)), max_prompt_length)
    return {"prompt_ids": prompt_ids, "notes": notes}


def _check_prompt_length(prompt_length: int, max_prompt_length: int | None) -> None:
    if not prompt_length:
        raise ValueError(_EMPTY_PROMPT)
    if max_prompt_length is not None and prompt_length > max_prompt_length:
        raise _Skip(_LONG_PROMPT)


def _encode_row(row: dict, index: int, *, encode: Callable[[dict], dict], columns: tuple[str, ...]) -> dict[str, Any]:
    """Encode one row; a skipped one stays, empty and marked, so that it can be counted."""
    try:
        encoded = encode(row)
        # Of what tells rows apart, as text: a set of the ids themselves would be as large as the dataset.
        key = hashlib.sha256(repr([encoded[column] for column in columns]).encode()).hexdigest()
        return {**encoded, "sample_id": index, "skipped": "", "key": key}
    except _Skip as skip:
        return {**dict.fromkeys(columns, []), "notes": [], "sample_id": index, "skipped": skip.args[0], "key": None}
    except (ValueError, TemplateError) as error:
        raise ValueError(f"Row {index} of the dataset: {error}") from error


def _find_columns(dataset: Dataset | IterableDataset, forms: tuple[tuple[str, ...], ...]):
    """Return the first row, and the first of `forms` among its columns."""
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(f"Expected one split, a `Dataset` or an `IterableDataset`, got `{type(dataset).__name__}`.")
    try:
        row = next(iter(dataset.with_format(None)), {})
    except UnicodeDecodeError as error:  # Arrow takes bytes for text without a look.
        raise ValueError(f"Row 0 of the dataset: {error}. Mend its source or drop the row.") from error
    if not row:
        raise ValueError("The dataset is empty. Check its split and its filters.")
    for form in forms:
        if set(form) <= set(row):
            return row, form
    accepted = ", or ".join(" with ".join(f"`{column}`" for column in form) for form in forms)
    raise ValueError(f"The dataset has columns {list(row)}, but needs {accepted}. Rename or map them.")


def _tokenize(dataset, forms, encode, encoder: _Encoder, new_columns: tuple[str, ...], num_proc: int | None):
    """Map `encode` over the rows, drop those it skips, and say how many and why."""
    row, form = _find_columns(dataset, forms)
    if form[0] in ("messages", "prompt") and isinstance(row[form[0]], list):
        encoder.check_template()
    types = {column: List(Value("int8" if column == "completion_mask" else "int32")) for column in new_columns}
    types |= {"sample_id": Value("int64"), "notes": List(Value("string"))}
    types |= {"skipped": Value("string"), "key": Value("string")}
    map_rows = partial(
        dataset.with_format(None).map,
        _encode_row,
        with_indices=True,
        remove_columns=list(row),
        features=Features(types),
        fn_kwargs={"encode": partial(encode, encoder=encoder, form=form), "columns": new_columns},
    )
    if isinstance(dataset, IterableDataset):
        return map_rows().filter(lambda row: not row["skipped"]).remove_columns(["skipped", "notes", "key"])
    encoded = map_rows(num_proc=num_proc, desc="Tokenizing")
    skipped, notes = encoded["skipped"][:], Counter(chain.from_iterable(encoded["notes"][:]))
    kept, reasons = [i for i, reason in enumerate(skipped) if not reason], Counter(filter(None, skipped))
    summary = f"{len(encoded)} rows: {'; '.join(f'{count} {reason}' for reason, count in reasons.most_common())}."
    if not kept:
        raise ValueError(f"None is left of {summary}")
    if reasons:
        warnings.warn(f"Skipped {reasons.total()} of {summary}")
    repeated = len(kept) - len({key for key in encoded["key"][:] if key is not None})
    if repeated:
        notes[_REPEATED_PROMPT if new_columns == ("prompt_ids",) else _REPEATED_ROW] = repeated
    for note, count in notes.items():
        warnings.warn(f"{count} of {len(encoded)} rows {note}")
    encoded = encoded.remove_columns(["skipped", "notes", "key"])
    return encoded.select(kept) if reasons else encoded


def tokenize_sft_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    chat_template: str | None,
    chat_template_kwargs: dict[str, Any] | None,
    eos_token_ids: Iterable[int],
    vocab_size: int,
    num_proc: int | None,
) -> Dataset | IterableDataset:
    """
    Turn text that the target wrote into token ids, with marks on the tokens it wrote.

    Rows are, first match first: `input_ids` with `completion_mask`; `prompt_ids` with `completion_ids`; `messages`;
    `prompt` with `completion` (both strings or both lists of messages); `text`. Other columns are ignored, token ids
    taken as they are. A string completion ends with its first EOS; where it has none, the tokenizer's is appended. Of a
    chat, assistant turns behind the prompt are marked up to and including their EOS; only the last if the template
    rewrites earlier ones. A `text` is marked throughout and gets no EOS. The first token of a row is never marked.
    Warnings count skipped and repeated rows, rewritten chats and those with turns out of order, except those of an
    `IterableDataset`, which is read lazily.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows of one of the forms above.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The target's own tokenizer.
        max_length (`int`, *optional*):
            Tokens kept of a row, from its start; rows left without a marked token are skipped.
        max_prompt_length (`int`, *optional*):
            Rows with more tokens than this before the first marked one are skipped.
        chat_template (`str`, *optional*), chat_template_kwargs (`dict`, *optional*):
            Jinja template in place of the tokenizer's own, and its variables: `{"enable_thinking": False}`.
        eos_token_ids (`Iterable[int]`), vocab_size (`int`):
            All ids that end a response of the target, and the size of its vocabulary.
        num_proc (`int`, *optional*):
            Processes that tokenize; one for an `IterableDataset`.

    Returns:
        `Dataset` or `IterableDataset` with `input_ids`, `completion_mask` (1 on marked tokens, else 0) and `sample_id`
        (index of the row in `dataset`; of an `IterableDataset`, in the stream that this process reads).

    Raises:
        ValueError: If the dataset is empty or lacks the columns, if a row is malformed or has an empty prompt, damaged text, a role
            the template does not know or ids outside the vocabulary (the message names the row), if the template does not end prompts
            where answers begin, or if no row is left.
    """
    encode = partial(
        _encode_sft_row,
        vocab_size=vocab_size,
        max_prompt_length=max_prompt_length,
        max_length=max_length,
    )
    encoder = _Encoder(tokenizer, chat_template, chat_template_kwargs, tuple(sorted(eos_token_ids)))
    return _tokenize(dataset, _SFT_FORMS, encode, encoder, ("input_ids", "completion_mask"), num_proc)


def tokenize_prompt_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    chat_template: str | None,
    chat_template_kwargs: dict[str, Any] | None,
    keep_completions: bool,
    eos_token_ids: Iterable[int],
    vocab_size: int,
    num_proc: int | None,
) -> Dataset | IterableDataset:
    """
    Turn prompts into token ids, with or without the completions behind them.

    Rows are, first match first: `prompt_ids`; `messages`; `prompt` (a string or a list of messages). `messages` are the
    prompt up to the last turn that is not the assistant's; the assistant turn behind it is the completion. Chats end
    with the generation prompt. Completions are read, and rows skipped, as by [`tokenize_sft_dataset`].

    Args:
        dataset, tokenizer, max_prompt_length, chat_template, chat_template_kwargs, eos_token_ids, vocab_size, num_proc:
            As for [`tokenize_sft_dataset`].
        keep_completions (`bool`):
            Keep `completion_ids`, `completion` or the last assistant turn, and skip rows without one. Otherwise they
            are dropped: OPD never walks text that the target did not write.

    Returns:
        `Dataset` or `IterableDataset` with `prompt_ids`, `sample_id` and, iff `keep_completions`, `completion_ids`.

    Raises:
        ValueError: As [`tokenize_sft_dataset`], and if completions are to be kept of a dataset that has none.
    """
    encode = partial(
        _encode_response_row if keep_completions else _encode_prompt_row,
        vocab_size=vocab_size,
        max_prompt_length=max_prompt_length,
    )
    encoder = _Encoder(tokenizer, chat_template, chat_template_kwargs, tuple(sorted(eos_token_ids)))
    if keep_completions:
        return _tokenize(dataset, _RESPONSE_FORMS, encode, encoder, ("prompt_ids", "completion_ids"), num_proc)
    return _tokenize(dataset, _PROMPT_FORMS, encode, encoder, ("prompt_ids",), num_proc)
