# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The jobs that `benchmarks/gpu.py` runs: targets and drafters of a real shape with random weights, made where they run,
and one training step, stage by stage, as the trainers take it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.gpu_rows import Clock
from trl_draft_opd import DraftOPDConfig, DraftSFTConfig, FrozenTarget
from trl_draft_opd.costs.jobs import Job, acceptance_of
from trl_draft_opd.costs.shapes import TargetShape
from trl_draft_opd.drafters.auto import DRAFTER_CLASSES
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.drafters.draft_vocabulary import build_draft_vocabulary
from trl_draft_opd.losses import default_chunk_bytes
from trl_draft_opd.rollout import replay
from trl_draft_opd.rollout.acceptance import SamplingSettings
from trl_draft_opd.rollout.blocks import BlockBatch, mark_slots, sample_anchors
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.replay import ReplayWalk, TargetText
from trl_draft_opd.rollout.types import Rollout
from trl_draft_opd.trainer import step
from trl_draft_opd.trainer.pair import compile_drafter
from trl_draft_opd.trainer.step import Objective, PreparedBatch, SlotRules, StreamSettings, weight_sums


GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)


def make_target(shape: TargetShape, device: torch.device, dtype: torch.dtype, positions: int) -> FrozenTarget:
    """Make a random Qwen3 of a shape on the device, which takes seconds there and minutes on a CPU."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.is_tied,
        max_position_embeddings=positions,
        pad_token_id=0,
        eos_token_id=2,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return FrozenTarget(Qwen3ForCausalLM(config).to(device, dtype))
    finally:
        torch.set_default_dtype(before)


def make_drafter(family: str, target: FrozenTarget, draft_vocab: int | None = None) -> Drafter:
    """Make a fresh drafter of a target, in float32 as training keeps it, on the target's device."""
    torch.manual_seed(1)
    vocabulary = None
    if draft_vocab is not None:
        counts = torch.arange(target.vocab_size, 0, -1)
        vocabulary = build_draft_vocabulary(counts, draft_vocab, target.eos_token_ids)
    # Drawn where it is to be: a CPU takes a minute for an 8B target's.
    with target.device:
        kind = DRAFTER_CLASSES[family]
        is_whole = kind.config_class.drafts_whole_blocks
        own = {"mask_token_id": target.vocab_size - 1} if is_whole else {"draft_vocabulary": vocabulary}
        drafter: Drafter = kind.from_target(target, **own)
    return drafter.to(target.device, torch.float32).train()


