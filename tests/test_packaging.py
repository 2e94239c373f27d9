# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What a user installs: the built sdist and wheel, the console script, and the settings files shipped beside the package.

Builds run offline on a copy of the tree. The wheel goes into an environment of its own that borrows every other
package from the one that runs the tests.
"""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import trl_draft_opd


ROOT = Path(__file__).resolve().parents[1]
VERSION = (ROOT / "trl_draft_opd" / "VERSION").read_text("utf-8").strip()
ACCELERATE_CONFIGS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))
CONSTRAINTS = ("constraints.txt", "constraints-newest.txt", "constraints-oldest.txt")
LEFT_OUT = (".*", "build", "dist", "site", "outputs", "__pycache__", "*.egg-info", "*.log")


def _run(*command: str | Path, cwd: Path) -> str:
    # PYTHONPATH would come before what is installed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or command[0] == sys.executable}
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _required_names(requirements: str) -> set[str]:
    lines = [line.strip() for line in requirements.splitlines()]
    return {_normalized(re.match(r"[\w.-]+", line).group()) for line in lines if line and not line.startswith("#")}


def _requirements(*extras: str, base: tuple[str, ...] = ("test", "plots")) -> dict[str, str]:
    """Return the allowed versions of everything that the package, or one of the extras, asks for."""
    config = _setup_cfg()
    groups = [config["options"]["install_requires"]]
    groups += [config["options.extras_require"][extra] for extra in (*base, *extras)]
    lines = [line.strip() for group in groups for line in group.splitlines()]
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {_normalized(requirement.name): str(requirement.specifier) for requirement in parsed}


@pytest.fixture(scope="module")
def dists(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel built from that sdist, and the wheel built from the tree."""
    pytest.importorskip("build", reason="needs the package `build`, which the extra `test` installs")
    tree = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out / "full", cwd=tree)
    _run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out / "wheel", cwd=tree)
    (sdist,) = (out / "full").glob("*.tar.gz")
    (wheel,) = (out / "full").glob("*.whl")
    (wheel_from_tree,) = (out / "wheel").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel, "wheel_from_tree": wheel_from_tree}


