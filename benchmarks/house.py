# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Measure the shape of the package: its size, its import graph, three walks through it, and what is long. Reads text,
imports nothing.

    python -m benchmarks.house [--root FOLDER] [--walks walks.json]

Nothing here fails: long files and functions are warnings. What must hold is kept by `make lint`.
"""

import argparse
import ast
import io
import json
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


PACKAGE = "trl_draft_opd"
WIDTH = 119
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
# By title, functions as `file.py:name` in the order in which they take their turn.
WALKS = Path(__file__).with_name("walks.json")
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.match_case, ast.comprehension)
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class File(NamedTuple):
    """One file of the package: its path below it, its text and its syntax tree."""

    name: str
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        return f"{PACKAGE}/{self.name.removesuffix('.py')}".removesuffix("/__init__").replace("/", ".")


def read_files(root: Path) -> list[File]:
    folder = root / PACKAGE
    texts = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in sorted(folder.rglob("*.py"))}
    return [File(name, text, ast.parse(text)) for name, text in texts.items()]


def docstring_lines(node: ast.AST) -> int:
    if not isinstance(node, Function | ast.ClassDef | ast.Module) or ast.get_docstring(node) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def count_code(file: File) -> int:
    """Count the lines that hold code: no blank ones, no comments, no docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(file.text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines) - sum(docstring_lines(node) for node in ast.walk(file.tree))


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield every function below a node with its qualified name, nested ones included."""
    for child in ast.iter_child_nodes(node):
        is_named = isinstance(child, Function | ast.ClassDef)
        if isinstance(child, Function):
            yield f"{prefix}{child.name}", child
        yield from functions(child, f"{prefix}{child.name}." if is_named else prefix)


def all_functions(files: list[File]) -> dict[str, Function]:
    return {f"{file.name}:{name}": function for file in files for name, function in functions(file.tree)}


def parameters(function: Function) -> list[ast.arg]:
    """Return the parameters without `self`, `cls` and the `ctx` of autograd."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, [given.vararg, given.kwarg])]
    return [arg for arg in named if arg.arg not in ("self", "cls", "ctx")]


def is_annotated(function: Function) -> bool:
    returns = function.returns is not None or function.name == "__init__"
    return returns and all(arg.annotation is not None for arg in parameters(function))


def length(function: Function) -> int:
    return function.end_lineno - function.lineno + 1 - docstring_lines(function)


def imports(file: File, modules: set[str]) -> set[str]:
    """Return the modules of the package that a file imports, inside functions or not."""
    found = set()
    package = [PACKAGE, *file.name.split("/")[:-1]]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names}
    return (found & modules) - {file.module, PACKAGE}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other."""
    reach = {node: set(graph[node]) for node in graph}
    for middle in graph:
        for node in graph:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    groups = {tuple(other for other in graph if other in reach[node] and node in reach[other]) for node in graph}
    return sorted(list(group) for group in groups if len(group) > 1)


def report_size(files: list[File]) -> None:
    lines, code = Counter(), Counter()
    for file in files:
        for key in (file.name.split("/")[0] if "/" in file.name else "(top)", "total"):
            lines[key] += len(file.text.splitlines())
            code[key] += count_code(file)
    print("\n## Lines by folder (all, and code without blanks, comments and docstrings)")
    for room in [*sorted(lines.keys() - {"total"}), "total"]:
        print(f"{room:14} {lines[room]:7,} {code[room]:7,}")


def report_imports(files: list[File]) -> None:
    modules = {file.module for file in files}
    graph = {file.module: imports(file, modules) for file in files}
    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        room = ".".join(module.split(".")[1:2])
        rooms.setdefault(room, set()).update({other.split(".")[1] for other in others} - {room})
    print(f"\n## Imports: {len(graph)} modules, {sum(map(len, graph.values()))} imports")
    for kind, found in (("modules", circles(graph)), ("folders", circles(rooms))):
        print(f"circles of {kind}: {'none' if not found else ''}", *(" <-> ".join(group) for group in found))


def report_walks(every: dict[str, Function], walks: dict[str, list[str]]) -> None:
    for title, walk in walks.items():
        given = {
            name: [arg.arg for arg in parameters(every[name])] if name in every else ["(not here)"] for name in walk
        }
        print(f"\n## Walk: {title}: {len(walk) - 1} hops, {sum(map(len, given.values()))} arguments")
        for name, arguments in given.items():
            print(f"{len(arguments):4}  {name}({', '.join(arguments)})")


def report_functions(every: dict[str, Function]) -> None:
    print("\n## The ten longest functions: lines without docstring, branches")
    for name, function in sorted(every.items(), key=lambda pair: -length(pair[1]))[:10]:
        branches = sum(isinstance(node, BRANCHES) for node in ast.walk(function))
        print(f"{length(function):4} {branches:4}  {name}")
    wide = {name: n for name, function in every.items() if (n := len(parameters(function))) > MAX_PARAMETERS}
    print(f"\n## Functions with more than {MAX_PARAMETERS} parameters: {len(wide)}")
    for name, count in sorted(wide.items(), key=lambda pair: -pair[1]):
        print(f"{count:4}  {name}")
    bare = Counter(name.split(":")[0] for name, function in every.items() if not is_annotated(function))
    print(f"\n## Functions without whole annotations: {bare.total()} of {len(every)}")
    for name, count in bare.most_common():
        print(f"{count:4}  {name}")


def report_warnings(files: list[File], every: dict[str, Function]) -> None:
    num_wide = sum(len(line) > WIDTH for file in files for line in file.text.splitlines())
    print(f"\n## Lines of more than {WIDTH} columns: {num_wide}")
    large = {file.name: n for file in files if (n := len(file.text.splitlines())) > MAX_FILE_LINES}
    large |= {name: n for name, function in every.items() if (n := length(function)) > MAX_FUNCTION_LINES}
    print(f"\n## Warnings: files over {MAX_FILE_LINES} lines, functions over {MAX_FUNCTION_LINES}: {len(large)}")
    for name, count in large.items():
        print(f"{count:4}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the shape of the package.")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that holds the package (default: here)")
    parser.add_argument(
        "--walks", type=Path, default=WALKS, help="JSON of the walks (default: walks.json beside this)"
    )
    args = parser.parse_args()
    files = read_files(args.root)
    every = all_functions(files)
    report_size(files)
    report_imports(files)
    report_walks(every, json.loads(args.walks.read_text("utf-8")))
    report_functions(every)
    report_warnings(files, every)


if __name__ == "__main__":
    main()
