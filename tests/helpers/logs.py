# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Lines of a server's log, as vLLM's bodies are, made from texts of a tiny target."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


GREEDY = {"model": "target", "temperature": 0.0}


def chat_line(
    content: str, prompt_ids: Sequence[int], ids: Sequence[int], finish: str = "stop", **request: Any
) -> dict[str, Any]:
    """Return a line of the chat endpoint with ids; more fields go into the request."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "text"}, "finish_reason": finish}
    usage = {"prompt_tokens": len(prompt_ids), "completion_tokens": len(ids)}
    return {
        "request": GREEDY | {"messages": [{"role": "user", "content": content}]} | request,
        "response": {
            "choices": [choice | {"token_ids": list(ids)}],
            "prompt_token_ids": list(prompt_ids),
            "usage": usage,
        },
    }


def streamed(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the chat endpoint as the text of the events of a stream, a token in each."""
    reply = line["response"]
    (choice,) = reply["choices"]
    first = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    chunks = [first | {"prompt_token_ids": reply["prompt_token_ids"]}]
    chunks += [{"choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": [i]}]} for i in choice["token_ids"]]
    chunks[-1]["choices"][0]["finish_reason"] = choice["finish_reason"]
    chunks.append({"choices": [], "usage": reply["usage"], "metrics": reply.get("metrics")})
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return {"request": line["request"] | {"stream": True}, "response": f": ping\n\n{events}data: [DONE]\n\n"}


def write_log(path: Path, lines: Sequence[Any]) -> Path:
    """Write lines to a file; text is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path
