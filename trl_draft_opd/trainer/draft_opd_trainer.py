# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Draft-OPD: on-policy distillation of a drafter from the target, on the states its own drafting induces.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from rich.console import Console
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..data.collators import PromptCollator, TextCollator
from ..drafters.base import Drafter
from ..rollout.blocks import (
    BlockBatch,
    draft_text,
    join_blocks,
    mark_slots,
    sample_anchors,
)
from ..rollout.drafting import DraftingSettings
from ..rollout.keyed_random import DrawKeys
from ..rollout.live import rollout_live
from ..rollout.replay import TargetText, rollout_replay
from ..rollout.types import Rollout
from ..runs.distributed.launch import loss_entry
from ..runs.distributed.sharding import whole_drafter
from ..runs.out_of_memory import explained_memory
from ..target.checks import naming_rows
from ..target.frozen import FrozenTarget, TargetReading
from ..utils.private_trl import _ForwardRedirection
from .adapters import adapt_drafter
from .draft_opd_config import DraftOPDConfig
from .metrics import rollout_sums
from .pair import (
    check_mask_token,
    compile_drafter,
    load_drafter,
    load_target,
    text_reader,
)
from .publishing import PublishingTrainer
from .rollout_printer import print_rollout
from .step import SlotRules, StepLoss, StreamSettings, step_loss, weight_sums
from .texts import ResponseSource, prompt_rows, regroup_by_length, text_of_rollout


if TYPE_CHECKING:
    from peft import PeftConfig


