# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What a text and a chat must be like before a template renders them. Knows no tokenizer and no template."""

import json
from typing import Any, NamedTuple


# Roles that templates are written for; others must stand in the template that is to render them.
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# Roles of other conventions, which most templates pass over or take for a user's.
_OTHER_NAMES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "ai", "model"), "assistant"),
}
_OPENING = ("system", "developer")
# Where a message's reasoning stands, apart from its content.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Keys of a message that hold something else than its text.
_OTHER_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "id", "weight", *REASONING_KEYS}


class ChatSettings(NamedTuple):
    """What a row gives its chat's template besides the messages: tools as JSON schemas, and further variables."""

    tools: list[dict[str, Any]] | None = None
    arguments: dict[str, Any] | None = None


def check_text(text: str) -> str:
    """Return a text unchanged; refuse a NUL or half of a surrogate pair, which a damaged or misread file leaves."""
    index, found = text.find("\0"), "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if index < 0:
            index, found = error.start, "half of a surrogate pair"
    if index >= 0:
        around = ascii(text[max(0, index - 20) : index + 20])
        raise ValueError(f"the text holds {found} at index {index}: {around}. Mend or drop the row.")
    return text


def read_messages(messages: Any, column: str) -> list[dict[str, Any]]:
    """
    Return the messages of a row as templates want them: contents that are strings, and no nulls.

    They may be JSON text. Text parts are joined, `from` and `value` (ShareGPT) become `role` and `content`. Where
    `content` is null or left out next to `tool_calls`, it is empty.

    Raises:
        ValueError: If there is no list of messages, or a message has another content; it names message and part.
    """
    kind = "a string or a list of messages" if column == "prompt" else "a list of messages"
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        messages = _read_json(messages, column)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"`{column}` must be {kind}, got {messages!r:.200}.")
    plain = [_rename_keys(drop_nulls(message)) for message in messages]
    for number, message in enumerate(plain):
        role = message.get("role")
        if not role or not isinstance(role, str):
            raise ValueError(
                f"`{column}` must be a list of messages, each with a `role`, got {messages[number]!r:.200} as message "
                f"{number}."
            )
        message["content"] = _read_content(message, number)
        if "tool_calls" in message:
            _check_tool_calls(message["tool_calls"], number)
    return plain


def drop_nulls(value: Any) -> Any:
    """
    Drop the entries of dictionaries that are null, at every depth, as TRL's `remove_none_values` does.

    Arrow adds them for keys that only other rows have, and nothing tells those from a null that was written.
    """
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def _rename_keys(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of the ShareGPT convention under the usual names, and any other as it is."""
    if "from" not in message or "role" in message:
        return message
    role, rest = message["from"], {key: item for key, item in message.items() if key not in ("from", "value")}
    if "value" in message:
        rest["content"] = message["value"]
    return {"role": _OTHER_NAMES.get(role, role) if isinstance(role, str) else role, **rest}


def _read_content(message: dict[str, Any], number: int) -> str:
    """Return the text of a message."""
    content = message.get("content")
    if isinstance(content, str):
        return check_text(content)
    if content is None:
        if message["role"] == "assistant" and message.get("tool_calls"):
            return ""
        others = [key for key, value in message.items() if key not in _OTHER_KEYS and isinstance(value, str)]
        fix = f"Rename its `{others[0]}`" if others else "Fill it"
        raise ValueError(f"message {number}, of role {message['role']!r}, has no `content`. {fix}, or drop the row.")
    if not isinstance(content, list):
        raise ValueError(
            f"message {number}, of role {message['role']!r}, must have a string or a list of text parts as its "
            f"`content`, got {content!r:.200}."
        )
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"message {number}, of role {message['role']!r}: part {index} of its `content` is no text but "
                f"{part!r:.200}. The target reads text alone: drop the part or the row."
            )
    return check_text("".join(part["text"] for part in content))


def _check_tool_calls(tool_calls: Any, number: int) -> None:
    if not isinstance(tool_calls, list) or not all(function_of(call).get("name") for call in tool_calls):
        raise ValueError(
            f"message {number}: `tool_calls` must be a list of calls, each with the `name` of a function, got "
            f"{tool_calls!r:.200}."
        )


def function_of(tool: Any) -> dict[str, Any]:
    """Return what names a tool or a call, which stands under `function` or right there; empty if there is neither."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    return inner if isinstance(inner, dict) else {}


def read_settings(row: dict[str, Any]) -> ChatSettings:
    """
    Return the columns `tools` and `chat_template_kwargs` of a row, as TRL's trainers read them, or as JSON text.

    Raises:
        ValueError: If a column holds something else.
    """
    tools = _read_json(row.get("tools"), "tools")
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"`tools` must be a list of JSON schemas, or that as JSON text, got {tools!r:.200}.")
    arguments = _read_json(row.get("chat_template_kwargs"), "chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError(f"`chat_template_kwargs` must be a dictionary, or that as JSON text, got {arguments!r:.200}.")
    # Some templates open a section of tools for an empty list.
    return ChatSettings(tools or None, arguments)


def _read_json(value: Any, column: str) -> Any:
    """Return a value that may be JSON text. What the text says is kept, nulls included."""
    if not isinstance(value, str):
        return drop_nulls(value)
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise ValueError(f"`{column}` is text but not JSON ({error}): {value!r:.200}.") from error


def check_roles(messages: list[dict], template: str) -> None:
    """Refuse a role that is neither a usual one nor named in the template, which would pass over it or mistake it."""
    for number, message in enumerate(messages):
        role = message["role"]
        if role in KNOWN_ROLES:
            continue
        if role in _OTHER_NAMES:
            fix = f"Rename it to {_OTHER_NAMES[role]!r}."
        elif f"'{role}'" in template or f'"{role}"' in template:
            continue
        else:
            fix = f"Rename it to one of {KNOWN_ROLES}, or drop the message."
        raise ValueError(f"message {number} has the role {role!r}, which the chat template does not know. {fix}")


def is_out_of_order(messages: list[dict]) -> bool:
    """Whether a system turn comes late, an assistant turn opens the chat, or one side has two turns in a row."""
    roles = [message["role"] for message in messages]
    while roles and roles[0] in _OPENING:
        roles = roles[1:]
    has_late_system = any(role in _OPENING for role in roles)
    has_twins = any(a == b and a in ("user", "assistant") for a, b in zip(roles, roles[1:], strict=False))
    return has_late_system or has_twins or roles[:1] == ["assistant"]


def has_text(message: dict[str, Any]) -> bool:
    """Whether a message says anything, in its content, its reasoning or a call of a tool."""
    return bool(message["content"].strip() or message.get("tool_calls") or reasoning_of(message))


def reasoning_of(message: dict[str, Any]) -> str:
    """Return the reasoning that a message holds apart from its content; empty if none."""
    texts = (message.get(key) for key in REASONING_KEYS)
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), "")
