# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Rules of the house that a reader of one file cannot see broken: floors, sizes, words, forbidden calls, headers.

A rule is a function from a file's name and text to a list of offences. Each rule has two tests: one holds the project to
it, one (`test_the_rule_...`) shows that it catches an offence. This file imports nothing of the package: it reads text.
"""

import ast
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "trl_draft_opd"
CODE = (PACKAGE, "examples", "benchmarks")

# A file imports only from lower floors, or from its own folder.
FLOORS = {
    "utils": 0,
    "data": 1,
    "losses": 1,
    "drafters": 1,
    "target": 2,
    "rollout": 3,
    "responses": 4,
    "evaluation": 5,
    "export": 6,
    "runs": 7,
    "trainer": 8,
    "parity": 9,
    "demo": 10,
    "cli": 11,
    "__main__": 12,
}

# Parts of TRL without a promise of stability: one file imports them, so that one file follows their changes.
PRIVATE_TRL = {"data_utils", "distributed", "extras", "generation", "kernels", "models", "scripts", "trainer"}
PRIVATE_TRL_IMPORTER = f"{PACKAGE}/utils/private_trl.py"

MAX_LINES = 500
MAX_TEST_LINES = 600
MAX_FUNCTION_LINES = 60
MIN_TEST_NAME_WORDS = 4

COPYRIGHT = "# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0."

BANNED_WORDS = re.compile(r"teacher|student|verifier|draft_?model", re.IGNORECASE)
# Names that are not ours to choose, with the reason.
ALLOWED_NAMES = {
    "DFlashDraftModel": "architecture name in published checkpoints, read by serving engines",
    "Eagle3DraftModel": "its counterpart, named alike",
}

# Reading a file with one of these runs code from that file.
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.system": "hands text to a shell; use subprocess with a list",
    "os.popen": "hands text to a shell; use subprocess with a list",
    "subprocess.getoutput": "hands text to a shell; use subprocess with a list",
    "subprocess.getstatusoutput": "hands text to a shell; use subprocess with a list",
    "yaml.unsafe_load": "makes objects of any class; use yaml.safe_load",
    "yaml.full_load": "makes objects; use yaml.safe_load",
}
# Code of a repository runs in one place, where `verify --trust-remote-code` asked for it.
TRUSTING_FILE = f"{PACKAGE}/parity/consumers.py"

# Where this project is built is nobody's business. Spelled in pieces so that this file does not match itself.
WORKPLACE = re.compile(r"(?<![\w.-])/" + r"work(?![\w-])|\bshared/" + r"design\b")
TEXT_SUFFIXES = {".cfg", ".in", ".ipynb", ".jinja", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
TEXT_NAMES = {"Makefile", "run"}
NOT_OURS = re.compile(r"\.git|\.gl|\.venv.*|\..*_cache|__pycache__|build|dist|site|outputs|.*\.egg-info")


# ---- reading the project ----------------------------------------------------------------------------------------------


def _text_files() -> Iterator[str]:
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not NOT_OURS.fullmatch(name))
        for name in sorted(names):
            if name in TEXT_NAMES or Path(name).suffix in TEXT_SUFFIXES:
                yield (Path(folder) / name).relative_to(ROOT).as_posix()


def _python_files(*folders: str) -> list[str]:
    return [name for name in _text_files() if name.endswith(".py") and name.split("/")[0] in folders]


def _offences(rule: Callable[[str, str], list[str]], names: list[str]) -> list[str]:
    assert names, "no file to hold to the rule"
    return [f"{name}: {offence}" for name in names for offence in rule(name, (ROOT / name).read_text("utf-8"))]


def _imports(name: str, source: str) -> list[tuple[int, str, str]]:
    """Line, module and imported name (empty for `import module`) of every import, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split("/")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found += [(node.lineno, module, alias.name) for alias in node.names]
    return found


def _calls(source: str) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def _is_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


# ---- the rules --------------------------------------------------------------------------------------------------------


