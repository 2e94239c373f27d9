# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What both trainers do in a step: prepare its micro-batches, compute the loss through the drafter's wrapper, measure on
evaluation batches. How rows become text and blocks, and which streams exist, is each trainer's own.
"""

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import IntervalStrategy, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..data.collators import RowCollator
from ..data.text_reader import is_tokenized
from ..drafters.base import Drafter
from ..drafters.portable_config import PortableConfig
from ..evaluation import explain_replay
from ..losses import default_chunk_bytes
from ..readings.prefetch import PrefetchingSource
from ..rollout.drafting import DraftingSettings
from ..rollout.keyed_random import DrawKeys
from ..rollout.live import rollout_live
from ..rollout.replay import rollout_replay
from ..rollout.texts import TargetText
from ..rollout.types import Rollout
from ..runs.distributed.launch import is_sharded, loss_entry
from ..target.checks import naming_rows
from ..target.frozen import FrozenTarget
from ..target.reading import TextReading
from ..utils.bars import library_bars
from ..utils.console import lasting_output
from ..utils.private_trl import _ForwardRedirection
from .card_memory import check_weights_fit, fit_to_card
from .common_config import DraftTrainingConfig, check_part_weights
from .delivery import LookAhead, ShardOrder, WaitMeter, check_texts, open_source, store_of, stored_texts
from .hub_names import claim_repository
from .metrics import Pace, best_model_metrics
from .notebook_table import print_logs_readably
from .pair import Pair, load_pair
from .publishing import PublishingTrainer
from .step import (
    Objective,
    PreparedBatch,
    SlotRules,
    StepLoss,
    StreamSettings,
    step_loss,
    verification_of,
    weight_sums,
)
from .texts import AnyDataset, check_texts_written, read_each, rows_of


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


Settings = TypeVar("Settings", bound=DraftTrainingConfig)


class DraftTrainer(PublishingTrainer, Generic[Settings]):
    """Base of both trainers, which document its arguments. A trainer fills in the abstract methods."""

    # The loss is divided by weight sums of the whole optimiser step, accumulation included.
    loss_is_scaled_for_ga = True
    args: Settings
    streams: dict[str, StreamSettings]
    slot_rules: SlotRules
    # The loss of a micro-batch; an experiment with another one puts it here.
    _step_loss = staticmethod(step_loss)
    _redirect = _ForwardRedirection()
    _config_class: type[Settings]

    @lasting_output()
    def __init__(
        self,
        model: str | Path | Drafter,
        target: "str | Path | PreTrainedModel | PeftModel | FrozenTarget",
        args: Settings | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: "PeftConfig | None" = None,
    ):
        args = self._config_class() if args is None else args
        self._check_request(args, eval_dataset)
        with library_bars(not args.disable_tqdm):
            pair = load_pair(model, target, args, processing_class, peft_config)
            check_part_weights(args, pair.drafter)
            if eval_dataset is not None:
                self._check_best_metric(args, eval_dataset, pair.num_drafts)
            # Before a row is read: what would not fit into the target's positions is refused or counted.
            args = args.fit_to(pair.target.num_positions, pair.num_drafts)
            if self._needs_rollback(args):
                # Now rather than at the first rollout.
                pair.target.require_rollback()
            if eval_dataset is not None and self._measures_tau(args) and pair.target.rollback_reason is not None:
                warnings.warn(explain_replay(pair.target.rollback_reason))
            # Refuses what could not be pushed before the target responds to anything.
            repo_id = claim_repository(args, pair)
            check_weights_fit(pair, args, optimizers[0] is not None)
            pair.target.place(args.device)
            open_source(pair, args)
            super().__init__(
                pair,
                repo_id,
                args,
                data_collator=RowCollator(pair.target.pad_token_id),
                train_dataset=None if train_dataset is None else self._read_known(pair, args, train_dataset, True),
                eval_dataset=read_each(partial(self._read_known, pair, args, is_training=False), eval_dataset),
                callbacks=callbacks,
                optimizers=optimizers,
            )
        print_logs_readably(self)
        self._pair, self._optimizer_is_given = pair, optimizers[0] is not None
        # Whether this process has computed what a step needs: a resumed run begins at another step than 0.
        self._is_fitted = False
        self._is_measuring = False
        # Where readings are delivered: the epoch's batches, drawn an update ahead, and how long steps waited for them.
        self._ahead: LookAhead | None = None
        self._waiting = WaitMeter(pair.target.source) if isinstance(pair.target.source, PrefetchingSource) else None
        # Whether responses that are replayed for evaluation were held to the target.
        self._responses_are_checked = False
        self._pace = Pace()
        assert isinstance(pair.drafter.config, PortableConfig), "every family's"
        self._set_up(args, pair.drafter.config)

    @classmethod
    def _check_request(cls, args: Any, eval_dataset: AnyDataset | dict[str, AnyDataset] | None) -> None:
        """Refuse settings of another trainer, and evaluations without rows, before anything is loaded."""
        if not isinstance(args, cls._config_class):
            raise ValueError(
                f"`args` must be a `{cls._config_class.__name__}`, got a `{type(args).__name__}`, whose settings mean "
                f"something else to `{cls.__name__}`."
            )
        if eval_dataset is None and (args.eval_strategy != "no" or args.eval_on_start):
            raise ValueError(
                f"`eval_strategy={IntervalStrategy(args.eval_strategy).value!r}` or `eval_on_start` asks for "
                "evaluations, and there is no `eval_dataset`. Give one (`--eval-dataset` or `--eval-split`)."
            )

    @classmethod
    def _check_best_metric(cls, args: Any, eval_dataset: AnyDataset | dict[str, AnyDataset], num_drafts: int) -> None:
        """Refuse a `metric_for_best_model` that no evaluation will have."""
        asked = args.metric_for_best_model
        metrics = best_model_metrics(args.trained_streams, num_drafts if cls._measures_tau(args) else None)
        if isinstance(eval_dataset, dict):
            metrics = [f"{name}_{metric}" for name in eval_dataset for metric in metrics]
        if asked is not None and asked.removeprefix("eval_") not in metrics:
            raise ValueError(f"`metric_for_best_model={asked!r}` is not measured. There are: {', '.join(metrics)}.")

    @staticmethod
    @abstractmethod
    def _needs_rollback(args: Any) -> bool:
        """Whether training rolls the target back, for live decoding or to branch off a text."""

    @staticmethod
    @abstractmethod
    def _measures_tau(args: Any) -> bool:
        """Whether evaluation measures tau: live, or by replay where the target cannot be rolled back."""

    @staticmethod
    @abstractmethod
    def _read_rows(pair: Pair, args: Any, dataset: AnyDataset, is_training: bool) -> AnyDataset:
        """Tokenize a dataset."""

    @classmethod
    def _read_known(cls, pair: Pair, args: Any, dataset: AnyDataset, is_training: bool) -> AnyDataset:
        """Tokenize a dataset, and refuse one whose texts a source of readings does not have, before any work."""
        rows = cls._read_rows(pair, args, dataset, is_training)
        if is_training and args.shuffle_by_shard and not isinstance(rows, Dataset):
            raise ValueError(
                "`shuffle_by_shard=True` orders rows of a dataset, and `train_dataset` is a stream, whose rows come "
                "in an order of their own. Load it whole, or leave `shuffle_by_shard` out."
            )
        if pair.target.source is not None and isinstance(rows, Dataset):
            texts = cls._known_texts(pair, args, rows, is_training)
            if texts is not None:
                place = "the dataset" if is_training else "the evaluation dataset"
                check_texts(pair.target, texts, rows["sample_id"], place)
        return rows

    @staticmethod
    def _known_texts(pair: Pair, args: Any, rows: Dataset, is_training: bool) -> Iterator[np.ndarray] | None:
        """Yield the texts that will be read of rows; `None` where they are not known yet."""
        return stored_texts(rows)

    @abstractmethod
    def _texts_ahead(self, batches: list[dict[str, torch.Tensor]]) -> list[TargetText]:
        """Return the texts that `_prepare` will make of batches, in the order of their reading, as far as known."""

    @abstractmethod
    def _set_up(self, args: Settings, drafter: PortableConfig) -> None:
        """Set `streams`, `slot_rules` and what else the steps of a trainer need."""

    @abstractmethod
    def _prepare(self, batches: list[dict[str, torch.Tensor]], epoch: int) -> list[PreparedBatch]:
        """Return text and blocks of the micro-batches of one optimiser step. Collective where anything is sharded."""

    @abstractmethod
    def _prepare_evaluation(self, batch: dict[str, torch.Tensor]) -> tuple[PreparedBatch, Rollout | None]:
        """
        Return what the loss of an evaluation batch is computed on, and the rollout that tau is counted on, if any.
        """

    # -- training -----------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[PreparedBatch], torch.Tensor]:
        """
        Fetch and prepare the micro-batches of one optimiser step, and sum the weights of their slots over all ranks.
        """
        with self._waiting.measuring() if self._waiting is not None else nullcontext():
            return self._prepare_step(self._draw(epoch_iterator, num_batches, device), device)

    def _draw(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
        """Fetch the micro-batches of one step; where readings are delivered, announce those of the next one too."""
        source = self.target.source
        if source is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)[0]
        ahead = self._ahead
        if ahead is None or ahead.batches is not epoch_iterator:
            gradient_state = self.accelerator.gradient_state
            ahead = self._ahead = LookAhead(epoch_iterator, lambda: gradient_state.end_of_dataloader)
            self._forget_texts()
            self._announce(ahead.draw(num_batches))
        batches, _ = super().get_batch_samples(ahead, num_batches, device)
        if not isinstance(self.train_dataset, Dataset):
            self._check_stream(batches)
        if self.state.global_step + 1 < self.state.max_steps:
            self._announce(ahead.draw(self.args.gradient_accumulation_steps))
        return batches

    def _announce(self, batches: list[dict[str, torch.Tensor]]) -> None:
        assert self.target.source is not None, "there is one to announce texts to"
        for text in self._texts_ahead(batches):
            self.target.source.expect(rows_of(text.input_ids, text.attention_mask))

    def _check_stream(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Refuse rows of a stream whose texts a source does not have, by their numbers."""
        for text in self._texts_ahead(batches):
            check_texts(self.target, rows_of(text.input_ids, text.attention_mask), text.sample_ids, "this step")

    def _forget_texts(self) -> None:
        """Let go of what was announced and will not be read."""
        if isinstance(self.target.source, PrefetchingSource):
            self.target.source.forget()

    def _prepare_step(
        self, batches: list[dict[str, torch.Tensor]], device: torch.device
    ) -> tuple[list[PreparedBatch], torch.Tensor]:
        prepared = self._prepare(batches, int(self.state.epoch or 0))
        self._pace.add([batch.text.completion_mask for batch in prepared])
        # ZeRO-2 keeps a share of what `fit_to_card` counts whole.
        is_split = is_sharded(self.accelerator) or self.accelerator.state.deepspeed_plugin is not None
        if not self._is_fitted and not is_split:
            self._is_fitted = True
            fit_to_card(self.drafter, self.target, prepared, self.args, self._chunk_bytes, self._optimizer_is_given)
        sums = weight_sums([batch.blocks for batch in prepared], self.streams, self.drafter.draft_token_ids)
        all_sums: Any = self.accelerator.reduce(sums.to(device, torch.float32), "sum")
        # The host waits once, here, and not for each stream of each micro-batch.
        return prepared, all_sums.cpu()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`ResumingTrainer.train`]."""
        self._pace.pop()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._ahead = None
            self._forget_texts()

    def training_step(
        self, model: nn.Module, inputs: PreparedBatch, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As [`ResumingTrainer.training_step`]."""
        with self._waiting.measuring() if self._waiting is not None else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Add `tokens_per_second`, response tokens of all processes since the last log or evaluation, and `reading_wait`,
        the share of the steps' time that went by waiting for readings.
        """
        is_evaluation = next(iter(logs)).startswith("eval_")
        tokens, seconds = self._pace.pop()
        if tokens and not is_evaluation:
            # Each process adds its own, and all of them its time.
            self._sums["train"].add({"tokens_per_second": (tokens * self.args.world_size, seconds)})
        share = None if self._waiting is None or is_evaluation else self._waiting.pop()
        if share is not None:
            logs["reading_wait"] = share
        super().log(logs, start_time)
        # A time differs between runs that are the same, and so would their checkpoints, which hold this history.
        for name in ("reading_wait", "tokens_per_second"):
            self.state.log_history[-1].pop(name, None)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Return transformers' sampler, or rows in the order of a store's shards (`shuffle_by_shard`)."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        store = store_of(self.target)
        if not self.args.shuffle_by_shard or store is None or not isinstance(rows, Dataset):
            return super()._get_train_sampler(train_dataset)
        texts = self._known_texts(self._pair, self.args, rows, True)
        assert texts is not None, "a store has the texts of every row"
        return ShardOrder(store, texts, self.args.seed, lambda: int(self.state.epoch or 0))

    def _prepare_inputs(self, inputs: dict[str, Any] | PreparedBatch) -> dict[str, Any] | PreparedBatch:
        """Leave a prepared batch as it is: it is on its device, and DeepSpeed must not cast its features."""
        return inputs if isinstance(inputs, PreparedBatch) else super()._prepare_inputs(inputs)

    def floating_point_ops(self, inputs: PreparedBatch) -> int:
        """Return 0: transformers' estimate counts a language model's tokens, which is no measure of blocks."""
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: PreparedBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return this micro-batch's share of the optimiser step's loss; `num_items_in_batch` holds the weight sums."""
        if return_outputs:
            raise ValueError("A drafter's loss has no outputs to return; call it with `return_outputs=False`.")
        assert num_items_in_batch is not None, "`get_batch_samples` sums the weights"
        drafter, target, objective = self.drafter, self.target, self._objective(num_items_in_batch)
        with self.accelerator.autocast(), naming_rows(inputs.text.sample_ids, "the dataset"):
            # Outside of the drafter's wrapper, whose collectives must not mix with those of a sharded target.
            batch = replace(inputs, reading=inputs.read_by(target, drafter.config.target_layer_ids))
            target.finish_together()

            def forward(entry: torch.Tensor) -> StepLoss:
                loss, sums = self._step_loss(drafter, target, batch, objective)
                return StepLoss(loss + entry, sums)

            # Through the wrapper's own forward, so that its hooks fire once per step.
            loss, sums = self._redirect(model, drafter, forward, loss_entry(self.accelerator))
        self._guard.note_loss(loss, batch.text.sample_ids)
        self._sums["train"].add(sums)
        # Wrappers average gradients over ranks, the weight sums already cover all of them.
        return loss * self.accelerator.num_processes

    def _objective(self, sums: torch.Tensor) -> Objective:
        return Objective(
            self.streams,
            self.slot_rules,
            self._chunk_bytes,
            sums,
            self.args.blocks_per_pass,
            verification_of(self._drafting),
            self.args.confidence_loss_weight,
            self.args.selector_loss_weight,
        )

    @property
    def _chunk_bytes(self) -> int:
        """Bytes of logits alive at a time: the setting, or what suits the device."""
        return self.args.loss_chunk_bytes or default_chunk_bytes(self.args.device)

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: str | AnyDataset | None = None) -> DataLoader:
        """Return batches of an evaluation dataset; rows that were not read yet are read as the constructor does."""
        if not (eval_dataset is None or isinstance(eval_dataset, str) or is_tokenized(eval_dataset)):
            eval_dataset = self._read_rows(self._pair, self.args, eval_dataset, is_training=False)
        given: Any = eval_dataset
        return super().get_eval_dataloader(given)

    def _measure(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss on an evaluation batch, and add its parts, tau and acceptance to the metrics."""
        drafter, sample_ids = self.drafter, inputs["sample_ids"].tolist()
        with torch.no_grad(), self.accelerator.autocast(), naming_rows(sample_ids, "the evaluation dataset"):
            self._is_measuring = True
            batch, rollout = self._prepare_evaluation(inputs)
            self._is_measuring = False
            sums = weight_sums([batch.blocks], self.streams, drafter.draft_token_ids).cpu()
            loss, parts = self._step_loss(drafter, self.target, batch, self._objective(sums))
        self.target.finish_together()
        self._sums["eval"].add(parts)
        if rollout is not None:
            self._count_rollout(rollout, sample_ids)
        return loss.detach()

    @property
    def _segment_length(self) -> int:
        """Tokens per segment of a text that is walked in parallel."""
        assert isinstance(self.drafter.config, PortableConfig), "every family's"
        return self.drafter.config.default_segment_length

    @property
    def _keeps_branches(self) -> bool:
        """Whether rollouts keep the target's states behind first rejections."""
        return False

    @property
    def _drafting(self) -> DraftingSettings:
        assert isinstance(self.drafter.config, PortableConfig), "every family's"
        return DraftingSettings(
            num_drafts=self.num_drafts,
            sampling=self.args.sampling_settings(),
            draft_sampling=self.args.draft_sampling,
            keep_branch_hidden=self._keeps_branches,
            # For the calibration that an evaluation reports.
            keep_confidences=self.drafter.config.has_confidence_head and self._is_measuring,
        )

    def _walk(self, drafter: Drafter, text: TargetText, epoch: int, reading: TextReading | None = None) -> Rollout:
        """Find the chain of blocks that the drafter makes along a text."""
        return rollout_replay(
            self.target,
            drafter,
            text,
            self._drafting,
            DrawKeys(self.args.seed, epoch, text.sample_ids),
            segment_length=self._segment_length,
            chunk_bytes=self._chunk_bytes,
            reading=reading,
        )

    def _walk_evaluation(self, text: TargetText, **limits: float) -> tuple[Rollout, TextReading]:
        """
        Find the blocks along evaluation rows, which tau is counted on, and return what was read for that too; `limits`
        are those of `check_responses`.
        """
        if not self._responses_are_checked:
            self._responses_are_checked = True
            check_texts_written(self.target, [text], self.args.sampling_settings(), **limits)
        layer_ids = self.drafter.config.target_layer_ids
        reading = self.target.read_text(text.input_ids, text.attention_mask, layer_ids)
        # Epoch 0, so that every evaluation draws alike.
        return self._walk(self.drafter, text, epoch=0, reading=reading), reading

    def _decode(self, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int], epoch: int) -> Rollout:
        """Decode prompts live with the current drafter, with a progress bar over the rows."""
        keys = DrawKeys(self.args.seed, epoch, sample_ids)
        is_hidden = self.args.disable_tqdm or not self.accelerator.is_local_main_process
        with tqdm(total=len(prompts), desc="rollout", leave=False, disable=is_hidden) as bar:
            return rollout_live(
                self.target,
                self.drafter,
                prompts,
                self._drafting,
                keys,
                max_completion_length=self.args.longest_response,
                eos_token_ids=self.target.eos_token_ids,
                on_finished=bar.update,
            )
