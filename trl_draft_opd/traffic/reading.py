# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One exchange to token ids: the prompt that the target read, proven by its template, and the response that it wrote.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from ..data.chats import ChatSettings, read_messages
from ..data.templates import ChatTemplate
from ..data.text_reader import TextReader
from ..responses.protocols import WrongReply, retokenize
from ..rollout.acceptance import SamplingSettings
from .records import Exchange, Unusable
from .sampling import read_sampling


# Of a token in log-probabilities, under `return_tokens_as_token_ids`.
_ID = "token_id:"
# Why a response is whole. Calls are text of the target like any other, which ended by itself.
_ENDED = ("stop", "tool_calls", "function_call")

# Parts of a message that are not in its text.
_APART = ("tool_calls", "function_call", "reasoning", "reasoning_content", "refusal")


@dataclass(frozen=True)
class ServedRounds:
    """
    What the server says of its speculative decoding of one response.

    Attributes:
        accepted (`list[int]`): Drafts kept in each round, in order.
        num_drafts (`int`): Drafts per round.
        is_whole (`bool`): Whether each round had that many.
    """

    accepted: list[int]
    num_drafts: int
    is_whole: bool


@dataclass(frozen=True)
class ServedResponse:
    """
    A prompt and what the target wrote to it.

    Attributes:
        prompt_ids (`np.ndarray`), completion_ids (`np.ndarray`): Token ids, int32.
        logprobs (`list[float]` or `None`): As the server reports them.
        sampling ([`SamplingSettings`]): What the tokens were drawn from.
        rounds ([`ServedRounds`] or `None`): If the server reports them.
    """

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    logprobs: list[float] | None
    sampling: SamplingSettings
    rounds: ServedRounds | None


