# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Rollouts on the small real target: replay against live decoding, batches, decoding speed, and the Draft-OPD step that
each of them feeds, with the share of every stage.
"""

import argparse
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks import texts
from benchmarks.arms import Arm, Curve, Report, assert_equal, median_seconds, paired_ratio, time_in_turns
from benchmarks.counters import count_forwards, peak_bytes
from benchmarks.reference import rollout as reference_rollout
from benchmarks.reference import step as reference_step
from benchmarks.stages import StageClock
from trl_draft_opd import DraftOPDConfig, FrozenTarget, SamplingSettings, generate_responses
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.losses import default_chunk_bytes
from trl_draft_opd.rollout import live, replay
from trl_draft_opd.rollout.blocks import mark_slots
from trl_draft_opd.rollout.counts import Counts
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.rollout.types import Rollout
from trl_draft_opd.trainer import step as package_step
from trl_draft_opd.trainer.step import Objective, PreparedBatch, SlotRules, StreamSettings, weight_sums
from trl_draft_opd.trainer.texts import text_of_rollout


GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
BATCH_SIZE = 8
# Asked: live over replay of an OPD step at batch 1 (at batch 8: aimed at), batch 8 over batch 1 in tokens per second.
REACH_STEP, REACH_BATCH = {1: 4.0, BATCH_SIZE: None}, 3.0


class Pair:
    """
    A target and a drafter, and the calls that every part makes of them.

    Args:
        args (`argparse.Namespace`), report ([`Report`]), family (`str`), target ([`FrozenTarget`]): What to load.
    """

    def __init__(self, args: argparse.Namespace, report: Report, family: str, target: FrozenTarget):
        self.args, self.family, self.target = args, family, target
        folder = getattr(args, f"drafter_{family}")
        self.drafter: Drafter = texts.make_drafter(args, report, family, target, folder)
        self.num_drafts = self.drafter.default_num_drafts
        self.max_completion_length = 32 if args.quick else args.max_completion_length
        self.segment_length = DraftOPDConfig("unused", use_cpu=args.device == "cpu").segment_length(
            self.drafter.config
        )

    def live(self, prompts, *, num_drafts=None, ignores_eos=False, keeps_branches=False) -> Rollout:
        """Decode speculatively as one batch."""
        return live.rollout_live(
            self.target,
            self.drafter,
            prompts,
            DraftingSettings(self.num_drafts if num_drafts is None else num_drafts, GREEDY, "greedy", keeps_branches),
            DrawKeys(0, 0, range(len(prompts))),
            max_completion_length=self.max_completion_length,
            eos_token_ids=[] if ignores_eos else self.target.eos_token_ids,
        )

    def replay(self, text: TargetText, *, keeps_branches: bool, reading=None) -> Rollout:
        """Replay texts as the trainer does."""
        return replay.rollout_replay(
            self.target,
            self.drafter,
            text,
            DraftingSettings(self.num_drafts, GREEDY, "greedy", keeps_branches),
            DrawKeys(0, 0, text.sample_ids),
            segment_length=self.segment_length,
            chunk_bytes=default_chunk_bytes(self.target.device),
            reading=reading,
        )

    def to_text(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TargetText:
        """Join prompts and responses, right-padded."""
        rows = [torch.tensor([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
        marks = [torch.arange(len(row)) >= len(prompt) for row, prompt in zip(rows, prompts, strict=True)]
        return TargetText(
            input_ids=pad_sequence(rows, batch_first=True).to(self.target.device),
            attention_mask=pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(
                self.target.device
            ),
            completion_mask=pad_sequence(marks, batch_first=True).to(self.target.device),
            sample_ids=list(range(len(rows))),
        )

    def plain(self, prompts) -> list[list[int]]:
        """Decode with the target alone, as one batch."""
        return generate_responses(
            self.target,
            prompts,
            max_completion_length=self.max_completion_length,
            sampling=GREEDY,
            batch_size=len(prompts),
            seed=0,
            show_progress=False,
        )


def run(args: argparse.Namespace, report: Report) -> None:
    """Run every part for both families."""
    target = texts.real_target(args)
    prompts = texts.questions(args, target, max(args.prompts, BATCH_SIZE))
    parts = {"equality": equality, "batch": batches, "decode": decoding, "step": opd_steps, "length": by_length}
    for family in args.family:
        pair = Pair(args, report, family, target)
        for name, part in parts.items():
            if not args.only or name in args.only:
                report.say(f" -- {family}: {name}")
                part(args, report, pair, prompts)


# ---- replay equals live ---------------------------------------------------------------------------------------------


def equality(args: argparse.Namespace, report: Report, pair: Pair, prompts) -> None:
    """Count the prompts on which replay finds another chain than live decoding, or either another than plain code."""
    different = tokens = 0
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        decoded = pair.live(batch, keeps_branches=True)
        replayed = pair.replay(pair.to_text(batch, decoded.responses()), keeps_branches=True)
        tokens += int(decoded.completion_mask.sum())
        different += sum(blocks_of(decoded, row) != blocks_of(replayed, row) for row in range(len(batch)))
    label = f"{pair.family}, {len(prompts)} prompts, {tokens} tokens"
    report.figure(f"prompts on which replay differs from live, {label}", different, 0)
    few = prompts[: 2 if args.quick else 8]
    decoded = pair.live(few)
    options = {"max_completion_length": pair.max_completion_length, "eos_token_ids": pair.target.eos_token_ids}
    missed = 0
    for row, prompt in enumerate(few):
        text, blocks = reference_rollout.decode(
            pair.target.causal_lm, pair.drafter, prompt, num_drafts=pair.num_drafts, **options
        )
        same = text[len(prompt) :] == decoded.responses()[row]
        same &= [(block.anchor, block.accepted) for block in blocks] == [b[:2] for b in blocks_of(decoded, row)]
        missed += not same
    report.figure(f"prompts on which live differs from plain code, {pair.family}, {len(few)} prompts", missed, 0)


def blocks_of(rollout: Rollout, row: int) -> list[tuple[int, int, list[int]]]:
    """Return anchor, accepted drafts and the judged drafts of each block: of a censored one, those inside the text."""
    count = int(rollout.num_rounds[row])
    anchors, accepted = rollout.anchors[row, :count].tolist(), rollout.accepted[row, :count].tolist()
    drafts, is_censored = rollout.drafts[row, :count].tolist(), rollout.is_censored[row, :count].tolist()
    return [
        (anchor, kept, block[:kept] if censored else block)
        for anchor, kept, block, censored in zip(anchors, accepted, drafts, is_censored, strict=True)
    ]


# ---- live decoding --------------------------------------------------------------------------------------------------


def batches(args: argparse.Namespace, report: Report, pair: Pair, prompts) -> None:
    """Decode the same prompts one by one and as one batch, to equal lengths; count the target's forwards."""
    batch = prompts[:BATCH_SIZE]
    with count_forwards(pair.target.backbone) as count:
        rollout = pair.live(batch, ignores_eos=True)
    rounds = int(rollout.num_rounds.max())
    # The prefill is no round.
    report.figure(f"target forwards per round, batch {BATCH_SIZE}, {pair.family}", (count.calls - 1) / rounds, 1.0)

    def joined(rollouts) -> dict[str, torch.Tensor]:
        return {"responses": torch.tensor([ids for rollout in rollouts for ids in rollout.responses()])}

    one_by_one = Arm("batch 1", lambda: joined([pair.live([prompt], ignores_eos=True) for prompt in batch]))
    together = Arm(f"batch {BATCH_SIZE}", lambda: joined([pair.live(batch, ignores_eos=True)]))
    assert_equal([together, one_by_one], rtol=0, atol=0)
    seconds = time_in_turns([together, one_by_one], pairs=args.pairs)
    # As many tokens in both arms, so the ratio of times is that of throughputs.
    ratio = report.ratio(f"live, {pair.family}", paired_ratio(seconds, one_by_one.name, together.name))
    spread = f"[{ratio.p10:.2f}, {ratio.p90:.2f}]"
    name = f"throughput of batch {BATCH_SIZE} over batch 1, {pair.family}"
    report.figure(name, ratio.median, REACH_BATCH, is_upper=False, detail=spread)


