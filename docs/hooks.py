# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What the site needs beside its pages, called by mkdocs (`mkdocs.yml`): the navigation, which is the tables of
`index.md`, the removal of links that only exist outside of the site, pictures in the reader's colours, and a search
that leads to the page with the answer.
"""

import re
from pathlib import Path
from typing import Any


DOCS = Path(__file__).parent


def read_navigation(index: str) -> list[dict[str, Any]]:
    """
    Read the navigation from the tables of the index.

    Args:
        index (`str`): Text of `index.md`: a heading of level two per section, and a row `| [title](page.md) | ... |`
            per page.

    Returns:
        `list[dict[str, Any]]`: Navigation in the form of mkdocs: sections in order, each with its pages in order.
    """
    sections: list[dict[str, Any]] = []
    for line in index.splitlines():
        if line.startswith("## "):
            sections.append({line[3:]: []})
        elif sections and (row := re.match(r"\| \[([^\]]+)\]\(([\w/]+\.md)\) \|", line)):
            sections[-1][next(iter(sections[-1]))].append({row[1]: row[2]})
    return [section for section in sections if any(section.values())]


def unlink_outside(text: str, page: Path) -> str:
    """Replace links of a page to files that are not in `docs/` by their text: the site does not hold them."""

    def replaced(match: re.Match) -> str:
        place = match[2].partition("#")[0]
        is_inside = not place or re.match(r"[a-z]+:", place) or (page.parent / place).resolve().is_relative_to(DOCS)
        return match[0] if is_inside else match[1]

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", replaced, text)


def split_pictures(text: str, page: Path) -> str:
    """Replace a picture that also exists for dark ground by both, of which the theme shows one."""

    def replaced(match: re.Match) -> str:
        dark = match[2].replace(".svg", ".dark.svg")
        if not (page.parent / dark).is_file():
            return match[0]
        return f"![{match[1]}]({match[2]}#only-light) ![{match[1]}]({dark}#only-dark)"

    return re.sub(r"!\[([^\]]*)\]\(([^)\s]+(?<!\.dark)\.svg)\)", replaced, text)


def on_config(config: Any) -> Any:
    """Set the navigation."""
    config.nav = [{"Home": "index.md"}, *read_navigation((DOCS / "index.md").read_text("utf-8"))]
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Take links out that leave the site, and tell the search what a page is for."""
    place = page.file.src_uri
    # The index holds the questions and no answer; of the pages that answer, those that say what to do come first.
    page.meta["search"] = {"exclude": place == "index.md", "boost": 2 if place.startswith("do/") else 1}
    return split_pictures(unlink_outside(markdown, DOCS / place), DOCS / place)


def on_post_page(output: str, **_: Any) -> str:
    """Name the dialog of the search, which the theme leaves without a name."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"', 1)


def on_page_content(html: str, **_: Any) -> str:
    """Take the brackets from names in docstrings, which mark them for another tool."""
    return re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
