# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Supervised training of a drafter on text its target wrote.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..drafters.base import Drafter
from ..rollout.blocks import sample_anchors
from ..rollout.replay import TargetText
from ..rollout.types import Rollout
from ..target.frozen import FrozenTarget
from .draft_sft_config import DraftSFTConfig
from .draft_trainer import DraftTrainer
from .pair import Pair, check_mask_token, load_pair, text_reader
from .publisher import Publisher
from .step import PreparedBatch, SlotRules, StreamSettings
from .texts import answer_all, make_collator, prompts_of_text, read_each, text_of


if TYPE_CHECKING:
    from peft import PeftConfig


class DraftSFTTrainer(DraftTrainer):
    """
    Trainer of a drafter on completions of its target: blocks are drafted at sampled anchors, teacher-forced on the text.

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
        target (`str`, `Path`, [`~transformers.PreTrainedModel`] or [`FrozenTarget`]):
            The target to draft for; frozen.
        args ([`DraftSFTConfig`], *optional*):
            Settings.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows as [`TextReader.read_texts`] takes them: `messages`, `prompt` and `completion`, `text`, or token ids.
        eval_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*):
            As `train_dataset`. Its prompts are decoded to measure tau.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The target's tokenizer; loaded beside the target by default.
        callbacks (`list`, *optional*), optimizers (`tuple`, *optional*):
            As in [`~transformers.Trainer`].
        peft_config ([`~peft.LoraConfig`], *optional*):
            Train an adapter in place of the whole drafter; into every linear layer but the head unless it says otherwise. Checkpoints
            hold the adapter, `export` and `push_to_hub` publish the drafter with it merged in.

    Raises:
        ValueError: If drafter, target, tokenizer and data do not belong together; each message names the value and the fix.
    """

    _tag_names = ["trl", "draft-sft", "speculative-decoding"]
    _method = "sft"
    _name = "DraftSFT"

    def __init__(
        self,
        model: str | Path | Drafter,
        target: str | Path | PreTrainedModel | FrozenTarget,
        args: DraftSFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: "PeftConfig | None" = None,
    ):
        args = args or DraftSFTConfig("drafter-sft")
        pair = load_pair(model, target, args, processing_class, peft_config)
        if eval_dataset is not None and args.eval_rollouts:
            # Now rather than after the first epoch.
            pair.target.require_rollback()
        publisher = Publisher(args, pair)
        pair.target.place(args.device)
        read = partial(_read_texts, pair=pair, args=args)
        super().__init__(
            pair,
            publisher,
            args,
            data_collator=make_collator(pair.target.pad_token_id),
            train_dataset=read_each(read, train_dataset),
            eval_dataset=read_each(read, eval_dataset),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        family = pair.drafter.config.family
        self.num_anchors = args.anchors_per_row(family)
        self.streams = {
            "accepted": StreamSettings(args.accepted_loss, 1.0, args.decay(family)),
            # Supervised text has no rejections.
            "rejected": StreamSettings(args.accepted_loss, 0.0, 1.0),
        }
        self.slot_rules = SlotRules(args.d_pace_floor if args.uses_d_pace else None, args.slot_scope == "until_fail")

    def _prepare(self, batches: list[dict[str, torch.Tensor]], epoch: int) -> list[PreparedBatch]:
        """Sample the blocks of every micro-batch."""
        return [self._sample_blocks(text_of(batch), epoch) for batch in batches]

    def _prepare_evaluation(self, batch: dict[str, torch.Tensor]) -> tuple[PreparedBatch, Rollout | None]:
        """Sample the blocks of the loss, and decode the prompts."""
        text, rollout = text_of(batch), None
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


def _read_texts(dataset: Dataset | IterableDataset, pair: Pair, args: DraftSFTConfig) -> Dataset | IterableDataset:
    """Tokenize a dataset, its completions rewritten by the target first if asked for."""
    reader = text_reader(pair.target, args, max_length=args.max_length)
    if args.regenerate:
        dataset = answer_all(pair.target, args, reader.read_prompts(dataset))
    rows = reader.read_texts(dataset)
    check_mask_token(pair.drafter, pair.target, rows, "input_ids")
    return rows
