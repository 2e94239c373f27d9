# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Renders chats: which form of contents and of tool arguments a template takes, what of a chat it writes out, and a clock
that stands still. Knows the tokenizer for its template alone.
"""

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .chats import ChatSettings, function_of, reasoning_of


# The day that templates read where they ask for the date. A day that moved would change the ids of every prompt at
# midnight, and with them stored responses, resumed runs and whatever was cached.
STANDING_DAY = "2026-01-01"
# The variable that sets another day; by the name of the function that templates call.
CLOCK = "strftime_now"
NO_SETTINGS = ChatSettings()
# What a template raises when a chat is not what it was written for.
_FAILURES = (TypeError, AttributeError, LookupError, ArithmeticError)
# Variables that reading rows sets itself.
_RESERVED = {
    *("chat_template", "tools", "documents", "tokenize", "add_generation_prompt", "continue_final_message"),
    *("return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs", "messages", "conversation"),
    *("padding", "truncation", "max_length", "sanitize_control_tokens"),
}
# Marks that close reasoning inside of a content: `</think>` and its likes, `[/THINK]`, `<channel|>`.
_REASONING_END = re.compile(r"</[^<>\s]*think[^<>\s]*>|\[/THINK\]|<channel\|>")
_QUESTION, _RESPONSE = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def read_template(value: str | None) -> str | None:
    """
    Return the text of a chat template that is given as text or as the path of a file; `None` stays `None`.

    Raises:
        ValueError: If it is neither, with the nearest file.
    """
    if value is None or _is_jinja(value):
        return value
    path = Path(value).expanduser()
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {value!r} of `chat_template` is not UTF-8 text: {error}.") from error
    except (OSError, ValueError) as error:
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {str(path.with_name(near[0]))!r}?" if near else ""
        raise ValueError(
            f"`chat_template` must be the text of a Jinja template, with `{{{{` or `{{%` in it, or the path of a file "
            f"with one; {value!r:.200} is neither.{hint}"
        ) from error
    if not _is_jinja(text):
        raise ValueError(f"The file {value!r} of `chat_template` holds no Jinja template: no `{{{{` and no `{{%`.")
    return text


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text


@dataclass(frozen=True)
class ChatTemplate:
    """
    Renders the messages of [`read_messages`] with one template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its template, and the special tokens in it.
        source (`str`, *optional*): Jinja template in place of the tokenizer's own.
        arguments (`dict`, *optional*):
            Its variables. `strftime_now`, a date like `"2026-05-01"`, is the day that the template reads.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str | None = None
    arguments: dict[str, Any] | None = None

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, settings: ChatSettings = NO_SETTINGS
    ) -> str:
        """
        Return the text of a chat.

        Raises:
            TemplateError: With the template's own words, if it refuses the chat.
            ValueError: If it fails on it, or a variable is not for a row to set.
        """
        arguments = {**(self.arguments or {}), **(settings.arguments or {})}
        reserved = sorted(_RESERVED & set(arguments))
        if reserved:
            raise ValueError(f"`chat_template_kwargs` sets {reserved}, which reading rows sets itself. Leave it out.")
        day = arguments.pop(CLOCK, STANDING_DAY)
        text = self.tokenizer.get_chat_template(self.source, settings.tools)
        if CLOCK in text:
            text = _stop_clock(str(day)) + text
        render: Any = self.tokenizer.apply_chat_template
        try:
            return render(
                [self._shape(message) for message in messages],
                chat_template=text,
                tools=settings.tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **arguments,
            )
        except _FAILURES as error:
            raise ValueError(f"the chat template fails with a {type(error).__name__}: {error}") from error

    def _shape(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message with content and tool arguments in the form that the template takes."""
        if self._wants_parts and isinstance(message["content"], str):
            message = message | {"content": [{"type": "text", "text": message["content"]}]}
        if message.get("tool_calls") and self.argument_form != "any":
            message = message | {"tool_calls": [self._shape_call(call) for call in message["tool_calls"]]}
        return message

    def _shape_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = function_of(call)
        arguments = function.get("arguments")
        if isinstance(arguments, str) and self.argument_form == "object":
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"the arguments of a tool call are not JSON ({error}): {arguments!r:.200}."
                ) from error
        elif isinstance(arguments, dict) and self.argument_form == "text":
            arguments = json.dumps(arguments, ensure_ascii=False)
        else:
            return call
        shaped = function | {"arguments": arguments}
        return shaped if function is call else call | {"function": shaped}

    def passes_over(
        self, key: str, messages: list[dict[str, Any]], settings: ChatSettings, *, prompt: bool, rendered: str
    ) -> bool:
        """Whether a chat (a `prompt` or a whole one) reads the same without what stands under a key, or its tools."""
        bare = [{name: value for name, value in message.items() if name != key} for message in messages]
        settings = settings._replace(tools=None) if key == "tools" else settings
        try:
            return self.render(bare, add_generation_prompt=prompt, settings=settings) == rendered
        except (TemplateError, ValueError):
            return False

    # -- what a template takes, found by rendering a chat that says little ------------------------------------------

    def _try(self, *messages: dict[str, Any]) -> str:
        """Return the text of a chat whose messages are left as they are; empty if the template does not take them."""
        plain = _PlainTemplate(self.tokenizer, self.source, self.arguments)
        try:
            return plain.render(list(messages), add_generation_prompt=False)
        except (TemplateError, ValueError):
            return ""

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template writes text out that stands in parts, and none that is a string."""
        parts = {"role": "user", "content": [{"type": "text", "text": _QUESTION["content"]}]}
        return _QUESTION["content"] not in self._try(_QUESTION) and _QUESTION["content"] in self._try(parts)

    @cached_property
    def argument_form(self) -> str:
        """
        How the template takes the arguments of tool calls: as an `"object"` alone, as JSON `"text"` alone, or `"any"`.

        One that encodes what it is given would encode text twice; one that joins strings fails on an object.
        """
        content: Any = [{"type": "text", "text": ""}] if self._wants_parts else ""
        given: dict[str, Any] = {"city": "Rome"}

        def written(arguments: Any) -> str:
            # Some templates want ids, and of nine letters.
            call = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": arguments}}
            return self._try(_QUESTION, {"role": "assistant", "content": content, "tool_calls": [call]})

        takes_text = json.dumps(given) in written(json.dumps(given))
        # Python's own form of an object is no JSON.
        takes_object = "Rome" in written(given) and str(given) not in written(given)
        if takes_text == takes_object:
            return "any"
        return "text" if takes_text else "object"

    @property
    def prints_date(self) -> bool:
        """Whether the template writes the date out, of a day that the user did not set."""
        if CLOCK in (self.arguments or {}):
            return False
        days = [ChatTemplate(self.tokenizer, self.source, (self.arguments or {}) | {CLOCK: day}) for day in _TWO_DAYS]
        chats = [(_QUESTION,), ({"role": "system", "content": "Be brief."}, _QUESTION)]
        return any(len({day._try(*chat) for day in days}) > 1 for chat in chats)

    def check_generation_prompt(self) -> None:
        """
        Refuse a template that writes something of its own before a response, but not at the end of a prompt.

        Raises:
            ValueError: With what to append to the template.
        """

        def render(*messages: dict[str, Any], prompt: bool = False) -> str:
            return self.render(list(messages), add_generation_prompt=prompt)

        try:
            prompt, bare, chat = render(_QUESTION, prompt=True), render(_QUESTION), render(_QUESTION, _RESPONSE)
        except TemplateError:
            return  # It wants another kind of chat; rows are checked one by one.
        header, responded, _ = chat.removeprefix(prompt).partition(_RESPONSE["content"])
        header = header.strip()
        if prompt == bare and chat.startswith(prompt) and responded and header:
            raise ValueError(
                f"The chat template writes {header!r} before a response but leaves it out under "
                "`add_generation_prompt=True`, so it would be trained on as the target's own. Append "
                f"`{{% if add_generation_prompt %}}{header}{{% endif %}}` to the template."
            )


class _PlainTemplate(ChatTemplate):
    """A template that gets messages as they are, to find out what it takes."""

    def _shape(self, message: dict[str, Any]) -> dict[str, Any]:
        return message


_TWO_DAYS = ("2001-01-01", "2012-12-22")


@cache
def _stop_clock(day: str) -> str:
    """Return the beginning of a template whose clock stands at the start of a day; nothing else of it changes."""
    try:
        time = datetime.fromisoformat(day)
    except ValueError as error:
        raise ValueError(
            f'`chat_template_kwargs={{"{CLOCK}": ...}}` must be a date like {STANDING_DAY!r}, got {day!r}.'
        ) from error
    values = {f"%{code}": time.strftime(f"%{code}") for code in "aAwdbBmyYHIpMSfjUWcxXGuV"}
    values |= {f"%-{code}": values[f"%{code}"].lstrip("0") or "0" for code in "dmyHIMSj"}
    values |= {"%F": time.strftime("%Y-%m-%d"), "%T": time.strftime("%H:%M:%S"), "%e": f"{time.day:2}"}
    values |= {"%z": "", "%Z": "", "%%": "%"}
    steps = "".join(f" | replace({json.dumps(code)}, {json.dumps(value)})" for code, value in values.items())
    # The block takes the line break behind it along.
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n"


# -- what of a chat reaches its text ----------------------------------------------------------------------------------


def reaches(text: str, rendered: str) -> bool:
    """Whether a text stands in a rendering: trimmed, as it is, as JSON, or with other white space."""
    text = text.strip()
    if text in rendered:
        return True
    if any(json.dumps(text, ensure_ascii=ascii)[1:-1] in rendered for ascii in (True, False)):
        return True
    return " ".join(text.split()) in " ".join(rendered.split())


def content_reaches(message: dict[str, Any], rendered: str) -> bool:
    """Whether a content stands in a rendering; of an assistant's, at least what follows its reasoning."""
    content = message["content"]
    return reaches(content, rendered) or reaches(content[find_reasoning(message)[1] :], rendered)


def reasoning_reaches(message: dict[str, Any], rendered: str) -> bool:
    """Whether the reasoning of a message, apart from its content or at the front of it, stands in a rendering."""
    inside = message["content"][: find_reasoning(message)[0]]
    # The mark that opens it may stand in the generation prompt.
    inside = re.sub(r"^\s*(?:<[^<>]*>|\[THINK\])", "", inside)
    return reaches(reasoning_of(message), rendered) and reaches(inside, rendered)


def find_reasoning(message: dict[str, Any]) -> tuple[int, int]:
    """Return where the reasoning at the front of an assistant's content ends, and where the mark behind it does."""
    if message["role"] != "assistant":
        return 0, 0
    ends = [match.span() for match in _REASONING_END.finditer(message["content"])]
    return ends[-1] if ends else (0, 0)


def names_reach(tools: Sequence[dict[str, Any]], rendered: str) -> bool:
    """Whether the name of every tool, or of every call, stands in a rendering."""
    return all(str(function_of(tool).get("name", "")) in rendered for tool in tools)