def _floor_offences(name: str, source: str) -> list[str]:
    if name == f"{PACKAGE}/__init__.py":  # lazy: it names every floor and loads none
        return []
    own = name.split("/")[1].removesuffix(".py")
    if own not in FLOORS:
        return [f"{own!r} has no floor; add it to FLOORS in tests/test_architecture.py"]
    offences = []
    for line, module, imported in _imports(name, source):
        path = [*module.split("."), *([imported] if imported else [])]
        if path[0] != PACKAGE or path[1:] == ["__version__"]:
            continue
        unit = path[1] if len(path) > 1 else ""
        if unit not in FLOORS:
            offences.append(f"line {line}: imports {'.'.join(path)}; import from the module that defines the name")
        elif unit != own and FLOORS[unit] >= FLOORS[own]:
            offences.append(
                f"line {line}: {own} (floor {FLOORS[own]}) imports {unit} (floor {FLOORS[unit]}); only lower floors may "
                "be imported"
            )
    hidden = [
        (call.lineno, called) for call, called in _calls(source) if called.endswith(("import_module", "__import__"))
    ]
    return offences + [f"line {line}: {called} hides an import from this test" for line, called in hidden]


def _trl_offences(name: str, source: str) -> list[str]:
    offences = []
    for line, module, imported in _imports(name, source):
        path = f"{module}.{imported}"
        if path.startswith("trl.experimental"):
            offences.append(f"line {line}: {path} is experimental; TRL removes such parts without notice")
        elif name == PRIVATE_TRL_IMPORTER or name.startswith("tests/"):
            continue
        elif module.startswith("trl.") or (module == "trl" and (imported in PRIVATE_TRL or imported.startswith("_"))):
            offences.append(f"line {line}: {path} is private; import it through {PRIVATE_TRL_IMPORTER}")
    return offences


def _size_offences(name: str, source: str) -> list[str]:
    most = MAX_TEST_LINES if name.startswith("tests/") else MAX_LINES
    lines = len(source.splitlines())
    return [f"{lines} lines; at most {most}"] if lines > most else []


def _function_offences(name: str, source: str) -> list[str]:
    offences = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        if lines > MAX_FUNCTION_LINES:
            offences.append(f"line {node.lineno}: {node.name} has {lines} lines; at most {MAX_FUNCTION_LINES}")
    return offences


def _word_offences(name: str, source: str) -> list[str]:
    defined = [(0, name)]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.append((node.lineno, node.name))
        elif isinstance(node, ast.arg):
            defined.append((node.lineno, node.arg))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.append((node.lineno, node.attr))
        elif isinstance(node, ast.alias) and node.asname:
            defined.append((node.lineno, node.asname))
    offences = []
    for line, identifier in defined:
        ours = identifier
        for allowed in ALLOWED_NAMES:
            ours = ours.replace(allowed, "")
        if BANNED_WORDS.search(ours):
            offences.append(f"line {line}: {identifier}; say target or drafter")
    return offences


def _unsafe_offences(name: str, source: str) -> list[str]:
    offences = []
    for line, module, imported in _imports(name, source):
        if module.split(".")[0] in UNSAFE_MODULES or (module, imported) == ("torch", "load"):
            offences.append(f"line {line}: import of {f'{module}.{imported}'.strip('.')}")
    for call, called in _calls(source):
        if called in UNSAFE_CALLS:
            offences.append(f"line {call.lineno}: {called}() {UNSAFE_CALLS[called]}")
        elif called == "torch.load" and not _is_true(call, "weights_only"):
            offences.append(f"line {call.lineno}: torch.load without weights_only=True runs code from the file")
        elif called in {"yaml.load", "yaml.load_all"} and "SafeLoader" not in ast.unparse(call):
            offences.append(f"line {call.lineno}: {called} without SafeLoader makes objects of any class")
        elif _is_true(call, "allow_pickle"):
            offences.append(f"line {call.lineno}: allow_pickle=True runs code from the file")
        elif _is_true(call, "shell"):
            offences.append(f"line {call.lineno}: shell=True hands text to a shell; give a list")
    return offences + [
        f"line {line}: trust_remote_code is True whoever asked" for line in _trusting_lines(name, source)
    ]


