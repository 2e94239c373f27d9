# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The loss over a large vocabulary: peak bytes, time against the bare products of the heads, rows sent through them.

Shape letters:  N = rows, H = hidden size, V = vocabulary
"""

import argparse

import torch

from benchmarks import peers
from benchmarks.arms import Arm, Curve, Report, assert_equal, median_seconds, paired_ratio, time_in_turns
from benchmarks.counters import HeadRows, flops, peak_bytes
from benchmarks.reference.loss import full_loss
from trl_draft_opd.losses import Head, chunked_divergence, default_chunk_bytes


VOCAB, HIDDEN = 151_936, 256
# Asked: peak over the bytes of all float32 logits at 2,048 rows; time over the bare products in the same chunks.
REACH_PEAK, REACH_PEAK_ROWS, REACH_TIME = 0.06, 2048, 1.6


class Problem:
    """
    Hidden states of drafter and target, and both heads.

    Args:
        rows (`int`), vocab_size (`int`): `N` and `V`.
        trains_head (`bool`): Whether the drafter's head needs a gradient.
        num_steps (`int`): Rows that share one state of the target, as the steps of a TTT do; 1 for distinct states.
    """

    def __init__(self, args, rows: int, vocab_size: int, *, trains_head: bool, num_steps: int = 1):
        generator = torch.Generator().manual_seed(args.seed)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            drawn = torch.randn(shape, generator=generator) * scale
            return drawn.to(args.device, getattr(torch, args.dtype))

        self.hidden = draw(rows, HIDDEN).requires_grad_()
        self.target_hidden = draw(rows // num_steps, HIDDEN)
        self.target_rows = torch.arange(rows, device=args.device) % len(self.target_hidden)
        self.weight = draw(vocab_size, HIDDEN, scale=HIDDEN**-0.5).requires_grad_(trains_head)
        self.target_weight = draw(vocab_size, HIDDEN, scale=HIDDEN**-0.5)
        self.row_weights = torch.full((rows,), 1 / rows, device=args.device)
        self.leaves = [self.hidden, self.weight] if trains_head else [self.hidden]

    @property
    def rows(self) -> int:
        return len(self.hidden)

    def _differentiate(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        grads = torch.autograd.grad(loss, self.leaves)
        named = dict(zip(("hidden gradient", "head gradient"), grads, strict=False))
        return {"loss": loss.detach()} | named

    def ours(self) -> dict[str, torch.Tensor]:
        """Run `chunked_divergence` as the trainers do."""
        losses = chunked_divergence(
            self.hidden,
            Head.linear(self.weight),
            self.target_hidden,
            Head(lambda hidden: hidden @ self.target_weight.T, (), len(self.target_weight)),
            target_rows_N=self.target_rows,
            labels_N=None,
            weights_N=self.row_weights,
            loss_type="forward_kl",
            draft_token_ids=None,
            chunk_bytes=default_chunk_bytes(self.hidden.device),
        )
        return self._differentiate(losses.total)

    def reference(self) -> dict[str, torch.Tensor]:
        """Run the plain loss over full logits."""
        loss = full_loss(
            self.hidden,
            self.weight,
            self.target_hidden[self.target_rows],
            self.target_weight,
            labels=None,
            weights=self.row_weights,
            loss_type="forward_kl",
            draft_token_ids=None,
        )
        return self._differentiate(loss)

    def speculators(self) -> dict[str, torch.Tensor]:
        """Run speculators' loss over full logits, made as its models make them."""
        with torch.no_grad():
            targets = (self.target_hidden @ self.target_weight.T)[self.target_rows]
        rows = peers.forward_kl((self.hidden @ self.weight.T)[None], targets[None])[0]
        return self._differentiate((rows * self.row_weights).sum())

    def bare_products(self, chunks: list[int], target_chunks: list[int]) -> dict[str, torch.Tensor]:
        """
        Run only the products with both heads, in given chunks: to logits, and back to hidden states (and the head).
        """
        with torch.no_grad():
            start = 0
            for size in target_chunks:
                self.target_hidden[start : start + size] @ self.target_weight.T
                start += size
            start, grad = 0, torch.zeros_like(self.hidden)
            head_grad = torch.zeros_like(self.weight) if self.weight.requires_grad else None
            for size in chunks:
                part = self.hidden[start : start + size]
                logits = part @ self.weight.T
                grad[start : start + size] = logits @ self.weight
                if head_grad is not None:
                    head_grad.addmm_(logits.T, part)
                start += size
        return {"gradient": grad}

    def count_rows(self) -> HeadRows:
        """Return the rows that ours sends through both heads."""
        with HeadRows({"drafter": self.weight, "target": self.target_weight}) as counter:
            self.ours()
        return counter


def run(args: argparse.Namespace, report: Report) -> None:
    """Measure a frozen head, a trained head, shared target states, and the growth with rows and vocabulary."""
    vocab = 8192 if args.quick else VOCAB
    parts = {"equality": equality, "peak": peaks, "time": times, "rows": head_rows, "vocabulary": by_vocabulary}
    for name, part in parts.items():
        if not args.only or name in args.only:
            report.say(f" -- {name}")
            part(args, report, vocab)


