# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Everything worth knowing of one GPU in twelve minutes: what it reaches, whether it computes what a CPU computes, where
the time of ten jobs goes on Qwen3-8B shapes, and how speculators does on the same weights.

    python -m benchmarks.gpu --part 1 --out gpu.jsonl     # probes, the small pair, supervised jobs: six minutes
    python -m benchmarks.gpu --part 2 --out gpu.jsonl     # Draft-OPD, arms, long rows, the peer: six minutes
    python -m benchmarks.gpu --rehearse                   # all of it at tiny sizes on a CPU, in a minute

A row is written after every measurement, so a run that is cut off loses one at most; started again with the same file,
it goes on with what is missing. An item that fails says so in a row and leaves the others alone. Weights are random:
a step's cost does not depend on them, and where it does (how many drafts are kept) it is set, see `forced`. Without a
network, `benchmarks/gpu_wheels.txt` lists what to bring along. `benchmarks/roofline.py --measured FILE` prints the
rows beside its predictions.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_arms, gpu_checks
from benchmarks.gpu_jobs import Training, make_drafter, make_target, make_text, on_tiny
from benchmarks.gpu_rows import Clock, Item, Rows, run_items, time_runs, wait
from benchmarks.scaling import shape_of
from trl_draft_opd import FrozenTarget
from trl_draft_opd.costs.counted import NOW
from trl_draft_opd.costs.gpus import GPUS, Gpu
from trl_draft_opd.costs.jobs import JOBS, Job
from trl_draft_opd.costs.roofline import predict
from trl_draft_opd.costs.shapes import TARGETS, TargetShape


PART_SECONDS = 345.0
TINY = TargetShape(64, 96, 8, 4, 2, 16, 512, False, True)


@dataclass(frozen=True)
class Sizes:
    """
    What differs between a run and its rehearsal.

    Attributes:
        product, copy_bytes, decoded, loss_rows, long_row (`int`): Of single measurements.
        repeats (`int`): Timed steps.
    """

    product: int = 8192
    copy_bytes: int = 2**32
    decoded: int = 96
    loss_rows: int = 8192
    long_row: int = 32_768
    repeats: int = 5


REHEARSAL = Sizes(128, 2**20, 12, 64, 256, 1)


