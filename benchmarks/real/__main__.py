# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The stages of a real model. Each resumes, so a killed command is simply given again; docs/why/real_model.md says what
each costs.

    python -m benchmarks.real target                                       # fetch, check and convert it
    python -m benchmarks.real responses --pair real-eagle3 --shared PATH   # in this process, or --base-url of a server
    python -m benchmarks.real readings --pair real-eagle3 --shared PATH    # so that the target is read once
    python -m benchmarks.lab run --pair real-eagle3 --tier 6 --shared PATH --out outputs/real \\
        --dtype bfloat16 --bf16 --readings outputs/real/readings
    python -m benchmarks.real publish --pair real-eagle3 --tier 6 --arm sft_start opd_first --shared PATH --bf16
    python -m benchmarks.real short --shared PATH                          # all of it in minutes, small
"""

import argparse
from pathlib import Path

from benchmarks.lab.__main__ import add_machine, open_bench
from trl_draft_opd import ServerSettings

from .fetch import fetch_target
from .publish import START, publish_drafter, write_example
from .short import run_short
from .texts import read_all_responses, write_all_responses


OUT = Path("outputs/real")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in ("target", "short"):
        stages.add_parser(name).add_argument("--out", type=Path, default=OUT)
    stages.choices["short"].add_argument("--shared", type=Path, help="folder with data/; the Hub's GSM8K if unset")
    stages.choices["short"].add_argument("--vllm", help="interpreter of an environment with vLLM: serve with it too")
    for name in ("responses", "readings", "publish"):
        add_machine(stages.add_parser(name))
        stages.choices[name].set_defaults(out=OUT, dtype="bfloat16")
    for name in ("responses", "readings"):
        stages.choices[name].add_argument("--temperature", type=float, default=0.0, help="of the responses")
    responses = stages.choices["responses"]
    responses.add_argument("--base-url", help="of a server of the target; this process if unset")
    responses.add_argument("--engine", choices=("vllm", "sglang"), default="vllm", help="of the server")
    responses.add_argument("--concurrency", type=int, default=64, help="requests to the server at a time")
    publish = stages.choices["publish"]
    publish.add_argument("--arm", nargs="+", default=[START], help=f"arms to publish, {START} by default")
    publish.add_argument("--tier", type=int, default=1, help="of the arms")
    publish.add_argument("--seed", type=int, default=0, help="of the arms")
    publish.add_argument("--owner", default="you", help="whose repositories they are to be")
    publish.add_argument("--license", help="of the drafters")
    publish.add_argument("--machine", help="what servers were measured on, where out/served/ holds files of `bench`")
    publish.add_argument("--example", type=Path, help="page to write the last card to, for documentation")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run a stage."""
    args = parse_arguments(arguments)
    if args.stage == "target":
        print(fetch_target(args.out))
    elif args.stage == "short":
        run_short(args.out, args.shared, vllm=args.vllm)
    elif args.stage == "responses":
        server = None
        if args.base_url is not None:
            server = ServerSettings(args.base_url, engine=args.engine, concurrency=args.concurrency)
        write_all_responses(open_bench(args), args.temperature, server)
    elif args.stage == "readings":
        # Not read from: it is what is written.
        path, args.readings = args.readings or args.out / "readings", None
        store = read_all_responses(open_bench(args), args.temperature, path)
        print(f"{store.path} holds the readings of {len(store)} texts.")
    else:
        bench = open_bench(args)
        for name in args.arm:
            options = {"owner": args.owner, "license": args.license, "machine": args.machine}
            folder = publish_drafter(bench, name, args.tier, args.seed, **options)
            print(folder)
            if args.example is not None:
                write_example(folder, args.example)


if __name__ == "__main__":
    main()
