# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Trainers that only the laboratory needs: the one-token estimators of the method's released code, random anchors,
anchors that go stale, and other ways to choose blocks, their target, and the weights to end with.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from trl_draft_opd import DraftOPDTrainer
from trl_draft_opd.drafters.base import Drafter, run_blocks
from trl_draft_opd.losses import position_weights
from trl_draft_opd.rollout.blocks import BlockBatch, join_blocks, sample_anchors
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.replay import TargetText, rollout_replay
from trl_draft_opd.rollout.types import Rollout
from trl_draft_opd.target.frozen import FrozenTarget
from trl_draft_opd.target.reading import TextReading
from trl_draft_opd.trainer.step import Objective, PreparedBatch, StepLoss, step_loss

from .redrafting import random_anchors, redraft


MAX_LOG_RATIO, MAX_ESTIMATE = 20.0, 10.0  # the released code's bounds; beyond them a draft has no gradient
LEAST_CONFIDENCE = 0.5
ROWS_AT_ONCE = 512


class OneTokenTrainer(DraftOPDTrainer):
    """
    Draft-OPD with one-token estimators in place of divergences over the vocabulary.

    Accepted slots: the Bernoulli forward KL of the committed token's probability. Rejected slots: `r - 1 - log r` with
    `r = p / q` of the drafted token, bounded. One pooled denominator. Drafters with a reduced vocabulary are not
    served.
    """

    @staticmethod
    def _step_loss(drafter: Drafter, target: FrozenTarget, batch: PreparedBatch, objective: Objective) -> StepLoss:
        assert drafter.draft_token_ids is None, "the one-token arm compares token ids of the full vocabulary"
        blocks, reading = batch.blocks, batch.read_by(target, drafter.config.target_layer_ids).padded()
        hidden = run_blocks(
            drafter, reading.features, batch.text.input_ids, blocks.anchors, blocks.drafts, target.embed
        )
        picked = blocks.is_accepted | blocks.is_rejected
        states = states_of_slots(reading.last_hidden, batch.rollout.branch_hidden, blocks.anchors, blocks.is_branch)
        with torch.no_grad():
            log_p = target.project(states[picked]).log_softmax(dim=-1)
        log_q = drafter.draft_logits(hidden[picked], target.project).log_softmax(dim=-1)
        tokens = torch.where(blocks.is_accepted, blocks.labels, blocks.drafts)[picked][:, None]
        log_p, log_q = log_p.gather(1, tokens)[:, 0], log_q.gather(1, tokens)[:, 0]
        is_accepted = blocks.is_accepted[picked]
        accepted, rejected = objective.streams["accepted"], objective.streams["rejected"]
        decay = position_weights(blocks.drafts.shape[-1], rejected.decay).to(log_q.device)
        weights = torch.where(is_accepted, 1.0, decay.expand_as(picked)[picked])
        rows = torch.where(is_accepted, bernoulli_forward_kl(log_p, log_q), bounded_k3(log_p, log_q))
        pooled = objective.weight_sums[0] * accepted.weight + objective.weight_sums[1] * rejected.weight
        stream = torch.where(is_accepted, accepted.weight, rejected.weight)
        loss = (rows * weights * stream).sum() / pooled.clamp(min=1e-8) + hidden.sum() * 0
        return StepLoss(loss, {"loss/one_token": (float((rows.detach() * weights).sum()), float(weights.sum()))})


def bernoulli_forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return `p log(p / q) + (1 - p) log((1 - p) / (1 - q))` of one token's log-probabilities, elementwise."""
    p, q = log_p.exp().clamp(1e-6, 1 - 1e-6), log_q.exp().clamp(1e-6, 1 - 1e-6)
    return p * (p.log() - q.log()) + (1 - p) * ((1 - p).log() - (1 - q).log())


