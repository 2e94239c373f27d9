# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The documentation holds together: links and anchors resolve, files named in it exist, and every line can be read in a
terminal.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest


ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "docs" / "do" / "faults.md"
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    if not path.is_relative_to(ROOT / "docs" / "figures")
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# A folder named in full, from the root of the repository; `...` and `<name>` stand for something.
CODE_PATH = re.compile(r"\b((?:trl_draft_opd|tests|benchmarks|examples|docs)/[\w./-]*\w\.(?:py|md|yaml|jinja))\b")
# A file of the package, named from one of its rooms: `trainer/step.py`.
ROOMS = "utils data losses drafters target rollout responses readings served_speed export runs".split()
ROOMS += "trainer parity demo cli".split()
ROOM_PATH = re.compile(rf"`((?:{'|'.join(ROOMS)})/[\w/]+\.py)")
PROSE_WIDTH, TABLE_WIDTH = 120, 159


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def numbered_lines(path: Path) -> tuple[tuple[int, str, bool], ...]:
    """Return number, text and whether it is code, of every line of a page."""
    lines, fence = [], None
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and fence is None:
            fence = mark[1]
        elif mark and mark[1].startswith(fence or mark[1]):
            lines.append((number, line, True))
            fence = None
            continue
        lines.append((number, line, fence is not None))
    return tuple(lines)