class Bench:
    """
    Device, sizes and rows of a run, and the target that several items share.

    Args:
        device (`torch.device`), rows ([`Rows`]): Where it runs, and where results go.
        is_rehearsal (`bool`): Tiny shapes in place of the real ones; everything else is the same.
        shared (`Path`, *optional*): Folder with the small trained target.
    """

    def __init__(self, device: torch.device, rows: Rows, is_rehearsal: bool, shared: Path | None):
        self.device, self.rows, self.is_rehearsal, self.shared = device, rows, is_rehearsal, shared
        self.sizes = REHEARSAL if is_rehearsal else Sizes()
        self._target: tuple[str, FrozenTarget] | None = None
        self.keeps_target = "qwen3-8b"

    def shape(self, name: str) -> TargetShape:
        """Return a target's sizes."""
        return TINY if self.is_rehearsal else TARGETS[name]

    def job(self, name: str) -> Job:
        """Return a job of the cost model."""
        found = next(job for job in JOBS if job.name == name)
        return on_tiny(found) if self.is_rehearsal else found

    def target(self, name: str = "qwen3-8b") -> FrozenTarget:
        """Make a target, or return it if it is the last that was made."""
        if self._target is None or self._target[0] != name:
            self._target = None
            with torch.random.fork_rng(devices=[]):
                made = make_target(self.shape(name), self.device, torch.bfloat16, 40_960)
            self._target = (name, made)
        return self._target[1]

    def training(self, job: Job, target: str = "qwen3-8b", **options: Any) -> Training:
        """Make the drafter and the text of a job."""
        drafter = make_drafter(job.family, self.target(target), job.draft_vocab)
        return Training(
            self.target(target), drafter, job, make_text(job, self.shape(target).vocab, self.device), **options
        )

    def clear(self) -> None:
        """Let go of what an item left, but for the target that others use too."""
        if self._target is not None and self._target[0] != self.keeps_target:
            self._target = None

    @property
    def gpu(self) -> Gpu:
        """The card as its maker publishes it; an H100 stands in for one that is not listed."""
        name = torch.cuda.get_device_name().lower() if self.device.type == "cuda" else ""
        return next((gpu for key, gpu in GPUS.items() if key in name.replace(" ", "")), GPUS["h100"])

    def utilisation(self, job: Job, target: str, seconds: float) -> dict[str, float]:
        """Return the FLOPs that a job must do, and what share of the card's peaks they are over some time."""
        shape = self.shape(target)
        counted = predict(job, shape, shape_of(job.family, shape, job.draft_vocab), self.gpu, NOW).flops
        product = self.rows.find("card", "product")
        reached = product["flops_per_s"] if product else self.gpu.flops
        return {
            "flops": counted,
            "mfu": counted / seconds / reached,
            "mfu_nominal": counted / seconds / self.gpu.peak,
        }

    def measure(self, job: Job, note: str = "", target: str = "qwen3-8b", given: bool = False, **options: Any) -> None:
        """Time the steps of a job, and write a row for every stage and one for the whole."""
        if self.rows.find(job.name, "step", note) is not None:
            return
        repeats, warmups = options.pop("repeats", self.sizes.repeats), options.pop("warmups", 2)
        training = self.training(job, target, **options)
        reading = training.read() if given else None
        limits = {"repeats": repeats, "warmups": 0 if self.is_rehearsal else warmups, "seconds": 25.0}
        found = time_runs(lambda clock: training.run(clock, reading), self.device, **limits)
        peak, whole = int(found.pop("peak_bytes")), found.pop("step")
        for stage, seconds in found.items():
            self.rows.add(job.name, stage, note, target=target, seconds=seconds)
        tokens = job.rows * job.length
        self.rows.add(
            job.name,
            "step",
            note,
            target=target,
            seconds=whole,
            tokens_per_s=tokens / whole,
            peak_bytes=peak,
            **self.utilisation(job, target, whole),
        )
        # Sorting its events takes a rehearsal longer than the steps, so it sorts one job's.
        if not note and (not self.is_rehearsal or job.name == JOBS[0].name):
            self.profile(job, training)

    def profile(self, job: Job, training: Training) -> None:
        """Write the kernels that took longest in one step."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profiler:
            training.run(Clock(self.device))
            wait(self.device)
        on_device = self.device.type == "cuda"
        own = lambda event: event.self_device_time_total if on_device else event.self_cpu_time_total  # noqa: E731
        events = sorted(profiler.key_averages(), key=own, reverse=True)
        total, launches = sum(map(own, events)) / 1e6, sum(event.count for event in events)
        top = [[event.key[:90], event.count, own(event) / 1e6] for event in events[:15]]
        self.rows.add(job.name, "profile", seconds=total, launches=launches, top=top)


# -- items ------------------------------------------------------------------------------------------------------------


def supervised(bench: Bench) -> None:
    """Supervised jobs, the cheap ones first; DFlash at 512 anchors with activation checkpointing."""
    bench.measure(bench.job("eagle3-sft-32k"))
    bench.measure(bench.job("dflash-sft-64"))
    bench.measure(bench.job("eagle3-sft-full"))
    bench.measure(bench.job("dflash-sft-512"), checkpointing=True)


def chunks(bench: Bench) -> None:
    """Supervised EAGLE-3 over all tokens with the chunks of a CPU."""
    options = {"chunk_bytes": 64 * 2**20, "repeats": 2, "warmups": 1}
    bench.measure(bench.job("eagle3-sft-full"), "loss_chunk_bytes 64 MiB", **options)


def compiled(bench: Bench) -> None:
    """Supervised jobs with `torch_compile`, and DFlash at 512 anchors without activation checkpointing."""
    compiler = "eager" if bench.is_rehearsal else "inductor"
    bench.measure(bench.job("dflash-sft-64"), "torch_compile", compiler=compiler)
    bench.measure(bench.job("eagle3-sft-32k"), "torch_compile", compiler=compiler)
    bench.measure(bench.job("dflash-sft-512"), "no activation checkpointing", repeats=3)


def on_policy(bench: Bench) -> None:
    """Draft-OPD of EAGLE-3 and DFlash, with the accepted lengths of the cost model."""
    bench.measure(bench.job("eagle3-opd"))
    bench.measure(bench.job("dflash-opd"))


def long_rows(bench: Bench) -> None:
    """One row of 32,768 tokens, DFlash and EAGLE-3."""
    for name in ("dflash-sft-512", "eagle3-sft-32k"):
        job = replace(bench.job(name), rows=1, length=bench.sizes.long_row)
        note = f"one row of {job.length} tokens"
        bench.measure(job, note, checkpointing=True, repeats=2, warmups=1)


def joined_families(bench: Bench) -> None:
    """The families that join a block with its tokens: supervised at 512 anchors, and Draft-OPD."""
    for family in ("dspark", "dflash2"):
        bench.measure(bench.job(f"{family}-sft-512"), checkpointing=True)
        bench.measure(bench.job(f"{family}-opd"))


def small_dflash(bench: Bench) -> None:
    """DFlash of a Qwen3-4B at 512 anchors, target and drafter on one card."""
    job = replace(bench.job("dflash-sft-512"), name="qwen3-4b-dflash-sft-512")
    bench.measure(job, target="qwen3-4b", checkpointing=True)


ITEMS = (
    Item("card", 1, 20, gpu_checks.card),
    Item("probes", 1, 90, gpu_checks.probes),
    Item("small pairs", 1, 90, gpu_checks.small_pairs),
    Item("supervised", 1, 200, supervised),
    Item("chunks", 1, 45, chunks),
    Item("compiled", 1, 90, compiled),
    Item("on policy", 2, 90, on_policy),
    Item("long rows", 2, 60, long_rows),
    Item("loss arms", 2, 40, gpu_arms.losses),
    Item("peer", 2, 150, gpu_arms.peer),
    Item("attention arms", 2, 40, gpu_arms.attentions),
    Item("reading arms", 2, 20, gpu_arms.readings),
    Item("joined families", 2, 120, joined_families),
    # Last, because it takes the place of the large target.
    Item("small dflash", 2, 60, small_dflash),
)


def run(
    out: Path,
    part: int | None,
    *,
    is_rehearsal: bool,
    shared: Path | None,
    seconds: float,
    device: str | None = None,
) -> Rows:
    """Run the items of a part, or all of them, and return the rows; `device` is CUDA, or the CPU for a rehearsal."""
    device = device or ("cpu" if is_rehearsal else "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. `--rehearse` runs everything at tiny sizes on a CPU.")
    gpu = torch.cuda.get_device_name() if device == "cuda" else f"{device}, rehearsal"
    rows = Rows(out, {"gpu": gpu, "target": "", "torch": torch.__version__})
    bench = Bench(torch.device(device), rows, is_rehearsal, shared)
    run_items([item for item in ITEMS if part in (None, item.part)], bench, rows, seconds)
    return rows


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines; what is in it already is not measured again")
    parser.add_argument("--part", type=int, choices=(1, 2), help="one half; both in turn if not given")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--shared", type=Path, help="folder that holds targets/, for the small trained target")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="time for each half")
    args = parser.parse_args()
    if args.out is None and not args.rehearse:
        parser.error("give a file to write to with --out")
    out = args.out or Path(tempfile.mkdtemp()) / "gpu.jsonl"
    seconds = args.seconds * (1 if args.part else 2)
    rows = run(out, args.part, is_rehearsal=args.rehearse, shared=args.shared, seconds=seconds)
    # The last word on each: an item that failed or was stopped is tried again by the next run.
    items = list({row["job"]: row for row in rows.rows if row["stage"] == "item"}.values())
    for row in items:
        print(f"{row['job']}: {row['status']}{' ' + row['error'].splitlines()[0] if row.get('error') else ''}")
    print(f"{len(rows.rows)} rows in {out}")
    # A failed item is told by its row; the run itself has done what it could.
    sys.exit(0 if all(row["status"] == "done" for row in items) else 1)


if __name__ == "__main__":
    # Large steps and small ones follow each other; growing segments keep the card's memory in one piece.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # noqa: TID251
    main()