def _trusting_lines(name: str, source: str) -> list[int]:
    """Lines that turn remote code on by themselves: as an argument, a default, a setting or an entry of a dictionary."""
    word, found = "trust_remote_code", []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _is_true(node, word):
            found.append(node.lineno)
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            found += [k.lineno for k, v in pairs if _is_constant(k, word) and _is_constant(v, True)]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and _is_constant(node.value, True):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [node.lineno for each in targets if ast.unparse(each).split(".")[-1] == word]
        elif isinstance(node, ast.arguments):
            named = [*zip(node.args[len(node.args) - len(node.defaults) :], node.defaults, strict=True)]
            named += zip(node.kwonlyargs, node.kw_defaults, strict=True)
            found += [arg.lineno for arg, default in named if arg.arg == word and _is_constant(default, True)]
    return [] if name == TRUSTING_FILE else found


def _is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is type(value) and node.value == value


def _ambient_offences(name: str, source: str) -> list[str]:
    offences = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.putenv"}:
            offences.append(f"line {node.lineno}: {ast.unparse(node)}; settings come from a config")
    for line, module, imported in _imports(name, source):
        if module == "os" and imported in {"environ", "getenv", "putenv"}:
            offences.append(f"line {line}: os.{imported}; settings come from a config")
    if name.split("/")[1].removesuffix(".py") not in {"cli", "demo"}:
        offences += [f"line {call.lineno}: print()" for call, called in _calls(source) if called == "print"]
    return offences


def _except_offences(name: str, source: str) -> list[str]:
    offences = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
            caught = node.args
        else:
            continue
        names = {ast.unparse(each) if each else "nothing named" for each in caught}
        if names & {"nothing named", "Exception", "BaseException"}:
            offences.append(f"line {node.lineno}: catches everything; name the exception that is expected")
    return offences


def _header_offences(name: str, source: str) -> list[str]:
    lines = source.splitlines()
    first = lines[1:2] if lines[:1] and lines[0].startswith("#!") else lines[:1]
    offences = [] if first == [COPYRIGHT] else ["the first line is not the copyright line"]
    return offences if ast.get_docstring(ast.parse(source)) else [*offences, "no module docstring"]


def _test_name_offences(name: str, source: str) -> list[str]:
    offences = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            offences.append(f"line {node.lineno}: {node.name}; tests are plain functions")
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            words = [word for word in node.name.removeprefix("test").split("_") if word]
            if len(words) < MIN_TEST_NAME_WORDS:
                offences.append(
                    f"line {node.lineno}: {node.name} is not a claim; use {MIN_TEST_NAME_WORDS} words or more"
                )
    return offences


def _workplace_offences(name: str, text: str) -> list[str]:
    return [f"line {n}: {line.strip()[:80]}" for n, line in enumerate(text.splitlines(), 1) if WORKPLACE.search(line)]


# ---- the project keeps them -------------------------------------------------------------------------------------------


def test_imports_go_to_lower_floors_only():
    assert _offences(_floor_offences, _python_files(PACKAGE)) == []


def test_private_parts_of_trl_are_imported_in_one_file():
    assert _offences(_trl_offences, _python_files(*CODE, "tests")) == []


def test_every_file_can_be_read_in_one_sitting():
    assert _offences(_size_offences, _python_files(*CODE, "tests")) == []


def test_every_function_of_the_package_fits_one_screen():
    assert _offences(_function_offences, _python_files(PACKAGE)) == []


def test_names_say_target_and_drafter_only():
    assert _offences(_word_offences, _python_files(*CODE, "tests")) == []


def test_nothing_runs_code_out_of_data():
    assert _offences(_unsafe_offences, _python_files(*CODE)) == []


def test_the_package_reads_no_environment_and_prints_nothing():
    assert _offences(_ambient_offences, _python_files(PACKAGE)) == []


def test_no_handler_catches_every_exception():
    assert _offences(_except_offences, _python_files(*CODE)) == []


def test_every_file_begins_with_copyright_and_purpose():
    assert _offences(_header_offences, _python_files(*CODE, "tests")) == []


def test_every_test_is_a_function_named_as_a_claim():
    names = [name for name in _python_files("tests") if name.split("/")[-1].startswith("test_")]
    assert _offences(_test_name_offences, names) == []


