# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Draft-OPD: on-policy distillation of a drafter from the target, on the states its own drafting induces.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset, IterableDataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..drafters.base import Drafter
from ..rollout.blocks import BlockBatch, draft_text, join_blocks, mark_slots, sample_anchors
from ..rollout.keyed_random import DrawKeys
from ..rollout.replay import TargetText, rollout_replay
from ..rollout.types import Rollout
from ..runs.distributed.sharding import whole_drafter
from ..runs.out_of_memory import explained_memory
from ..target.checks import naming_rows
from ..target.frozen import FrozenTarget, TargetReading
from .draft_opd_config import DraftOPDConfig
from .draft_trainer import DraftTrainer
from .metrics import rollout_sums
from .pair import Pair, check_mask_token, load_pair, text_reader
from .publisher import Publisher
from .resuming import describe_batches
from .rollout_printer import print_rollout
from .step import PreparedBatch, SlotRules, StreamSettings
from .texts import ResponseSource, make_collator, prompt_rows, read_each, text_of_rollout


if TYPE_CHECKING:
    from peft import PeftConfig


class DraftOPDTrainer(DraftTrainer):
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
        ValueError: If drafter, target, tokenizer and data do not belong together; each message names the value and the fix.
    """

    _tag_names = ["trl", "draft-opd", "speculative-decoding"]
    _method = "opd"
    _name = "DraftOPD"

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
        pair = load_pair(model, target, args, processing_class, peft_config)
        # Replay of first rejections reads committed text alone. Else a target that cannot branch is refused before a rollout.
        if args.rollout == "live" or args.trains_suffix or eval_dataset is not None:
            pair.target.require_rollback()
        publisher = Publisher(args, pair)
        pair.target.place(args.device)
        walks_rows = args.completions_from_target
        super().__init__(
            pair,
            publisher,
            args,
            data_collator=make_collator(pair.target.pad_token_id),
            train_dataset=read_each(
                partial(_read_rows, pair=pair, args=args, with_responses=walks_rows), train_dataset
            ),
            eval_dataset=read_each(partial(_read_rows, pair=pair, args=args, with_responses=False), eval_dataset),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.segment_length = args.segment_length(pair.drafter.config.family)
        self.streams = {
            "accepted": StreamSettings(args.accepted_loss, args.accepted_weight, 1.0),
            "rejected": StreamSettings(args.rejected_loss, args.rejected_weight, args.slot_decay),
        }
        if args.supervised_weight > 0:
            self.streams["supervised"] = StreamSettings(args.accepted_loss, args.supervised_weight, args.slot_decay)
        self.slot_rules = SlotRules(args.d_pace_floor if args.uses_d_pace else None)
        self._responses = ResponseSource(self.target, args, self.train_dataset)
        self._console = Console()

    # -- 1. the rollout: blocks of the current drafter along text that the target writes --------------------------------

    def _prepare(self, batches: list[dict[str, torch.Tensor]], epoch: int) -> list[PreparedBatch]:
        """Roll out the prompts of every micro-batch, on the target's stored text or live."""
        settings = (
            "lower `per_device_train_batch_size` (and raise `gradient_accumulation_steps`)",
            "lower `reading_bytes`, `generation_batch_size` or `max_completion_length`",
        )
        with explained_memory("a rollout", lambda: describe_batches(batches), settings):
            if self.args.rollout == "replay":
                prepared = self._replay(self._written_texts(batches), epoch)
            else:
                prepared = self._decode_live(batches, epoch)
            self.target.finish_together()
        for batch in prepared:
            self._sums["train"].add(rollout_sums(batch.rollout, self.target.eos_token_ids))
        if prepared:
            self._print_rollout(prepared[0].rollout)
        return prepared

    def _written_texts(self, batches: list[dict[str, torch.Tensor]]) -> list[TargetText]:
        """Return the prompts of a step with the target's responses, which it writes where there are none yet."""
        is_first = self._responses.audit is None
        texts = self._responses.texts(batches)
        # A run that resumes checks again, and logs what the uninterrupted one would have.
        if is_first and self._resumed is None:
            self._sums["train"].add({"response_mismatch": (self._responses.audit.share, 1.0)})
        # A phase of the target ends before all ranks do anything else together.
        self.target.finish_together()
        return texts

    def _replay(self, texts: list[TargetText], epoch: int) -> list[PreparedBatch]:
        """Draft along the responses of every micro-batch; readings of the target are kept for the loss while they fit."""
        free_bytes, prepared = self.args.reading_bytes, []
        with whole_drafter(self.accelerator, self.model) as drafter:
            layer_ids = drafter.config.target_layer_ids
            for text in texts:
                with self.accelerator.autocast(), naming_rows(text.sample_ids, "the dataset"):
                    reading = self.target.read_text(
                        text.input_ids, text.attention_mask, layer_ids, keep_cache=self._keeps_branches
                    )
                    rollout = self._walk(drafter, text, epoch, reading)
                free_bytes -= reading.num_bytes
                kept = reading.without_caches() if free_bytes >= 0 else None
                prepared.append(PreparedBatch(text, rollout, self._mark(rollout, text.sample_ids, epoch), kept))
        return prepared

    def _walk(self, drafter: Drafter, text: TargetText, epoch: int, reading: TargetReading) -> Rollout:
        """Find the chain of blocks that the drafter makes along a text."""
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

    def _decode_live(self, batches: list[dict[str, torch.Tensor]], epoch: int) -> list[PreparedBatch]:
        """Have the pair decode the prompts of every micro-batch anew."""
        prepared = []
        with whole_drafter(self.accelerator, self.model):
            for batch in batches:
                with self.accelerator.autocast(), naming_rows(batch["sample_ids"], "the dataset"):
                    prepared.append(self._decode_prompts(batch, epoch))
        return prepared

    def _decode_prompts(self, batch: dict[str, torch.Tensor], epoch: int) -> PreparedBatch:
        sample_ids = batch["sample_ids"].tolist()
        rollout = self._decode(prompt_rows(batch), sample_ids, epoch)
        blocks = self._mark(rollout, sample_ids, epoch)
        return PreparedBatch(text_of_rollout(rollout, sample_ids), rollout, blocks, reading=None)

    def _prepare_evaluation(self, batch: dict[str, torch.Tensor]) -> tuple[PreparedBatch, Rollout | None]:
        """Decode the prompts live; the loss is that of the blocks of this rollout."""
        # Epoch 0, so that every evaluation draws alike and looks at the same anchors.
        prepared = self._decode_prompts(batch, epoch=0)
        return prepared, prepared.rollout

    @property
    def _keeps_branches(self) -> bool:
        return self.args.trains_suffix

    # -- 2. the streams: which slots are trained, and as what -----------------------------------------------------------

    def _mark(self, rollout: Rollout, sample_ids: Sequence[int], epoch: int) -> BlockBatch:
        """Mark accepted and rejected slots of a rollout, and add the blocks of the supervised stream if it has a share."""
        args = self.args
        # A rollout has no suffixes where they carry no weight.
        scope = "suffix" if args.trains_suffix else "first"
        blocks = mark_slots(rollout, rejected_scope=scope, eos_token_ids=self.target.eos_token_ids)
        if args.supervised_weight == 0:
            return blocks
        on_text = self._supervised_blocks(rollout, sample_ids, epoch)
        return join_blocks(blocks, on_text) if args.trains_chain else on_text

    def _supervised_blocks(self, rollout: Rollout, sample_ids: Sequence[int], epoch: int) -> BlockBatch:
        """Return blocks whose drafts are the committed tokens: at the anchors of the chain, or at random ones."""
        # A row without a chain was refused: its text is impossible under the sampling settings.
        is_written = rollout.completion_mask & rollout.is_block.any(dim=1, keepdim=True)
        if self.args.supervised_anchors == "error":
            blocks = draft_text(rollout.anchors, rollout.input_ids, is_written, num_drafts=self.num_drafts)
        else:
            blocks = sample_anchors(
                rollout.input_ids,
                is_written,
                sample_ids,
                num_anchors=self.args.num_supervised_anchors or None,
                num_drafts=self.num_drafts,
                seed=self.args.seed,
                epoch=epoch,
            )
        return blocks.as_supervised()

    # -- 3. the loss: `compute_loss` of `DraftTrainer`, `step_loss` of step.py ------------------------------------------

    def _print_rollout(self, rollout: Rollout) -> None:
        """Show a rollout every `logging_steps`, if asked for."""
        every = max(int(self.state.logging_steps or 1), 1)
        if self.args.log_completions and self.is_world_process_zero() and self.state.global_step % every == 0:
            print_rollout(
                rollout,
                self.target.tokenizer,
                num_rows=self.args.num_completions_to_print,
                step=self.state.global_step,
                console=self._console,
            )


def _read_rows(
    dataset: Dataset | IterableDataset, pair: Pair, args: DraftOPDConfig, with_responses: bool
) -> Dataset | IterableDataset:
    """Tokenize prompts, with the responses where they are the target's own and walked as they are."""
    reader = text_reader(pair.target, args, max_length=args.max_prompt_length + args.max_completion_length)
    rows = reader.read_texts(dataset) if with_responses else reader.read_prompts(dataset)
    check_mask_token(pair.drafter, pair.target, rows, "input_ids" if with_responses else "prompt_ids")
    return rows
