# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Dataset rows to token ids, with marks on what the target wrote. Knows no model: of the target it needs the tokenizer,
the EOS ids and the size of the vocabulary.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .chats import check_generation_prompt, check_roles, check_text, is_out_of_order


# Columns that make a row; the first form whose columns are all present is read.
_RESPONSE_FORMS = (("prompt_ids", "completion_ids"), ("messages",), ("prompt", "completion"))
_TEXT_FORMS = (("input_ids", "completion_mask"), *_RESPONSE_FORMS, ("text",))
_PROMPT_FORMS = (("prompt_ids",), ("messages",), ("prompt",))

_EMPTY_PROMPT = "the prompt is empty: the target has nothing to respond to. Fill it or drop the row."
# Ends of sentences that begin with a number of rows.
_LONG_PROMPT = "have a prompt longer than `max_prompt_length`"
_NO_COMPLETION = "have no completion (none given, or no assistant turn that responds to something)"
_NO_SUPERVISION = "have no supervised token after the first token and within `max_length`"
_BROKEN_PROMPT = "have a response that does not continue the chat template's generation prompt; pass it as token ids"
_HISTORY_REWRITTEN = "have assistant turns that the chat template rewrites later; only their last turn is supervised."
_ROLES_OUT_OF_ORDER = (
    "have turns out of order (a late system turn, an opening response, or two turns of one side in "
    "a row), read as the template writes them."
)
_REPEATED_PROMPT = "repeat an earlier row's prompt: the target responds once, and each row trains on that response."
_REPEATED_ROW = "repeat an earlier row token by token, and are trained on again. Drop them if that is not meant."
_EOS_MISSING = "have an assistant turn without an EOS, supervised to its end. Check `eos_token_ids` and the template."


class _Skip(Exception):
    """Leaves a row out; its one argument is the reason that is counted."""


