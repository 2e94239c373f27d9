# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Docstrings as Markdown, for the API pages: an extension of griffe, which reads the package for the site (`mkdocs.yml`).
Sections stand as in transformers, several names in one entry and groups of settings included, which no parser of
griffe's takes.
"""

import re
from typing import Any

import griffe


_SECTION = re.compile(r"(Args|Parameters|Attributes|Returns|Raises|Yields|Example|Examples):$")
# The name of an entry, which its type follows.
_NAME = re.compile(r"(?<![`\w])(\w+)(?= \([`*])")
_TITLES = {"Args": "Arguments", "Parameters": "Settings"}
_LISTS = ("Args", "Parameters", "Attributes", "Raises")


def to_markdown(docstring: str) -> str:
    """
    Return a docstring as Markdown.

    Args:
        docstring (`str`): Text whose sections (`Args:` and its likes) are indented by four spaces. Entries of a list
            stand at that depth, what belongs to them four deeper; lines behind `> ` name a group of entries.
    """
    lines, section, is_header = [], None, False
    for line in docstring.splitlines():
        if found := _SECTION.match(line):
            section, is_header = found[1], False
            lines += ["", f"**{_TITLES.get(section, section)}**", ""]
            continue
        if section and line and not line.startswith("    "):
            section = None
            lines.append("")
        if section is None or not line.strip():
            lines.append(line.strip() and line)
            continue
        line = line[4:]
        if section not in _LISTS:
            lines.append(line)
        elif line.startswith("> "):
            lines += ["", f"*{line[2:].rstrip('.:')}*", ""]
        elif line.startswith(" "):
            lines.append(line)
        else:
            lines.append(("    " if is_header else "- ") + _NAME.sub(r"`\1`", line))
        # Several names share a text: each stands on a line of its own, all but the last end with a comma.
        is_header = section in _LISTS and not line.startswith(" ") and line.endswith(",")
    return "\n".join(lines)


class MarkdownDocstrings(griffe.Extension):
    """Rewrites each docstring as soon as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a function, class or attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
