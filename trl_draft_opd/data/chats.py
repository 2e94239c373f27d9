# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What a text, a chat and its template must be like before they are tokenized. Knows no tokenizer."""

from collections.abc import Callable

from jinja2 import TemplateError


# Roles that templates are written for; others must stand in the template that is to render them.
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# Roles of other conventions, which most templates pass over or take for a user's.
_OTHER_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_OPENING = ("system", "developer")


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


def check_generation_prompt(render: Callable[[list[dict], bool], str]) -> None:
    """
    Refuse a template that writes something of its own before a response, but not at the end of a prompt.

    Args:
        render (`Callable`): Renders messages as a string, the second argument being `add_generation_prompt`.
    """
    question, response = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
    try:
        prompt, bare, chat = render([question], True), render([question], False), render([question, response], False)
    except TemplateError:
        return  # It wants another kind of chat; rows are checked one by one.
    header, responded, _ = chat.removeprefix(prompt).partition("Because.")
    header = header.strip()
    if prompt == bare and chat.startswith(prompt) and responded and header:
        raise ValueError(
            f"The chat template writes {header!r} before a response but leaves it out under "
            "`add_generation_prompt=True`, so it would be trained on as the target's own. Append "
            f"`{{% if add_generation_prompt %}}{header}{{% endif %}}` to the template."
        )