def make_text(job: Job, vocab_size: int, device: torch.device) -> TargetText:
    """Return random rows of a job's sizes; every row is a prompt and a response."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size - 1, (job.rows, job.length), generator=generator).to(device)
    is_written = (torch.arange(job.length, device=device) >= job.prompt).expand(job.rows, -1).contiguous()
    return TargetText(ids, torch.ones_like(ids), is_written, range(job.rows))


class ForcedWalk(ReplayWalk):
    """
    A walk that does all of its work and then keeps drafts by chance, as often as an accepted length asks for; which
    ones is fixed by anchor and slot. Random weights keep none.
    """

    tau = 1.0

    def _judge(self, hidden: Tensor, anchors: Tensor, room: Tensor, slot: int, *rest) -> tuple[Tensor, Tensor]:
        super()._judge(hidden, anchors, room, slot, *rest)
        coins = kept_by_chance(self.tau, len(self.ids), self.settings.num_drafts, self.ids.device)
        slots = torch.arange(slot, slot + hidden.shape[1], device=anchors.device)
        committed = self.ids[(anchors[:, None] + slots + 1).clamp(max=len(self.ids) - 1)]
        is_kept = coins[anchors[:, None], slots] & (slots < room[:, None])
        return torch.where(is_kept, committed, (committed + 1) % self.target.vocab_size), is_kept


@cache
def kept_by_chance(tau: float, num_tokens: int, num_drafts: int, device: torch.device) -> Tensor:
    """Return whether the draft of each slot is kept at each anchor, `(num_tokens, num_drafts)`; drawn once."""
    keep, generator = acceptance_of(tau, num_drafts), torch.Generator().manual_seed(0)
    return (torch.rand(num_tokens, num_drafts, generator=generator) < keep).to(device)


@contextlib.contextmanager
def forced(tau: float | None) -> Iterator[None]:
    """Have every replay inside keep drafts as an accepted length asks for; leave it as it is at `None`."""
    if tau is None:
        yield
        return
    with mock.patch.object(replay, "ReplayWalk", type("Forced", (ForcedWalk,), {"tau": tau})):
        yield


@dataclass
class Training:
    """
    One pair and one micro-batch, and the steps of a trainer on them.

    Attributes:
        target ([`FrozenTarget`]), drafter ([`Drafter`]): The pair.
        job ([`Job`]), text ([`TargetText`]): What a step is made of.
        chunk_bytes (`int` or `None`): Setting of that name.
        checkpointing (`bool`): Whether the drafter's layers are computed again in the backward pass.
        compiler (`str` or `None`): Backend of `torch_compile`, as the trainers use it.
        is_mixed (`bool`): Whether the drafter computes in bfloat16, as training on a GPU does.
        learning_rate (`float`): 0 does all of the work and changes nothing.
    """

    target: FrozenTarget
    drafter: Drafter
    job: Job
    text: TargetText
    chunk_bytes: int | None = None
    checkpointing: bool = False
    compiler: str | None = None
    is_mixed: bool = True
    learning_rate: float = 0.0

    def __post_init__(self) -> None:
        self.device = self.target.device
        is_cuda = self.device.type == "cuda"
        options = {"report_to": "none", "use_cpu": not is_cuda, "bf16": False}
        args = (DraftSFTConfig if self.job.tau is None else DraftOPDConfig)("unused", **options)
        if isinstance(args, DraftSFTConfig):
            self.streams = {"accepted": StreamSettings("forward_kl", 1.0, args.decay(self.drafter.config))}
        else:
            self.streams = {
                "accepted": StreamSettings(args.accepted_loss, args.accepted_weight, 1.0),
                "rejected": StreamSettings(args.rejected_loss, args.rejected_weight, args.position_decay),
            }
            # The job's, which the cost model has too.
            self.segment_length = self.job.segment
        if self.checkpointing:
            self.drafter.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compiler is not None:
            options = {"torch_compile": True, "torch_compile_backend": self.compiler, "torch_compile_mode": None}
            settings: Any = SimpleNamespace(**options)
            compile_drafter(self.drafter, settings)
        self.blocks_per_pass = args.blocks_per_pass
        self.optimizer = torch.optim.AdamW(
            self.drafter.parameters(), lr=self.learning_rate, weight_decay=0.0, fused=is_cuda
        )

    def read(self):
        """Have the target read the text."""
        text, layer_ids = self.text, self.drafter.config.target_layer_ids
        return self.target.read_text(text.input_ids, text.attention_mask, layer_ids)

    def blocks(self, reading, clock: Clock) -> tuple[BlockBatch, Rollout | None]:
        """Sample the blocks of supervised training, or walk the text and mark the chain's."""
        text, num_drafts = self.text, self.drafter.default_num_drafts
        if self.job.tau is None:
            options = {"num_anchors": self.job.num_anchors, "num_drafts": num_drafts, "seed": 0, "epoch": 0}
            return sample_anchors(text.input_ids, text.completion_mask, text.sample_ids, **options), None
        with clock.stage("walk"), forced(self.job.tau), self.autocast():
            rollout = replay.rollout_replay(
                self.target,
                self.drafter,
                text,
                DraftingSettings(num_drafts, GREEDY, "greedy", keep_branch_hidden=False),
                DrawKeys(0, 0, text.sample_ids),
                segment_length=self.segment_length,
                chunk_bytes=self.chunk_bytes or default_chunk_bytes(self.device),
                reading=reading,
            )
        return mark_slots(rollout, rejected_scope="first", eos_token_ids=self.target.eos_token_ids), rollout

    def autocast(self) -> torch.autocast:
        """Return the precision that the drafter computes in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_mixed)

    def loss(self, clock: Clock, reading=None) -> Tensor:
        """Read (unless a reading is given), walk and return the loss of a micro-batch."""
        if reading is None:
            with clock.stage("read"), self.autocast():
                reading = self.read()
        blocks, rollout = self.blocks(reading, clock)
        sums = weight_sums([blocks], self.streams, self.drafter.draft_token_ids).cpu()
        chunk_bytes = self.chunk_bytes or default_chunk_bytes(self.device)
        objective = Objective(self.streams, SlotRules(), chunk_bytes, sums, self.blocks_per_pass)
        batch = PreparedBatch(self.text, rollout, blocks, reading)
        with (
            self.autocast(),
            mock.patch.object(step, "run_blocks", clock.wrapped(step.run_blocks, "draft")),
            mock.patch.object(step, "chunked_divergence", clock.wrapped(step.chunked_divergence, "loss")),
        ):
            return step.step_loss(self.drafter, self.target, batch, objective).loss

    def run(self, clock: Clock, reading=None) -> Tensor:
        """Take a whole step: read, walk, draft, loss, backward, update."""
        loss = self.loss(clock, reading)
        with clock.stage("backward"):
            loss.backward()
        with clock.stage("update"):
            torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Return the loss and the gradients of a step, on the CPU in float32, and update nothing."""
        loss = self.loss(Clock(self.device))
        loss.backward()
        found = {n: p.grad.float().cpu() for n, p in self.drafter.named_parameters() if p.grad is not None}
        self.drafter.zero_grad()
        return float(loss.detach()), found


def on_tiny(job: Job) -> Job:
    """Return a job at the sizes of a rehearsal."""
    anchors = None if job.num_anchors is None else max(2, job.num_anchors // 32)
    vocab = None if job.draft_vocab is None else 128
    return replace(job, num_anchors=anchors, draft_vocab=vocab, rows=2, length=max(64, job.length // 32), prompt=24)
