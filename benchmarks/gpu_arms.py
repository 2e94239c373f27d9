# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What `benchmarks/gpu.py` compares: ways to compute the loss, the attention and the target's reading, and a whole step
of speculators at its best. How far results are apart stands beside the times.
"""

import contextlib
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.arms import Report
from benchmarks.gpu_jobs import make_drafter, make_text
from benchmarks.gpu_rows import Clock, time_runs
from benchmarks.suites.step import SftProblem
from trl_draft_opd.drafters.attention import AttentionPlan, anchored_attention
from trl_draft_opd.losses import Head, chunked_divergence, comparison, default_chunk_bytes, fused


def note_difference(first: Tensor, second: Tensor) -> float:
    """Return the norm of a difference over that of the first."""
    return float((first.float() - second.float()).norm() / first.float().norm().clamp(min=1e-20))


# -- the loss ---------------------------------------------------------------------------------------------------------


def losses(bench: Any) -> None:
    """Loss and gradients of a trained head: eager formulas, the same compiled, fused kernels."""
    shape, device, count = bench.shape("qwen3-8b"), bench.device, bench.sizes.loss_rows
    torch.manual_seed(0)
    weight = torch.randn(shape.vocab, shape.hidden, device=device, dtype=torch.float32) * shape.hidden**-0.5
    frozen = weight.to(torch.bfloat16)
    weight.requires_grad_()
    hidden = torch.randn(count, shape.hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    target_hidden = torch.randn(count, shape.hidden, device=device, dtype=torch.bfloat16)
    weights = torch.full((count,), 1 / count, device=device)

    def work(clock: Clock) -> tuple[Tensor, Tensor]:
        with clock.stage("loss"), torch.autocast(device.type, torch.bfloat16):
            rows = chunked_divergence(
                hidden,
                Head.linear(weight),
                target_hidden,
                Head.linear(frozen),
                target_rows_N=None,
                labels_N=None,
                weights_N=weights,
                loss_type="forward_kl",
                draft_token_ids=None,
                chunk_bytes=default_chunk_bytes(device),
            )
        weight.grad = None
        (grad,) = torch.autograd.grad(rows.total, [hidden], retain_graph=False)
        return rows.total.detach(), grad

    eager = mock.patch.object(fused, "is_used_for", lambda hidden: False)
    compiled = mock.patch.object(comparison, "differentiate", torch.compile(comparison.differentiate))
    arms = {"fused": ()} if fused.is_used_for(hidden) else {}
    arms |= {"eager": (eager,)}
    if device.type == "cuda":
        arms |= {"torch.compile": (eager, compiled)}
    want: tuple[Tensor, Tensor] | None = None
    for name, patches in arms.items():
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            got = work(Clock(device))
            want = want or got
            found = time_runs(work, device, repeats=bench.sizes.repeats, warmups=1, seconds=8)
        bench.rows.add(
            "loss arms",
            name,
            seconds=found["step"],
            peak_bytes=int(found["peak_bytes"]),
            loss_difference=note_difference(want[0], got[0]),
            gradient_difference=note_difference(want[1], got[1]),
        )


# -- the attention ----------------------------------------------------------------------------------------------------


def attentions(bench: Any) -> None:
    """Forward and backward of one layer by fused kernel and by products: EAGLE-3's last step, and DFlash's blocks."""
    length = 128 if bench.is_rehearsal else 2048
    for name, num_blocks, width, num_pieces in (
        ("eagle3", length - 1, 1, 6),
        ("dflash", 16 if bench.is_rehearsal else 512, 16, 1),
    ):
        problem = Attention(bench, length, num_blocks, width, num_pieces)
        want: list[Tensor] | None = None
        for backend in ("flex", "products") if bench.device.type == "cuda" else ("flash", "products"):
            work = partial(problem.run, backend)
            got = work(Clock(bench.device))
            want = want or got
            found = time_runs(work, bench.device, repeats=bench.sizes.repeats, warmups=2, seconds=8)
            bench.rows.add(
                f"attention arms, {name}",
                backend,
                seconds=found["step"],
                forward_seconds=found["forward"],
                backward_seconds=found["backward"],
                peak_bytes=int(found["peak_bytes"]),
                difference=max(note_difference(a, b) for a, b in zip(want, got, strict=True)),
            )


class Attention:
    """Queries, keys and values of one layer of a target's heads, for blocks at anchors spread over one text."""

    def __init__(self, bench: Any, length: int, num_blocks: int, width: int, num_pieces: int):
        shape = bench.shape("qwen3-8b")
        torch.manual_seed(0)

        def draw(heads: int, *sizes: int) -> Tensor:
            states = torch.randn(1, heads, *sizes, shape.head_dim, device=bench.device, dtype=torch.bfloat16)
            return states.requires_grad_()

        self.query = draw(shape.heads, num_blocks, width)
        self.context = [draw(shape.kv_heads, length) for _ in range(2)]
        self.keys = [draw(shape.kv_heads, num_blocks, width) for _ in range(num_pieces)]
        self.values = [draw(shape.kv_heads, num_blocks, width) for _ in range(num_pieces)]
        self.anchors = torch.linspace(1, length - 1, num_blocks, device=bench.device).round().long()[None]

    def run(self, backend: str, clock: Clock) -> list[Tensor]:
        """Return the output and all gradients."""
        with clock.stage("forward"):
            plan, scaling = AttentionPlan(self.anchors), self.query.shape[-1] ** -0.5
            out = anchored_attention(self.query, *self.context, self.keys, self.values, plan, scaling, backend=backend)
        leaves = [self.query, *self.context, *self.keys, *self.values]
        with clock.stage("backward"):
            return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


