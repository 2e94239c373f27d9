# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The laboratory's command. Every phase resumes, so a killed command is simply given again.

    python -m benchmarks.lab run --pair gsm8k-eagle3 --tier 1 --shared PATH       # everything a table needs
    python -m benchmarks.lab run --pair gsm8k-eagle3 --tier 2 --arm opd tv        # some arms
    python -m benchmarks.lab collect --pair gsm8k-eagle3 --shared PATH --commit   # write what is there, run nothing
    python -m benchmarks.lab table --pair gsm8k-eagle3                            # redo its tables from the JSON
    python -m benchmarks.lab families --pair families-dflash families-dspark      # families beside each other
    python -m benchmarks.lab figure                                               # draw all figures from the JSONs
    python -m benchmarks.lab check --pair smoke --fresh outputs/lab/smoke.json    # a fresh run against the record
    python -m benchmarks.lab live --pair gsm8k-eagle3 --shared PATH               # live against replayed rollouts
    python -m benchmarks.lab diagnose --pair gsm8k-eagle3 --shared PATH           # what holds tau down, per drafter

On a GPU with real models: `--target Qwen/Qwen3-4B --drafter z-lab/Qwen3-4B-DFlash-b16 --device cuda --dtype bfloat16
--bf16`.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from .anatomy_report import draw_diagnosis, render_diagnosis
from .arms import DIAGNOSED_PROMPTS, collect, measure_start, run_arm
from .compare_rollouts import compare_rollouts
from .diagnose import diagnose_drafter
from .families import render_families
from .figures import draw_all
from .plan import FOLDER, Pair, read_arms, read_pair
from .start import make_start
from .statistics import NUM_RESAMPLES
from .tables import check, load_results, render
from .workbench import Machine, Workbench, write_json


