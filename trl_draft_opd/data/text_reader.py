# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Dataset rows to token ids, with marks on what the target wrote. Knows no model: of the target it needs the tokenizer,
the EOS ids and the size of the vocabulary.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from .chats import (
    ChatSettings,
    check_roles,
    check_text,
    has_text,
    is_out_of_order,
    read_messages,
    read_settings,
)
from .columns import (
    PROMPT_FORMS,
    RESPONSE_FORMS,
    TEXT_FORMS,
    Form,
    RowFormat,
    decode_contents,
    find_format,
    find_mixed,
    first_row,
    keep_texts,
)
from .row_notes import Skip, StreamNotes, drop_skipped, encode_row
from .templates import (
    CLOCK,
    STANDING_DAY,
    ChatTemplate,
    content_reaches,
    find_reasoning,
    names_reach,
    reasoning_reaches,
)


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
_NO_BLOCK = "have no two supervised tokens in a row, and train nothing: a block needs two."
_EMPTY_RESPONSE = "have assistant turns that render to nothing but their end"
_EMPTY_TURN = _EMPTY_RESPONSE + "; those are not supervised."
_REASONING_LOST = (
    "have reasoning in their last turn that the chat template does not write out: it is not trained on. Give a "
    "template that reads it (`reasoning_content`, or `<think>` in `content`)."
)
_TOOLS_LOST = "have `tools` that the chat template does not write out: the target is not told of them."
_TEXT_LOST = "have a message of role {!r} whose text the chat template does not write out: it is read without."
_CONTROL_TOKENS = "have special tokens in a message's text, read as such: they can end a turn or open one."
_CLOCK_STANDS = (
    f"The chat template prints the date. It reads {STANDING_DAY} on every day, so that stored responses and resumed "
    f'runs agree. To set another: `chat_template_kwargs={{"{CLOCK}": "{STANDING_DAY}"}}`.'
)
_EOS_MISSING = "have an assistant turn without an EOS, supervised to its end. Check `eos_token_ids` and the template."


class _Text(NamedTuple):
    """Token ids of one row, 0/1 marks on those the target wrote (supervised), and notes to count."""

    input_ids: list[int]
    completion_mask: list[int]
    notes: tuple[str, ...] = ()


def is_tokenized(dataset: Any) -> bool:
    """Whether a dataset is one that [`TextReader`] returned."""
    columns = set(getattr(dataset, "column_names", None) or ())
    return columns in ({"prompt_ids", "sample_id"}, {"input_ids", "completion_mask", "sample_id"})