class TrafficReader:
    """
    Reads exchanges with one target.

    Args:
        reader ([`TextReader`]): Tokenizer, template and limits of the target.
        defaults (`dict`): What the server fills in, see [`read_defaults`].
        served_model_name (`str`, *optional*): Requests to other names are left out.
    """

    def __init__(self, reader: TextReader, defaults: dict[str, Any], served_model_name: str | None) -> None:
        self.reader, self.defaults, self.served_model_name = reader, defaults, served_model_name
        self.models: set[str] = set()

    def read(self, exchange: Exchange) -> ServedResponse:
        """Return what an exchange holds, or raise [`Unusable`] with the reason."""
        try:
            return self._read(*exchange)
        except Unusable:
            raise
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            pass
        # Out of the handler: its error may quote the text.
        raise Unusable("bodies of another form than the two endpoints have")

    def _read(self, request: dict[str, Any], reply: dict[str, Any]) -> ServedResponse:
        model = request.get("model") or reply.get("model")
        if self.served_model_name is not None and model != self.served_model_name:
            raise Unusable("of another model than `--served-model-name`")
        sampling = read_sampling(request, self.defaults, self.reader.vocab_size)
        if len(reply["choices"]) != 1:
            raise Unusable("none or several responses to one request")
        choice = reply["choices"][0]
        reason = choice.get("finish_reason")
        if reason not in (*_ENDED, "length"):
            raise Unusable("broken off: no `finish_reason`, or one that is neither an end nor a limit")
        prompt = self._read_prompt(request, reply, choice)
        if self.reader.max_prompt_length is not None and len(prompt) > self.reader.max_prompt_length:
            raise Unusable("a prompt longer than `max_prompt_length`")
        completion = self._read_completion(request, reply, choice, prompt)
        if reason != "length":
            completion = self._with_end(completion, choice.get("stop_reason"))
        # Counted here, so that what is left out for another reason does not ask for the flag.
        self.models.add(str(model))
        return ServedResponse(
            np.asarray(prompt, np.int32),
            np.asarray(completion, np.int32),
            _read_logprobs(choice, len(completion)),
            sampling,
            _read_rounds(reply),
        )

    # -- the prompt ---------------------------------------------------------------------------------------------------

    def _read_prompt(self, request: dict[str, Any], reply: dict[str, Any], choice: dict[str, Any]) -> list[int]:
        """Return the prompt's ids as the server has them, checked against the template; or those proven by count."""
        ids = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
        asked = request.get("prompt")
        if isinstance(asked, list):
            if not all(type(token) is int for token in asked):
                raise Unusable("several prompts in one request")
            rendered = asked
        elif isinstance(asked, str):
            special = request.get("add_special_tokens", True)
            rendered = self.reader.tokenizer(asked, add_special_tokens=special, verbose=False)["input_ids"]
        else:
            rendered = self._render(request)
        if ids is not None and list(ids) != rendered:
            raise Unusable("a prompt whose ids are not those of this tokenizer and chat template")
        if ids is None and asked is not rendered and (reply.get("usage") or {}).get("prompt_tokens") != len(rendered):
            raise Unusable("no `prompt_token_ids`, and the prompt's text has no proven way to the ids")
        return rendered

    def _render(self, request: dict[str, Any]) -> list[int]:
        tokenizer, template = self.reader.tokenizer, self.reader.chat_template
        arguments = {**(self.reader.chat_template_kwargs or {}), **(request.get("chat_template_kwargs") or {})}
        # vLLM leaves tools out of the prompt that may not be called; where it is told not to, the ids say so.
        tools = None if request.get("tool_choice") == "none" else request.get("tools")
        try:
            text = ChatTemplate(tokenizer, template, arguments).render(
                read_messages(request["messages"], "messages"),
                add_generation_prompt=True,
                settings=ChatSettings(tools or None),
            )
        except (TemplateError, ValueError):
            text = None
        if text is None:
            raise Unusable("a chat that this chat template does not render")
        special = bool(request.get("add_special_tokens", False))
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    # -- the response -------------------------------------------------------------------------------------------------

    def _read_completion(
        self, request: dict[str, Any], reply: dict[str, Any], choice: dict[str, Any], prompt: list[int]
    ) -> list[int]:
        ids = choice.get("token_ids")
        if ids is None:
            ids = _ids_of_logprobs(choice.get("logprobs") or {})
        count = (reply.get("usage") or {}).get("completion_tokens")
        if ids is not None and count not in (None, len(ids)):
            raise Unusable("not as many `token_ids` as the server counted")
        if ids is None:
            message = choice.get("message") or {}
            text = choice.get("text", message.get("content"))
            # A stop is cut off the text, and calls and reasoning are taken out of it.
            is_whole = not any(message.get(name) for name in _APART)
            if request.get("stop") or request.get("stop_token_ids") or not isinstance(text, str) or not is_whole:
                raise Unusable("no `token_ids`, and a text that is not whole")
            try:
                ids = retokenize(text, prompt, reply.get("usage") or {}, self.reader.tokenizer)
            except WrongReply:
                pass
            # Only an end of sequence is counted and not in the text.
            ids = None if choice.get("finish_reason") == "length" and ids is not None and len(ids) != count else ids
        if ids is None:
            raise Unusable("no `token_ids`, and the text has no proven way back to the ids")
        if not len(ids):
            raise Unusable("an empty response")
        if any(type(token) is not int or not 0 <= token < self.reader.vocab_size for token in ids):
            raise Unusable("ids outside the target's vocabulary")
        if not set(ids[:-1]).isdisjoint(self.reader.eos_token_ids):
            raise Unusable("text after an end of sequence")
        return list(ids)

    def _with_end(self, ids: list[int], stop_reason: Any) -> list[int]:
        """Return a response that ended with the end that the server left out; one that a stop ended stays as it is."""
        eos = self.reader.eos_token_ids
        if ids[-1] in eos or stop_reason is not None:
            return [*ids, stop_reason] if ids[-1] not in eos and stop_reason in eos else ids
        if len(eos) != 1:
            raise Unusable("an end of sequence that the server left out, of several there are")
        return [*ids, eos[0]]


def _ids_of_logprobs(logprobs: dict[str, Any]) -> list[int] | None:
    """Return the ids that stand in place of tokens under `return_tokens_as_token_ids`."""
    tokens = logprobs.get("tokens") or [entry["token"] for entry in logprobs.get("content") or ()]
    if not tokens or not all(token.startswith(_ID) for token in tokens):
        return None
    return [int(token.removeprefix(_ID)) for token in tokens]


def _read_logprobs(choice: dict[str, Any], length: int) -> list[float] | None:
    logprobs = choice.get("logprobs") or {}
    values = logprobs.get("token_logprobs") or [entry["logprob"] for entry in logprobs.get("content") or ()]
    # An end that was put back has none.
    return [float(value) for value in values] if len(values) == length else None


def _read_rounds(reply: dict[str, Any]) -> ServedRounds | None:
    """Return `metrics.speculative_decoding` of vLLM from 0.29, under `--per-request-spec-decode-metrics detailed`."""
    found = (reply.get("metrics") or {}).get("speculative_decoding") or {}
    accepted, drafted, num_drafts = (
        found.get(name) for name in ("per_step_accepted", "per_step_drafted", "num_spec_tokens")
    )
    if not accepted or not num_drafts:
        return None
    is_whole = drafted is None or all(count == num_drafts for count in drafted)
    return ServedRounds([int(count) for count in accepted], int(num_drafts), is_whole)
