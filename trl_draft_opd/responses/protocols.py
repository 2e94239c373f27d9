# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What to ask a vLLM or an SGLang server, and how to read its reply as token ids, or refuse it. Knows no network.

Every sampling setting is sent, the neutral ones too: a server fills what is missing from the model's generation
config, whose repetition penalty or top-k are not part of the distribution.
"""

import math
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from .origin import Origin
from .shards import StoredResponse, prompt_key


ENGINES = ("vllm", "sglang")


class WrongReply(ValueError):
    """The server replied, but not with what the target wrote to this prompt. Asking again would not help."""


def prompt_seed(prompt_ids: list[int], seed: int) -> int:
    """Return a seed of 31 bits that depends only on the prompt and on `seed`: a resumed run draws the same."""
    return (int(prompt_key(prompt_ids)[:15], 16) + seed) % 2**31


def build_request(
    engine: str, prompt_ids: list[int], origin: Origin, *, model: str | None, seed: int, with_logprobs: bool
) -> tuple[str, dict[str, Any]]:
    """
    Return the path and the JSON body that ask for one response.

    Args:
        engine (`str`):
            `"vllm"` (or another server that speaks its `/v1/completions`) or `"sglang"` (its own `/generate`).
        prompt_ids (`list[int]`): The prompt, sent as ids: the server's tokenizer and template play no part.
        origin ([`Origin`]): Distribution, longest response and end-of-sequence ids.
        model (`str` or `None`): Name the server serves the target under; SGLang serves one and needs none.
        seed (`int`): See [`prompt_seed`]; sent where tokens are drawn.
        with_logprobs (`bool`): Ask for the sampled tokens' log-probabilities.
    """
    distribution: dict[str, Any] = {
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
        distribution |= {"max_new_tokens": origin.max_new_tokens, "min_new_tokens": 0, "no_stop_trim": True}
        if not origin.sampling.is_greedy:
            distribution["sampling_seed"] = seed
        body = {
            "input_ids": prompt_ids,
            "sampling_params": distribution,
            "return_logprob": with_logprobs,
            "stream": False,
        }
        return "/generate", body
    distribution |= {"max_tokens": origin.max_new_tokens, "min_tokens": 0}
    if not origin.sampling.is_greedy:
        distribution["seed"] = seed
    if with_logprobs:
        distribution["logprobs"] = 0  # the sampled token's own, no alternatives
    return "/v1/completions", distribution | {
        "model": model,
        "prompt": prompt_ids,
        "return_token_ids": True,
        "stream": False,
    }


def read_reply(
    engine: str, reply: Any, prompt_ids: list[int], origin: Origin, tokenizer: PreTrainedTokenizerBase | None
) -> StoredResponse:
    """
    Read a server's reply.

    Args:
        engine (`str`), prompt_ids (`list[int]`), origin ([`Origin`]): As for [`build_request`].
        reply (`Any`): The JSON value the server sent.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `None`): Reads text where the server returns no ids.

    Raises:
        WrongReply: If the reply is no response of the target to this prompt.
    """
    read: Callable = _read_sglang if engine == "sglang" else _read_vllm
    try:
        ids, logprobs, reason, stop_id = read(reply, prompt_ids, tokenizer)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise WrongReply(
            f"the reply has not the form of a {engine} server's ({type(error).__name__}: {error}): {str(reply)[:300]}"
        ) from error
    outside = [i for i in ids if type(i) is not int or not 0 <= i < origin.vocab_size]
    if outside:
        raise WrongReply(
            f"the id {outside[0]!r} is outside the target's vocabulary of {origin.vocab_size} tokens. The server "
            "serves another model"
        )
    if len(ids) > origin.max_new_tokens:
        raise WrongReply(f"{len(ids)} tokens were returned, at most {origin.max_new_tokens} were asked for")
    if reason not in ("stop", "length"):
        raise WrongReply(f"the server ended the response for the reason {reason!r}")
    ids, reason = _settle_end(ids, reason, stop_id, origin)
    if logprobs is not None:
        logprobs = _settle_logprobs(logprobs, len(ids))
    return StoredResponse(prompt_ids, ids, logprobs, reason)


def _settle_end(ids: list[int], reason: str, stop_id: Any, origin: Origin) -> tuple[list[int], str]:
    """Return the response with its end-of-sequence id, and whether it is whole."""
    eos = origin.eos_token_ids
    early = next((index for index, token_id in enumerate(ids[:-1]) if token_id in eos), None)
    if early is not None:
        raise WrongReply(f"the response continues after the end-of-sequence id {ids[early]} at token {early}")
    if ids and ids[-1] in eos:
        return ids, "stop"
    if reason == "length":
        if len(ids) < origin.max_new_tokens:
            raise WrongReply(
                f"the response was cut at {len(ids)} of {origin.max_new_tokens} tokens. Start the server with a "
                "larger context length"
            )
        return ids, "length"
    # Stopped, and the id that stopped it is not among the returned ones: the engine strips it.
    if stop_id not in eos:
        if len(eos) != 1 or stop_id is not None:
            raise WrongReply(
                f"the response was stopped by {stop_id!r}, and not by one of the target's end-of-sequence ids "
                f"{list(eos)}"
            )
        stop_id = eos[0]
    if len(ids) == origin.max_new_tokens:
        return ids, "length"
    return [*ids, stop_id], "stop"


def _settle_logprobs(logprobs: list[Any], num_tokens: int) -> list[float] | None:
    """Return one finite number per token, or `None` where an appended end-of-sequence id has none."""
    if len(logprobs) != num_tokens:
        if len(logprobs) == num_tokens - 1:
            return None
        raise WrongReply(f"{len(logprobs)} log-probabilities were returned for {num_tokens} tokens")
    if not all(isinstance(value, float | int) and math.isfinite(value) and value <= 1e-3 for value in logprobs):
        raise WrongReply("log-probabilities were returned that are not finite or above 0")
    return [min(float(value), 0.0) for value in logprobs]


def _read_vllm(reply: Any, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> tuple:
    choice = reply["choices"][0]
    if len(reply["choices"]) != 1:
        raise WrongReply(f"{len(reply['choices'])} responses were returned, one was asked for")
    echoed = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
    if echoed is not None and echoed != prompt_ids:
        raise WrongReply(f"the server read another prompt, of {len(echoed)} ids in place of {len(prompt_ids)}")
    ids = choice.get("token_ids")
    stop_id = choice.get("stop_reason")
    if ids is None:
        ids = _retokenize(choice["text"], prompt_ids, reply.get("usage") or {}, tokenizer)
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    return ids, logprobs, choice["finish_reason"], stop_id


def _read_sglang(reply: Any, prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase | None) -> tuple:
    meta = reply["meta_info"]
    num_read = meta.get("prompt_tokens", len(prompt_ids))
    if num_read != len(prompt_ids):
        raise WrongReply(f"the server read another prompt, of {num_read} ids in place of {len(prompt_ids)}")
    ids, finish = reply.get("output_ids"), meta["finish_reason"]
    if ids is None:
        ids = _retokenize(reply["text"], prompt_ids, meta, tokenizer)
    logprobs = meta.get("output_token_logprobs")
    if logprobs is not None:
        # Triples of log-probability, id and text; an id that is not the returned one belongs to another token.
        if [entry[1] for entry in logprobs][: len(ids)] != ids[: len(logprobs)]:
            raise WrongReply("its log-probabilities belong to other tokens than the returned ids")
        logprobs = [entry[0] for entry in logprobs]
    return ids, logprobs, finish["type"], finish.get("matched")


def _retokenize(
    text: str, prompt_ids: list[int], usage: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> list[int]:
    """
    Turn text back into the ids the target wrote, where that is proven.

    One text has many tokenisations. Proof asks that the tokenizer's own gives the text back, that it stands unchanged
    behind the prompt, and that the server counted as many tokens, the stripped end of the response aside.
    """
    if tokenizer is None:
        raise WrongReply("the server returned text and no ids, and there is no tokenizer")
    count = usage.get("completion_tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=False)
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
