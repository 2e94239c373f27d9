# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Attention of DFlash blocks over a text, forward and backward, by the number of anchors and by the size of a block.

Shape letters:  L = text length, A = anchors, S = block size, h = heads, d = head dimension
"""

import argparse

import torch

from benchmarks.arms import Arm, Curve, Report, assert_equal, median_seconds, paired_ratio, time_in_turns
from benchmarks.counters import flops, peak_bytes
from benchmarks.reference.attention import dense_attention
from trl_draft_opd.drafters.attention import anchored_attention


HEADS, HEAD_DIM = 8, 64
# Asked: exponent of the cost in the number of anchors, and time of a dense mask over ours at 256 anchors.
REACH_EXPONENT, REACH_RATIO, REACH_ANCHORS = 1.15, 2.5, 256


class Problem:
    """
    Queries, keys and values of blocks at anchors spread evenly over a text.

    Args:
        length (`int`), num_anchors (`int`), block_size (`int`): `L`, `A` and `S`.
    """

    def __init__(self, length: int, num_anchors: int, block_size: int, device: str, dtype: torch.dtype, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(1, HEADS, *shape, HEAD_DIM, generator=generator).to(device, dtype).requires_grad_()

        self.context_key, self.context_value = draw(length), draw(length)
        self.query, self.key, self.value = (draw(num_anchors, block_size) for _ in range(3))
        self.weight = torch.randn(1, num_anchors, block_size, HEADS * HEAD_DIM, generator=generator).to(device, dtype)
        self.anchors = torch.linspace(1, length, num_anchors, device=device).round().long()[None]

    def run(self, attention) -> dict[str, torch.Tensor]:
        """Return the output and the gradients of a weighted sum of it."""
        out = attention(
            self.query,
            self.context_key,
            self.context_value,
            [self.key],
            [self.value],
            self.anchors,
            HEAD_DIM**-0.5,
        )
        names = ("query", "context_key", "context_value", "key", "value")
        grads = torch.autograd.grad(out, [getattr(self, name) for name in names], self.weight)
        return {"output": out.detach()} | {f"{n} gradient": g for n, g in zip(names, grads, strict=True)}


def run(args: argparse.Namespace, report: Report) -> None:
    """Measure time, peak and FLOPs by anchors, then by block size at a fixed number of queries."""
    dtype = getattr(torch, args.dtype)
    by_anchors(args, report, dtype)
    by_block_size(args, report, dtype)


def by_anchors(args: argparse.Namespace, report: Report, dtype: torch.dtype) -> None:
    """Hold ours to a dense mask, then time all sizes in turns, so that a busy moment hits every point of the curve."""
    length, block_size, counts = (128, 4, [8, 16, 32]) if args.quick else (1024, 16, [32, 64, 128, 256, 512])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    arms = []
    for count in counts:
        problem = Problem(length, count, block_size, args.device, dtype)
        pair = [
            Arm(f"ours A={count}", lambda p=problem: p.run(anchored_attention)),
            Arm(f"dense A={count}", lambda p=problem: p.run(dense_attention)),
        ]
        assert_equal(pair, **tolerance)
        for arm in pair:
            report.count(arm.name, peak_bytes=peak_bytes(arm.run), flops=flops(arm.run))
        arms += pair
    seconds = time_in_turns(arms, pairs=args.pairs)
    for count in counts:
        ratio = report.ratio(f"A={count}", paired_ratio(seconds, f"dense A={count}", f"ours A={count}"))
        reach = REACH_RATIO if count == REACH_ANCHORS else None
        spread = f"[{ratio.p10:.2f}, {ratio.p90:.2f}]"
        report.figure(f"dense / ours, time, {count} anchors", ratio.median, reach, is_upper=False, detail=spread)
        share = report.counters[f"ours A={count}"]["peak_bytes"] / report.counters[f"dense A={count}"]["peak_bytes"]
        report.figure(f"ours / dense, peak, {count} anchors", share)
    for name in ("ours", "dense"):
        medians = [median_seconds(seconds, f"{name} A={count}") for count in counts]
        curve = report.curve(
            Curve(f"DFlash attention time, {name}", "anchors", "time", [*map(float, counts)], medians)
        )
        reach = REACH_EXPONENT if name == "ours" and not args.quick else None
        report.figure(f"exponent of time in anchors, {name}", curve.exponent, reach)
        peaks = [report.counters[f"{name} A={count}"]["peak_bytes"] for count in counts]
        report.curve(Curve(f"DFlash attention peak, {name}", "anchors", "bytes", [*map(float, counts)], peaks))


def by_block_size(args: argparse.Namespace, report: Report, dtype: torch.dtype) -> None:
    """Keep the number of queries and change how many of them share an anchor."""
    length, num_queries, sizes = (128, 64, [4, 8]) if args.quick else (1024, 2048, [4, 8, 16, 32])
    problems = {size: Problem(length, num_queries // size, size, args.device, dtype) for size in sizes}
    arms = [Arm(f"ours S={size}", lambda p=p: p.run(anchored_attention)) for size, p in problems.items()]
    seconds = time_in_turns(arms, pairs=args.pairs)
    medians = [median_seconds(seconds, arm.name) for arm in arms]
    name = f"DFlash attention time, ours, {num_queries} queries"
    report.curve(Curve(name, "block size", "time", [*map(float, sizes)], medians))
