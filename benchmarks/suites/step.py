# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
One supervised step of every family: ours, the plain reference, and speculators on the same weights and the same
batch. And where the time of the real trainers goes.

The settings are those that ours and speculators can both express: forward KL over the full vocabulary (cross-entropy
with the target's likeliest token for DFlash 2, whose selector knows nothing else there), a confidence head that
foresees drawn drafts, supervised rows chosen as speculators chooses them, its way of dividing. Prompts are at least as
long as a block, so that every TTT step supervises the same number of rows.

Shape letters:  B = texts, L = longest text, A = anchors per text, K = drafts per block
"""

import argparse
import math
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks import peers, texts
from benchmarks.arms import Arm, Report, assert_equal, paired_ratio, time_in_turns
from benchmarks.counters import HeadRows, flops, peak_bytes
from benchmarks.reference import step as reference
from benchmarks.suites import trainer_share
from trl_draft_opd import FrozenTarget, SamplingSettings
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.losses import default_chunk_bytes
from trl_draft_opd.rollout.blocks import BlockBatch, sample_anchors
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.trainer.step import (
    Objective,
    PreparedBatch,
    SlotRules,
    StreamSettings,
    step_loss,
    verification_of,
    weight_sums,
)


GAMMA = 4.0
# Asked: time of speculators over ours, and peak of ours over speculators'.
REACH = {"eagle3": (1.5, 0.5), "dflash": (2.0, 0.5), "dspark": (2.0, 0.5), "dflash2": (2.0, 0.5)}
# Of our losses, speculators' name.
LOSSES = {"forward_kl": "kl_div", "ce": "ce"}
DRAWN = DraftingSettings(1, SamplingSettings(temperature=1.0, top_k=0, top_p=1.0), "sample", keep_branch_hidden=False)


class SftProblem:
    """
    A batch of texts, a pair of models, and the same drafter in speculators' class where that is installed.

    Args:
        target ([`FrozenTarget`]), drafter ([`Drafter`]): The pair.
        rows (`Sequence[torch.Tensor]`), marks (`Sequence[torch.Tensor]`): Token ids, and which are supervised.
        num_anchors (`int`): DFlash's anchors in the whole batch; EAGLE-3 drafts from every position.
        trains_head (`bool`): Whether EAGLE-3's head is trained.
    """

    def __init__(
        self,
        target: FrozenTarget,
        drafter: Drafter,
        rows: Sequence[torch.Tensor],
        marks: Sequence[torch.Tensor],
        *,
        num_anchors: int,
        trains_head: bool,
        seed: int,
    ):
        self.target, self.drafter, self.family = target, drafter.train(), drafter.config.family
        self.num_anchors, self.seed = num_anchors, seed
        self.num_drafts = drafter.default_num_drafts
        self.is_whole = drafter.config.drafts_whole_blocks
        self.loss_type = "forward_kl" if drafter.candidates is None else "ce"
        device = target.device
        self.rows, self.marks = [row.to(device) for row in rows], [mark.to(device) for mark in marks]
        self.input_ids = pad_sequence(self.rows, batch_first=True)
        self.attention_mask = pad_sequence([torch.ones_like(row) for row in self.rows], batch_first=True)
        if drafter.config.owns_head:
            drafter.lm_head.requires_grad_(trains_head)
        self.optimizer = self._make_optimizer(drafter)
        self.reading = target.read_text(self.input_ids, self.attention_mask, drafter.config.target_layer_ids)

    def _make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        # A rate of 0 does all the work and leaves both models equal.
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)

    def _packed(self) -> peers.PackedBatch:
        """
        Read the texts and join them for speculators, which wants the last layer before the target's final norm: one
        more tapped layer of the same reading.
        """
        layer_ids = self.drafter.config.target_layer_ids
        tapped = sorted({*layer_ids, self.target.num_layers - 1})
        features = self.target.read_text(self.input_ids, self.attention_mask, tapped).features
        layers = dict(zip(tapped, features.chunk(len(tapped), dim=-1), strict=True))
        own = torch.cat([layers[index] for index in layer_ids], dim=-1)
        return peers.pack(self.rows, self.marks, own, layers[tapped[-1]], self.family)

    def add_speculators(self, trains_head: bool) -> None:
        """Build the same drafter in speculators' class, and choose the anchors as it does."""
        causal_lm = self.target.causal_lm
        self.peer = peers.make_model(self.drafter, causal_lm, trains_head=trains_head)
        self.peer_optimizer = self._make_optimizer(self.peer)
        self.packed = self._packed()
        self.anchors = self._block_anchors() if self.is_whole else self._eagle3_anchors()
        decay = math.exp(-1 / GAMMA) if self.is_whole else 1.0
        self.streams = streams(self.loss_type, decay)
        num_rows = self.anchors.is_accepted.sum()
        # speculators divides by the rows of a step (EAGLE-3) or of all slots (blocks), whatever they weigh.
        self.weight_sums = torch.tensor([num_rows / (1 if self.is_whole else self.num_drafts), 0.0])

    def _eagle3_anchors(self) -> BlockBatch:
        """Draft from every position; slot `k` counts if the token before it, at `a + k - 1`, is supervised."""
        B, L = self.input_ids.shape
        slots = torch.arange(1, self.num_drafts + 1, device=self.target.device)
        supervised = pad_sequence(self.marks, batch_first=True)
        supervised = torch.cat([supervised, supervised.new_zeros(B, self.num_drafts)], dim=1)
        ids = torch.cat([self.input_ids, self.input_ids.new_zeros(B, self.num_drafts)], dim=1)
        anchors = torch.arange(1, L, device=slots.device).expand(B, -1)
        positions = (anchors[..., None] + slots).flatten(1)
        is_row = supervised.gather(1, positions - 1).unflatten(1, (L - 1, self.num_drafts))
        counts = is_row.sum(dim=(0, 1))
        assert (counts == counts[0]).all(), "a prompt is shorter than a block"
        drafts = ids.gather(1, positions).unflatten(1, (L - 1, self.num_drafts))
        return trim(anchors, drafts, is_row)

    def _block_anchors(self) -> BlockBatch:
        """
        Draft from the anchors that speculators draws; slot `k` counts if the token at its own place is supervised: at
        `a + k`, or one before where the anchor drafts too.
        """
        block_size = self.drafter.config.block_size
        drawn = peers.dflash_anchors(self.packed, self.num_anchors, block_size, self.seed).tolist()
        assert len(drawn) == self.num_anchors, f"only {len(drawn)} anchors are to be had"
        starts = torch.tensor([0, *[len(row) for row in self.rows]]).cumsum(0).tolist()
        places = [
            [a - start for a in drawn if start <= a < end] for start, end in zip(starts, starts[1:], strict=False)
        ]
        places = [torch.tensor(found, dtype=torch.long, device=self.target.device) for found in places]
        anchors = pad_sequence(places, batch_first=True, padding_value=-1)
        slots = torch.arange(1, self.num_drafts + 1, device=self.target.device)
        supervised = pad_sequence(self.marks, batch_first=True)
        supervised = torch.cat([supervised, supervised.new_zeros(len(supervised), self.num_drafts)], dim=1)
        ids = torch.cat([self.input_ids, self.input_ids.new_zeros(len(self.input_ids), self.num_drafts)], dim=1)
        positions = (anchors.clamp(min=0)[..., None] + slots).flatten(1)
        places = positions - int(self.drafter.config.sample_from_anchor)
        is_row, drafts = (
            values.gather(1, at).unflatten(1, (anchors.shape[1], self.num_drafts))
            for values, at in ((supervised, places), (ids, positions))
        )
        return trim(anchors, drafts, is_row & (anchors >= 0)[..., None])

    # -- the arms -----------------------------------------------------------------------------------------------------

    def loss(self, reading=None) -> torch.Tensor:
        """Return our loss, reading the texts if no reading is given."""
        marks = pad_sequence(self.marks, batch_first=True)
        text = TargetText(self.input_ids, self.attention_mask, marks, range(len(self.rows)))
        chunk_bytes, verification = default_chunk_bytes(self.target.device), verification_of(DRAWN)
        objective = Objective(self.streams, SlotRules(), chunk_bytes, self.weight_sums, verification=verification)
        return step_loss(self.drafter, self.target, PreparedBatch(text, None, self.anchors, reading), objective).loss

    def peer_loss(self, reads: bool) -> torch.Tensor:
        """Return speculators' loss."""
        packed = self._packed() if reads else self.packed
        if not self.is_whole:
            return peers.eagle3_loss(self.peer, packed, self.num_drafts)
        return peers.dflash_loss(self.peer, packed, self.num_anchors, GAMMA, self.seed, LOSSES[self.loss_type])

    def ours(self, reads: bool = False) -> dict[str, torch.Tensor]:
        """Run one step."""
        return self._update(self.loss(None if reads else self.reading), self.optimizer, self.drafter)

    def speculators(self, reads: bool = False) -> dict[str, torch.Tensor]:
        """Run one step of speculators."""
        return self._update(self.peer_loss(reads), self.peer_optimizer, self.peer)

    def _update(self, loss, optimizer, model) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        optimizer.step()
        # Left for the comparison; cleared at the start of the next step.
        grads = {
            f"gradient of {name.replace('midlayer.', 'layers.0.')}": parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        return {"loss": loss.detach()} | grads

    def plain(self, decay: float) -> tuple[Arm, Arm]:
        """Return arms of ours and of the plain reference, on anchors of our own choice."""
        marks = pad_sequence(self.marks, batch_first=True)
        count = max(self.num_anchors // len(self.rows), 1) if self.is_whole else None
        self.anchors = sample_anchors(
            self.input_ids,
            marks,
            range(len(self.rows)),
            num_anchors=count,
            num_drafts=self.num_drafts,
            seed=self.seed,
            epoch=0,
        )
        self.streams = streams("forward_kl", decay)
        self.weight_sums = weight_sums([self.anchors], self.streams, self.drafter.draft_token_ids)
        places = [[a for a in row if a >= 0] for row in self.anchors.anchors.tolist()]
        pairs = [(row.tolist(), mark.tolist()) for row, mark in zip(self.rows, self.marks, strict=True)]
        stream = reference.Stream("forward_kl", 1.0, decay)

        def plain() -> dict[str, torch.Tensor]:
            loss = reference.sft_step(self.target.causal_lm, self.drafter, pairs, places, self.num_drafts, stream)
            return self._update(loss, self.optimizer, self.drafter)

        return Arm("ours", lambda: detached(self.ours(reads=True))), Arm("plain reference", lambda: detached(plain()))


def detached(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies, because both arms leave their gradients in the same place."""
    return {name: value.clone() for name, value in results.items()}


def streams(loss_type: str, decay: float) -> dict[str, StreamSettings]:
    """Return the streams of a supervised step."""
    return {"accepted": StreamSettings(loss_type, 1.0, decay), "rejected": StreamSettings(loss_type, 0.0, 1.0)}


def trim(anchors: torch.Tensor, drafts: torch.Tensor, is_row: torch.Tensor) -> BlockBatch:
    """Return a batch of the blocks that hold a row, packed to the front of each text."""
    keep = is_row.any(dim=2)
    order = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(keep.sum(dim=1).max())]
    rows = torch.arange(len(order), device=order.device)[:, None]
    is_row, drafts = is_row[rows, order], drafts[rows, order]
    empty = torch.zeros_like(is_row)
    return BlockBatch(
        anchors=torch.where(keep[rows, order], anchors[rows, order], -1),
        drafts=drafts,
        labels=torch.full_like(drafts, -1),
        is_accepted=is_row,
        is_rejected=empty,
        is_branch=empty,
    )


def run(args: argparse.Namespace, report: Report) -> None:
    """Measure steps on the real target and on a larger random one, then the trainers."""
    parts = {"real": on_real_target, "random": on_random_target, "trainer": trainer_share.run}
    for name, part in parts.items():
        if not args.only or name in args.only:
            report.say(f" -- {name}")
            part(args, report)


def on_real_target(args: argparse.Namespace, report: Report) -> None:
    """Compare on GSM8K: several texts of about 1,024 tokens in all, and one text as long."""
    target = texts.real_target(args)
    num_tokens = 256 if args.quick else 1024
    several, several_marks = texts.worked_answers(args, target, num_tokens)
    if args.quick:
        # The full batch holds rows of unlike length, which the target may read apart; so few need a much shorter one.
        start = int(several_marks[0].nonzero()[0])
        short = slice(start - 16, start + 16)
        several, several_marks = [*several, several[0][short]], [*several_marks, several_marks[0][short]]
    batches = {"texts": (several, several_marks), "one text": texts.one_long_text(several, num_tokens, 64)}
    for family in args.family:
        drafter = texts.make_drafter(args, report, family, target)
        for label, (rows, marks) in batches.items():
            compare(args, report, f"{family}, {label}", target, drafter, rows, marks, asked=not args.quick)


def on_random_target(args: argparse.Namespace, report: Report) -> None:
    """Compare on a wider model and a larger vocabulary."""
    hidden_size, vocab_size, num_tokens = (128, 2048, 128) if args.quick else (512, 32768, 512)
    target = texts.random_target(args, hidden_size, vocab_size, num_layers=8)
    rows, marks = texts.random_texts(args, vocab_size, num_tokens, num_prompt=32)
    for family in args.family:
        drafter = texts.make_drafter(args, report, family, target)
        label = f"{family}, H={hidden_size} V={vocab_size} L={num_tokens}"
        compare(args, report, label, target, drafter, rows, marks, asked=False)


def compare(args, report: Report, label: str, target, drafter, rows, marks, *, asked: bool) -> None:
    """Compare one batch with the plain reference and with speculators, with the head as either trains it."""
    num_anchors = 16 if args.quick else 128
    options = {"num_anchors": num_anchors, "seed": args.seed}
    if drafter.config.family in reference.FAMILIES:
        arms = SftProblem(target, drafter, rows, marks, trains_head=True, **options).plain(0.9)
        assert_equal(arms, rtol=1e-3, atol=1e-5)
        measure(args, report, f"{label}, with the target's reading", arms, (None, None))
    if not peers.has_speculators(report):
        return
    for trains_head in (True, False) if drafter.config.owns_head else (False,):
        problem = SftProblem(target, drafter, rows, marks, trains_head=trains_head, **options)
        problem.add_speculators(trains_head)
        head = ("trained head" if trains_head else "frozen head") if drafter.config.owns_head else "target's head"
        reach = REACH[problem.family] if asked else (None, None)
        for reads in (False, True):
            arms = (
                Arm("ours", lambda p=problem, r=reads: p.ours(r)),
                Arm("speculators", lambda p=problem, r=reads: p.speculators(r)),
            )
            first, second = (arm.run()["loss"] for arm in arms)
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
            # The weakest candidate of a slot may be another one where two are level up to rounding.
            assert_equal(arms, rtol=1e-3, atol=1e-5 if drafter.candidates is None else 5e-3)
            given = "with the target's reading" if reads else "reading given"
            measure(args, report, f"{label}, {head}, {given}", arms, reach if not reads else (None, None))
        count_rows(report, f"{label}, {head}", problem)


def measure(args, report: Report, label: str, arms: Sequence[Arm], reach: tuple[float | None, float | None]) -> None:
    """Count and time two arms."""
    ours, other = arms
    peaks = {arm.name: peak_bytes(arm.run) for arm in arms}
    for arm in arms:
        report.count(f"{label}, {arm.name}", peak_bytes=peaks[arm.name], flops=flops(arm.run))
    seconds = time_in_turns(arms, pairs=args.pairs)
    ratio = report.ratio(label, paired_ratio(seconds, other.name, ours.name))
    spread = f"[{ratio.p10:.2f}, {ratio.p90:.2f}]"
    report.figure(f"{other.name} / ours, time, {label}", ratio.median, reach[0], is_upper=False, detail=spread)
    report.figure(f"ours / {other.name}, peak, {label}", peaks[ours.name] / peaks[other.name], reach[1])


def count_rows(report: Report, label: str, problem: SftProblem) -> None:
    """Count rows through the heads, of ours and of speculators."""
    supervised = int(problem.anchors.is_accepted.sum())
    target_head = problem.target.causal_lm.get_output_embeddings().weight
    heads = {"target": target_head}
    if problem.drafter.config.owns_head:
        heads = {"drafter": problem.drafter.lm_head.weight, "target": target_head}
    with HeadRows(heads) as counter:
        problem.ours()
    # Only a drafter's rows have a gradient to send back; a head that both share shows them by that.
    drafter_rows = counter.forward["drafter"] if problem.drafter.config.owns_head else counter.backward["target"]
    target_rows = counter.forward["target"] - (0 if problem.drafter.config.owns_head else drafter_rows)
    report.figure(f"drafter head rows / supervised rows, {label}", drafter_rows / supervised, 1.0)
    report.figure(f"target head rows / supervised rows, {label}", target_rows / supervised, 1.0)
    if torch.cuda.is_available():
        return  # Its forward is compiled there, and the counter sees operations that are not.
    with HeadRows({"drafter": problem.peer.lm_head.weight, "target": problem.peer.verifier_lm_head.weight}) as peer:
        problem.speculators()
    report.count(
        f"{label}, speculators' head rows / supervised rows",
        drafter=peer.forward["drafter"] / supervised,
        target=peer.forward["target"] / supervised,
    )