@dataclass(frozen=True)
class TextReader:
    """
    Reads dataset rows as one target reads text. Build it with [`FrozenTarget.text_reader`].

    Warnings count skipped and repeated rows and chats that are read in part or out of order; of an
    `IterableDataset`, which is read lazily, they name the first such row. Other columns than those named below are
    ignored, but for `tools` and `chat_template_kwargs` of chats, which are read as TRL's trainers read them.

    Messages are a list, or that as JSON text; each has a `role` and as `content` a string or a list of text parts;
    `from` and `value` (ShareGPT) are renamed. Where none of the columns below is there, `conversations`, `question`
    (with `answer`) and `instruction` (with `input` and `output`) are read as chats.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The target's own tokenizer.
        eos_token_ids (`tuple[int, ...]`), vocab_size (`int`):
            All ids that end a response of the target, and the size of its vocabulary.
        chat_template (`str`, *optional*), chat_template_kwargs (`dict`, *optional*):
            Jinja template in place of the tokenizer's own, and its variables; those of a row come before them. A
            template that prints the date reads 2026-01-01, or what the variable `strftime_now` says.
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
        return self._read(dataset, TEXT_FORMS, TextReader._encode_text_row, ("input_ids", "completion_mask"))

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
        return self._read(dataset, PROMPT_FORMS, TextReader._encode_prompt_row, ("prompt_ids",))

    def read_responses(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """
        Turn rows into prompts and the first response to each; rows without one are skipped.

        Rows are, first match first: `prompt_ids` with `completion_ids`; `messages`; `prompt` with `completion`.

        Returns:
            `Dataset` or `IterableDataset` with `prompt_ids`, `completion_ids` and `sample_id`.

        Raises:
            ValueError: As [`read_texts`].
        """
        return self._read(dataset, RESPONSE_FORMS, TextReader._encode_response_row, ("prompt_ids", "completion_ids"))

    def _read(
        self,
        dataset: Dataset | IterableDataset,
        forms: tuple[Form, ...],
        encode: Callable[..., dict[str, Any]],
        columns: tuple[str, ...],
    ) -> Dataset | IterableDataset:
        """Map `encode` over the rows, drop those it skips, and warn how many and why."""
        row = first_row(dataset)
        row_format = find_format(row, forms)
        mixed = find_mixed(dataset, row_format.form)
        if mixed:
            dataset, convert = keep_texts(dataset, mixed), partial(decode_contents, mixed=mixed)
            row_format = row_format._replace(convert=convert)
        self._check_chats(next(iter(dataset.with_format(None))) if mixed else row, row_format)
        types = {column: List(Value("int8" if column == "completion_mask" else "int32")) for column in columns}
        types |= {"sample_id": Value("int64"), "notes": List(Value("string"))}
        types |= {"skipped": Value("string"), "key": Value("string")}
        # The number of processes changes no row, so that it must not change the key of the cache.
        reader = partial(encode, replace(self, num_proc=None), form=row_format.form)
        options: dict[str, Any] = {
            "with_indices": True,
            "remove_columns": list(row),
            "features": Features(types),
            "fn_kwargs": {"encode": reader, "columns": columns, "convert": row_format.convert},
        }
        rows = dataset.with_format(None)
        if isinstance(rows, Dataset):
            encoded = rows.map(encode_row, num_proc=self.num_proc, desc="Tokenizing", **options)
            return drop_skipped(encoded, columns)
        encoded = rows.map(encode_row, **options).filter(StreamNotes())
        return encoded.remove_columns(["skipped", "notes", "key"])

    def _encode_text_row(self, row: dict, form: Form) -> dict[str, Any]:
        text = self._read_text(row, form, every_turn=True)
        input_ids = self._check_ids(text.input_ids, "input_ids")
        # The first token is predicted from nothing, whoever wrote it.
        completion_mask = [0, *text.completion_mask[1:]]
        if 1 in completion_mask:
            self._check_prompt_length(completion_mask.index(1))
        completion_mask = completion_mask[: self.max_length]
        if 1 not in completion_mask:
            raise Skip(_NO_SUPERVISION)
        notes = set(text.notes)
        if self.max_length is not None and len(input_ids) > self.max_length:
            notes.add(f"are longer than `max_length` {self.max_length} and were cut there.")
        if not any(a and b for a, b in zip(completion_mask, completion_mask[1:], strict=False)):
            notes.add(_NO_BLOCK)
        return {
            "input_ids": input_ids[: self.max_length],
            "completion_mask": completion_mask,
            "notes": sorted(notes),
        }

    def _encode_response_row(self, row: dict, form: Form) -> dict[str, Any]:
        text = self._read_text(row, form, every_turn=False)
        input_ids = self._check_ids(text.input_ids, "input_ids")
        if 1 not in text.completion_mask:
            raise Skip(_NO_COMPLETION)
        start, length = text.completion_mask.index(1), sum(text.completion_mask)
        self._check_prompt_length(start)
        completion_ids = input_ids[start : start + length]
        return {"prompt_ids": input_ids[:start], "completion_ids": completion_ids, "notes": text.notes}

    def _encode_prompt_row(self, row: dict, form: Form) -> dict[str, Any]:
        notes: set[str] = set()
        if form == ("prompt_ids",):
            prompt_ids = row["prompt_ids"]
        elif isinstance(prompt := read_turns(row, form)[0], str):
            prompt_ids = self._tokenize(prompt)
        else:
            settings = read_settings(row)
            self._check_roles(prompt)
            prompt_text, prompt_ids = self._render(prompt, settings, add_generation_prompt=True)
            notes = self._check_chat(prompt, settings, prompt_text, is_prompt=True)
        self._check_prompt_length(len(self._check_ids(prompt_ids, "prompt_ids")))
        return {"prompt_ids": prompt_ids, "notes": sorted(notes)}

    def _read_text(self, row: dict, form: Form, every_turn: bool) -> _Text:
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
        prompt, completion = read_turns(row, form)
        if isinstance(prompt, str):
            assert not isinstance(completion, list)
            return self._encode_pair(prompt, completion)
        assert isinstance(completion, list)
        first_turn = 0 if every_turn and len(form) == 1 else len(prompt)
        messages = prompt + (completion if every_turn else completion[:1])
        return self._encode_chat(messages, read_settings(row), first_turn=first_turn)

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
            raise Skip(f"{_LONG_PROMPT} {self.max_prompt_length}")

    def _tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer(check_text(text), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.chat_template, self.chat_template_kwargs)

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """The special tokens of the tokenizer, as text."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted({name for name in [*added, *self.tokenizer.all_special_tokens] if name})
        # By their first characters, or a search would try a thousand names at every bracket of a program.
        groups = [
            re.escape(head) + "(?:" + "|".join(re.escape(name[2:]) for name in group) + ")"
            for head, group in groupby(names, key=lambda name: name[:2])
        ]
        # Nothing matches where there is none.
        return re.compile("|".join(groups) or r"(?!)")

    def _render(
        self, messages: list[dict], settings: ChatSettings, *, add_generation_prompt: bool
    ) -> tuple[str, list[int]]:
        """Return a chat as text and as token ids."""
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt, settings=settings)
        return text, self._tokenize(text, add_special_tokens=False)

    def _check_chats(self, row: dict[str, Any], row_format: RowFormat) -> None:
        """Check what all chats of a dataset have in common, by its first row, and say how they are read."""
        try:
            first = row_format.convert(row)[row_format.form[0]]
        except ValueError as error:
            raise ValueError(f"Row 0 of the dataset: {error}") from error
        is_chat = isinstance(first, list) or row_format.form in (("messages",), ("conversations",))
        if row_format.form[0] not in ("messages", "conversations", "prompt") or not is_chat:
            return
        if self.chat_template is None and self.tokenizer.chat_template is None:
            raise ValueError(
                "The dataset holds chats, but the tokenizer has no chat template. Pass `chat_template=` with the one "
                "the target is served with, or turn the chats into `prompt` and `completion` strings."
            )
        self._template.check_generation_prompt()
        if row_format.note is not None:
            warnings.warn(f"The rows are read as chats: {row_format.note}.")
        if self._template.prints_date:
            warnings.warn(_CLOCK_STANDS)

    def _check_chat(
        self,
        messages: list[dict],
        settings: ChatSettings,
        rendered: str,
        *,
        is_prompt: bool = False,
        starts: dict[int, int] | None = None,
    ) -> set[str]:
        """
        Return notes on a chat and on what of it its rendering leaves out; refuse calls that are left out.

        `starts`: Where in the rendering the texts of assistant turns begin, where that is known.
        """
        notes = {_ROLES_OUT_OF_ORDER} if is_out_of_order(messages) else set()
        passes_over = partial(
            self._template.passes_over, messages=messages, settings=settings, prompt=is_prompt, rendered=rendered
        )
        for number, message in enumerate(messages):
            written = rendered[(starts or {}).get(number, 0) :]
            if not content_reaches(message, written):
                notes.add(_TEXT_LOST.format(message["role"]))
            calls = message.get("tool_calls")
            if calls and (not names_reach(calls, written) or passes_over("tool_calls")):
                raise ValueError(
                    f"message {number} has `tool_calls` that the chat template does not write out. Give one that does "
                    "(`chat_template=`), or drop the row."
                )
            # Reasoning may stand between special tokens.
            if self._control_tokens.search(message["content"], find_reasoning(message)[1]):
                notes.add(_CONTROL_TOKENS)
        if settings.tools and (not names_reach(settings.tools, rendered) or passes_over("tools")):
            notes.add(_TOOLS_LOST)
        return notes

    def _check_roles(self, messages: list[dict]) -> None:
        """Refuse roles that the template does not know, before anything is concluded from what roles there are."""
        check_roles(messages, str(self.chat_template or self.tokenizer.chat_template))

    def _find_end(self, input_ids: list[int], start: int) -> int:
        """Return the index after the first EOS from `start` on: the target wrote nothing beyond it."""
        return next(
            (i + 1 for i in range(start, len(input_ids)) if input_ids[i] in self.eos_token_ids), len(input_ids)
        )

    def _encode_pair(self, prompt: str, completion: str | None) -> _Text:
        """Tokenize a prompt and its completion, which ends with its first EOS, appended where it has none."""
        if completion is None:
            raise Skip(_NO_COMPLETION)
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

    def _encode_chat(self, messages: list[dict], settings: ChatSettings, *, first_turn: int) -> _Text:
        """Render a chat and mark its assistant turns from message `first_turn` on, up to and including their EOS."""
        self._check_roles(messages)
        # An assistant turn that opens the chat responds to nothing.
        turns = [i for i in range(max(first_turn, 1), len(messages)) if messages[i]["role"] == "assistant"]
        if not turns:
            raise Skip(_NO_COMPLETION)
        messages = messages[: turns[-1] + 1]
        rendered, input_ids = self._render(messages, settings, add_generation_prompt=False)
        spans, starts, notes = [], {}, set()
        for i in reversed(turns):
            prompt, prompt_ids = self._render(messages[:i], settings, add_generation_prompt=True)
            is_last = i == turns[-1]
            turn_ids = input_ids
            if not is_last:
                turn_ids = self._render(messages[: i + 1], settings, add_generation_prompt=False)[1]
            start, end = len(prompt_ids), self._find_end(turn_ids, len(prompt_ids))
            # What the target read and what it wrote must both stand unchanged in the text that is trained on.
            if turn_ids[:start] != prompt_ids or turn_ids[:end] != input_ids[:end]:
                if is_last:
                    raise Skip(_BROKEN_PROMPT)
                spans, notes = spans[:1], notes | {_HISTORY_REWRITTEN}
                break
            starts[i] = len(prompt)
            if set(turn_ids[start:end]) <= set(self.eos_token_ids) or not has_text(messages[i]):
                notes.add(_EMPTY_TURN)
                continue
            spans.append((start, end))
            if turn_ids[end - 1] not in self.eos_token_ids:
                notes.add(_EOS_MISSING)
        notes |= self._check_chat(messages, settings, rendered, starts=starts)
        if not spans:
            raise Skip(_EMPTY_RESPONSE)
        if not reasoning_reaches(messages[-1], rendered[starts[turns[-1]] :]):
            notes.add(_REASONING_LOST)
        completion_mask = [0] * len(input_ids)
        for start, end in spans:
            completion_mask[start:end] = [1] * (end - start)
        return _Text(input_ids, completion_mask, tuple(sorted(notes)))


def read_turns(row: dict, form: Form) -> tuple[str, str | None] | tuple[list[dict], list[dict]]:
    """Return prompt and completion as strings or as messages; the prompt of a chat ends before its last answer."""
    if form in (("messages",), ("conversations",)):
        others = [name for name in ("messages", "prompt", "conversations") if row.get(name) is not None]
        if row[form[0]] is None and others:
            raise ValueError(
                f"`{form[0]}` is null, and `{others[0]}` is not: other rows have `{form[0]}`. Give all rows one form, "
                "or train on a file for each."
            )
        messages = read_messages(row[form[0]], form[0])
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
    prompt = read_messages(prompt, "prompt")
    if prompt[-1]["role"] == "assistant":
        raise ValueError(
            "`prompt` ends with an assistant turn. Move it to `completion`, or call the column `messages`."
        )
    return prompt, read_messages(completion or [], "completion")


def _join_ids(prompt_ids: list[int], completion_ids: list[int]) -> _Text:
    if not prompt_ids:
        raise ValueError(_EMPTY_PROMPT)
    return _Text(prompt_ids + completion_ids, [0] * len(prompt_ids) + [1] * len(completion_ids))
