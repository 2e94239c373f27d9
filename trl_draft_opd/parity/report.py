# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What a verification found: one row per consumer, what is wrong, what differs and why, and what was not run."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Column, Table


@dataclass(frozen=True)
class Row:
    """
    One line of the table.

    Attributes:
        name (`str`): What decoded, or what was estimated.
        tau (`float`), acceptance_per_slot (`list[float]`), num_rounds (`int`):
            Of the counted rounds; NaN, empty and 0 for plain decoding.
        num_different (`int` or `None`): Responses that differ from the target's own; `None` where nothing was written.
        num_other_chains (`int` or `None`):
            Prompts whose rounds differ from the reference's; `None` where they are unknown.
        remark (`str`): What a reader should know.
    """

    name: str
    tau: float
    acceptance_per_slot: list[float]
    num_rounds: int
    num_different: int | None
    num_other_chains: int | None
    remark: str = ""


@dataclass(frozen=True)
class Verdict:
    """What comparing one consumer with the reference found: differences without an explanation, and with one."""

    row: Row
    problems: list[str]
    notes: list[str]


@dataclass
class VerificationReport:
    """
    Result of [`verify_drafter`].

    Attributes:
        path (`str`), family (`str`): What was verified.
        num_prompts (`int`), num_drafts (`int`), max_completion_length (`int`): The size of the run.
        rows (`list[Row]`): The reference first, then estimates and consumers.
        problems (`list[str]`): What must not be. Empty when the export may be published.
        notes (`list[str]`): Differences that have an explanation.
        skipped (`dict[str, str]`): What was not run or not compared, and why.
    """

    path: str
    family: str
    num_prompts: int
    num_drafts: int
    max_completion_length: int
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with what was run; `skipped` lists what was not."""
        return not self.problems

    def add(self, verdict: Verdict) -> None:
        """Take in what a comparison found."""
        self.rows.append(verdict.row)
        self.problems += verdict.problems
        self.notes += verdict.notes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; a tau that does not exist is `None`."""
        rows = [asdict(row) | {"tau": None if math.isnan(row.tau) else row.tau} for row in self.rows]
        return asdict(self) | {"rows": rows, "ok": self.ok}

    def table(self, title: str) -> Table:
        """Return a table to print with `rich`, remarks and notes below it."""
        heads = ("tau", "rounds", "outputs equal", "rounds equal", "acceptance per slot")
        table = Table(Column("", no_wrap=True), *heads, title=title)
        for row in self.rows:
            table.add_row(
                row.name,
                "" if math.isnan(row.tau) else f"{row.tau:.4f}",
                str(row.num_rounds or ""),
                self._share(row.num_different),
                self._share(row.num_other_chains),
                " ".join(f"{rate:.3f}" for rate in row.acceptance_per_slot),
            )
        remarks = [f"{row.name}: {row.remark}" for row in self.rows if row.remark]
        table.caption, table.caption_justify = "\n".join([*remarks, *self.notes]), "left"
        return table

    def _share(self, num_different: int | None) -> str:
        return "" if num_different is None else f"{self.num_prompts - num_different} of {self.num_prompts}"
