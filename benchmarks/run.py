# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Measure the fast paths against plain code and against others, in one process and on one set of tensors.

    python benchmarks/run.py --suite ttt
    python benchmarks/run.py --suite rollout step --shared PATH --drafter-eagle3 PATH --drafter-dflash PATH

Arms of speculators run where `speculators` is installed (`make conformance` prepares such an environment) and are left
out, with a printed line, where it is not. `docs/why/performance.md` says what is counted and what came out.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch


SUITES = ("loss", "ttt", "dflash", "rollout", "step", "long", "readings")
# The last two are known to `long` and to `step --only real random`.
FAMILIES = ("eagle3", "dflash", "dflash2", "dspark")


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, or what is given in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=SUITES, required=True)
    parser.add_argument("--pairs", type=int, default=15, help="timed turns of every arm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--only", nargs="+", default=[], help="parts of a suite, by the names it prints")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=["eagle3", "dflash"])
    parser.add_argument(
        "--shared", type=Path, help="folder that holds targets/ and data/, for rollout, step and readings"
    )
    parser.add_argument("--target", type=Path, help="folder of the target of readings, in place of the small one")
    parser.add_argument("--drafter-eagle3", type=Path, help="folder of a trained drafter; a random one without it")
    parser.add_argument("--drafter-dflash", type=Path, help="folder of a trained drafter; a random one without it")
    parser.add_argument("--prompts", type=int, default=200, help="prompts on which replay must equal live decoding")
    parser.add_argument("--max-completion-length", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


def main() -> None:
    """Run the suites one after the other."""
    # Started as a file, Python looks beside this file only; the suites name each other from the folder above.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    arms = importlib.import_module("benchmarks.arms")  # noqa: TID251
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs, {args.threads} threads, {args.pairs} pairs")
    reports = []
    for name in args.suite:
        print(f"\n== {name}", flush=True)
        report = arms.Report(name, vars(args))
        importlib.import_module(f"benchmarks.suites.{name}").run(args, report)  # noqa: TID251
        reports.append(report)
        # After every suite, so that a later failure loses nothing.
        if args.json is not None:
            arms.save_json(args.json, reports)
        if args.plot is not None:
            arms.save_plot(args.plot, reports)
    print("\nFigures")
    for report in reports:
        for figure in report.figures:
            print(f"  {report.suite}: {figure}")


if __name__ == "__main__":
    main()