def decoding(args: argparse.Namespace, report: Report, pair: Pair, prompts) -> None:
    """
    Compare live decoding at batch 1 with the target alone, by drafts per block, and with transformers' own DFlash.
    """
    few = prompts[: 2 if args.quick else 4]
    most = pair.drafter.max_drafts or pair.num_drafts
    some = (1,) if args.quick else (1, 2, 3, 4, 5, 7)
    counts = sorted({count for count in some if count <= most} | {pair.num_drafts})

    def listed(responses) -> dict[str, torch.Tensor]:
        return {str(row): torch.tensor(ids) for row, ids in enumerate(responses)}

    arms = [Arm("target alone", lambda: listed([pair.plain([prompt])[0] for prompt in few]))]
    taus = {}
    for count in counts:
        decoded = [pair.live([prompt], num_drafts=count) for prompt in few]
        taus[count] = sum(map(Counts.of_rollout, decoded), Counts()).tau
        arms.append(
            Arm(f"K={count}", lambda c=count: listed([pair.live([p], num_drafts=c).responses()[0] for p in few]))
        )
    if pair.family == "dflash":
        arms.append(Arm("transformers' DFlash", lambda: listed([native_dflash(pair, prompt) for prompt in few])))
    assert_equal(arms, rtol=0, atol=0)
    seconds = time_in_turns(arms, pairs=args.pairs)
    ratios = {arm.name: paired_ratio(seconds, "target alone", arm.name) for arm in arms[1:]}
    for ratio in ratios.values():
        report.ratio(f"decoding, batch 1, {pair.family}", ratio)
    best = max(counts, key=lambda count: ratios[f"K={count}"].median)
    report.figure(
        f"target alone / ours, time at batch 1, {pair.family}",
        ratios[f"K={best}"].median,
        is_upper=False,
        detail=f"best of K={counts}: K={best}, tau {taus[best]:.2f}; tau by K: "
        + ", ".join(f"{count}: {tau:.2f}" for count, tau in taus.items()),
    )
    if pair.family == "dflash":
        native = paired_ratio(seconds, "transformers' DFlash", f"K={pair.num_drafts}")
        report.ratio("decoding, batch 1", native)
        spread = f"[{native.p10:.2f}, {native.p90:.2f}]"
        report.figure("transformers' DFlash / ours, time at batch 1", native.median, is_upper=False, detail=spread)