@cache
def anchors_of(path: Path) -> frozenset[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    anchors: dict[str, int] = {}
    for _, line, is_code in numbered_lines(path):
        heading = None if is_code else re.match(r"#{1,6} +(.+?) *#*$", line)
        if heading:
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", text.replace("`", "")).replace(" ", "-")
            anchors[slug] = anchors.get(slug, -1) + 1
            if anchors[slug]:
                anchors[f"{slug}-{anchors[slug]}"] = 0
    return frozenset(anchors)


def find_broken_link(page: Path, link: str) -> str | None:
    """Return what is wrong with a relative link, or `None`."""
    place, _, anchor = link.partition("#")
    target = (page.parent / place).resolve() if place else page
    if not target.is_relative_to(ROOT.resolve()) or not target.exists():
        return "no such file"
    if anchor and target.suffix == ".md" and anchor not in anchors_of(target):
        return f"no heading #{anchor}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_anchor_resolves(page):
    broken = []
    for number, line, is_code in numbered_lines(page):
        for link in [] if is_code else LINK.findall(line):
            if not re.match(r"[a-z]+:", link) and (problem := find_broken_link(page, link)):
                broken.append(f"line {number}: {link}: {problem}")
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page):
    missing = []
    for number, line, _ in numbered_lines(page):
        named = [ROOT / path for path in CODE_PATH.findall(re.sub(r"https?://\S+|\]\([^)]*\)", "", line))]
        named += [ROOT / "trl_draft_opd" / path for path in ROOM_PATH.findall(line)]
        missing += [f"line {number}: {name_of(path)}" for path in named if not path.exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_fit_a_terminal(page):
    """Prose 120 columns, rows of a table 159; code, and a line that is one long link, as they are."""
    too_long = []
    for number, line, is_code in numbered_lines(page):
        width = TABLE_WIDTH if line.lstrip().startswith("|") else PROSE_WIDTH
        if not is_code and len(re.sub(r"\]\([^)]*\)|https?://\S+", "", line)) > width:
            too_long.append(f"line {number}: {len(line)} columns")
    assert too_long == []


def test_every_page_stands_in_the_index():
    index = ROOT / "docs" / "index.md"
    links = {(index.parent / link.partition("#")[0]).resolve() for link in LINK.findall(index.read_text("utf-8"))}
    assert [
        name_of(page) for page in PAGES if page.is_relative_to(ROOT / "docs") and page not in {*links, index}
    ] == []


def words_of(text: str) -> set[str]:
    """Return the words that a search goes by, without those that stand in every sentence."""
    common = set("a are about as do does for how i in is it my need of on or the to what when which why will".split())
    return set(re.findall(r"[a-z]+", text.lower())) - common


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Which family for my model?", "do/choosing.md"),
        ("How many prompts do I need?", "do/recipes.md"),
        ("How long does training take?", "do/recipes.md"),
        ("What about thinking mode?", "do/data.md"),
        ("How do I know the plateau is reached?", "do/monitor.md"),
        ("Why is tau low when served?", "do/troubleshooting.md"),
        ("What will it cost on my GPU?", "do/recipes.md"),
    ],
)
def test_a_question_of_a_new_user_finds_its_page_by_its_headings(question, answer):
    index = ROOT / "docs" / "index.md"
    assert f"]({answer}" in next(
        line for line in index.read_text("utf-8").splitlines() if words_of(question) <= words_of(line) | {"reached"}
    )
    # As a search by titles does: the page with a heading that holds most of the words.
    found: dict[str, float] = {}
    for page in (ROOT / "docs").rglob("*.md"):
        for _, line, is_code in numbered_lines(page):
            if not is_code and line.startswith("#") and page != index:
                words = words_of(line)
                score = len(words & words_of(question)) / len(words_of(question))
                found[name_of(page)] = max(found.get(name_of(page), 0), score)
    best = max(found.values())
    assert best >= 0.5 and [page for page, score in found.items() if score == best] == [f"docs/{answer}"]


def texts_of(path: Path) -> list[str]:
    """Return the texts that a file of the package can print, with a mark where a value is put in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        parts = [node] if isinstance(node, ast.Constant) else getattr(node, "values", [])
        if isinstance(node, ast.Constant | ast.JoinedStr):
            found.append("".join(part.value if is_text(part) else "\0" for part in parts))
    return found


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_every_message_of_troubleshooting_is_one_of_the_package():
    page = (ROOT / "docs" / "do" / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `(.+?)` \|", page.partition("## Messages")[2], re.MULTILINE)
    assert len(messages) > 40
    texts = [text for path in (ROOT / "trl_draft_opd").rglob("*.py") for text in texts_of(path)]
    patterns = {message: ".*".join(map(re.escape, message.split("..."))) for message in messages}
    missing = [
        message for message, it in patterns.items() if not any(re.search(it, text, re.DOTALL) for text in texts)
    ]
    assert missing == []


def test_every_public_name_stands_in_the_api_under_its_home():
    homes = re.findall(r"^from \.([\w.]+) import (\w+)", (ROOT / "trl_draft_opd" / "__init__.pyi").read_text(), re.M)
    listed = [
        name
        for page in (ROOT / "docs" / "api").glob("*.md")
        for name in re.findall(r"^::: ([\w.]+)", page.read_text(), re.M)
    ]
    assert len(listed) == len(set(listed))
    assert {f"trl_draft_opd.{home}.{name}" for home, name in homes} <= set(listed)


def test_the_sites_navigation_is_the_index(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    sections = hooks.read_navigation((ROOT / "docs" / "index.md").read_text("utf-8"))
    assert [next(iter(section)) for section in sections] == ["Learn", "Do", "Why", "API"]
    pages = [next(iter(page.values())) for section in sections for page in next(iter(section.values()))]
    assert len(pages) == len(set(pages)) and "do/choosing.md" in pages
    on_page = ROOT / "docs" / "do" / "x.md"
    text = "[in](training.md#a) [out](../../README.md) [web](https://example.org) ![picture](../figures/method.svg)"
    assert hooks.unlink_outside(text, on_page) == text.replace("[out](../../README.md)", "out")


def test_the_site_shows_a_picture_in_the_readers_colours(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    on_page = ROOT / "docs" / "learn" / "method.md"
    shown = hooks.split_pictures("![a](../figures/method.svg) ![b](../figures/slots.png) ![c](none.svg)", on_page)
    assert shown == (
        "![a](../figures/method.svg#only-light) ![a](../figures/method.dark.svg#only-dark) ![b](../figures/slots.png) "
        "![c](none.svg)"
    )


def test_entries_of_docstrings_stand_as_a_list_with_their_names_as_code(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    import docstrings

    text = "What.\n\nArgs:\n    one (`int`), two (`int` of `(B, A)`):\n        Both.\n    three (`x`): It (or not).\n"
    assert docstrings.to_markdown(text).split("\n") == [
        "What.",
        "",
        "",
        "**Arguments**",
        "",
        "- `one` (`int`), `two` (`int` of `(B, A)`):",
        "    Both.",
        "- `three` (`x`): It (or not).",
    ]


def test_forty_faults_stand_in_the_table_each_with_a_test():
    text = FAULTS.read_text("utf-8")
    numbers = [str(number) for number in range(1, 41)]
    assert re.findall(r"^\| (\d+) \| \S.* \| \S.* \|$", text, re.MULTILINE) == numbers
    assert re.findall(r"^\*\*(\d+)\*\*\n\n- `[\w/]+\.py::test_", text, re.MULTILINE) == numbers


def test_every_test_that_faults_names_exists():
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", FAULTS.read_text("utf-8"))
    assert len(named) > 80
    assert [f"{name}::{test}" for name, test in named if test not in functions_in(ROOT / "tests" / name)] == []


@cache
def functions_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text("utf-8") if path.is_file() else "")
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_a_broken_anchor_and_a_missing_file_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# One `word`, two\n\n```\n# not a heading\n```\n", encoding="utf-8")
    assert find_broken_link(page, "#one-word-two") is None
    assert find_broken_link(page, "#not-a-heading") == "no heading #not-a-heading"
    assert find_broken_link(page, "other.md") == "no such file"
    assert find_broken_link(page, "../outside.md") == "no such file"
