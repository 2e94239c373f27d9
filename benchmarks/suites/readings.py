# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A step whose readings come from a store, against the same step with the target in process: time, the memory of either,
and how long a step waits where the store is read at 1 GB/s.

Drafts are kept by chance, as often as `TAU` asks for, as in `benchmarks/gpu.py`: random weights keep none. Text is
GSM8K's questions with their answers. `--target` names the target, SmolLM2-135M for the figures that are asked for.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks import texts
from benchmarks.arms import Arm, Report, assert_equal, paired_ratio, time_in_turns
from benchmarks.counters import peak_bytes
from benchmarks.gpu_jobs import Training
from benchmarks.gpu_rows import Clock
from trl_draft_opd import FrozenTarget
from trl_draft_opd.costs.jobs import Job
from trl_draft_opd.drafters.auto import DRAFTER_CLASSES
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.drafters.draft_vocabulary import build_draft_vocabulary
from trl_draft_opd.readings.fetching import Fetcher
from trl_draft_opd.readings.prefetch import PrefetchingSource
from trl_draft_opd.readings.store import ReadingStore
from trl_draft_opd.readings.write import write_readings
from trl_draft_opd.rollout.texts import TargetText
from trl_draft_opd.target.reading import TextStates


# Accepted length of drafters of SmolLM2-135M that were trained for half an hour.
TAU = 1.7
ROWS = 4
# Asked: in process over store under Draft-OPD, share of a step that waits, bytes of the target without its body.
REACH = {"eagle3": 1.6, "dflash": 1.1}
REACH_WAITING, REACH_HELD = 0.05, 0.25
THROTTLE = 1e9
LIMIT_BYTES = 2**30
DRAFT_VOCABULARY = 2_000


class Throttled:
    """
    A fetcher behind a line of `bytes_per_second` that all its threads share: a text takes its bytes over the line's
    speed, or longer where the fetcher is slower.
    """

    def __init__(self, fetcher: Fetcher, bytes_per_second: float):
        self.fetcher, self.bytes_per_second, self.line = fetcher, bytes_per_second, threading.Lock()
        self.is_before_norm, self.concurrency = fetcher.is_before_norm, fetcher.concurrency
        self.layer_ids, self.digest = fetcher.layer_ids, fetcher.digest

    def fetch(self, text: Sequence[int], layer_ids: Sequence[int]) -> TextStates:
        """Fetch a text, and let the line carry it."""
        with self.line:
            begun = time.perf_counter()
            states = self.fetcher.fetch(text, layer_ids)
            seconds = sum(part.nbytes for part in states) / self.bytes_per_second
            time.sleep(max(0.0, begun + seconds - time.perf_counter()))
        return states

    def num_bytes(self, num_tokens: int, num_layers: int) -> int:
        """Return what the fetcher holds."""
        return self.fetcher.num_bytes(num_tokens, num_layers)

    def close(self) -> None:
        """Close the fetcher."""
        self.fetcher.close()


def run(args: argparse.Namespace, report: Report) -> None:
    """Compare memory, then time and waiting for every family under Draft-OPD and under supervised training."""
    path = args.shared / "targets" / texts.TARGET if args.target is None else args.target
    dtype = getattr(torch, args.dtype)
    whole, bodiless = (FrozenTarget.load(path, dtype=dtype, body=body) for body in (True, False))
    compare_held(report, whole, bodiless, REACH_HELD if args.target is not None else None)
    batches = batches_of(args, whole, 2 if args.quick else 4)
    rows = [row for batch in batches for row in rows_of(batch)]
    for family, size in product(args.family, ("small", "default")):
        drafter = make_drafter(family, size, whole, rows)
        layer_ids = drafter.config.target_layer_ids
        with tempfile.TemporaryDirectory() as folder:
            # As many at a time as in a step, so that a text's states are the same to the last bit.
            write_readings(whole, rows, folder, layer_ids=layer_ids, batch_size=ROWS, show_progress=False).close()
            for job in jobs_of(family, args.quick)[: 2 if size == "small" else 1]:
                inside, outside = (
                    Training(target, drafter, job, batches[0], is_mixed=args.dtype == "bfloat16")
                    for target in (whole, bodiless)
                )
                label = f"{family} {job.name}, {size} drafter, {args.dtype}"
                is_asked = size == "small" and not args.quick and args.target is not None
                reach = REACH[family] if is_asked and job.tau is not None else None
                compare_steps(args, report, label, inside, outside, folder, reach)
                waiting(report, label, outside, batches, folder, REACH_WAITING if is_asked else None)


def jobs_of(family: str, is_quick: bool) -> list[Job]:
    """Return the steps that are compared: Draft-OPD's on first rejections, and supervised ones."""
    is_whole = DRAFTER_CLASSES[family].config_class.drafts_whole_blocks
    anchors = (8 if is_quick else 64) if is_whole else None
    return [Job("Draft-OPD", family, tau=TAU, segment=8 if is_whole else 1), Job("SFT", family, num_anchors=anchors)]