def equality(args: argparse.Namespace, report: Report, vocab: int) -> None:
    """Hold ours to full logits and to speculators on few rows, then time and count all of them."""
    rows = 64 if args.quick else 256
    for trains_head in (False, True):
        label = "trained head" if trains_head else "frozen head"
        problem = Problem(args, rows, vocab, trains_head=trains_head)
        arms = [Arm("ours", problem.ours), Arm("full logits", problem.reference)]
        if peers.has_speculators(report):
            arms.append(Arm("speculators", problem.speculators))
        assert_equal(arms, rtol=1e-4, atol=1e-5)
        for arm in arms:
            peak = peak_bytes(arm.run)
            report.count(f"{rows} rows, {label}, {arm.name}", peak_bytes=peak, flops=flops(arm.run))
        seconds = time_in_turns(arms, pairs=args.pairs)
        for arm in arms[1:]:
            ratio = report.ratio(f"{rows} rows, {label}", paired_ratio(seconds, arm.name, "ours"))
            spread = f"[{ratio.p10:.2f}, {ratio.p90:.2f}]"
            report.figure(f"{arm.name} / ours, time, {label}", ratio.median, is_upper=False, detail=spread)


def peaks(args: argparse.Namespace, report: Report, vocab: int) -> None:
    """Measure the peak by rows, less what any loss must hold: gradients of hidden states and head, row values."""
    counts = [128, 256] if args.quick else [256, 512, 1024, 2048]
    for trains_head in (False, True):
        label = "trained head" if trains_head else "frozen head"
        shares = []
        for rows in counts:
            problem = Problem(args, rows, vocab, trains_head=trains_head)
            peak = peak_bytes(problem.ours)
            # Two [rows, H] buffers: the gradient that was stored, and the one handed back, scaled.
            held = 2 * sum(leaf.numel() * leaf.element_size() for leaf in problem.leaves)
            shares.append((peak - held) / (rows * vocab * 4))
            report.count(f"{rows} rows, {label}, peak", peak_bytes=peak, held_bytes=held, share=shares[-1])
            reach = REACH_PEAK if rows == REACH_PEAK_ROWS else None
            report.figure(f"peak / (rows V 4), {rows} rows, {label}", shares[-1], reach)
        bytes_alive = [share * rows * vocab * 4 for share, rows in zip(shares, counts, strict=True)]
        report.curve(Curve(f"loss peak, {label}", "rows", "bytes", [*map(float, counts)], bytes_alive))


def times(args: argparse.Namespace, report: Report, vocab: int) -> None:
    """Measure time against the bare products in the same chunks, and in one go over all rows."""
    rows = 128 if args.quick else 512
    for trains_head in (False, True):
        label = "trained head" if trains_head else "frozen head"
        problem = Problem(args, rows, vocab, trains_head=trains_head)
        chunks = problem.count_rows().chunks
        same = lambda p=problem, c=chunks: p.bare_products(c["drafter"], c["target"])  # noqa: E731
        whole = lambda p=problem: p.bare_products([p.rows], [p.rows])  # noqa: E731
        arms = [Arm("ours", problem.ours), Arm("bare, same chunks", same), Arm("bare, all rows", whole)]
        report.count(
            f"{rows} rows, {label}, chunk", rows_per_chunk=max(chunks["drafter"]), chunks=len(chunks["drafter"])
        )
        seconds = time_in_turns(arms, pairs=args.pairs)
        for arm, reach in ((arms[1], REACH_TIME), (arms[2], None)):
            ratio = report.ratio(f"{rows} rows, {label}", paired_ratio(seconds, "ours", arm.name))
            spread = f"[{ratio.p10:.2f}, {ratio.p90:.2f}]"
            reach = None if args.quick else reach
            report.figure(f"ours / {arm.name}, time, {label}", ratio.median, reach, detail=spread)


def head_rows(args: argparse.Namespace, report: Report, vocab: int) -> None:
    """Count rows through both heads where seven steps share each state of the target."""
    num_steps = 7
    problem = Problem(args, 16 * num_steps, vocab, trains_head=False, num_steps=num_steps)
    counter = problem.count_rows()
    report.figure("drafter head rows / supervised rows", counter.forward["drafter"] / problem.rows, 1.0)
    report.figure("target head rows / supervised rows, TTT-7", counter.forward["target"] / problem.rows, 1.0)
    report.figure(
        "target head rows / distinct target states, TTT-7", counter.forward["target"] / len(problem.target_hidden)
    )


def by_vocabulary(args: argparse.Namespace, report: Report, vocab: int) -> None:
    """Measure time and peak by the size of the vocabulary."""
    rows, sizes = (64, [2048, 8192]) if args.quick else (512, [8192, 32768, VOCAB])
    problems = {size: Problem(args, rows, size, trains_head=False) for size in sizes}
    arms = [Arm(f"V={size}", problem.ours) for size, problem in problems.items()]
    seconds = time_in_turns(arms, pairs=args.pairs)
    medians = [median_seconds(seconds, arm.name) for arm in arms]
    report.curve(Curve("loss time", "vocabulary", "time", [*map(float, sizes)], medians))
    peaks = [peak_bytes(problem.ours) for problem in problems.values()]
    report.curve(Curve("loss peak", "vocabulary", "bytes", [*map(float, sizes)], [*map(float, peaks)]))
