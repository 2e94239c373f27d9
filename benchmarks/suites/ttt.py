# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Attention of EAGLE-3's training-time test: seven steps from every position of a text, forward and backward.

Shape letters:  L = text length and anchors, h = heads, d = head dimension
"""

import argparse

import torch

from benchmarks import peers
from benchmarks.arms import Arm, Curve, Report, assert_equal, median_seconds, paired_ratio, time_in_turns
from benchmarks.counters import flops, peak_bytes
from benchmarks.reference.attention import dense_attention, sdpa_attention, written_out_attention
from trl_draft_opd.drafters.attention import anchored_attention


HEADS, HEAD_DIM = 8, 64
# Beyond this, the scores of all steps take more than ten gigabytes.
LONGEST_WRITTEN_OUT = 1024
# Asked at the longest text: time of the other over ours, peak of ours over the other.
REACH = {"dense sdpa": (3.0, 0.35), "speculators": (2.0, 0.6)}


class Problem:
    """
    Queries, keys and values of every step at every position, and weights that make a loss of the outputs.

    Args:
        length (`int`): Positions.
        num_steps (`int`): Steps; the keys of the first one are the context.
    """

    def __init__(self, length: int, num_steps: int, device: str, dtype: torch.dtype, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def draw() -> torch.Tensor:
            return torch.randn(1, HEADS, length, HEAD_DIM, generator=generator).to(device, dtype)

        self.queries, self.keys, self.values = ([draw().requires_grad_() for _ in range(num_steps)] for _ in range(3))
        self.weights = [draw().transpose(1, 2).flatten(2) for _ in range(num_steps)]
        # Pair `i` is read by the block whose anchor is `i + 1`: it sees the entries up to its own.
        self.anchors = torch.arange(1, length + 1, device=device)[None]
        self.length = length

    def differentiate(self, outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs and the gradients of a weighted sum of them."""
        grads = torch.autograd.grad(outputs, [*self.queries, *self.keys, *self.values], self.weights)
        count = len(self.queries)
        names = ("query", "key", "value")
        named = {f"{name} gradient": grads[i * count : (i + 1) * count] for i, name in enumerate(names)}
        return {"output": [output.detach() for output in outputs]} | named

    def blocked(self, attention, **options) -> dict[str, torch.Tensor]:
        """Run all steps with a function of `anchored_attention`'s signature."""
        outputs = []
        for step, query in enumerate(self.queries):
            mixed = attention(
                query[:, :, :, None],
                self.keys[0],
                self.values[0],
                [key[:, :, :, None] for key in self.keys[1 : step + 1]],
                [value[:, :, :, None] for value in self.values[1 : step + 1]],
                self.anchors,
                HEAD_DIM**-0.5,
                **options,
            )
            outputs.append(mixed[:, :, 0])
        return self.differentiate(outputs)

    def speculators(self) -> dict[str, torch.Tensor]:
        """Run all steps as speculators does."""
        outputs = peers.ttt_attention(self.queries, self.keys, self.values, HEAD_DIM**-0.5)
        return self.differentiate(outputs)


def arms_of(problem: Problem, report: Report) -> list[Arm]:
    """Return ours, the dense mask by torch's sdpa, the dense mask written out, and speculators'."""
    arms = [
        Arm("ours", lambda: problem.blocked(anchored_attention)),
        Arm("dense sdpa", lambda: problem.blocked(dense_attention, attend=sdpa_attention)),
    ]
    if problem.length <= LONGEST_WRITTEN_OUT:
        written_out = lambda: problem.blocked(dense_attention, attend=written_out_attention)  # noqa: E731
        arms.append(Arm("dense written out", written_out))
    if peers.has_speculators(report):
        arms.append(Arm("speculators", problem.speculators))
    return arms


def run(args: argparse.Namespace, report: Report) -> None:
    """Measure time, peak and FLOPs by length, and by the number of steps."""
    dtype = getattr(torch, args.dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    lengths, num_steps = ([128, 256], 3) if args.quick else ([512, 1024, 2048], 7)
    times: dict[str, list[float]] = {}
    peaks: dict[str, list[int]] = {}
    for length in lengths:
        arms = arms_of(Problem(length, num_steps, args.device, dtype), report)
        assert_equal(arms, **tolerance)
        for arm in arms:
            peaks.setdefault(arm.name, []).append(peak_bytes(arm.run))
            report.count(f"L={length} {arm.name}", peak_bytes=peaks[arm.name][-1], flops=flops(arm.run))
        seconds = time_in_turns(arms, pairs=args.pairs)
        for arm in arms:
            times.setdefault(arm.name, []).append(median_seconds(seconds, arm.name))
        for arm in arms[1:]:
            ratio = report.ratio(f"TTT-{num_steps}, L={length}", paired_ratio(seconds, arm.name, "ours"))
            share = peaks["ours"][-1] / peaks[arm.name][-1]
            is_last = length == lengths[-1]
            reach = REACH.get(arm.name, (None, None)) if is_last and not args.quick else (None, None)
            spread = f"[{ratio.p10:.2f}, {ratio.p90:.2f}]"
            report.figure(
                f"{arm.name} / ours, time, L={length}", ratio.median, reach[0], is_upper=False, detail=spread
            )
            report.figure(f"ours / {arm.name}, peak, L={length}", share, reach[1])
    for name, values in times.items():
        sizes = [float(length) for length in lengths[: len(values)]]
        report.curve(Curve(f"TTT attention time, {name}", "length", "time", sizes, values))
        report.curve(Curve(f"TTT attention peak, {name}", "length", "bytes", sizes, peaks[name]))
    by_steps(args, report, dtype)


def by_steps(args: argparse.Namespace, report: Report, dtype: torch.dtype) -> None:
    """Measure ours by the number of steps at a fixed length."""
    length, counts = (128, [1, 2]) if args.quick else (1024, [1, 2, 4, 7])
    problems = {count: Problem(length, count, args.device, dtype) for count in counts}
    arms = [Arm(f"{n} steps", lambda p=p: p.blocked(anchored_attention)) for n, p in problems.items()]
    seconds = time_in_turns(arms, pairs=args.pairs)
    medians = [median_seconds(seconds, arm.name) for arm in arms]
    report.curve(Curve(f"TTT attention time, ours, L={length}", "steps", "time", [*map(float, counts)], medians))