class _Text(NamedTuple):
    """Token ids of one row, 0/1 marks on those the target wrote (supervised), and notes to count."""

    input_ids: list[int]
    completion_mask: list[int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextReader:
    """
    Reads dataset rows as one target reads text. Build it with [`FrozenTarget.text_reader`].

    Warnings count skipped and repeated rows and chats that are read in part or out of order; not for an
    `IterableDataset`, which is read lazily. Other columns than those named below are ignored.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The target's own tokenizer.
        eos_token_ids (`tuple[int, ...]`), vocab_size (`int`):
            All ids that end a response of the target, and the size of its vocabulary.
        chat_template (`str`, *optional*), chat_template_kwargs (`dict`, *optional*):
            Jinja template in place of the tokenizer's own, and its variables.
        max_prompt_length (`int`, *optional*):
            Rows with more tokens than this before the first one the target wrote are skipped.
        max_length (`int`, *optional*):
            Tokens that [`read_texts`] keeps of a row, from its start; rows left without a marked token are skipped.
        num_proc (`int`, *optional*):
            Processes that tokenize; one for an `IterableDataset`.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_prompt_length: int | None = None
    max_length: int | None = None
    num_proc: int | None = None
    # The cache of `datasets` knows this code by name only: raise it when the same row would give other ids or marks.
    cache_version: int = 4

    def read_texts(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """
        Turn rows into whole texts, with marks on the tokens that the target wrote.

        Rows are, first match first: `input_ids` with `completion_mask`; `prompt_ids` with `completion_ids`;
        `messages`; `prompt` with `completion` (both strings or both lists of messages); `text`. A string completion
        ends with its first EOS; where it has none, the tokenizer's is appended. Of a chat, assistant turns after the
        prompt are marked up to and including their EOS; only the last if the template rewrites earlier ones. A `text`
        is marked throughout and gets no EOS. The first token of a row is never marked.

        Returns:
            `Dataset` or `IterableDataset` with `input_ids`, `completion_mask` (1 on marked tokens, else 0) and
            `sample_id` (index of the row in `dataset`, or in the stream that this process reads).

        Raises:
            ValueError: If the dataset is empty or lacks the columns, a row is malformed or damaged (the message names
                the row), the template does not end prompts where responses begin, or no row is left.
        """
        return self._read(dataset, _TEXT_FORMS, TextReader._encode_text_row, ("input_ids", "completion_mask"))

    def read_prompts(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """
        Turn rows into prompts; completions are dropped, because the target did not write them.

        Rows are, first match first: `prompt_ids`; `messages`, up to the last turn that is not the assistant's;
        `prompt` (a string or a list of messages). Chats end with the generation prompt.

        Returns:
            `Dataset` or `IterableDataset` with `prompt_ids` and `sample_id`.

        Raises:
            ValueError: As [`read_texts`].
        """
        return self._read(dataset, _PROMPT_FORMS, TextReader._encode_prompt_row, ("prompt_ids",))

    def read_responses(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """
        Turn rows into prompts and the first response to each; rows without one are skipped.

        Rows are, first match first: `prompt_ids` with `completion_ids`; `messages`; `prompt` with `completion`.

        Returns:
            `Dataset` or `IterableDataset` with `prompt_ids`, `completion_ids` and `sample_id`.

        Raises:
            ValueError: As [`read_texts`].
        """
        return self._read(dataset, _RESPONSE_FORMS, TextReader._encode_response_row, ("prompt_ids", "completion_ids"))

    def _read(
        self,
        dataset: Dataset | IterableDataset,
        forms: tuple[tuple[str, ...], ...],
        encode: Callable[..., dict[str, Any]],
        columns: tuple[str, ...],
    ) -> Dataset | IterableDataset:
        """Map `encode` over the rows, drop those it skips, and warn how many and why."""
        row, form = _find_columns(dataset, forms)
        if form[0] in ("messages", "prompt") and isinstance(row[form[0]], list):
            self._check_template()
        types = {column: List(Value("int8" if column == "completion_mask" else "int32")) for column in columns}
        types |= {"sample_id": Value("int64"), "notes": List(Value("string"))}
        types |= {"skipped": Value("string"), "key": Value("string")}
        # The number of processes changes no row, so that it must not change the key of the cache.
        encode_row = partial(encode, replace(self, num_proc=None), form=form)
        options: dict[str, Any] = {
            "with_indices": True,
            "remove_columns": list(row),
            "features": Features(types),
            "fn_kwargs": {"encode": encode_row, "columns": columns},
        }
        rows = dataset.with_format(None)
        if isinstance(rows, Dataset):
            encoded = rows.map(_encode_row, num_proc=self.num_proc, desc="Tokenizing", **options)
            return _drop_skipped(encoded, columns)
        encoded = rows.map(_encode_row, **options).filter(lambda row: not row["skipped"])
        return encoded.remove_columns(["skipped", "notes", "key"])

    def _encode_text_row(self, row: dict, form: tuple[str, ...]) -> dict[str, Any]:
        text = self._read_text(row, form, every_turn=True)
        input_ids = self._check_ids(text.input_ids, "input_ids")
        # The first token is predicted from nothing, whoever wrote it.
        completion_mask = [0, *text.completion_mask[1:]]
        if 1 in completion_mask:
            self._check_prompt_length(completion_mask.index(1))
        if 1 not in completion_mask[: self.max_length]:
            raise _Skip(_NO_SUPERVISION)
        notes = [*text.notes]
        if self.max_length is not None and len(input_ids) > self.max_length:
            notes.append(f"are longer than `max_length` {self.max_length} and were cut there.")
        return {
            "input_ids": input_ids[: self.max_length],
            "completion_mask": completion_mask[: self.max_length],
            "notes": notes,
        }

    def _encode_response_row(self, row: dict, form: tuple[str, ...]) -> dict[str, Any]:
        text = self._read_text(row, form, every_turn=False)
        input_ids = self._check_ids(text.input_ids, "input_ids")
        if 1 not in text.completion_mask:
            raise _Skip(_NO_COMPLETION)
        start, length = text.completion_mask.index(1), sum(text.completion_mask)
        self._check_prompt_length(start)
        completion_ids = input_ids[start : start + length]
        return {"prompt_ids": input_ids[:start], "completion_ids": completion_ids, "notes": text.notes}

    def _encode_prompt_row(self, row: dict, form: tuple[str, ...]) -> dict[str, Any]:
        notes = ()
        if form == ("prompt_ids",):
            prompt_ids = row["prompt_ids"]
        elif isinstance(prompt := _read_turns(row, form)[0], str):
            prompt_ids = self._tokenize(prompt)
        else:
            notes = self._check_chat(prompt)
            prompt_ids = self._render(prompt, add_generation_prompt=True)
        self._check_prompt_length(len(self._check_ids(prompt_ids, "prompt_ids")))
        return {"prompt_ids": prompt_ids, "notes": notes}

    def _read_text(self, row: dict, form: tuple[str, ...], every_turn: bool) -> _Text:
        """Read a row with all that the target wrote in it, or with the first response to its prompt only."""
        if form == ("input_ids", "completion_mask"):
            input_ids, marks = self._check_ids(row["input_ids"], "input_ids"), row["completion_mask"] or []
            if len(marks) != len(input_ids) or not set(marks) <= {0, 1}:
                raise ValueError(
                    f"`completion_mask` must mark {len(input_ids)} tokens with 0 or 1, got {marks!r:.200}."
                )
            return _Text(input_ids, [int(mark) for mark in marks])
        if form == ("prompt_ids", "completion_ids"):
            completion_ids = self._check_ids(row["completion_ids"] or [], "completion_ids")
            return _join_ids(self._check_ids(row["prompt_ids"], "prompt_ids"), completion_ids)
        if form == ("text",):
            if not isinstance(row["text"], str):
                raise ValueError(f"`text` must be a string, got {row['text']!r:.200}.")
            input_ids = self._tokenize(row["text"])
            return _Text(input_ids, [1] * len(input_ids))
        prompt, completion = _read_turns(row, form)
        if isinstance(prompt, str):
            assert not isinstance(completion, list)
            return self._encode_pair(prompt, completion)
        assert isinstance(completion, list)
        first_turn = 0 if every_turn and form == ("messages",) else len(prompt)
        return self._encode_chat(prompt + (completion if every_turn else completion[:1]), first_turn=first_turn)

    def _check_ids(self, token_ids: Any, column: str) -> list[int]:
        if not isinstance(token_ids, list):
            raise ValueError(f"`{column}` must be a list of token ids, got {token_ids!r:.200}.")
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            outside = next(i for i in token_ids if not 0 <= i < self.vocab_size)
            tokens = {index: token for token, index in self.tokenizer.get_vocab().items()}
            known = f" ({tokens[outside]!r})" if outside in tokens else ""
            raise ValueError(
                f"token id {outside}{known} in `{column}` is outside the target's vocabulary of {self.vocab_size} "
                "tokens: it has no embedding. Take the token out, or tokenize with the target's own tokenizer."
            )
        return token_ids

    def _check_prompt_length(self, prompt_length: int) -> None:
        if not prompt_length:
            raise ValueError(_EMPTY_PROMPT)
        if self.max_prompt_length is not None and prompt_length > self.max_prompt_length:
            raise _Skip(f"{_LONG_PROMPT} {self.max_prompt_length}")

    def _tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer(check_text(text), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _render(self, messages: list[dict], *, add_generation_prompt: bool) -> list[int]:
        return self._apply_template(messages, add_generation_prompt, tokenize=True, return_dict=True)["input_ids"]

    def _apply_template(self, messages: list[dict], add_generation_prompt: bool, **options: Any) -> Any:
        options |= {"chat_template": self.chat_template, **(self.chat_template_kwargs or {})}
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **options)

    def _check_template(self) -> None:
        if self.chat_template is None and self.tokenizer.chat_template is None:
            raise ValueError(
                "The dataset holds chats, but the tokenizer has no chat template. Pass `chat_template=` with the one "
                "the target is served with, or turn the chats into `prompt` and `completion` strings."
            )
        check_generation_prompt(partial(self._apply_template, tokenize=False))

    def _check_chat(self, messages: list[dict]) -> tuple[str, ...]:
        """Refuse what the template would pass over, and return notes on the order of turns."""
        check_roles(messages, str(self.chat_template or self.tokenizer.chat_template))
        for message in messages:
            if isinstance(message.get("content"), str):
                check_text(message["content"])
        return (_ROLES_OUT_OF_ORDER,) if is_out_of_order(messages) else ()

    def _find_end(self, input_ids: list[int], start: int) -> int:
        """Return the index after the first EOS from `start` on: the target wrote nothing beyond it."""
        return next(
            (i + 1 for i in range(start, len(input_ids)) if input_ids[i] in self.eos_token_ids), len(input_ids)
        )

    def _encode_pair(self, prompt: str, completion: str | None) -> _Text:
        """Tokenize a prompt and its completion, which ends with its first EOS, appended where it has none."""
        if completion is None:
            raise _Skip(_NO_COMPLETION)
        prompt_ids, joint_ids = self._tokenize(prompt), self._tokenize(prompt + completion)
        completion_ids = joint_ids[len(prompt_ids) :]
        if joint_ids[: len(prompt_ids)] != prompt_ids:  # A merge across the border: the target read unmerged ids.
            completion_ids = self._tokenize(completion, add_special_tokens=False)
        completion_ids = completion_ids[: self._find_end(completion_ids, 0)]
        if not completion_ids or completion_ids[-1] not in self.eos_token_ids:
            eos_token_id: Any = self.tokenizer.eos_token_id
            if eos_token_id is None:
                raise ValueError("the completion needs an EOS, but the tokenizer has no `eos_token`. Set it.")
            completion_ids.append(eos_token_id)
        return _join_ids(prompt_ids, completion_ids)

    def _encode_chat(self, messages: list[dict], *, first_turn: int) -> _Text:
        """Render a chat and mark its assistant turns from message `first_turn` on, up to and including their EOS."""
        notes = {*self._check_chat(messages)}
        # An assistant turn that opens the chat responds to nothing.
        turns = [i for i in range(max(first_turn, 1), len(messages)) if messages[i]["role"] == "assistant"]
        if not turns:
            raise _Skip(_NO_COMPLETION)
        input_ids = self._render(messages[: turns[-1] + 1], add_generation_prompt=False)
        spans = []
        for i in reversed(turns):
            prompt_ids = self._render(messages[:i], add_generation_prompt=True)
            turn_ids = input_ids if i == turns[-1] else self._render(messages[: i + 1], add_generation_prompt=False)
            start, end = len(prompt_ids), self._find_end(turn_ids, len(prompt_ids))
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


def _join_ids(prompt_ids: list[int], completion_ids: list[int]) -> _Text:
    if not prompt_ids:
        raise ValueError(_EMPTY_PROMPT)
    return _Text(prompt_ids + completion_ids, [0] * len(prompt_ids) + [1] * len(completion_ids))


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


def _find_columns(
    dataset: Dataset | IterableDataset, forms: tuple[tuple[str, ...], ...]
) -> tuple[dict[str, Any], tuple[str, ...]]:
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
    if forms is _TEXT_FORMS and ("prompt" in row or "prompt_ids" in row):
        raise ValueError(
            "The rows have prompts but no responses. Set `regenerate=True` (`--regenerate`) to have the target write "
            "them; in Draft-OPD, leave out `completions_from_target`."
        )
    # The simple forms stand last in `forms`, because token ids are read first where both are given.
    accepted = ", or ".join(" with ".join(f"`{column}`" for column in form) for form in reversed(forms))
    fix = "Rename or map them."
    if "question" in row:
        fix += ' For example: dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})'
    raise ValueError(f"The dataset has columns {list(row)}, but needs {accepted}. {fix}")


def _drop_skipped(encoded: Dataset, columns: tuple[str, ...]) -> Dataset:
    """Return the rows that were not skipped, and warn of those that were and of what was noted."""
    skipped, notes = encoded["skipped"][:], Counter(chain.from_iterable(encoded["notes"][:]))
    kept, reasons = [i for i, reason in enumerate(skipped) if not reason], Counter(filter(None, skipped))
    summary = f"{len(encoded)} rows: {'; '.join(f'{count} {reason}' for reason, count in reasons.most_common())}."
    if not kept:
        raise ValueError(f"None is left of {summary}")
    if reasons:
        warnings.warn(f"Skipped {reasons.total()} of {summary}")
    repeated = len(kept) - len({key for key in encoded["key"][:] if key is not None})
    if repeated:
        notes[_REPEATED_PROMPT if columns == ("prompt_ids",) else _REPEATED_ROW] = repeated
    for note, count in notes.items():
        warnings.warn(f"{count} of {len(encoded)} rows {note}")
    encoded = encoded.remove_columns(["skipped", "notes", "key"])
    return encoded.select(kept) if reasons else encoded
