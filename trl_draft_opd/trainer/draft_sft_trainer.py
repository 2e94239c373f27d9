# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Supervised training of a drafter on text its target wrote.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..data.collators import TextCollator
from ..drafters.base import Drafter
from ..rollout.blocks import sample_anchors
from ..rollout.drafting import DraftingSettings
from ..rollout.keyed_random import DrawKeys
from ..rollout.live import rollout_live
from ..runs.distributed.launch import loss_entry
from ..target.checks import naming_rows
from ..target.frozen import FrozenTarget, TargetReading
from ..utils.private_trl import _ForwardRedirection
from .adapters import adapt_drafter
from .draft_sft_config import DraftSFTConfig
from .pair import (
    check_mask_token,
    compile_drafter,
    load_drafter,
    load_target,
    text_reader,
)
from .publishing import PublishingTrainer
from .step import SlotRules, StepLoss, StreamSettings, step_loss, weight_sums
from .texts import answer_all


if TYPE_CHECKING:
    from peft import PeftConfig


class DraftSFTTrainer(PublishingTrainer):
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
        ValueError: If drafter, target, tokenizer and data do not belong together; each message names the value and the way out.
    """

    _tag_names = ["trl", "draft-sft", "speculative-decoding"]
    _method = "sft"
    _name = "DraftSFT"
    # The loss is divided by weight sums of the whole optimiser step, accumulation included.
    loss_is_scaled_for_ga = True

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
        self.target = load_target(target, args, processing_class)
        if eval_dataset is not None and args.eval_rollouts:
            # Now rather than after the first epoch.
            self.target.require_rollback()
        drafter = adapt_drafter(load_drafter(model, self.target, args), peft_config, seed=args.seed)
        self._prepare_publishing(args, drafter)
        self.reader = text_reader(self.target, args, max_length=args.max_length)
        self.num_drafts = args.num_drafts or drafter.default_num_drafts
        family = drafter.config.family
        self.num_anchors = args.anchors_per_row(family)
        self.streams = {
            "accepted": StreamSettings(args.accepted_loss, 1.0, args.decay(family)),
            # Supervised text has no rejections.
            "rejected": StreamSettings(args.accepted_loss, 0.0, 1.0),
        }
        self.slot_rules = SlotRules(
            d_pace_floor=args.d_pace_floor if args.uses_d_pace else None, is_until_fail=args.slot_scope == "until_fail"
        )
        self.target.place(args.device)
        train_dataset = self._prepare_dataset(train_dataset, args, drafter)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepare_dataset(part, args, drafter) for name, part in eval_dataset.items()}
        else:
            eval_dataset = self._prepare_dataset(eval_dataset, args, drafter)
        compile_drafter(drafter, args)
        super().__init__(
            model=drafter,
            args=args,
            data_collator=TextCollator(self.target.pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._redirect = _ForwardRedirection()

    def _prepare_dataset(
        self, dataset: Dataset | IterableDataset | None, args: DraftSFTConfig, drafter: Drafter
    ) -> Dataset | IterableDataset | None:
        """Tokenize a dataset, its completions rewritten by the target first if asked for."""
        if dataset is None:
            return None
        if args.regenerate:
            dataset = self._regenerate(self.reader.read_prompts(dataset), args)
        rows = self.reader.read_texts(dataset)
        check_mask_token(drafter, self.target, rows, "input_ids")
        return rows

    def _regenerate(self, prompts: Dataset | IterableDataset, args: DraftSFTConfig) -> Dataset:
        if isinstance(prompts, IterableDataset):
            raise ValueError("`regenerate=True` needs a dataset of known length, got an `IterableDataset`.")
        return answer_all(self.target, args, prompts)

    # -- training ------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Fetch the micro-batches of one optimiser step, sample their anchors, and sum the weights over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        epoch = int(self.state.epoch or 0)
        for batch in batches:
            batch["anchors"] = self._sample_anchors(batch, epoch)
        unwrapped = self.accelerator.unwrap_model(self.model)
        sums = weight_sums([batch["anchors"] for batch in batches], self.streams, unwrapped.draft_token_ids)
        return batches, self.accelerator.reduce(sums.to(device, torch.float32), "sum")

    def _sample_anchors(self, batch: dict[str, torch.Tensor], epoch: int) -> Any:
        return sample_anchors(
            batch["input_ids"],
            batch["completion_mask"],
            batch["sample_ids"].tolist(),
            num_anchors=self.num_anchors,
            num_drafts=self.num_drafts,
            seed=self.args.seed,
            epoch=epoch,
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this micro-batch's share of the optimiser step's loss; `num_items_in_batch` holds the weight sums."""
        if return_outputs:
            raise ValueError(
                "`compute_loss` of a drafter has no outputs to return; call it with `return_outputs=False`."
            )
        unwrapped = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast(), naming_rows(inputs["sample_ids"], "the dataset"):
            reading = self._read(inputs)
            self.target.finish_together()
            entry = loss_entry(self.accelerator)
            loss, sums = self._redirect(model, unwrapped, self._loss_parts, entry, inputs, num_items_in_batch, reading)
        self._guard.note_loss(loss, inputs["sample_ids"])
        self._sums["train"].add(sums)
        # Wrappers average gradients over ranks, the weight sums already cover all of them.
        return loss * self.accelerator.num_processes

    def _read(self, inputs: dict[str, Any]) -> TargetReading:
        """Have the target read a text, outside of the drafter's wrapper, whose collectives must not mix with a sharded target's."""
        layer_ids = self.accelerator.unwrap_model(self.model).config.target_layer_ids
        return self.target.read_text(inputs["input_ids"], inputs["attention_mask"], layer_ids)

    def _loss_parts(
        self, entry: torch.Tensor, inputs: dict[str, Any], sums: torch.Tensor, reading: TargetReading
    ) -> tuple[torch.Tensor, dict[str, tuple[float, float]]]:
        """Return the loss in a tuple, where the wrappers of sharded drafters find it; `entry` is `loss_entry`'s."""
        result = self._step_loss(inputs, sums, reading)
        return result.loss + entry, result.sums

    def _step_loss(self, inputs: dict[str, Any], sums: torch.Tensor, reading: TargetReading) -> StepLoss:
        return step_loss(
            self.accelerator.unwrap_model(self.model),
            self.target,
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs["anchors"],
            None,
            self.streams,
            sums,
            self.args.loss_chunk_bytes,
            reading,
            self.slot_rules,
        )

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _measure(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the loss on a batch's text, and add tau and acceptance on its prompts to the metrics."""
        # Epoch 0, so that every evaluation looks at the same anchors.
        inputs["anchors"] = self._sample_anchors(inputs, epoch=0)
        drafter = self.accelerator.unwrap_model(self.model)
        sums = weight_sums([inputs["anchors"]], self.streams, drafter.draft_token_ids)
        names = naming_rows(inputs["sample_ids"], "the evaluation dataset")
        with torch.no_grad(), self.accelerator.autocast(), names:
            result = self._step_loss(inputs, sums, self._read(inputs))
        self._sums["eval"].add(result.sums)
        if self.args.eval_rollouts:
            settings = DraftingSettings(
                num_drafts=self.num_drafts,
                sampling=self.args.sampling_settings(),
                draft_sampling=self.args.draft_sampling,
                keep_branch_hidden=False,
            )
            # Epoch 0, so that every evaluation draws alike.
            keys = DrawKeys(self.args.seed, 0, inputs["sample_ids"].tolist())
            with self.accelerator.autocast():
                rollout = rollout_live(
                    self.target,
                    drafter,
                    self._prompts(inputs),
                    settings,
                    keys,
                    max_new_tokens=self.args.max_completion_length,
                    eos_token_ids=self.target.eos_token_ids,
                )
            self._count_rollout(rollout, self._prompts(inputs), inputs["sample_ids"].tolist())
        self.target.finish_together()
        return result.loss.detach()

    @staticmethod
    def _prompts(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
        """Return what stands before each row's first completion token."""
        starts = inputs["completion_mask"].long().argmax(dim=1).tolist()
        return [row[: max(start, 1)] for row, start in zip(inputs["input_ids"].tolist(), starts, strict=True)]