def make_drafter(family: str, size: str, target: FrozenTarget, rows: Sequence[Sequence[int]]) -> Drafter:
    """Make a fresh drafter of default size, or of one that suits a target of some hundred million weights."""
    torch.manual_seed(1)
    kind, options = DRAFTER_CLASSES[family], {}
    if kind.config_class.drafts_whole_blocks:
        options = {"mask_token_id": target.vocab_size - 1}
        options |= {"num_hidden_layers": 3, "block_size": 8} if size == "small" else {}
    elif size == "small":
        counts = torch.bincount(torch.tensor([token for row in rows for token in row]), minlength=target.vocab_size)
        vocabulary = build_draft_vocabulary(counts, DRAFT_VOCABULARY, target.eos_token_ids)
        options = {"draft_vocabulary": vocabulary, "ttt_steps": 5}
    return kind.from_target(target, **options).to(torch.float32).train()


def batches_of(args: argparse.Namespace, target: FrozenTarget, count: int) -> list[TargetText]:
    """Return batches of GSM8K's questions with answers, `ROWS` texts of similar length each."""
    found, marks = texts.worked_answers(args, target, 10**9)
    order = sorted(range(len(found)), key=lambda row: len(found[row]))[: count * ROWS]
    parts = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
    return [
        TargetText(
            pad_sequence([found[row] for row in part], batch_first=True),
            pad_sequence([torch.ones_like(found[row]) for row in part], batch_first=True),
            pad_sequence([marks[row] for row in part], batch_first=True),
            part,
        )
        for part in parts
    ]


def rows_of(text: TargetText) -> list[list[int]]:
    """Return the token ids of every row."""
    lengths = text.attention_mask.sum(dim=1).tolist()
    return [row[:length] for row, length in zip(text.input_ids.tolist(), lengths, strict=True)]


def compare_held(report: Report, whole: FrozenTarget, bodiless: FrozenTarget, reach: float | None) -> None:
    """Count what the weights and buffers of a target take with its body and without."""
    held = [held_bytes(target) for target in (whole, bodiless)]
    report.count("bytes of the target", whole=held[0], without_body=held[1])
    report.figure("bytes of the target without its body / with it", held[1] / held[0], reach)


def held_bytes(target: FrozenTarget) -> int:
    """Return the bytes of all storages of a target's weights and buffers."""
    tensors = [*target.causal_lm.parameters(), *target.causal_lm.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def compare_steps(
    args: argparse.Namespace,
    report: Report,
    label: str,
    inside: Training,
    outside: Training,
    folder: str,
    reach: float | None,
) -> None:
    """Compare a step in process with one from the store that fetches when it reads, and never before."""
    store = ReadingStore.open_for(outside.target, folder, outside.drafter.config.target_layer_ids)
    source = PrefetchingSource(store, store.layer_ids, LIMIT_BYTES)
    outside.target.source, clock = source, Clock(inside.device)

    def results(training: Training) -> Mapping[str, torch.Tensor]:
        loss, gradients = training.gradients()
        return {"loss": torch.tensor(loss)} | gradients

    names, pair = ("in process", "store"), (inside, outside)
    assert_equal([Arm(name, lambda t=t: results(t)) for name, t in zip(names, pair, strict=True)], rtol=0.0, atol=0.0)
    arms = [Arm(name, lambda t=t: {"loss": t.run(clock)}) for name, t in zip(names, pair, strict=True)]
    for arm, training in zip(arms, pair, strict=True):
        peak = peak_bytes(arm.run)
        report.count(f"{label}, {arm.name}", peak_bytes=peak, with_the_target=peak + held_bytes(training.target))
    ratio = report.ratio(label, paired_ratio(time_in_turns(arms, pairs=args.pairs), *names))
    spread = f"[{ratio.p10:.2f}, {ratio.p90:.2f}]"
    report.figure(f"in process / store, time of a step, {label}", ratio.median, reach, is_upper=False, detail=spread)
    source.close()


def waiting(
    report: Report,
    label: str,
    training: Training,
    batches: Sequence[TargetText],
    folder: str,
    reach: float | None,
) -> None:
    """Measure what share of a step, announced one step ahead, waits where the store is read at 1 GB/s."""
    store = ReadingStore.open_for(training.target, folder, training.drafter.config.target_layer_ids)
    source = PrefetchingSource(Throttled(store, THROTTLE), store.layer_ids, LIMIT_BYTES)
    training.target.source, clock = source, Clock(training.device)
    turns = [*batches, *batches[:2]]
    source.expect(rows_of(turns[0]))
    for index, text in enumerate(turns):
        if index == 1:
            # Behind the first step, which nothing was fetched ahead of.
            begun, waited, delivered = time.perf_counter(), source.wait_seconds, source.delivered_bytes
        if index + 1 < len(turns):
            source.expect(rows_of(turns[index + 1]))
        training.text = text
        training.run(clock)
    seconds, waited = time.perf_counter() - begun, source.wait_seconds - waited
    report.count(f"{label}, at 1 GB/s", megabytes_a_second=(source.delivered_bytes - delivered) / seconds / 1e6)
    report.figure(f"share of a step that waits at 1 GB/s, {label}", waited / seconds, reach)
    source.close()
