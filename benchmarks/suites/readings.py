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
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from benchmarks import texts
from benchmarks.arms import Arm, Report, assert_equal, paired_ratio, time_in_turns
from benchmarks.counters import peak_bytes
from benchmarks.gpu_jobs import Training, forced
from benchmarks.gpu_rows import Clock
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer, FrozenTarget
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
from trl_draft_opd.trainer.draft_trainer import DraftTrainer
from trl_draft_opd.trainer.log_printer import LogPrinter


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
        with tempfile.TemporaryDirectory() as root:
            folder = f"{root}/readings"
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
                waiting(args, report, label, path, drafter, job, batches, folder, REACH_WAITING if is_asked else None)


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
    args: argparse.Namespace,
    report: Report,
    label: str,
    path: Path,
    drafter: Drafter,
    job: Job,
    batches: Sequence[TargetText],
    folder: str,
    reach: float | None,
) -> None:
    """Measure what share of the real trainer's steps, the first left out, waits where the store is read at 1 GB/s."""
    trainer = make_trainer(args, path, drafter, job, batches, folder)
    source = trainer.target.source
    # Behind the check that every text is there, and before a thread starts.
    source.fetcher = Throttled(source.fetcher, THROTTLE)
    meter = Meter(source, len(batches) + 1)
    trainer.add_callback(meter)
    trainer.remove_callback(LogPrinter)
    with forced(job.tau):
        trainer.train()
    source.close()
    report.count(f"{label}, at 1 GB/s", megabytes_a_second=meter.delivered / meter.seconds / 1e6)
    report.figure(f"share of a step that waits at 1 GB/s, {label}", meter.waited / meter.seconds, reach)


class Meter(TrainerCallback):
    """Counts seconds, seconds of waiting and bytes from the end of the first step to the end of the last."""

    def __init__(self, source: PrefetchingSource, num_steps: int):
        self.source, self.num_steps = source, num_steps
        self.seconds = self.waited = self.delivered = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        sign = {1: -1, self.num_steps: 1}.get(state.global_step, 0)
        self.seconds += sign * time.perf_counter()
        self.waited += sign * self.source.wait_seconds
        self.delivered += sign * self.source.delivered_bytes


def make_trainer(
    args: argparse.Namespace, path: Path, drafter: Drafter, job: Job, batches: Sequence[TargetText], folder: str
) -> DraftTrainer:
    """Return a trainer of `ROWS` texts per step that reads from the store, silent and without checkpoints."""
    rows, output_dir = [], f"{folder}-run"
    for batch in batches:
        for text, is_written in zip(rows_of(batch), batch.completion_mask, strict=True):
            start = int(is_written.to(torch.uint8).argmax())
            rows.append({"prompt_ids": text[:start], "completion_ids": text[start:]})
    settings = {
        "per_device_train_batch_size": ROWS,
        "max_steps": len(batches) + 1,
        "learning_rate": 1e-6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "bf16": args.dtype == "bfloat16",
        "target_dtype": args.dtype,
        "readings": folder,
    }
    if job.tau is None:
        anchors = {} if job.num_anchors is None else {"num_anchors": job.num_anchors}
        config = DraftSFTConfig(output_dir, **settings, **anchors)
        return DraftSFTTrainer(drafter, path, config, Dataset.from_list(rows))
    # The answers are GSM8K's and not the target's.
    any_text = {"completions_from_target": True, "warn_mismatch_share": 1.0, "max_mismatch_share": 1.0}
    return DraftOPDTrainer(drafter, path, DraftOPDConfig(output_dir, **settings, **any_text), Dataset.from_list(rows))
