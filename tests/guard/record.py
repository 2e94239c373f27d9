# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The guard of a refactor: compare what tiny models train, draft, export and refuse with a record, bit for bit.

`python tests/guard/record.py --check` compares, `--write` records anew, `--only WORD ...` does either for some cases.
A change of behaviour that is meant is a commit of its own, which records anew the cases that it changes.

Exit codes: 0 all is as recorded, 1 something differs, 2 this machine or its packages cannot give the same bits.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
# The working tree is what is guarded, installed or not; `tests` is there for its tiny models.
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]
_HF_HOME = tempfile.TemporaryDirectory(prefix="trl-draft-opd-guard-")
# Before any library is imported, because they read these once.
os.environ.update(
    CI="1",
    CUDA_VISIBLE_DEVICES="",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=_HF_HOME.name,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    MKL_NUM_THREADS="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


RECORD_FILE = HERE / "record.json"
RAISED = "the case raised an exception"
# Lines printed of a case that differs.
SHOWN = 6


def describe_environment() -> dict[str, str]:
    """Return what the bits rest on: packages, and the kind of processor, by which libraries choose their kernels."""
    import adapter

    cpu = dict.fromkeys(("vendor_id", "cpu family", "model"), "?")
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in cpu:
            cpu[name.strip()] = value.strip()
    return {
        "python": platform.python_version(),
        **adapter.installed_versions(),
        "machine": platform.machine(),
        "cpu": " ".join(cpu.values()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def run_cases(names: list[str]) -> dict[str, dict[str, Any]]:
    """Run cases, each from the same seeds."""
    from cases import all_cases, in_silence

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    cases, found = all_cases(), {}
    for name in names:
        begun = time.perf_counter()
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            found[name] = in_silence(cases[name])
        except Exception:
            found[name] = {RAISED: traceback.format_exc()}
        print(f"{time.perf_counter() - begun:6.1f} s  {name}", flush=True)
    return found


def readable(value: Any) -> str:
    """Return a recorded value, a float with its decimal digits beside it."""
    if isinstance(value, str) and "0x" in value:
        return f"{value} ({float.fromhex(value):.9g})"
    return repr(value)


def difference(recorded: Any, now: Any) -> str:
    """Say where two values of one quantity part."""
    if isinstance(recorded, list) and isinstance(now, list):
        if len(recorded) != len(now):
            return f"{len(recorded)} values recorded, {len(now)} now"
        places = [place for place, pair in enumerate(zip(recorded, now, strict=True)) if pair[0] != pair[1]]
        first = places[0]
        more = "" if len(places) == 1 else f", and {len(places) - 1} behind it"
        return (
            f"at index {first} of {len(now)}: recorded {readable(recorded[first])}, now {readable(now[first])}{more}"
        )
    return f"recorded {readable(recorded)}, now {readable(now)}"


def compare_case(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one line per quantity of a case that is not as recorded, in the order of the case."""
    lines = [f"{name}: recorded, but not there now" for name in recorded if name not in now]
    lines += [f"{name}: there now, but not recorded" for name in now if name not in recorded]
    shared = [name for name in now if name in recorded]
    return lines + [f"{n}: {difference(recorded[n], now[n])}" for n in shared if recorded[n] != now[n]]


def check(record: dict[str, Any], found: dict[str, dict[str, Any]], names: list[str]) -> int:
    """Compare cases with the record, print what differs, and return the exit code."""
    wrong = 0
    for name in names:
        if name not in record["cases"]:
            lines = ["the case was never recorded"]
        elif name not in found:
            lines = ["the case is recorded, but there is none of this name now"]
        elif RAISED in found[name]:
            lines = [RAISED, *found[name][RAISED].strip().splitlines()[-SHOWN + 1 :]]
        else:
            lines = compare_case(record["cases"][name], found[name])
        if lines:
            wrong += 1
            print(f"DIFFERS  {name} ({len(lines)} lines)")
            print("".join(f"    {line}\n" for line in lines[:SHOWN]), end="")
            print(f"    ... and {len(lines) - SHOWN} more\n" if len(lines) > SHOWN else "", end="")
    print(f"{len(names) - wrong} of {len(names)} cases are as recorded.")
    return int(wrong > 0)


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record with one quantity per line, so that a change of it can be read."""
    parts = []
    for name, quantities in record["cases"].items():
        lines = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in quantities.items())
        parts.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    environment = json.dumps(record["environment"], indent=1).replace("\n", "\n ")
    cases = ",\n".join(parts)
    path.write_text(f'{{\n "environment": {environment},\n "cases": {{\n{cases}\n }}\n}}\n', "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare what tiny models do with what was recorded.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the record")
    action.add_argument("--write", action="store_true", help="record anew")
    action.add_argument(
        "--train-drafters", action="store_true", help="train anew the drafters that the cases start from"
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose names hold one of these words")
    parser.add_argument("--file", type=Path, default=RECORD_FILE, help="the record; default: record.json")
    options = parser.parse_args()
    from cases import all_cases, train_drafters

    if options.train_drafters:
        torch.set_num_threads(1)
        train_drafters()
        return 0
    record = json.loads(options.file.read_text("utf-8")) if options.file.exists() else None
    if record is None and (options.check or options.only):
        parser.error(f"there is no record {options.file}")
    environment, known = describe_environment(), list(all_cases())
    if record is not None and (options.check or options.only):
        changed = {key: (value, environment.get(key)) for key, value in record["environment"].items()}
        changed = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
        if changed:
            print("The same bits are only to be had with the packages and the kind of processor of the record:")
            print("".join(f"    {key}: recorded {old}, here {new}\n" for key, (old, new) in changed.items()), end="")
            print(
                "On this machine, run `record.py --write --file FILE` at the commit to compare with, and then "
                "`record.py --check --file FILE` here."
            )
            return 2
    if options.check:
        # Cases that were there once must be missed.
        known += [name for name in record["cases"] if name not in known]
    names = [name for name in known if options.only is None or any(word in name for word in options.only)]
    if not names:
        parser.error(f"no case holds any of {options.only}")
    found = run_cases([name for name in names if name in all_cases()])
    if options.check:
        return check(record, found, names)
    for name in [name for name in found if RAISED in found[name]]:
        print(f"{name}: {RAISED}\n{found[name][RAISED]}Nothing was written.")
        return 1
    cases = (record["cases"] if options.only else {}) | found
    write({"environment": environment, "cases": {name: cases[name] for name in known if name in cases}}, options.file)
    print(f"Recorded {len(found)} cases in {options.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
