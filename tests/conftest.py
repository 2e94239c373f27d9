# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What holds for every test: no network, nothing written outside temporary folders, one thread, fixed seeds.

Two options decide which tests run: `--shared PATH` gives tests real text and a real small target (without it they are
skipped, and report so), `--run-slow` adds the slow ones. Tests against real engines run with `-m conformance` alone,
those of `benchmarks/` with `-m lab`. This file builds no model and no data: see `helpers/tiny.py`.
"""

import gc
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


_HF_HOME = tempfile.TemporaryDirectory(prefix="trl-draft-opd-tests-")

# Before any Hugging Face library is imported, because they read these once; subprocesses inherit them.
os.environ.update(
    CI="1",  # TRL sends no usage ping
    HF_DATASETS_OFFLINE="1",
    HF_HOME=_HF_HOME.name,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from helpers.pretend_accelerator import apart  # noqa: E402


SHARED_FOLDERS = ("targets", "data")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trl-draft-opd")
    group.addoption(
        "--shared",
        metavar="PATH",
        default=None,
        help="Folder that holds targets/ and data/. Without it, tests on real text are skipped. With pytest alone, "
        "write `--shared=PATH`; `make test ARGS=...` takes `--shared PATH` too.",
    )
    group.addoption(
        "--drafters",
        metavar="PATH",
        default=None,
        help="Folder with trained drafters, eagle3/ and dflash/, for the tests against real engines. Without it they "
        "train short ones.",
    )
    group.addoption(
        "--readme-target",
        metavar="PATH",
        default=None,
        help="Target for the walk through the README, in place of the small one of --shared: a folder, as "
        "`save_pretrained` writes it.",
    )
    group.addoption(
        "--readme-env",
        metavar="PATH",
        default=None,
        help="Virtual environment in which the README's own commands run. The default is that of the tests, which "
        "serves with vLLM in any case.",
    )
    group.addoption("--run-slow", action="store_true", default=False, help="Run the tests marked slow too.")


def pytest_configure(config: pytest.Config) -> None:
    _shared_path(config)
    # The order of a sum depends on the number of threads.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "shared_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.shared)
    asked = config.getoption("-m")
    runs = {
        "conformance": "conformance" in asked,
        "crash": "crash" in asked,
        "lab": "lab" in asked or "slow" in asked,
        "slow": config.getoption("--run-slow") or "slow" in asked,
    }
    left_out = [name for name, is_asked in runs.items() if not is_asked]
    dropped = [item for item in items if any(item.get_closest_marker(name) for name in left_out)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def pytest_collection_finish() -> None:
    _freeze()


_num_modules = 0


def _freeze() -> None:
    """
    Have garbage collections pass over all that is there for good: modules, and the tests themselves. Every training
    run ends in a full collection, of a quarter of a second otherwise.
    """
    global _num_modules
    if len(sys.modules) > _num_modules:
        gc.collect()
        gc.freeze()
        _num_modules = len(sys.modules)


def _shared_path(config: pytest.Config) -> Path | None:
    given = config.getoption("--shared")
    if given is None:
        return None
    path = (config.invocation_params.dir / given).resolve()
    missing = [name for name in SHARED_FOLDERS if not (path / name).is_dir()]
    if missing:
        raise pytest.UsageError(
            f"--shared {given}: {path} has no folder {' and no folder '.join(missing)}. Give the folder that holds "
            f"{' and '.join(SHARED_FOLDERS)}, or leave --shared out to skip the tests which need it."
        )
    return path


@pytest.fixture(scope="session")
def shared_dir(pytestconfig: pytest.Config) -> Path:
    """Folder given with `--shared`, holding `targets/` and `data/`."""
    path = _shared_path(pytestconfig)
    if path is None:
        pytest.skip("needs real text and a real target: give their folder with --shared PATH")
    return path


@pytest.fixture(scope="session")
def call() -> Iterator[Callable[..., Any]]:
    """`call(function, *args)` in the one process of this run, or of its worker, that has the pretend accelerator."""
    with apart() as run:
        yield run


@pytest.fixture(autouse=True)
def _frozen_modules() -> Iterator[None]:
    yield
    # Some are imported by the first test that needs them.
    _freeze()


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