RESULTS = FOLDER / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "collect", "live", "diagnose"):
        add_machine(commands.add_parser(name))
    diagnose = commands.choices["diagnose"]
    diagnose.add_argument("--of", type=Path, nargs="+", help="folders of drafters; by default the start and all arms")
    diagnose.add_argument("--prompts", type=int, default=100, help="responses of each set to look at")
    for name in ("run", "collect"):
        commands.choices[name].add_argument(
            "--commit", action="store_true", help="also write the results into benchmarks/lab/results"
        )
    run = commands.choices["run"]
    run.add_argument("--tier", type=int, default=1, help="1: complete, several seeds; 2: one seed, many arms")
    run.add_argument("--arm", nargs="+", help="arms to run, all of the tier by default")
    run.add_argument("--seed", type=int, nargs="+", help="seeds to run, the pair's by default")
    table = commands.add_parser("table")
    table.add_argument("--pair", required=True)
    table.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    beside = commands.add_parser("families")
    beside.add_argument("--pair", nargs="+", required=True, help="the others are held against the first")
    beside.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    figure = commands.add_parser("figure")
    figure.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    figure.add_argument("--to", type=Path, default=Path("docs/figures"))
    against = commands.add_parser("check")
    against.add_argument("--pair", required=True)
    against.add_argument("--fresh", type=Path, required=True, help="JSON file of the fresh run")
    return parser.parse_args(arguments)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add what says where to run, and what a pair is made of."""
    parser.add_argument("--pair", required=True, help="name in benchmarks/lab/pairs, or the path of a YAML file")
    parser.add_argument("--shared", type=Path, help="folder that holds targets/ and data/")
    parser.add_argument("--out", type=Path, default=Path("outputs/lab"))
    parser.add_argument("--target", help="another target than the pair's, by id or folder")
    parser.add_argument("--drafter", help="a published drafter to continue from, by id or folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the target")
    parser.add_argument("--bf16", action="store_true", help="train drafters under bf16 autocast")
    parser.add_argument("--readings", type=Path, help="a store of the target's readings of all texts")
    parser.add_argument("--memo-gb", type=float, default=4.0, help="GB of target readings to keep in memory")
    parser.add_argument("--generation-batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")


def open_bench(args: argparse.Namespace) -> Workbench:
    """Return the workbench of a command."""
    torch.set_num_threads(args.threads)
    pair = read_pair(args.pair)
    changes = {"target": args.target} if args.target else {}
    changes |= {"drafter": {"id": args.drafter}} if args.drafter else {}
    if changes:
        # Another pair: it must not find the first one's responses and drafters.
        name = "-".join([pair.name, *(Path(value).name for value in (args.target, args.drafter) if value)])
        pair = dataclasses.replace(pair, name=name, **changes)
    machine = Machine(
        args.shared,
        args.out,
        args.device,
        args.dtype,
        int(args.memo_gb * 1e9),
        args.generation_batch_size,
        args.micro_batch_size,
        args.bf16,
        args.readings,
    )
    return Workbench(pair, machine)


def run(args: argparse.Namespace) -> None:
    """Make the start, run the arms, write and print the tables."""
    bench = open_bench(args)
    pair: Pair = bench.pair
    if args.tier not in pair.budgets:
        raise SystemExit(f"Pair {pair.name!r} has no tier {args.tier}; it has {sorted(pair.budgets)}.")
    arms = read_arms(pair, args.tier)
    names = args.arm or [arm.name for arm in arms]
    unknown = sorted(set(names) - {arm.name for arm in arms})
    if unknown:
        raise SystemExit(f"Tier {args.tier} has no arms {unknown}; it has {[arm.name for arm in arms]}.")
    make_start(bench)
    measure_start(bench)
    # Seed by seed, so that an interrupted run leaves whole tables.
    for seed in args.seed or range(pair.seeds[args.tier]):
        for arm in arms:
            if arm.name in names:
                run_arm(bench, arm, args.tier, seed)
    gather(bench, args)


def gather(bench: Workbench, args: argparse.Namespace) -> None:
    """Write what was measured so far into one file, and print its tables."""
    results = collect(bench)
    write_json(args.out / f"{bench.pair.name}.json", results)
    if args.commit:
        write_json(RESULTS / f"{bench.pair.name}.json", results)
    print(render(results))


def diagnose(bench: Workbench, args: argparse.Namespace) -> None:
    """
    Look at drafters along the responses of each test set, and along those of prompts they were trained on: print
    tables, write JSON and a figure for each.
    """
    folders = args.of or [
        bench.folder / "sft" / "start",
        *sorted(bench.folder.glob("tier*/*/seed0/drafter")),
    ]
    sets = {
        name: bench.answered(bench.prompt_ids(prompts)[: args.prompts], 0.0)
        for name, prompts in bench.pair.tests.items()
    }
    sets["trained"] = bench.training_rows(pool=args.prompts)
    for test, rows in sets.items():
        few = rows.select(range(min(DIAGNOSED_PROMPTS, len(rows))))
        found = {
            drafter_name(folder): diagnose_drafter(bench.target, bench.load_drafter(folder), rows, few)
            for folder in folders
        }
        name = f"diagnosis-{bench.pair.name}-{test}"
        write_json(args.out / f"{name}.json", found)
        print(f"# {bench.pair.name}, {test}, {len(rows)} greedy responses\n\n{render_diagnosis(found)}")
        for path in draw_diagnosis(found, args.out, name):
            print(path)


def drafter_name(folder: Path) -> str:
    """Return what tables call the drafter of a folder: its arm where it is one's."""
    return folder.parents[1].name if folder.name == "drafter" else folder.name


def main(arguments: list[str] | None = None) -> None:
    """Run a command."""
    args = parse_arguments(arguments)
    if args.command == "run":
        run(args)
    elif args.command == "collect":
        gather(open_bench(args), args)
    elif args.command == "diagnose":
        diagnose(open_bench(args), args)
    elif args.command == "live":
        print(compare_rollouts(open_bench(args)))
    elif args.command == "table":
        print(render(load_results(args.results / f"{args.pair}.json")))
    elif args.command == "families":
        found = [load_results(args.results / f"{pair}.json") for pair in args.pair]
        print(render_families(found, "math", num_resamples=NUM_RESAMPLES))
    elif args.command == "figure":
        # The smoke pair shows that the laboratory runs, not what is true.
        results = [load_results(path) for path in sorted(args.results.glob("*.json")) if path.stem != "smoke"]
        for path in draw_all(results, args.to):
            print(path)
    else:
        disagreements = check(load_results(args.fresh), load_results(RESULTS / f"{args.pair}.json"))
        if disagreements:
            raise SystemExit("\n".join(disagreements))
        print("The fresh run agrees with the committed one.")


if __name__ == "__main__":
    main()