# -- the target's reading ---------------------------------------------------------------------------------------------


def readings(bench: Any) -> None:
    """Uneven rows: as the package reads them, and padded with and without the mask that padding asks for."""
    target, job = bench.target(), bench.job("dflash-sft-64")
    text = make_text(job, target.vocab_size, bench.device)
    lengths = torch.linspace(job.length // 4, job.length, job.rows, device=bench.device).long()
    mask = (torch.arange(job.length, device=bench.device) < lengths[:, None]).long()
    layer_ids = [1, target.num_layers // 2 - 1, target.num_layers - 4]
    places = torch.arange(job.length, device=bench.device).expand(job.rows, -1)

    def padded(given: Tensor | None) -> Tensor:
        states = target.step(text.input_ids, given, places, None, layer_ids).last_hidden
        return states[mask.bool()]

    arms = {
        "as read_text does": lambda: target.read_text(text.input_ids, mask, layer_ids).last_hidden,
        "padded, with mask": lambda: padded(mask),
        "padded, without": lambda: padded(None),
    }
    want: Tensor | None = None
    for name, work in arms.items():
        got = work()
        want = got if want is None else want
        found = time_runs(lambda _clock, work=work: work(), bench.device, repeats=bench.sizes.repeats, warmups=1)
        bench.rows.add(
            "reading arms",
            name,
            seconds=found["step"],
            tokens=int(lengths.sum()),
            peak_bytes=int(found["peak_bytes"]),
            difference=note_difference(want, got),
        )


# -- speculators ------------------------------------------------------------------------------------------------------


def peer(bench: Any) -> None:
    """A step from given features on the same weights and rows: ours, and speculators with all it has on the device."""
    report = Report("gpu", {"device": str(bench.device)})
    target = bench.target()
    for family, name in (("eagle3", "eagle3-sft-full"), ("dflash", "dflash-sft-512")):
        job = bench.job(name)
        text = make_text(job, target.vocab_size, bench.device)
        rows, marks = list(text.input_ids), list(text.completion_mask)
        num_anchors = 512 if not bench.is_rehearsal else 8
        drafter = make_drafter(family, target)
        problem = SftProblem(target, drafter, rows, marks, num_anchors=num_anchors, trains_head=False, seed=0)
        has_peer = peers.has_speculators(report)
        note = f"reading given, frozen head, {len(rows)} documents of {job.length} tokens, {num_anchors} anchors"
        note += f"; {peers.describe(bench.device).strip()}" if has_peer else "; speculators is not installed"
        if has_peer:
            problem.add_speculators(trains_head=False)
        else:
            problem.plain(0.8)
        arms = {"ours": problem.ours} | ({"speculators": problem.speculators} if has_peer else {})
        want: float | None = None
        for arm, run in arms.items():

            def work(_clock: Clock, run=run) -> Tensor:
                with torch.autocast(bench.device.type, torch.bfloat16):
                    return run()["loss"]

            got = float(work(Clock(bench.device)))
            want = got if want is None else want
            found = time_runs(work, bench.device, repeats=bench.sizes.repeats, warmups=1, seconds=15)
            tokens = sum(map(len, rows))
            bench.rows.add(
                f"peer, {family}",
                arm,
                note,
                target="qwen3-8b",
                seconds=found["step"],
                tokens_per_s=tokens / found["step"],
                peak_bytes=int(found["peak_bytes"]),
                loss=got,
                loss_difference=abs(got - want) / abs(want),
            )
        del problem, drafter
