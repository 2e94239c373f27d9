# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A tokenizer that reads any text, one token a byte, and the kinds of chat templates that are in use.
"""

import warnings
from datetime import datetime

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from trl_draft_opd.data.text_reader import TextReader


SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
EOS = SPECIAL.index("<|im_end|>")
_HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
_END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TOOLS = "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
_PART = "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"

CHATML = _HEAD + "{{ m['content'] }}" + _END
STRINGS_ONLY = _HEAD + "{% if m['content'] is string %}{{ m['content'] }}{% endif %}" + _END
PARTS_ONLY = _HEAD + _PART + _END
EITHER = _HEAD + "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + _PART + "{% endif %}" + _END
# Encodes arguments, whatever they are.
ENCODES = (
    _TOOLS
    + _HEAD
    + "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c['function'] | tojson }}{% endfor %}"
    + _END
)
# Joins strings: arguments must be one.
JOINS = (
    _TOOLS
    + _HEAD
    + "{{ m['content'] }}{% for c in m.tool_calls or [] %}"
    + """{{ '{"name": "' + c['function']['name'] + '", "arguments": ' + c['function']['arguments'] + '}' }}"""
    + "{% endfor %}"
    + _END
)
# Takes both, as Qwen's template does.
TAKES_BOTH = JOINS.replace(
    "c['function']['arguments'] +",
    "(c['function']['arguments'] if c['function']['arguments'] is string else c['function']['arguments'] | tojson) +",
)
PRINTS_DATE = "{{ 'Today is ' + strftime_now('%d %B %Y') + '\n' }}" + CHATML
DATE_BY_DEFAULT = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}" + (
    "Today Date: {{ date_string }}\n" + CHATML
)


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Return a tokenizer over bytes."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


def make_reader(template: str = CHATML, **settings) -> TextReader:
    tokenizer = make_tokenizer(template)
    return TextReader(tokenizer, (EOS,), len(tokenizer), **settings)


def as_dataset(rows):
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def texts_of(rows, template: str = CHATML, **settings) -> list[str]:
    """Return the whole texts of rows."""
    reader = make_reader(template, **settings)
    return [reader.tokenizer.decode(ids) for ids in reader.read_texts(as_dataset(rows))["input_ids"]]


def prompts_of(rows, template: str = CHATML, **settings) -> list[str]:
    """Return the prompts of rows as text."""
    reader = make_reader(template, **settings)
    return [reader.tokenizer.decode(ids) for ids in reader.read_prompts(as_dataset(rows))["prompt_ids"]]


def responses_of(rows, template: str = CHATML, **settings) -> list[list[str]]:
    """Return what is supervised of every row, run by run."""
    reader, found = make_reader(template, **settings), []
    for row in reader.read_texts(as_dataset(rows)):
        runs, was_marked = [], False
        for token_id, mark in zip(row["input_ids"], row["completion_mask"], strict=True):
            if mark and not was_marked:
                runs.append([])
            if mark:
                runs[-1].append(token_id)
            was_marked = bool(mark)
        found.append([reader.tokenizer.decode(run) for run in runs])
    return found


def noted(action):
    """Return the result of an action and the package's warnings, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = action()
    return result, [str(each.message) for each in caught if "trl_draft_opd" in each.filename]


def chat(*turns):
    """Return a row of messages from pairs of role and content."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def move_clock(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Set the day that templates are told it is."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