def bounded_k3(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """
    Return `r - 1 - log r` with `r = p / q`, both the logarithm and the result cut off where the released code does.
    """
    log_ratio = (log_p - log_q).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (log_ratio.exp() - log_ratio - 1).clamp(max=MAX_ESTIMATE)


def states_of_slots(
    last_hidden: torch.Tensor, branch_hidden: torch.Tensor | None, anchors: torch.Tensor, is_branch: torch.Tensor
) -> torch.Tensor:
    """
    Return the target's state of every slot, `(B, A, K, H)`: on the committed text, or on the branch where it is one.
    """
    B, L, H = last_hidden.shape
    A, K = is_branch.shape[1:]
    positions = (anchors[..., None] + torch.arange(K, device=anchors.device)).clamp(0, L - 1)
    on_text = last_hidden.gather(1, positions.reshape(B, A * K, 1).expand(-1, -1, H)).reshape(B, A, K, H)
    if branch_hidden is None:
        return on_text
    return torch.where(is_branch[..., None], branch_hidden.to(on_text), on_text)


class RandomAnchorsTrainer(DraftOPDTrainer):
    """
    Draft-OPD at as many random positions of each response as its chain has anchors: the paper's ablation. By replay
    alone.
    """

    def _walk(self, drafter: Drafter, text: TargetText, epoch: int, reading: TextReading) -> Rollout:
        keys = DrawKeys(self.args.seed, epoch, text.sample_ids)
        chain = rollout_replay(
            self.target,
            drafter,
            text,
            replace(self._drafting, keep_branch_hidden=False),
            keys,
            segment_length=self.segment_length,
            chunk_bytes=self._chunk_bytes,
            reading=reading,
        )
        return redraft(
            self.target,
            drafter,
            text,
            random_anchors(chain, keys),
            self._drafting,
            keys,
            chunk_bytes=self._chunk_bytes,
            reading=reading,
        )


class StaleAnchorsTrainer(DraftOPDTrainer):
    """
    Draft-OPD that walks each response's chain once in some epochs, and drafts anew from the same anchors in between.

    Set `refresh_epochs` before training.
    """

    refresh_epochs = 1

    def _walk(self, drafter: Drafter, text: TargetText, epoch: int, reading: TextReading) -> Rollout:
        known = self.__dict__.setdefault("_known_anchors", {})
        names = [(epoch // self.refresh_epochs, sample_id) for sample_id in text.sample_ids]
        if all(name in known for name in names):
            return redraft(
                self.target,
                drafter,
                text,
                pad_sequence([known[name] for name in names], batch_first=True, padding_value=-1),
                self._drafting,
                DrawKeys(self.args.seed, epoch, text.sample_ids),
                chunk_bytes=self._chunk_bytes,
                reading=reading,
            )
        rollout = super()._walk(drafter, text, epoch, reading)
        known |= {name: row[row >= 0] for name, row in zip(names, rollout.anchors, strict=True)}
        return rollout


class DenseAnchorsTrainer(DraftOPDTrainer):
    """Draft-OPD at every position of a response: at those inside what a block of the chain keeps, too."""

    def _walk(self, drafter: Drafter, text: TargetText, epoch: int, reading: TextReading) -> Rollout:
        options = {"num_anchors": None, "num_drafts": 1, "seed": 0, "epoch": 0}
        blocks = sample_anchors(text.input_ids, text.completion_mask, text.sample_ids, **options)
        keys = DrawKeys(self.args.seed, epoch, text.sample_ids)
        budget = {"chunk_bytes": self._chunk_bytes, "reading": reading}
        return redraft(self.target, drafter, text, blocks.anchors.cpu(), self._drafting, keys, **budget)


class HardAnchorsTrainer(DraftOPDTrainer):
    """Draft-OPD that replays the blocks whose first draft is wrong twice. For first rejections alone."""

    def _mark(self, rollout: Rollout, sample_ids: Sequence[int], epoch: int) -> BlockBatch:
        blocks = super()._mark(rollout, sample_ids, epoch)
        is_hard = blocks.is_rejected[..., 0]
        again = replace(
            blocks,
            anchors=torch.where(is_hard, blocks.anchors, -1),
            is_accepted=blocks.is_accepted & is_hard[..., None],
            is_rejected=blocks.is_rejected & is_hard[..., None],
        )
        return join_blocks(blocks, again)


class ConfidentErrorsTrainer(DraftOPDTrainer):
    """
    Draft-OPD whose rejected stream holds the slots alone at which the target gives its token `LEAST_CONFIDENCE`: the
    errors that could be avoided. For first rejections alone.
    """

    def _walk(self, drafter: Drafter, text: TargetText, epoch: int, reading: TextReading) -> Rollout:
        # `_mark` is called next, with the rollout alone.
        self._walked = reading
        return super()._walk(drafter, text, epoch, reading)

    @torch.no_grad()
    def _mark(self, rollout: Rollout, sample_ids: Sequence[int], epoch: int) -> BlockBatch:
        blocks = super()._mark(rollout, sample_ids, epoch)
        states = states_of_slots(self._walked.padded().last_hidden, None, blocks.anchors, blocks.is_branch)
        top_prob = [
            self.target.project(chunk).float().softmax(dim=-1).amax(dim=-1)
            for chunk in states[blocks.is_rejected].split(ROWS_AT_ONCE)
        ]
        is_rejected = blocks.is_rejected.clone()
        is_rejected[blocks.is_rejected] = torch.cat(top_prob) >= LEAST_CONFIDENCE
        return replace(blocks, is_rejected=is_rejected)


def sharpened(temperature: float) -> Callable[[Drafter, FrozenTarget, PreparedBatch, Objective], StepLoss]:
    """
    Return the loss of a step against the target at another temperature: 1 is its own, towards 0 its argmax. Of targets
    whose head is a plain linear layer: their logits scale with its input.
    """

    def loss(drafter: Drafter, target: FrozenTarget, batch: PreparedBatch, objective: Objective) -> StepLoss:
        head = target.causal_lm.get_output_embeddings()
        assert type(head) is torch.nn.Linear and head.bias is None, "sharpened targets need a head without bias"
        reading, rollout = batch.read_by(target, drafter.config.target_layer_ids), batch.rollout
        reading = replace(reading, last_hidden=reading.last_hidden / temperature)
        if rollout is not None and rollout.branch_hidden is not None:
            rollout = replace(rollout, branch_hidden=rollout.branch_hidden / temperature)
        return step_loss(drafter, target, replace(batch, reading=reading, rollout=rollout), objective)

    return loss


class AverageCallback(TrainerCallback):
    """
    Averages the drafter's weights over the updates, exponentially, and leaves the average in it at the end. Kept in
    the checkpoints, so that a killed arm goes on with it.

    Args:
        decay (`float`): Share of the average that an update keeps, in (0, 1).
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step > 0:
            self.average = load_file(self._path(args, state), device=str(model.device))
        else:
            self.average = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, weight in model.named_parameters():
            self.average[name].lerp_(weight.detach(), 1 - self.decay)

    def on_save(self, args, state, control, **kwargs):
        save_file(self.average, self._path(args, state))

    @torch.no_grad()
    def on_train_end(self, args, state, control, model=None, **kwargs):
        for name, weight in model.named_parameters():
            weight.copy_(self.average[name])

    @staticmethod
    def _path(args, state) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "average.safetensors"