def test_no_text_mentions_where_the_project_was_built():
    assert _offences(_workplace_offences, list(_text_files())) == []


# ---- the rules catch offences -----------------------------------------------------------------------------------------


def test_the_rule_of_floors_catches_every_way_up():
    losses = "trl_draft_opd/losses.py"
    assert _floor_offences(losses, "import torch\nfrom torch import nn\n") == []
    assert len(_floor_offences(losses, "from trl_draft_opd.target.frozen import FrozenTarget")) == 1
    assert len(_floor_offences(losses, "from .target import FrozenTarget")) == 1
    assert len(_floor_offences(losses, "from . import target")) == 1
    assert len(_floor_offences("trl_draft_opd/drafters/base.py", "from ..target import FrozenTarget")) == 1
    assert len(_floor_offences(losses, "def f():\n    import trl_draft_opd.trainer.draft_opd_trainer\n")) == 1
    assert len(_floor_offences(losses, "if TYPE_CHECKING:\n    from .target import FrozenTarget")) == 1
    assert len(_floor_offences(losses, "importlib.import_module('trl_draft_opd.target.frozen')")) == 1


def test_the_rule_of_floors_keeps_neighbours_apart():
    assert len(_floor_offences("trl_draft_opd/losses.py", "from .data import Collator")) == 1
    assert len(_floor_offences("trl_draft_opd/demo/run.py", "from trl_draft_opd.cli import main")) == 1
    assert _floor_offences("trl_draft_opd/cli.py", "from .demo import run") == []
    assert _floor_offences("trl_draft_opd/drafters/dflash/modeling_dflash.py", "from ..base import Drafter") == []
    assert _floor_offences("trl_draft_opd/target/frozen.py", "from .losses import chunked_rows") == []


def test_the_rule_of_floors_wants_a_floor_for_every_module():
    assert "add it to FLOORS" in _floor_offences("trl_draft_opd/utils.py", "")[0]
    assert len(_floor_offences("trl_draft_opd/target/frozen.py", "from trl_draft_opd.utils import pad")) == 1
    assert len(_floor_offences("trl_draft_opd/target/frozen.py", "from trl_draft_opd import FrozenTarget")) == 1
    assert len(_floor_offences("trl_draft_opd/target/frozen.py", "import trl_draft_opd")) == 1
    assert _floor_offences("trl_draft_opd/target/frozen.py", "from trl_draft_opd import __version__") == []


def test_the_rule_of_private_trl_catches_it_outside_one_file():
    private = "from trl.trainer.utils import pad\n"
    assert len(_trl_offences("trl_draft_opd/data/text_reader.py", private)) == 1
    assert len(_trl_offences("trl_draft_opd/data/text_reader.py", "import trl.models.utils")) == 1
    assert len(_trl_offences("trl_draft_opd/data/text_reader.py", "from trl import data_utils")) == 1
    assert _trl_offences("trl_draft_opd/data/text_reader.py", "from trl import TrlParser") == []
    assert _trl_offences(PRIVATE_TRL_IMPORTER, private) == []
    for source in ("from trl.experimental.gkd import GKDTrainer", "from trl import experimental"):
        assert len(_trl_offences(PRIVATE_TRL_IMPORTER, source)) == 1


def test_the_rule_of_sizes_counts_lines_but_no_docstring():
    assert _size_offences("trl_draft_opd/losses.py", "x = 1\n" * 500) == []
    assert len(_size_offences("trl_draft_opd/losses.py", "x = 1\n" * 501)) == 1
    assert _size_offences("tests/test_losses.py", "x = 1\n" * 600) == []
    assert len(_size_offences("tests/test_losses.py", "x = 1\n" * 601)) == 1
    docstring = '    """\n' + "    words\n" * 40 + '    """\n'
    assert _function_offences("", "def f():\n" + docstring + "    x = 1\n" * 59) == []
    assert len(_function_offences("", "def f():\n" + docstring + "    x = 1\n" * 60)) == 1
    assert len(_function_offences("", "class A:\n    async def f(self):\n" + "        x = 1\n" * 60)) == 1


