# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Predict tokens per second and memory of a training step on a GPU, stage by stage. Nothing is measured here.

    python -m benchmarks.roofline                                         # ten jobs, Qwen3-8B on an H100
    python -m benchmarks.roofline --target-shape qwen3-4b --gpu 4090 --stages
    python -m benchmarks.roofline --measured gpu.jsonl                    # beside what benchmarks/gpu.py measured
    python -m benchmarks.roofline --memory                                # one row of 32,768 tokens, stage by stage
    python -m benchmarks.roofline --readings                              # readings from a store or from servers
    python -m benchmarks.roofline --count                                 # trl_draft_opd/costs/counted.py anew

The arithmetic is in `trl_draft_opd/costs/`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_rows import parse_row
from benchmarks.scaling import DRAFT_VOCABULARY, FAMILIES, markdown, shape_of, titles, workload_of
from trl_draft_opd.costs.counted import NOW
from trl_draft_opd.costs.gpus import GPUS, Gpu
from trl_draft_opd.costs.jobs import JOBS
from trl_draft_opd.costs.memory import BF16, LAUNCHES, Workload, checkpointing_pays, count_stages, gib, launch_bytes
from trl_draft_opd.costs.readings import (
    Flow,
    bodiless_bytes,
    bytes_per_token,
    cache_bytes_per_token,
    served_tokens_per_second,
    shared_folder_bytes,
)
from trl_draft_opd.costs.roofline import Prediction, predict
from trl_draft_opd.costs.shapes import SERVED, TARGETS, TargetShape
from trl_draft_opd.losses.budget import chunk_bytes_of_card


# Asked: predicted tokens a second over the floor's.
REACH_SHARE = 0.6
LONG_ROW, LONG_PROMPT = 32_768, 2_048
DELIVERED = LAUNCHES[-1]
# Cards that share a layer of the targets on the page, and texts under way at their servers.
SERVED_ON = {"qwen3-8b": 1, "qwen3-32b": 2, "llama3-70b": 4, "qwen3-235b-a22b": 8}
UNDER_WAY = 8


def predictions(target: TargetShape, gpu: Gpu, checkpointing: bool = False) -> list[Prediction]:
    """Return what every job takes with the code as it is."""
    drafters = [shape_of(job.family, target, job.draft_vocab) for job in JOBS]
    return [
        predict(job, target, each, gpu, NOW, checkpointing=checkpointing)
        for job, each in zip(JOBS, drafters, strict=True)
    ]


def job_table(found: list[Prediction], measured: dict[str, dict] | None = None) -> str:
    """Return the table of jobs; with what was measured, where there is something."""
    header = [
        "job",
        "TFLOP: target / drafter / heads / walk",
        "floor, s",
        "step, s",
        "tokens/s",
        "of the floor",
        "MFU",
    ]
    rows = []
    for each in found:
        parts = " / ".join(
            f"{each.column(c) / 1e12:.0f}" if each.column(c) else "-" for c in ("target", "drafter", "heads", "walk")
        )
        row = [each.job.name, parts, f"{each.floor:.2f}", f"{each.total:.2f}"]
        row += [f"{each.tokens_per_second:,.0f}", f"{each.share:.2f}", f"{each.utilisation:.1%}"]
        if measured is not None:
            known = measured.get(each.job.name)
            row += ["-"] if known is None else [f"{known['tokens_per_s']:,.0f}"]
        rows.append(row)
    return markdown(header + ([] if measured is None else ["measured tokens/s"]), rows)


def stage_table(found: Prediction) -> str:
    """Return the stages of a job: what they need, and what they take."""
    rows = []
    for stage, seconds in zip(found.stages, found.seconds, strict=True):
        flops = stage.flops + stage.attention_flops
        row = [stage.name, f"{1e3 * flops / found.gpu.flops:.1f}", f"{flops / 1e12:.1f}"]
        row += [f"{(stage.bytes + stage.product_bytes) / 1e9:.1f}", f"{stage.launches:,.0f}", f"{stage.syncs:,.0f}"]
        rows.append([*row, f"{1e3 * seconds:.1f}"])
    total = [f"{1e3 * found.floor:.1f}", f"{found.flops / 1e12:.1f}", "", "", "", f"{1e3 * found.total:.1f}"]
    header = [found.job.name, "floor, ms", "TFLOP", "GB", "launches", "waits", "ms"]
    return markdown(header, [*rows, ["**step**", *total]])


