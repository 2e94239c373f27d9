# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What to ask an OpenAI-compatible server under load, and how to read a reply as it comes: its tokens by the time they
arrived, and its text. Knows no network.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ..responses.protocols import WrongReply


# How a prompt is sent.
FORMS = ("ids", "text", "chat")
_LONGEST_QUOTE = 300
_LONGEST_LINE = 2**24
# Hexadecimal digits by which a text is known again.
_DIGITS = 16


def build_body(
    prompt: Any,
    form: str,
    *,
    model: str | None,
    max_completion_length: int,
    temperature: float,
    ignore_eos: bool,
    eos_token_ids: Sequence[int],
) -> tuple[str, dict[str, Any]]:
    """
    Return the path and the JSON body that ask for one response, sent as it is written.

    Every sampling setting is sent, the neutral ones too, so that no default of a server counts; those that are not
    OpenAI's are vLLM's and SGLang's.

    Args:
        prompt (`list[int]`, `str` or `list[dict]`): Token ids, text, or the messages of a chat, by `form`.
        eos_token_ids (`Sequence[int]`): What ends a response, unless it is ignored.
    """
    settings = {
        "model": model,
        "max_tokens": max_completion_length,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "stop_token_ids": [] if ignore_eos else list(eos_token_ids),
        "ignore_eos": ignore_eos,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if form == "chat":
        return "/v1/chat/completions", settings | {"messages": prompt}
    # A prompt in text has its special tokens already.
    return "/v1/completions", settings | {"prompt": prompt} | ({} if form == "ids" else {"add_special_tokens": False})


@dataclass(frozen=True)
class Reply:
    """
    One response, as it came.

    Attributes:
        arrivals (`tuple[tuple[float, int], ...]`): When tokens arrived, in seconds, and how many.
        digest (`str`): By which its text is known again.
        is_whole (`bool`): Whether it came to its end.
    """

    arrivals: tuple[tuple[float, int], ...]
    digest: str
    is_whole: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that arrived."""
        return sum(count for _, count in self.arrivals)


def read_reply(pieces: Iterable[tuple[float, bytes]], *, is_cut: bool, clean: Callable[[str], str] = str) -> Reply:
    """
    Read a reply from its pieces and the times at which they arrived.

    Args:
        pieces (`Iterable[tuple[float, bytes]]`): The reply as it came.
        is_cut (`bool`): Whether it was not waited for to its end.
        clean (`Callable`, *optional*): Takes secrets out of what errors quote.

    Raises:
        WrongReply: If it is no response sent as it is written, holds an error, ended before its end, or does not
            tell how many tokens it has.
    """
    # When, and how many tokens were there by then, where that is known.
    events: list[tuple[float, int | None]] = []
    texts: list[str] = []
    num_ids, total, reason, is_done = 0, None, None, False
    for moment, event in _events(pieces):
        if event == "[DONE]":
            is_done = True
            continue
        try:
            content = json.loads(event)
            if content.get("error") is not None or content.get("object") == "error":
                raise WrongReply(f"the server broke the response off: {clean(event)[:_LONGEST_QUOTE]}")
            usage = (content.get("usage") or {}).get("completion_tokens")
            total = total if usage is None else int(usage)
            for choice in content.get("choices") or ():
                text, ids = _written(choice)
                reason = choice.get("finish_reason") or reason
                num_ids += len(ids or ())
                if text or ids:
                    events.append((moment, num_ids if ids is not None else usage))
                    texts.append(text)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, WrongReply):
                raise
            raise WrongReply(
                f"the reply is no response sent as it is written; it holds {clean(event)[:_LONGEST_QUOTE]!r}"
            ) from None
    is_whole = is_done and reason is not None
    if not is_whole and not is_cut:
        raise WrongReply(f"the response ended before its end, after {len(events)} pieces of text")
    if reason not in (None, "stop", "length"):
        raise WrongReply(f"the server ended the response for the reason {clean(str(reason))[:_LONGEST_QUOTE]!r}")
    digest = sha256("".join(texts).encode("utf-8", "replace")).hexdigest()[:_DIGITS]
    return Reply(_count(events, total, is_whole=is_whole), digest, is_whole)


def _events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """Yield the data of server-sent events, with the time at which the line was whole."""
    rest = b""
    for moment, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            raise WrongReply(f"the reply has a line of more than {_LONGEST_LINE} bytes")
        for line in lines:
            field, _, data = line.decode("utf-8", "replace").strip().partition(":")
            if field == "data":
                yield moment, data.strip()


def _written(choice: dict[str, Any]) -> tuple[str, list[int] | None]:
    """Return the text of a piece, of a reasoning model its reasoning too, and its ids where the server sends them."""
    delta = choice.get("delta")
    if delta is None:
        text = choice.get("text") or ""
    else:
        names = ("reasoning_content", "reasoning", "content")
        text = "".join(delta.get(name) or "" for name in names)
    ids = choice.get("token_ids")
    return text, None if ids is None else list(map(int, ids))


def _count(
    events: Sequence[tuple[float, int | None]], total: int | None, *, is_whole: bool
) -> tuple[tuple[float, int], ...]:
    """Return how many tokens arrived when: as the server says, or its total spread evenly over the pieces."""
    sums = [count for _, count in events if count is not None]
    if len(sums) < len(events):
        if not is_whole:
            return ()
        if total is None:
            raise WrongReply(
                "the server tells neither token ids nor how many tokens it wrote, and pieces of text are no measure: "
                "with a drafter, one holds several tokens. Use a server that knows `return_token_ids` or "
                "`stream_options`"
            )
        sums = [total * number // len(events) for number in range(1, len(events) + 1)]
    counts = [own - before for own, before in zip(sums, [0, *sums], strict=False)]
    return tuple((moment, count) for (moment, _), count in zip(events, counts, strict=True) if count > 0)
