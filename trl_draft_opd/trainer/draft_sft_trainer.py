# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Supervised training of a drafter on text its target wrote.
"""

import warnings
from dataclasses import replace
from typing import Any

import torch

from ..drafters.portable_config import PortableConfig
from ..rollout.blocks import sample_anchors
from ..rollout.replay import TargetText
from ..rollout.types import Rollout
from .draft_sft_config import DraftSFTConfig
from .draft_trainer import DraftTrainer
from .draft_vocabulary import settle_vocabulary, vocabulary_settings, wanted_vocab_size
from .pair import Pair, check_mask_token, text_reader
from .resuming import check_resumes
from .step import PreparedBatch, SlotRules, StreamSettings
from .texts import AnyDataset, prompts_of_text, respond_to_all, text_of


_NOT_THE_TARGETS = (
    "The completions are the dataset's, not the target's own text; `regenerate=True` (`--regenerate`) has the target "
    "write them."
)


class DraftSFTTrainer(DraftTrainer[DraftSFTConfig]):
    """
    Trainer of a drafter on text of its target: blocks are drafted at sampled anchors, teacher-forced on the text.

    Example:

    ```python
    from datasets import load_dataset
    from trl_draft_opd import DraftSFTTrainer, Eagle3DraftModel

    target = "Qwen/Qwen3-4B"
    trainer = DraftSFTTrainer(
        model=Eagle3DraftModel.from_target(target),
        target=target,
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str`, `Path` or [`Drafter`]):
            The drafter, or the id or path of one in any published layout.
        target (`str`, `Path`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`FrozenTarget`]):
            The target to draft for; frozen.
        args ([`DraftSFTConfig`], *optional*):
            Settings.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows as [`TextReader.read_texts`] takes them: `messages`, `prompt` and `completion`, `text`, or token ids.
        eval_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*):
            As `train_dataset`. Its prompts are decoded to measure tau; where the target cannot be rolled back, its
            responses are replayed, which the target writes once unless they are given as ids.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The target's tokenizer; loaded beside the target by default.
        callbacks (`list`, *optional*), optimizers (`tuple`, *optional*):
            As in [`~transformers.Trainer`].
        peft_config ([`~peft.LoraConfig`], *optional*):
            Train an adapter in place of the whole drafter; into every linear layer but the head unless it says
            otherwise. Checkpoints hold the adapter, `export` and `push_to_hub` publish the drafter with it merged in.

    Raises:
        ValueError: If drafter, target, tokenizer and data do not belong together. The message names value and fix.
    """

    _tag_names = ["trl", "draft-sft", "speculative-decoding"]
    _method = "sft"
    _name = "DraftSFT"
    _config_class = DraftSFTConfig

    @staticmethod
    def _needs_rollback(args: DraftSFTConfig) -> bool:
        return False

    @staticmethod
    def _measures_tau(args: DraftSFTConfig) -> bool:
        return args.eval_rollouts

    @staticmethod
    def _read_rows(pair: Pair, args: DraftSFTConfig, dataset: AnyDataset, is_training: bool) -> AnyDataset:
        """Tokenize a dataset, its completions rewritten by the target first if asked for."""
        drafter = pair.drafter
        # Refused before the target responds to anything.
        vocab_size = (
            wanted_vocab_size(drafter, args.draft_vocab_size, pair.target.eos_token_ids) if is_training else None
        )
        reader = text_reader(pair.target, args, max_length=args.max_length)
        has_ids = "completion_ids" in (dataset.column_names or ())
        # Tau by replay is that of the target's own text.
        by_replay = not is_training and args.eval_rollouts and pair.target.rollback_reason is not None
        if args.regenerate or (by_replay and not has_ids):
            if is_training:
                check_resumes(DraftSFTTrainer._method, pair, args)
            place = "the dataset" if is_training else "the evaluation dataset"
            dataset = respond_to_all(pair.target, args, reader.read_prompts(dataset), place)
        rows = reader.read_texts(dataset)
        if is_training and not args.regenerate and not has_ids:
            # As ids, they come out of a store or of the user's own work with the target.
            warnings.warn(_NOT_THE_TARGETS)
        if is_training:
            settle_vocabulary(drafter, pair.target, vocab_size, rows)
        return check_mask_token(drafter, pair.target, rows, "input_ids")

    def _set_up(self, args: DraftSFTConfig, drafter: PortableConfig) -> None:
        self.num_anchors = args.anchors_per_row(drafter)
        self.streams = {"accepted": StreamSettings(args.accepted_loss, 1.0, args.decay(drafter))}
        self.slot_rules = SlotRules(args.d_pace_floor if args.uses_d_pace else None, args.slot_scope == "until_fail")

    def _recorded_settings(self) -> dict[str, Any]:
        return super()._recorded_settings() | vocabulary_settings(self.drafter)

    def _texts_ahead(self, batches: list[dict[str, torch.Tensor]]) -> list[TargetText]:
        return [text_of(batch) for batch in batches]

    def _prepare(self, batches: list[dict[str, torch.Tensor]], epoch: int) -> list[PreparedBatch]:
        """Sample the blocks of every micro-batch."""
        return [self._sample_blocks(text_of(batch), epoch) for batch in batches]

    def _prepare_evaluation(self, batch: dict[str, torch.Tensor]) -> tuple[PreparedBatch, Rollout | None]:
        """Sample the blocks of the loss, and decode the prompts, or replay their responses."""
        text, rollout = text_of(batch), None
        if self.args.eval_rollouts and self.target.rollback_reason is not None:
            rollout, reading = self._walk_evaluation(text)
            return replace(self._sample_blocks(text, epoch=0), reading=reading), rollout
        if self.args.eval_rollouts:
            # Epoch 0, so that every evaluation draws alike and looks at the same anchors.
            rollout = self._decode(prompts_of_text(text), text.sample_ids, epoch=0)
        return self._sample_blocks(text, epoch=0), rollout

    def _sample_blocks(self, text: TargetText, epoch: int) -> PreparedBatch:
        blocks = sample_anchors(
            text.input_ids,
            text.completion_mask,
            text.sample_ids,
            num_anchors=self.num_anchors,
            num_drafts=self.num_drafts,
            seed=self.args.seed,
            epoch=epoch,
        )
        return PreparedBatch(text, rollout=None, blocks=blocks, reading=None)