def read_measured(path: Path, target: str, gpu: str) -> dict[str, dict]:
    """Return the whole steps that were measured on a card with a target at the default settings, by job."""
    lines = path.read_text(encoding="utf-8").splitlines()
    parsed = [row for row in map(parse_row, lines) if row is not None]
    rows = [row for row in parsed if (row["stage"], row["note"], row.get("target")) == ("step", "", target)]
    # A rehearsal's rows, or those of another card, stand beside no prediction of this one.
    return {row["job"]: row for row in rows if gpu.upper() in str(row.get("gpu")).upper()}


def long_row(name: str, family: str, card: int) -> Workload:
    """
    Return a micro-batch of one long row under Draft-OPD (tau 3 for EAGLE-3, 4 for blocks), its layers computed again
    where it would not fit otherwise.
    """
    target, drafter = TARGETS[name], shape_of(family, TARGETS[name])
    work = Workload(1, LONG_ROW, (LONG_ROW - LONG_PROMPT) // (4 if drafter.drafts_whole_blocks else 3), 1, False)
    needed = launch_bytes(count_stages(target, drafter, work), "one GPU", 1)
    return replace(work, checkpointing=checkpointing_pays(needed, card))


def memory_table(name: str, gpu: Gpu) -> str:
    """Return the stages of a step on one long row, all families, and the peak beside the card."""
    target = TARGETS[name]
    works = [long_row(name, family, gpu.memory) for family in FAMILIES]
    drafters = [shape_of(family, target) for family in FAMILIES]
    columns = [count_stages(target, drafter, work) for drafter, work in zip(drafters, works, strict=True)]
    passes = [w.blocks_at_once(drafter.num_drafts) for drafter, w in zip(drafters, works, strict=True)]
    labels = [label for label, _ in columns[0].rows()]
    rows = [[label, *(gib(stages.rows()[i][1]) for stages in columns)] for i, label in enumerate(labels)]
    rows.append(["layers computed again in the backward pass", *("yes" if w.checkpointing else "no" for w in works)])
    counts = (f"{work.blocks:,}, {size:,}" for work, size in zip(works, passes, strict=True))
    rows.append(["blocks, and how many a pass drafts (`blocks_per_pass`)", *counts])
    rows.append([f"**peak, of {gib(gpu.memory)}**", *(f"**{gib(launch_bytes(s, 'one GPU', 1))}**" for s in columns)])
    return markdown([f"{name}, one row of {LONG_ROW:,} tokens, GiB", *titles()], rows)


# -- readings that come from elsewhere --------------------------------------------------------------------------------


def reading_tables(gpu: Gpu) -> list[str]:
    """Return the tables of docs/do/scaling.md on readings from a store or from servers; `gpu` is the trainer's."""
    return [size_table(), flow_table(gpu), delivered_table(gpu), small_card_table()]


def num_layers_of(family: str, target: TargetShape) -> int:
    """Return how many layers a family's drafter taps."""
    return shape_of(family, target).features // target.hidden


def size_table() -> str:
    """Return what targets hold without their body, what a token's reading takes, and what it adds to a server."""
    rows = []
    for name, target in SERVED.items():
        counts = [num_layers_of(family, target) for family in ("eagle3", "dflash")]
        sizes = [bytes_per_token(target.hidden, count) for count in counts]
        keys, states = cache_bytes_per_token(target, counts[0], SERVED_ON[name])
        row = [name, f"{gib(BF16 * target.parameters)}, {gib(bodiless_bytes(target))}"]
        row += [", ".join(f"{size:,}" for size in sizes), ", ".join(f"{size * 1e8 / 1e12:.1f}" for size in sizes)]
        rows.append([*row, f"{keys:,}, {states:,} ({SERVED_ON[name]})"])
    header = ["target, bf16", "weights whole, without body, GiB", "bytes a token: EAGLE-3, DFlash"]
    return markdown([*header, "1e8 tokens, TB", "server's cache a token and card: keys, states (cards)"], rows)


def flow_table(gpu: Gpu) -> str:
    """Return what a trainer on one card takes in, and how many cards read as much."""
    rows = []
    for name, target in SERVED.items():
        for job in (each for each in JOBS if each.name in ("eagle3-opd", "dflash-opd")):
            drafter = shape_of(job.family, target, DRAFT_VOCABULARY)
            token_bytes = bytes_per_token(target.hidden, num_layers_of(job.family, target))
            flow = Flow.of(predict(job, target, drafter, gpu, NOW), token_bytes)
            cards = flow.tokens_per_second / served_tokens_per_second(target, job.length, gpu)
            row = [f"{name}, {job.name}", f"{flow.reading_share:.0%}", f"{flow.tokens_per_second:,.0f}"]
            folder = shared_folder_bytes(UNDER_WAY, job.length, token_bytes)
            rows.append([*row, f"{flow.bytes_per_second / 1e9:.2f}", f"{cards:.1f}", gib(folder)])
    header = [f"one {gpu.name}", "reading, of a step in process", "tokens/s", "GB/s", "cards that read as much"]
    return markdown([*header, f"shared folder, {UNDER_WAY} texts, GiB"], rows)


def delivered_table(gpu: Gpu) -> str:
    """Return the peak of a trainer whose readings are delivered, under the workload of the launches."""
    rows = []
    for name, target in SERVED.items():
        drafters = [shape_of(family, target, DRAFT_VOCABULARY) for family in FAMILIES]
        found = [count_stages(target, d, workload_of(f)) for f, d in zip(FAMILIES, drafters, strict=True)]
        rows.append([name, *(gib(launch_bytes(stages, DELIVERED, 1)) for stages in found)])
    return markdown([f"readings delivered, GiB, card of {gib(gpu.memory)}", *titles()], rows)


def small_card_table() -> str:
    """Return how a drafter of Qwen3-8B fits on a card of 24 GB: one row a micro-batch, layers computed again."""
    target, card = TARGETS["qwen3-8b"], GPUS["4090"].memory
    columns = []
    for family in FAMILIES:
        drafter = shape_of(family, target, DRAFT_VOCABULARY)
        work = replace(workload_of(family, rows=1), chunk_bytes=chunk_bytes_of_card(card))
        peaks = [
            launch_bytes(count_stages(target, drafter, replace(work, checkpointing=again)), DELIVERED, 1)
            for again in (False, True)
        ]
        columns.append([gib(16 * drafter.parameters), *map(gib, peaks)])
    labels = ["masters, gradients, AdamW's moments", "peak", "peak, `activation_checkpointing`"]
    rows = [[label, *(column[i] for column in columns)] for i, label in enumerate(labels)]
    return markdown([f"qwen3-8b, one row a micro-batch, GiB, card of {gib(card)}", *titles()], rows)


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-shape", choices=list(TARGETS), default="qwen3-8b")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--stages", action="store_true", help="a table of stages for every job")
    parser.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    parser.add_argument("--measured", type=Path, help="JSON lines of benchmarks/gpu.py")
    parser.add_argument("--memory", action="store_true", help="memory of one long row")
    parser.add_argument("--readings", action="store_true", help="readings from a store or from servers")
    parser.add_argument("--count", action="store_true", help="count layers, kernels and waits anew, and print them")
    args = parser.parse_args()
    if args.measured is not None and not args.measured.is_file():
        parser.error(f"`--measured` {str(args.measured)!r} is no file. Name one that `benchmarks/gpu.py --out` wrote.")
    gpu = GPUS[args.gpu]
    if args.count:
        from benchmarks.traffic import counted, on_pretended

        print(on_pretended(counted))
        return
    if args.readings:
        print("\n\n".join(reading_tables(gpu)))
        return
    if args.memory:
        print(memory_table(args.target_shape, gpu))
        return
    measured = None if args.measured is None else read_measured(args.measured, args.target_shape, args.gpu)
    found = predictions(TARGETS[args.target_shape], gpu, args.checkpointing)
    print(f"{args.target_shape} on one {gpu.name} ({gpu.source}), predicted:\n")
    print(job_table(found, measured))
    if args.stages:
        print("", *map(stage_table, found), sep="\n\n")


if __name__ == "__main__":
    main()