def test_the_rule_of_words_looks_at_every_defined_name():
    for source in (
        "teacher_logits = 1",
        "self.student = 1",
        "def f(verifier): pass",
        "class Student: pass",
        "import torch as teacher",
        "for draft_model in []: pass",
        "class MyDraftModel: pass",
    ):
        assert len(_word_offences("trl_draft_opd/losses.py", source)) == 1, source
    assert len(_word_offences("trl_draft_opd/teacher.py", "")) == 1
    # What others named may be used, and what engines read must be.
    assert _word_offences("trl_draft_opd/losses.py", "f(teacher_model=x.teacher)\nclass DFlashDraftModel: pass") == []


def test_the_rule_of_unsafe_calls_catches_each_of_them():
    for source in (
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "eval('1')",
        "exec('1')",
    ):
        assert len(_unsafe_offences("", source)) == 1, source
    assert _unsafe_offences("", "model.eval()\ntorch.load(path, weights_only=True)\nnp.load(path)") == []


def test_the_rule_of_unsafe_calls_catches_shells_and_loaders_of_objects():
    for source in (
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
    ):
        assert len(_unsafe_offences("", source)) == 1, source
    assert _unsafe_offences("", "yaml.safe_load(t)\nyaml.load(t, yaml.SafeLoader)\nsubprocess.run([a])") == []


def test_the_rule_of_remote_code_catches_every_way_to_turn_it_on():
    for source in (
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "def load(x, trust_remote_code=True): pass",
        "def load(*, trust_remote_code=True): pass",
        "class C:\n    trust_remote_code: bool = True",
        "options.trust_remote_code = True",
    ):
        assert len(_unsafe_offences("", source)) == 1, source
        assert _unsafe_offences(TRUSTING_FILE, source) == []
        assert _unsafe_offences("", source.replace("True", "False")) == []
    assert _unsafe_offences("", "load(x, trust_remote_code=options.trust_remote_code)") == []


def test_the_rule_of_ambient_state_catches_each_way():
    for source in ("os.environ['A']", "os.getenv('A')", "from os import environ", "print(1)"):
        assert len(_ambient_offences("trl_draft_opd/losses.py", source)) == 1, source
    assert _ambient_offences("trl_draft_opd/cli.py", "print(1)\nos.path.join('a')") == []
    assert len(_ambient_offences("trl_draft_opd/cli.py", "os.environ['A'] = '1'")) == 1


def test_the_rule_of_handlers_catches_each_net():
    for caught in ("", " Exception", " BaseException as error", " (ValueError, Exception)"):
        assert len(_except_offences("", f"try:\n    f()\nexcept{caught}:\n    pass\n")) == 1, caught
    assert len(_except_offences("", "with contextlib.suppress(Exception):\n    f()\n")) == 1
    assert _except_offences("", "try:\n    f()\nexcept (ValueError, KeyError):\n    raise\n") == []


def test_the_rule_of_headers_wants_copyright_and_docstring():
    assert _header_offences("", f'{COPYRIGHT}\n"""Purpose."""\n') == []
    assert _header_offences("", f'#!/usr/bin/env python\n{COPYRIGHT}\n"""Purpose."""\n') == []
    assert len(_header_offences("", '"""Purpose."""\n')) == 1
    assert len(_header_offences("", f"{COPYRIGHT}\nx = 1\n")) == 1
    assert len(_header_offences("", "")) == 2


def test_the_rule_of_test_names_wants_a_claim():
    assert len(_test_name_offences("", "def test_the_loss(): pass")) == 1
    assert len(_test_name_offences("", "def test(): pass")) == 1
    assert len(_test_name_offences("", "class TestLoss:\n    def test_a_loss_is_never_negative(self): pass")) == 1
    assert _test_name_offences("", "def test_a_loss_is_never_negative(): pass") == []


def test_the_rule_of_the_workplace_spares_other_paths():
    for line in ("see /" + "work/main", "`/" + "work`", "file:///" + "work/x", "read ../shared/" + "design/x.md"):
        assert len(_workplace_offences("", line)) == 1, line
    assert _workplace_offences("", ".github/workflows\nframe/work\n/workers\n--shared ../shared\ndesign/shared") == []
