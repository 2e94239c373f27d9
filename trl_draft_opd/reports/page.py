# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The page of a report: one HTML file without scripts, whose own policy lets a browser fetch nothing. Every text goes
through the template's escaping; only the figures, which matplotlib wrote, are put in as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .completions import Completion


@dataclass(frozen=True)
class Table:
    """A table: its caption (`str`), titles of the columns, and rows; the first cell of a row names it."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A figure: its title (`str`), and the SVG (`str`)."""

    title: str
    svg: str


@dataclass(frozen=True)
class Section:
    """A section: its anchor (`str`), title (`str`), sentences, figures, and tables of their numbers."""

    name: str
    title: str
    sentences: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """
    All of a report.

    Attributes:
        title (`str`): Which drafter for which target.
        facts (`Sequence[str]`): Sentences about the whole.
        sections (`Sequence[Section]`): In order.
        completions (`Sequence[Completion]`): Responses to show; none if empty.
        missing (`Sequence[str]`): What is not there, and how to get it.
    """

    title: str
    facts: Sequence[str]
    sections: Sequence[Section]
    completions: Sequence[Completion] = ()
    missing: Sequence[str] = field(default_factory=tuple)


def render(page: Page) -> str:
    """Return the HTML of a report."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(page=page)


def write_page(page: Page, path: str | Path) -> None:
    """Write a report."""
    Path(path).write_text(render(page), encoding="utf-8")
