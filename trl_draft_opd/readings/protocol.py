# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What to ask a vLLM server that extracts hidden states, how to read its reply, and what of its file is believed.

Source: vLLM 0.32, `vllm/distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py`.

Shape letters:  L = text length, S = states of a token (the tapped layers and the last one), H = hidden size
"""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import torch

from ..responses.client import ServerError
from ..responses.protocols import WrongReply


# What vLLM's files of a completion begin with; the number of our request and random letters follow.
FILE_START = "cmpl-"


class NoStates(ServerError):
    """The server replied, but its file did not come; asking again may help."""


class NotExtracting(WrongReply):
    """The server is none that extracts hidden states."""


def build_reading(
    text: Sequence[int], *, model: str | None, request_id: str, with_logprobs: bool = False
) -> tuple[str, dict[str, Any]]:
    """
    Return the path and the JSON body that ask for the states of one text, by ids.

    A list of texts would return the file of the first alone. `request_id` becomes part of the file's name.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(text),
        # None is not allowed; the token is thrown away.
        "max_tokens": 1,
        "temperature": 0.0,
        "n": 1,
        "return_token_ids": True,
        "request_id": request_id,
        "stream": False,
    }
    return "/v1/completions", body | ({"prompt_logprobs": 0} if with_logprobs else {})


def find_file_name(reply: Any, text: Sequence[int], request_id: str) -> str:
    """
    Return the name, inside the shared folder, of the file that a reply promises.

    Raises:
        NotExtracting: If it promises none.
        WrongReply: If it is the reply to another text, or the file is not of this request.
    """
    try:
        choice = reply["choices"][0]
        echoed = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
        path = (reply.get("kv_transfer_params") or {}).get("hidden_states_path")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise WrongReply(
            f"the reply has not the form of a vLLM server's ({type(error).__name__}: {error}): {str(reply)[:300]}"
        ) from error
    if path is None:
        raise NotExtracting("its reply names no file of hidden states (`kv_transfer_params.hidden_states_path`)")
    if echoed is not None and echoed != list(text):
        raise WrongReply(f"the server read another text, of {len(echoed)} ids in place of {len(text)}")
    # Its folder is its own machine's; only a plain name in ours is ever opened, and only one that we gave.
    name = PurePosixPath(path).name if isinstance(path, str) else ""
    if not (name.startswith(f"{FILE_START}{request_id}") and name.endswith(".safetensors")) or "\0" in name:
        raise WrongReply(
            f"the server names the file {str(path)[:300]!r}, which is not that of our request {request_id!r}. A proxy "
            "between here and the server must not set `X-Request-Id`"
        )
    return name


def read_logprobs(reply: Any, text: Sequence[int]) -> list[float]:
    """Return the server's log-probabilities of a text's tokens from the second on; [`WrongReply`] without them."""
    try:
        entries = reply["choices"][0]["prompt_logprobs"]
        found = [float(entry[str(token)]["logprob"]) for entry, token in zip(entries[1:], text[1:], strict=True)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise WrongReply(
            f"the reply has no log-probabilities of the text's tokens (`prompt_logprobs`; {type(error).__name__})"
        ) from error
    return found


def max_file_bytes(num_tokens: int, num_states: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of a whole file, with room for its header."""
    return num_tokens * (num_states * hidden_size * dtype.itemsize + 8) + 2**16


def check_states(
    tensors: dict[str, torch.Tensor], text: Sequence[int], num_states: int, hidden_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """
    Return the states `(L, S, H)` of a text if a file's tensors are that.

    Raises:
        WrongReply: If they are of another text, shape or precision, not finite, or of one layer twice.
    """
    missing = {"hidden_states", "token_ids"} - set(tensors)
    if missing:
        raise WrongReply(f"the file of states lacks {sorted(missing)}, it holds {sorted(tensors)}")
    states, ids = tensors["hidden_states"], tensors["token_ids"].flatten().tolist()
    if ids != list(text):
        raise WrongReply(f"the file of states is of another text: {len(ids)} ids in place of {len(text)}, or others")
    shape = (len(text), num_states, hidden_size)
    if tuple(states.shape) != shape:
        raise WrongReply(
            f"the states have the shape {tuple(states.shape)} in place of {shape} (tokens, states of a token, hidden "
            "size). The server was started for other layers, or serves another model"
        )
    if states.dtype != dtype:
        raise WrongReply(
            f"the states are {states.dtype}, and the target computes in {dtype}. Start the server with `--dtype "
            f"{str(dtype).removeprefix('torch.')}` and without `--kv-cache-dtype`, or set `target_dtype`"
        )
    if not states.isfinite().all():
        where = (~states.isfinite()).any(dim=-1).nonzero()[0].tolist()
        raise WrongReply(f"the states are not finite from token {where[0]}, state {where[1]}")
    for one in range(num_states):
        for other in range(one):
            # Whole states are compared only where those of the last token are equal already.
            pairs = (states[-1, one], states[-1, other]), (states[:, one], states[:, other])
            if all(torch.equal(*pair) for pair in pairs):
                raise WrongReply(
                    f"the states {other} and {one} of every token are equal: vLLM repeats a layer for a number beyond "
                    "the target's. The server was started for other layers"
                )
    return states
