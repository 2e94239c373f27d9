# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whole steps on one long row, families and both trainers: how peak memory, and time outside of attention, grow with
its length. Weights are random and the target is tiny; the length is what is measured.
"""

import argparse
import math
import time
from statistics import median
from typing import Any

import torch

from benchmarks.arms import Curve, Report
from benchmarks.counters import PeakBytes
from benchmarks.gpu_jobs import Training, make_target, make_text
from benchmarks.gpu_rows import Clock
from benchmarks.stages import StageClock
from trl_draft_opd import Eagle3DraftModel, FrozenTarget
from trl_draft_opd.costs.jobs import Job
from trl_draft_opd.costs.shapes import TargetShape
from trl_draft_opd.drafters.attention import tiles
from trl_draft_opd.drafters.auto import DRAFTER_CLASSES
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.target import attention


TARGET = TargetShape(64, 96, 8, 4, 2, 16, 512, False, True)
LENGTHS, QUICK_LENGTHS = (2048, 8192, 32_768), (1024, 2048)
REPEATS = 5  # of a step on all but the longest row
# Exponents of peak bytes and of seconds outside of attention, from each length to the next.
MOST_MEMORY, MOST_TIME = 1.05, 1.1
ATTENTION = [
    (attention, "_attend", "attention"),
    (tiles._Attention, "forward", "attention"),
    (tiles._Attention, "backward", "attention"),
]


def run(args: argparse.Namespace, report: Report) -> None:
    """Take steps on rows of every length."""
    target = make_target(TARGET, torch.device("cpu"), torch.float32, 2 * LENGTHS[-1])
    lengths = QUICK_LENGTHS if args.quick else LENGTHS
    for family in args.family:
        for method in ("sft", "opd"):
            name = f"{family} {method}"
            if not args.only or method in args.only:
                _measure(report, name, target, family, method, lengths)


def _measure(
    report: Report, name: str, target: FrozenTarget, family: str, method: str, lengths: tuple[int, ...]
) -> None:
    peaks, seconds = [], []
    for length in lengths:
        job = _job(family, method, length)
        text = make_text(job, target.vocab_size, target.device)
        training = Training(target, _drafter(family, target), job, text, is_mixed=False)
        outside = []
        for _ in range(REPEATS if length < LENGTHS[-1] else 1):
            clock, begun = StageClock(), time.perf_counter()
            with clock.watch(*ATTENTION), PeakBytes() as bytes_:
                clock.start()
                training.run(Clock(target.device))
                clock.stop()
            outside.append(clock.total - clock.seconds["attention"])
        peaks.append(bytes_.peak)
        seconds.append(median(outside))
        report.count(
            f"{name}, {length:,} tokens",
            peak_bytes=bytes_.peak,
            seconds=time.perf_counter() - begun,
            outside_attention=seconds[-1],
        )
    report.curves.append(
        Curve(f"{name}: memory", "tokens", "peak bytes", [*map(float, lengths)], [*map(float, peaks)])
    )
    for shorter in range(len(lengths) - 1):
        grown = math.log(lengths[shorter + 1] / lengths[shorter])
        span = f"{name}, {lengths[shorter]:,} to {lengths[shorter + 1]:,} tokens: exponent"
        for what, values, most in (("peak bytes", peaks, MOST_MEMORY), ("time outside attention", seconds, MOST_TIME)):
            exponent = math.log(values[shorter + 1] / values[shorter]) / grown
            report.figure(f"{span} of {what}", exponent, most)


def _job(family: str, method: str, length: int) -> Job:
    kind: dict[str, Any]
    if method == "sft":
        # EAGLE-3 drafts from every position; DFlash from so many that its blocks grow with the row.
        kind = {"num_anchors": None if family == "eagle3" else length // 16}
    else:
        kind = {"tau": 3.0, "segment": 1 if family == "eagle3" else 16}
    return Job("long", family, rows=1, length=length, prompt=length // 8, **kind)


def _drafter(family: str, target: FrozenTarget) -> Drafter:
    torch.manual_seed(1)
    if family == "eagle3":
        return Eagle3DraftModel.from_target(target, ttt_steps=3).train()
    family_class: Any = DRAFTER_CLASSES[family]
    mask = target.vocab_size - 1
    return family_class.from_target(target, mask_token_id=mask, num_hidden_layers=1, block_size=8).train()
