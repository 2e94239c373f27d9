# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Lines of a log to requests and whole replies, streamed ones put together. Knows no tokenizer and no model.

A line is `{"request": BODY, "response": BODY, "status": 200}`: the bodies of `/v1/completions` or
`/v1/chat/completions` as JSON or as text; of a streamed reply the list of its chunks, or the text of its events.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


_EVENT, _LAST_EVENT = "data:", "[DONE]"
# Parts of log-probabilities, of the two kinds of endpoint.
_LOGPROB_PIECES = ("content", "token_logprobs", "tokens")


class Unusable(Exception):
    """A line of the log that is no response to train on; the message is the reason, and says nothing of its text."""


class Exchange(NamedTuple):
    """The body of a request, and that of its whole reply in the form of one that was not streamed."""

    request: dict[str, Any]
    reply: dict[str, Any]


def read_lines(path: Path) -> Iterator[bytes]:
    """
    Yield the lines of a log that are not empty; `.gz` is unpacked.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no log {str(path)!r}.")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        yield from (line for line in lines if line.strip())


def read_exchange(line: bytes) -> Exchange:
    """Return what a line holds, or raise [`Unusable`]."""
    entry = _parse(line)
    if not isinstance(entry, dict) or "request" not in entry or "response" not in entry:
        raise Unusable("no line of `request` and `response`")
    request, response = _parse(entry["request"]), _parse(entry["response"])
    if entry.get("status") not in (None, 200) or response is None:
        raise Unusable("the server replied with an error, or not at all")
    reply = _join_chunks(response) if isinstance(response, list) else response
    if not isinstance(request, dict) or not isinstance(reply, dict):
        raise Unusable("no line of `request` and `response`")
    if reply.get("error") is not None or reply.get("object") == "error":
        raise Unusable("the server replied with an error, or not at all")
    return Exchange(request, reply)


def _parse(value: Any) -> Any:
    """Return what JSON text says, the list of chunks that a stream's text says, and anything else as it is."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        if text.startswith((_EVENT, ":")):
            # Events of other names and comments that keep a connection alive are passed over.
            events = [line[len(_EVENT) :].strip() for line in text.splitlines() if line.startswith(_EVENT)]
            return [json.loads(event) for event in events if event and event != _LAST_EVENT]
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        pass
    # Out of the handler: its error quotes the text.
    raise Unusable("no JSON, or cut short")


def _join_chunks(chunks: Sequence[Any]) -> dict[str, Any]:
    """Return the reply that the chunks of a stream make; what has no `finish_reason` in the end was broken off."""
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        raise Unusable("no JSON, or cut short")
    reply: dict[str, Any] = {"choices": []}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for name in ("error", "model", "prompt_token_ids", "usage", "metrics"):
            if chunk.get(name) is not None:
                reply[name] = chunk[name]
        for piece in chunk.get("choices") or ():
            _add_piece(choices.setdefault(piece.get("index", 0), {}), piece)
    reply["choices"] = list(choices.values())
    return reply


def _add_piece(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    """Add what a chunk says of a choice."""
    for name in ("finish_reason", "stop_reason", "prompt_token_ids"):
        if piece.get(name) is not None:
            choice[name] = piece[name]
    if piece.get("token_ids") is not None:
        choice["token_ids"] = choice.get("token_ids", []) + piece["token_ids"]
    if "text" in piece:
        choice["text"] = choice.get("text", "") + piece["text"]
    for name, value in (piece.get("delta") or {}).items():
        message = choice.setdefault("message", {})
        if value is not None:
            # Calls and reasoning need not be put together: that there are some is all that is asked.
            message[name] = message.get(name, "") + value if name == "content" else value
    for name in _LOGPROB_PIECES:
        values = (piece.get("logprobs") or {}).get(name)
        if values is not None:
            logprobs = choice.setdefault("logprobs", {})
            logprobs[name] = logprobs.get(name, []) + values