def native_dflash(pair: Pair, prompt: Sequence[int]) -> list[int]:
    """Decode with transformers' own DFlash decoding and return the response."""
    ids = torch.tensor([list(prompt)], device=pair.target.device)
    output = pair.target.causal_lm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=pair.max_completion_length,
        assistant_model=pair.drafter,
        speculation_type="dflash",
    )
    return output[0, len(prompt) :].tolist()


# ---- the Draft-OPD step ---------------------------------------------------------------------------------------------


class OpdStep:
    """One update from a batch of prompts whose responses are stored, or decoded anew."""

    def __init__(self, pair: Pair, prompts, text: TargetText | None = None):
        self.pair, self.prompts = pair, prompts
        self.text = text or pair.to_text(prompts, pair.live(prompts).responses())
        streams = {"accepted": ("forward_kl", 1.0, 1.0), "rejected": ("reverse_kl", 1.0, 0.8)}
        self.streams = {name: StreamSettings(*values) for name, values in streams.items()}
        self.reference_streams = {name: reference_step.Stream(*values) for name, values in streams.items()}
        self.optimizer = torch.optim.AdamW(pair.drafter.parameters(), lr=0.0, weight_decay=0.0)

    def from_responses(self) -> dict[str, torch.Tensor]:
        """Replay the stored responses; the target reads them once."""
        pair, text = self.pair, self.text
        layer_ids = pair.drafter.config.target_layer_ids
        reading = pair.target.read_text(text.input_ids, text.attention_mask, layer_ids, keep_cache=True)
        rollout = pair.replay(text, keeps_branches=True, reading=reading)
        return self._update([(rollout, reading.without_caches())])

    def live(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Decode the responses anew, `batch_size` prompts at a time."""
        starts = range(0, len(self.prompts), batch_size)
        parts = [self.pair.live(self.prompts[start : start + batch_size], keeps_branches=True) for start in starts]
        return self._update([(part, None) for part in parts])

    def plain(self) -> dict[str, torch.Tensor]:
        """Run the plain reference on the stored responses."""
        lengths = self.text.attention_mask.sum(dim=1).tolist()
        rows = [row[:length] for row, length in zip(self.text.input_ids.tolist(), lengths, strict=True)]
        loss = reference_step.opd_step(
            self.pair.target.causal_lm,
            self.pair.drafter,
            [(row, len(prompt)) for row, prompt in zip(rows, self.prompts, strict=True)],
            self.pair.num_drafts,
            self.reference_streams,
            rejected_scope="suffix",
            eos_token_ids=self.pair.target.eos_token_ids,
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self._results(float(loss.detach()))

    def _update(self, parts) -> dict[str, torch.Tensor]:
        pair = self.pair
        eos = pair.target.eos_token_ids
        batches = [mark_slots(part, rejected_scope="suffix", eos_token_ids=eos) for part, _ in parts]
        sums = weight_sums(batches, self.streams, pair.drafter.draft_token_ids)
        objective = Objective(self.streams, SlotRules(), default_chunk_bytes(pair.target.device), sums)
        self.optimizer.zero_grad()
        total = 0.0
        for (part, reading), anchors in zip(parts, batches, strict=True):
            batch = PreparedBatch(text_of_rollout(part, range(len(part.input_ids))), part, anchors, reading)
            loss = package_step.step_loss(pair.drafter, pair.target, batch, objective).loss
            with CLOCK.stage("backward"):
                loss.backward()
            total += float(loss.detach())
        with CLOCK.stage("optimiser"):
            self.optimizer.step()
        return self._results(total)

    def _results(self, loss: float) -> dict[str, torch.Tensor]:
        grads = {n: p.grad.clone() for n, p in self.pair.drafter.named_parameters() if p.grad is not None}
        return {"loss": torch.tensor(loss)} | grads


# Charged only while a split is measured.
CLOCK = StageClock()


def opd_steps(args: argparse.Namespace, report: Report, pair: Pair, prompts) -> None:
    """Compare the same update from stored responses, from live decoding in two batch sizes, and by plain code."""
    work = OpdStep(pair, prompts[: 4 if args.quick else BATCH_SIZE])
    arms = [
        Arm("from responses", work.from_responses),
        Arm("live, batch 1", lambda: work.live(1)),
        Arm(f"live, batch {BATCH_SIZE}", lambda: work.live(BATCH_SIZE)),
        Arm("plain reference", work.plain),
    ]
    # A drafter without training has gradients of a wide range, which sum differently row by row and all at once.
    assert_equal(arms, rtol=1e-3, atol=1e-4)
    for arm in arms[:3]:
        with count_forwards(pair.target.backbone) as count:
            peak = peak_bytes(arm.run)
        report.count(
            f"{pair.family}, {arm.name}", target_forwards=count.calls, target_tokens=sum(count.tokens), peak_bytes=peak
        )
        shares = split(pair, arm)
        listed = ", ".join(f"{name} {share:.1%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
        report.say(f"  {pair.family}, {arm.name}: {listed}")
        report.count(f"{pair.family}, {arm.name}, shares", **shares)
    seconds = time_in_turns(arms, pairs=args.pairs)
    for arm, reach in zip(arms[1:], (REACH_STEP[1], REACH_STEP[BATCH_SIZE], None), strict=True):
        ratio = report.ratio(f"OPD step, {pair.family}", paired_ratio(seconds, arm.name, arms[0].name))
        spread = f"[{ratio.p10:.2f}, {ratio.p90:.2f}]"
        name = f"OPD step, {arm.name} / from responses, {pair.family}"
        report.figure(name, ratio.median, None if args.quick else reach, is_upper=False, detail=spread)


def split(pair: Pair, arm: Arm) -> dict[str, float]:
    """Return the share of each stage in one update."""
    CLOCK.seconds.clear()
    CLOCK.total = 0.0
    places = [
        (live, "rollout_live", "decoding"),
        (replay, "rollout_replay", "walk"),
        (pair.target, "read_text", "target"),
        (replay, "score_branches", "branches"),
        (package_step, "run_blocks", "draft"),
        (package_step, "chunked_divergence", "loss"),
    ]
    with CLOCK.watch(*places):
        CLOCK.start()
        arm.run()
        CLOCK.stop()
    return CLOCK.shares()


def by_length(args: argparse.Namespace, report: Report, pair: Pair, prompts) -> None:
    """Measure replay and the step from responses by the length of one text, joined from the target's responses."""
    lengths = [64, 128] if args.quick else [256, 512, 1024, 1536]
    responses = pair.plain(prompts[: 2 if args.quick else 16])
    joined = [token for response in responses for token in response]
    joined *= -(-lengths[-1] // len(joined))
    prompt = prompts[0][:32]
    works = {}
    for length in lengths:
        works[length] = OpdStep(pair, [prompt], pair.to_text([prompt], [joined[:length]]))
    arms = [Arm(f"R={length}", work.from_responses) for length, work in works.items()]
    seconds = time_in_turns(arms, pairs=args.pairs)
    medians = [median_seconds(seconds, arm.name) for arm in arms]
    sizes = [float(length) for length in lengths]
    report.curve(Curve(f"OPD step from responses, {pair.family}", "response length", "time", sizes, medians))
    peaks = [float(peak_bytes(arm.run)) for arm in arms]
    report.curve(Curve(f"OPD step peak, {pair.family}", "response length", "bytes", sizes, peaks))