@pytest.fixture(scope="module")
def installed(dists: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` folder of a new environment that holds the wheel."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False, symlinks=True)
    (site_packages,) = home.glob("lib/python*/site-packages")
    # Only a path: the .pth files of the borrowed folder, an editable install among them, are not read.
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--disable-pip-version-check"]
    _run(*pip, "install", "-q", "--no-deps", "--no-index", "--ignore-installed", dists["wheel"], cwd=home)
    return home / "bin"


def test_importing_the_package_loads_no_heavy_library():
    probe = (
        "import sys, trl_draft_opd; heavy = {'torch', 'transformers', 'trl', 'datasets', 'accelerate'}; "
        "print(trl_draft_opd.__version__, sorted(heavy & set(sys.modules)))"
    )
    assert _run(sys.executable, "-c", probe, cwd=ROOT).strip() == f"{VERSION} []"


def test_every_public_name_is_where_the_stub_says():
    assert {"FrozenTarget", "DraftOPDTrainer", "evaluate_drafter"} <= set(trl_draft_opd.__all__)
    for name in trl_draft_opd.__all__:
        assert name == "__version__" or getattr(trl_draft_opd, name).__name__ == name


def test_the_wheel_holds_the_package_and_nothing_else(dists: dict[str, Path]):
    names = set(zipfile.ZipFile(dists["wheel"]).namelist())
    info = f"trl_draft_opd-{VERSION}.dist-info"
    assert {name.split("/")[0] for name in names} == {"trl_draft_opd", info}
    assert f"{info}/licenses/LICENSE" in names
    assert {"trl_draft_opd/VERSION", "trl_draft_opd/py.typed"} <= names
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "trl_draft_opd").rglob("*") if p.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    assert {name for name in names if not name.startswith(info)} == ours


def test_the_sdist_builds_the_same_wheel_as_the_tree(dists: dict[str, Path]):
    from_sdist = zipfile.ZipFile(dists["wheel"])
    from_tree = zipfile.ZipFile(dists["wheel_from_tree"])
    assert sorted(from_sdist.namelist()) == sorted(from_tree.namelist())
    assert {i.filename: i.CRC for i in from_sdist.infolist()} == {i.filename: i.CRC for i in from_tree.infolist()}


def test_pypi_would_take_sdist_and_wheel_and_show_the_readme(dists: dict[str, Path]):
    pytest.importorskip("twine", reason="needs the package `twine`, which the extra `test` installs")
    shown = _run(sys.executable, "-m", "twine", "check", "--strict", dists["sdist"], dists["wheel"], cwd=ROOT)
    assert shown.count("PASSED") == 2, shown


def test_version_changelog_and_citation_name_the_same_release():
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M).group(1) == VERSION


def test_the_sdist_can_run_its_own_tests(dists: dict[str, Path]):
    top = f"trl_draft_opd-{VERSION}"
    names = set(tarfile.open(dists["sdist"]).getnames())
    needed = {"Makefile", "LICENSE", "tests/conftest.py", *CONSTRAINTS}
    assert {f"{top}/{name}" for name in needed} <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_installed_script_prints_its_version(installed: Path):
    assert VERSION in _run(installed / "trl-draft-opd", "--version", cwd=installed)


def test_the_installed_script_lists_its_commands(installed: Path):
    text = _run(installed / "trl-draft-opd", "--help", cwd=installed)
    for command in ("demo", "init", "sft", "opd", "evaluate"):
        assert re.search(rf"\b{command}\b", text), f"no `{command}` in:\n{text}"


def test_the_installed_package_is_the_wheel(installed: Path):
    where = _run(installed / "python", "-c", "import trl_draft_opd; print(trl_draft_opd.__file__)", cwd=installed)
    assert where.startswith(str(installed.parent))


def test_every_imported_package_is_declared_in_setup_cfg():
    config = _setup_cfg()
    declared = _required_names(config["options"]["install_requires"])
    for extra in ("peft", "deepspeed", "plots"):
        declared |= _required_names(config["options.extras_require"][extra])
    # huggingface_hub brings its own HTTP client, one of the two by version; readers of exports are imported where they
    # are installed; torch for CUDA brings Triton, and without it the eager formulas run; a notebook brings IPython.
    declared |= {"httpx", "httpx2", "ipython", "triton"}
    imported = set()
    for path in (ROOT / "trl_draft_opd").rglob("*.py"):
        guests = {"vllm", "sglang", "speculators"} if path.parent.name == "parity" else set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names} - guests
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported |= {node.module.split(".")[0]} - guests
    assert "torch" in imported
    imported -= sys.stdlib_module_names | {"trl_draft_opd"}
    assert {_normalized({"yaml": "PyYAML"}.get(name, name)) for name in imported} <= declared


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_requirement_has_a_tested_version_in_its_range(name: str):
    pins = {_normalized(pinned): version for pinned, version in _pins(name).items()}
    requirements = _requirements(*(("lint",) if name == "constraints.txt" else ()))
    assert requirements["torch"] and requirements["rich"]
    for required, versions in requirements.items():
        assert SpecifierSet(versions).contains(pins[required]), required


def test_every_lower_bound_is_the_version_that_the_oldest_constraints_install():
    oldest = {_normalized(pinned): version for pinned, version in _pins("constraints-oldest.txt").items()}
    bounds = {
        name: bound.version
        for name, versions in _requirements().items()
        for bound in SpecifierSet(versions)
        if bound.operator == ">="
    }
    assert bounds == {name: oldest[name] for name in bounds}
    # What users install has a lower bound.
    assert _requirements(base=("peft", "deepspeed", "plots")).keys() <= bounds.keys()


def test_the_newest_constraints_are_nowhere_older_than_the_others():
    newest = _pins("constraints-newest.txt")
    for name in ("constraints.txt", "constraints-oldest.txt"):
        others = _pins(name)
        assert [n for n in newest.keys() & others.keys() if Version(newest[n]) < Version(others[n])] == []


def test_the_tests_of_foreign_code_are_there():
    listed = _run("make", "-s", "--eval", "list: ; @echo $(FOREIGN_TESTS)", "list", cwd=ROOT).split()
    assert "tests/test_versions.py" in listed
    assert [name for name in listed if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_shipped_config(path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.use_cpu == path.stem.endswith("cpu")
    assert (config.num_processes == 1) == path.stem.startswith("single")
    assert config.mixed_precision == ("no" if config.use_cpu else "bf16")


def test_the_config_of_two_cpu_processes_joins_them(tmp_path: Path):
    script = tmp_path / "count.py"
    # As a trainer's arguments do on the CPU, without the time to import them.
    script.write_text(
        "from pathlib import Path\n"
        "from accelerate import PartialState\n"
        "state = PartialState(cpu=True)\n"
        "Path(f'{state.process_index} of {state.num_processes}').touch()\n",
        "utf-8",
    )
    config = ROOT / "examples" / "accelerate_configs" / "multi_cpu.yaml"
    launch = ("-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", config, script)
    _run(sys.executable, *launch, cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.glob("* of *")) == ["0 of 2", "1 of 2"]
