# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What to ask a vLLM or an SGLang server, and how to read its reply as token ids, or refuse it. Knows no network.

Every sampling setting is sent, the neutral ones too: a server fills what is missing from the model's generation
config, whose repetition penalty or top-k are not part of the distribution.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .origin import Origin
from .shards import StoredResponse, prompt_key, why_impossible


ENGINES = ("vllm", "sglang")
# Ids, log-probabilities, why the response ended, and the id or text that ended it where the server names it.
_Reply = tuple[list[int], list[Any] | None, str, Any]


class WrongReply(ValueError):
    """The server replied, but not with what the target wrote to this prompt. Asking again would not help."""


def prompt_seed(prompt_ids: Sequence[int], seed: int) -> int:
    """Return a seed of 31 bits that depends only on the prompt and on `seed`: a resumed run draws the same."""
    return (int(prompt_key(prompt_ids)[:15], 16) + seed) % 2**31


def build_request(
    engine: str, prompt_ids: list[int], origin: Origin, *, model: str | None, seed: int
) -> tuple[str, dict[str, Any]]:
    """
    Return the path and the JSON body that ask for one response, by ids: the server's tokenizer plays no part.

    `model` is the name that vLLM serves the target under; SGLang serves one and needs none.
    """
    settings: dict[str, Any] = {
        "temperature": origin.temperature,
        "top_p": origin.top_p,
        # Both take -1 for all tokens; 0 means the same to newer vLLM only.
        "top_k": origin.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "stop_token_ids": list(origin.eos_token_ids),
        "ignore_eos": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }
    if engine == "sglang":
        settings |= {"max_new_tokens": origin.max_completion_length, "min_new_tokens": 0, "no_stop_trim": True}
        if not origin.sampling.is_greedy:
            settings["sampling_seed"] = seed
        return "/generate", {
            "input_ids": prompt_ids,
            "sampling_params": settings,
            "return_logprob": True,
            "stream": False,
        }
    # Log-probabilities: the sampled token's own, no alternatives.
    settings |= {"max_tokens": origin.max_completion_length, "min_tokens": 0, "logprobs": 0}
    if not origin.sampling.is_greedy:
        settings["seed"] = seed
    return "/v1/completions", settings | {
        "model": model,
        "prompt": prompt_ids,
        "return_token_ids": True,
        "stream": False,
    }


def read_reply(
    engine: str, reply: Any, prompt_ids: list[int], origin: Origin, tokenizer: PreTrainedTokenizerBase | None
) -> StoredResponse:
    """
    Read a server's JSON reply, or raise [`WrongReply`] if it is no response of the target to this prompt.

    The tokenizer reads text where the server returns no ids.
    """
    read = _read_sglang if engine == "sglang" else _read_vllm
    try:
        ids, logprobs, reason, stop_id = read(reply, prompt_ids, tokenizer)
        ids = _with_end(ids, reason, stop_id, origin)
        if logprobs is not None and len(logprobs) == len(ids) - 1:
            logprobs = None  # the end that was put back has none
        row = StoredResponse(prompt_ids, ids, logprobs, origin.finish_reason(ids))
        wrong = why_impossible(row, origin)
    except WrongReply:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise WrongReply(
            f"the reply has not the form of a {engine} server's ({type(error).__name__}: {error}): {str(reply)[:300]}"
        ) from error
    if wrong is not None:
        raise WrongReply(f"the response {wrong.rstrip('.')}")
    return row


def _with_end(ids: list[int], reason: str, stop_id: Any, origin: Origin) -> list[int]:
    """Return a response that is whole or as long as allowed, with the end-of-sequence id that engines strip."""
    eos = origin.eos_token_ids
    if reason not in ("stop", "length"):
        raise WrongReply(f"the server ended the response for the reason {reason!r}")
    if len(ids) >= origin.max_completion_length or (ids and ids[-1] in eos):
        return ids
    if reason == "length":
        raise WrongReply(
            f"the response was cut at {len(ids)} of {origin.max_completion_length} tokens. Start the server with a "
            "larger context length"
        )
    if stop_id is None and len(eos) == 1:
        return [*ids, eos[0]]
    if stop_id not in eos:
        raise WrongReply(
            f"the response was stopped by {stop_id!r}, and not by one of the target's end-of-sequence ids {list(eos)}"
        )
    return [*ids, stop_id]


def _read_vllm(reply: Any, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> _Reply:
    choice = reply["choices"][0]
    if len(reply["choices"]) != 1:
        raise WrongReply(f"{len(reply['choices'])} responses were returned, one was asked for")
    echoed = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
    if echoed is not None and echoed != prompt_ids:
        raise WrongReply(f"the server read another prompt, of {len(echoed)} ids in place of {len(prompt_ids)}")
    ids = choice.get("token_ids")
    stop_id = choice.get("stop_reason")
    if ids is None:
        ids = retokenize(choice["text"], prompt_ids, reply.get("usage") or {}, tokenizer)
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    return ids, logprobs, choice["finish_reason"], stop_id


def _read_sglang(reply: Any, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> _Reply:
    meta = reply["meta_info"]
    num_read = meta.get("prompt_tokens", len(prompt_ids))
    if num_read != len(prompt_ids):
        raise WrongReply(f"the server read another prompt, of {num_read} ids in place of {len(prompt_ids)}")
    ids, finish = reply.get("output_ids"), meta["finish_reason"]
    if ids is None:
        ids = retokenize(reply["text"], prompt_ids, meta, tokenizer)
    logprobs = meta.get("output_token_logprobs")
    if logprobs is not None:
        # Triples of log-probability, id and text; an id that is not the returned one belongs to another token.
        if [entry[1] for entry in logprobs][: len(ids)] != ids[: len(logprobs)]:
            raise WrongReply("its log-probabilities belong to other tokens than the returned ids")
        logprobs = [entry[0] for entry in logprobs]
    return ids, logprobs, finish["type"], finish.get("matched")


def retokenize(
    text: str, prompt_ids: list[int], usage: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> list[int]:
    """
    Turn text back into the ids the target wrote, where that is proven: the tokenizer's own ids give the text back,
    stand unchanged behind the prompt, and are as many as the server counted, the stripped end aside.
    """
    if tokenizer is None:
        raise WrongReply("the server returned text and no ids, and there is no tokenizer")
    count = usage.get("completion_tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=False)
    assert isinstance(prompt, str)
    joint = tokenizer(prompt + text, add_special_tokens=False, verbose=False)["input_ids"]
    if (
        not isinstance(count, int)
        or count - len(ids) not in (0, 1)
        or tokenizer.decode(ids, skip_special_tokens=False) != text
        or joint != [*prompt_ids, *ids]
    ):
        raise WrongReply(
            f"the server returned text and no ids, and the text has no proven way back to its {count} tokens "
            f"({len(ids)} by this tokenizer). Use a server that returns ids: vLLM from 0.10.2, or SGLang"
        )
    return ids