class DraftOPDTrainer(PublishingTrainer):
    """
    Trainer that improves a drafter by on-policy distillation: the pair decodes together, every rejection exposes an error
    position, the drafter drafts again from there, and the target supervises accepted and rejected drafts alike.

    Source: [Draft-OPD](https://huggingface.co/papers/2605.29343). Start from a drafter whose supervised training has reached its plateau.

    Example:

    ```python
    from datasets import load_dataset
    from trl_draft_opd import DraftOPDTrainer

    trainer = DraftOPDTrainer(
        model="z-lab/Qwen3-4B-DFlash-b16",
        target="Qwen/Qwen3-4B",
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    trainer.push_to_hub()
    ```

    Args:
        model (`str`, `Path` or [`Drafter`]):
            The drafter, or the id or path of one in any published layout.
        target (`str`, `Path`, [`~transformers.PreTrainedModel`] or [`FrozenTarget`]):
            The target to draft for; frozen.
        args ([`DraftOPDConfig`], *optional*):
            Settings.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows with a `prompt` or `messages`. Completions are ignored unless `completions_from_target=True` declares them the
            target's: the answers of a chat are then walked one by one. Otherwise the target answers every prompt once.
        eval_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*):
            As `train_dataset`; always decoded live.
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

    _tag_names = ["trl", "draft-opd", "speculative-decoding"]
    _method = "opd"
    _name = "DraftOPD"
    # The loss is divided by weight sums of the whole optimiser step, accumulation included.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | Path | Drafter,
        target: str | Path | PreTrainedModel | FrozenTarget,
        args: DraftOPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: "PeftConfig | None" = None,
    ):
        args = args or DraftOPDConfig("drafter-opd")
        self.target = load_target(target, args, processing_class)
        is_forward_only = args.rollout == "replay" and (args.rejected_scope == "first" or args.rejected_weight == 0)
        # Replay of first rejections reads committed text alone; else a target that cannot branch is refused before a rollout.
        if not is_forward_only or eval_dataset is not None:
            self.target.require_rollback()
        drafter = adapt_drafter(load_drafter(model, self.target, args), peft_config, seed=args.seed)
        self._prepare_publishing(args, drafter)
        self.reader = text_reader(self.target, args, max_length=args.max_prompt_length + args.max_completion_length)
        self.num_drafts = args.num_drafts or drafter.default_num_drafts
        self.segment_length = args.segment_length(drafter.config.family)
        self.streams = _streams_of(args)
        self.slot_rules = SlotRules(d_pace_floor=args.d_pace_floor if args.uses_d_pace else None, is_until_fail=False)
        self.target.place(args.device)
        keep_completions = args.completions_from_target and args.rollout == "replay"
        train_dataset = self._prepare_dataset(train_dataset, args, drafter, keep_completions)
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_dataset(part, args, drafter, False) for name, part in eval_dataset.items()
            }
        else:
            eval_dataset = self._prepare_dataset(eval_dataset, args, drafter, False)
        compile_drafter(drafter, args)
        super().__init__(
            model=drafter,
            args=args,
            data_collator=self._collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._responses = ResponseSource(
            self.target,
            args,
            self._prompts_to_answer(),
            self.accelerator.process_index,
            self.accelerator.num_processes,
            show_progress=not args.disable_tqdm and self.accelerator.is_local_main_process,
        )
        self._redirect = _ForwardRedirection()
        self._console = Console()

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset | None,
        args: DraftOPDConfig,
        drafter: Drafter,
        keep_completions: bool,
    ) -> Dataset | IterableDataset | None:
        """Tokenize prompts, with the responses where they are the target's own and walked as they are."""
        if dataset is None:
            return None
        if keep_completions:
            rows = self.reader.read_texts(dataset)
            check_mask_token(drafter, self.target, rows, "input_ids")
        else:
            rows = self.reader.read_prompts(dataset)
            check_mask_token(drafter, self.target, rows, "prompt_ids")
        return rows

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad prompts, or texts where the dataset's responses are walked."""
        collator = TextCollator if "input_ids" in rows[0] else PromptCollator
        return collator(self.target.pad_token_id)(rows)

    def _prompts_to_answer(self) -> Dataset | None:
        """Return the training prompts if the run comes to all of them; a shorter one has only its own answered."""
        args, rows = self.args, self.train_dataset
        if not isinstance(rows, Dataset) or args.completions_from_target:
            return None
        per_step = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        num_rows = args.max_steps * per_step if args.max_steps > 0 else args.num_train_epochs * len(rows)
        return rows if num_rows >= len(rows) else None

    # -- rollout -------------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Fetch the prompts of one optimiser step, roll them out with the current drafter, and sum the weights over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        settings = (
            "lower `per_device_train_batch_size` (and raise `gradient_accumulation_steps`)",
            "lower `reading_bytes`, `generation_batch_size` or `max_completion_length`",
        )
        with explained_memory("a rollout", batches, settings):
            prepared = self._roll_out(batches, int(self.state.epoch or 0))
        unwrapped = self.accelerator.unwrap_model(self.model)
        sums = weight_sums([batch["anchors"] for batch in prepared], self.streams, unwrapped.draft_token_ids)
        if prepared and self._is_logging_step():
            print_rollout(
                prepared[0]["rollout"],
                self.reader.tokenizer,
                num_rows=self.args.num_completions_to_print,
                step=self.state.global_step,
                console=self._console,
            )
        return prepared, self.accelerator.reduce(sums.to(device, torch.float32), "sum")

    def _roll_out(self, batches: list[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
        """Roll out the prompts of every micro-batch, on the target's stored text or live. Collective where anything is sharded."""
        if self.args.rollout == "replay":
            is_first = self._responses.audit is None
            texts = regroup_by_length(self._responses.texts(batches), self.target.pad_token_id)
            # A run that goes on checks again, and logs what the uninterrupted one would have.
            if is_first and self._resumed is None:
                self._sums["train"].add({"response_mismatch": (self._responses.audit.share, 1.0)})
            # A phase of the target ends before all ranks do anything else together.
            self.target.finish_together()
            with whole_drafter(self.accelerator, self.model):
                prepared = self._replay(texts, epoch)
        else:
            with whole_drafter(self.accelerator, self.model):
                prepared = [self._roll_out_live(batch, epoch) for batch in batches]
        self.target.finish_together()
        return prepared

    def _replay(self, texts: list[TargetText], epoch: int) -> list[dict[str, Any]]:
        """Draft along the responses of every micro-batch; readings of the target are kept for the loss while they fit."""
        drafter = self.accelerator.unwrap_model(self.model)
        free_bytes = self.args.reading_bytes
        prepared = []
        for text in texts:
            with self.accelerator.autocast(), naming_rows(text.sample_ids, "the dataset"):
                reading = self.target.read_text(
                    text.input_ids,
                    text.attention_mask,
                    drafter.config.target_layer_ids,
                    keep_cache=self._needs_branches,
                )
                rollout = self._walk(drafter, text, epoch, reading)
                batch = self._mark(rollout, text, epoch)
            free_bytes -= reading.num_bytes
            prepared.append(batch | {"reading": reading.without_caches() if free_bytes >= 0 else None})
        return prepared

    def _roll_out_live(self, batch: dict[str, torch.Tensor], epoch: int) -> dict[str, Any]:
        """Decode every prompt together with the current drafter."""
        sample_ids = batch["sample_ids"].tolist()
        keys = DrawKeys(self.args.seed, epoch, sample_ids)
        with self.accelerator.autocast(), naming_rows(sample_ids, "the dataset"):
            rollout = self._decode(self.accelerator.unwrap_model(self.model), batch, keys)
            return self._mark(rollout, text_of_rollout(rollout, sample_ids), epoch) | {"reading": None}

    def _mark(self, rollout: Rollout, text: TargetText, epoch: int) -> dict[str, Any]:
        """Count a rollout and mark which slots belong to which stream."""
        self._sums["train"].add(rollout_sums(rollout, self.target.eos_token_ids))
        anchors = self._add_supervised(self._error_blocks(rollout), rollout, text.sample_ids, epoch)
        return {"rollout": rollout, "anchors": anchors, "sample_ids": torch.tensor(text.sample_ids)}

    def _error_blocks(self, rollout: Rollout) -> BlockBatch:
        # A rollout has no suffixes where they carry no weight.
        rejected_scope = "suffix" if self._needs_branches else "first"
        return mark_slots(rollout, rejected_scope=rejected_scope, eos_token_ids=self.target.eos_token_ids)

    def _add_supervised(self, blocks: BlockBatch, chain: Rollout, sample_ids: Sequence[int], epoch: int) -> BlockBatch:
        """Append the blocks of the supervised stream, if it has a share; without one the chain's own need not be drafted."""
        args = self.args
        if args.supervised_weight == 0:
            return blocks
        # A row without a chain was refused: its text is impossible under the sampling settings.
        is_written = chain.completion_mask & chain.is_block.any(dim=1, keepdim=True)
        if args.supervised_anchors == "error":
            on_text = draft_text(chain.anchors, chain.input_ids, is_written, num_drafts=self.num_drafts)
        else:
            on_text = sample_anchors(
                chain.input_ids,
                is_written,
                sample_ids,
                num_anchors=args.num_supervised_anchors or None,
                num_drafts=self.num_drafts,
                seed=args.seed,
                epoch=epoch,
            )
        on_text = on_text.as_supervised()
        return join_blocks(blocks, on_text) if args.trains_chain else on_text

    @property
    def _needs_branches(self) -> bool:
        return self.args.trains_suffix

    @property
    def _drafting(self) -> DraftingSettings:
        return DraftingSettings(
            num_drafts=self.num_drafts,
            sampling=self.args.sampling_settings(),
            draft_sampling=self.args.draft_sampling,
            keep_branch_hidden=self._needs_branches,
        )

    def _walk(self, drafter: Drafter, text: TargetText, epoch: int, reading: TargetReading) -> Rollout:
        """Draft along a text the target wrote."""
        return rollout_replay(
            self.target,
            drafter,
            text,
            self._drafting,
            DrawKeys(self.args.seed, epoch, text.sample_ids),
            segment_length=self.segment_length,
            chunk_bytes=self.args.loss_chunk_bytes,
            reading=reading,
        )

    def _decode(self, drafter: Drafter, batch: dict[str, torch.Tensor], keys: DrawKeys) -> Rollout:
        """Decode a batch of prompts live, with a progress bar over its rows."""
        prompts = prompt_rows(batch)
        is_hidden = self.args.disable_tqdm or not self.accelerator.is_local_main_process
        with tqdm(total=len(prompts), desc="rollout", leave=False, disable=is_hidden) as bar:
            return rollout_live(
                self.target,
                drafter,
                prompts,
                self._drafting,
                keys,
                max_new_tokens=self.args.max_completion_length,
                eos_token_ids=self.target.eos_token_ids,
                on_finished=bar.update,
            )

    def _is_logging_step(self) -> bool:
        every = max(int(self.state.logging_steps or 1), 1)
        return self.args.log_completions and self.is_world_process_zero() and self.state.global_step % every == 0

    # -- training ------------------------------------------------------------------------------------------------------

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
            reading = inputs["reading"] or self._read(inputs["rollout"])
            self.target.finish_together()
            entry = loss_entry(self.accelerator)
            loss, sums = self._redirect(model, unwrapped, self._loss_parts, entry, inputs, num_items_in_batch, reading)
        self._guard.note_loss(loss, inputs["sample_ids"])
        self._sums["train"].add(sums)
        # Wrappers average gradients over ranks, the weight sums already cover all of them.
        return loss * self.accelerator.num_processes

    def _read(self, rollout: Rollout) -> TargetReading:
        """Have the target read a text, outside of the drafter's wrapper, whose collectives must not mix with a sharded target's."""
        layer_ids = self.accelerator.unwrap_model(self.model).config.target_layer_ids
        return self.target.read_text(rollout.input_ids, rollout.attention_mask, layer_ids)

    def _loss_parts(
        self, entry: torch.Tensor, inputs: dict[str, Any], sums: torch.Tensor, reading: TargetReading
    ) -> tuple[torch.Tensor, dict[str, tuple[float, float]]]:
        """Return the loss in a tuple, where the wrappers of sharded drafters find it; `entry` is `loss_entry`'s."""
        result = self._step_loss(inputs["rollout"], inputs["anchors"], sums, reading)
        return result.loss + entry, result.sums

    def _step_loss(
        self, rollout: Rollout, anchors: BlockBatch, sums: torch.Tensor, reading: TargetReading
    ) -> StepLoss:
        return step_loss(
            self.accelerator.unwrap_model(self.model),
            self.target,
            rollout.input_ids,
            rollout.attention_mask,
            anchors,
            rollout.branch_hidden,
            self.streams,
            sums,
            self.args.loss_chunk_bytes,
            reading,
            self.slot_rules,
        )

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _measure(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the loss on the blocks of a live rollout, and add tau and acceptance to the metrics."""
        drafter = self.accelerator.unwrap_model(self.model)
        # Epoch 0, so that every evaluation draws alike.
        keys = DrawKeys(self.args.seed, 0, inputs["sample_ids"].tolist())
        names = naming_rows(inputs["sample_ids"], "the evaluation dataset")
        with torch.no_grad(), self.accelerator.autocast(), names:
            rollout = self._decode(drafter, inputs, keys)
            # Epoch 0, so that every evaluation looks at the same positions.
            anchors = self._add_supervised(
                self._error_blocks(rollout), rollout, inputs["sample_ids"].tolist(), epoch=0
            )
            sums = weight_sums([anchors], self.streams, drafter.draft_token_ids)
            result = self._step_loss(rollout, anchors, sums, self._read(rollout))
        self.target.finish_together()
        self._sums["eval"].add(result.sums)
        self._count_rollout(rollout, prompt_rows(inputs), inputs["sample_ids"].tolist())
        return result.loss.detach()


def _streams_of(args: DraftOPDConfig) -> dict[str, StreamSettings]:
    """Return how each stream that takes part is weighed."""
    streams = {
        "accepted": StreamSettings(args.accepted_loss, args.accepted_weight, 1.0),
        "rejected": StreamSettings(args.rejected_loss, args.rejected_weight, args.slot_decay),
    }
    if args.supervised_weight > 0:
        streams["supervised"] = StreamSettings(args.accepted_loss, args.supervised_weight, args.slot_decay)
    return streams
