# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a text, a chat and its template must be like before they are tokenized. Strings and messages only: knows no tokenizer.
"""

from collections.abc import Callable

from jinja2 import TemplateError


# Roles that templates are written for; others must stand in the template that is to render them.
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# Roles of other conventions, which most templates pass over or take for a user's.
_OTHER_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
_OPENING = ("system", "developer")


def check_text(text: str) -> str:
    """
    Return a text unchanged.

    Raises:
        ValueError: If it holds a NUL or half of a surrogate pair, which stand where a file was damaged or wrongly decoded.
    """
    if "\0" in text:
        raise ValueError(
            f"the text holds a NUL character at index {text.index(chr(0))}: {_around(text, text.index(chr(0)))}. Its source is damaged; "
            "mend or drop the row."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds half of a surrogate pair at index {error.start}: {_around(text, error.start)}. It was decoded wrongly; "
            "mend or drop the row."
        ) from error
    return text


def _around(text: str, index: int) -> str:
    return ascii(text[max(0, index - 20) : index + 20])


def check_roles(messages: list[dict], template: str) -> None:
    """
    Check that a chat template can tell who speaks.

    Raises:
        ValueError: If a role is neither a usual one nor named in the template, which would pass over it or mistake it.
    """
    for number, message in enumerate(messages):
        role = message["role"]
        if role in KNOWN_ROLES:
            continue
        if role in _OTHER_NAMES:
            way_out = f"Rename it to {_OTHER_NAMES[role]!r}."
        elif f"'{role}'" in template or f'"{role}"' in template:
            continue
        else:
            way_out = f"Rename it to one of {KNOWN_ROLES}, or drop the message."
        raise ValueError(f"message {number} has the role {role!r}, which the chat template does not know. {way_out}")


def is_out_of_order(messages: list[dict]) -> bool:
    """
    Whether a system turn stands behind the first other one, an assistant turn opens the chat, or two turns of the user or of the
    assistant follow each other.
    """
    roles = [message["role"] for message in messages]
    while roles and roles[0] in _OPENING:
        roles = roles[1:]
    has_late_system = any(role in _OPENING for role in roles)
    has_twins = any(a == b and a in ("user", "assistant") for a, b in zip(roles, roles[1:], strict=False))
    return has_late_system or has_twins or roles[:1] == ["assistant"]


def check_generation_prompt(render: Callable[[list[dict], bool], str]) -> None:
    """
    Check on one chat that a template ends a prompt where the target's answer begins.

    Args:
        render (`Callable`): Renders messages as a string, the second argument being `add_generation_prompt`.

    Raises:
        ValueError: If the template writes something of its own before an answer but does not write it at the end of a prompt.
    """
    question, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
    try:
        prompt, bare, chat = render([question], True), render([question], False), render([question, answer], False)
    except TemplateError:
        return  # It wants another kind of chat; rows are checked one by one.
    header, answered, _ = chat.removeprefix(prompt).partition("Because.")
    header = header.strip()
    if prompt == bare and chat.startswith(prompt) and answered and header:
        raise ValueError(
            f"The chat template writes {header!r} before an answer but leaves it out under `add_generation_prompt=True`: prompts would end "
            "too early, and it would be trained on as if the target had written it. Append "
            f"`{{% if add_generation_prompt %}}{header}{{% endif %}}` to the template."
        )
