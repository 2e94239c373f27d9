# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Draft-OPD: on-policy distillation of a drafter from the target, on the states its own drafting induces.

One optimiser step: `_prepare` rolls out the prompts with the current drafter, along stored responses (`_replay`) or
live (`_decode_live`); `_mark` tells which slots of its blocks are trained; [`DraftTrainer`] hands each micro-batch to
[`step_loss`], which drafts the blocks again, with gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console

from ..drafters.portable_config import PortableConfig
from ..rollout.blocks import BlockBatch, draft_text, join_blocks, mark_slots, sample_anchors
from ..rollout.texts import TargetText
from ..rollout.types import Rollout
from ..runs.distributed.sharding import whole_drafter
from ..runs.out_of_memory import explained_memory
from ..target.checks import naming_rows
from ..target.reading import TextReading
from .delivery import require_responses, store_of, stored_texts
from .draft_opd_config import DraftOPDConfig
from .draft_trainer import DraftTrainer
from .draft_vocabulary import note_whole_vocabulary
from .metrics import rollout_sums
from .pair import Pair, check_mask_token, text_reader
from .resuming import describe_batches
from .rollout_printer import print_rollout
from .step import PreparedBatch, SlotRules, StreamSettings
from .texts import (
    AnyDataset,
    ResponseSource,
    open_store,
    prompt_rows,
    respond_to_all,
    text_of,
    text_of_rollout,
)


class DraftOPDTrainer(DraftTrainer[DraftOPDConfig]):
    """
    Trainer that improves a drafter by on-policy distillation: the pair decodes together, every rejection exposes an
    error position, the drafter drafts again from there, and the target supervises accepted and rejected drafts alike.

    Source: [Draft-OPD](https://huggingface.co/papers/2605.29343). Start from a drafter whose supervised training has
    reached its plateau.

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
        target (`str`, `Path`, [`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`FrozenTarget`]):
            The target to draft for; frozen.
        args ([`DraftOPDConfig`], *optional*):
            Settings.
        train_dataset (`Dataset` or `IterableDataset`):
            Rows with a `prompt` or `messages`, to which the target responds once. Completions are ignored unless
            `completions_from_target=True` declares them the target's; those of a chat are then walked one by one.
        eval_dataset (`Dataset`, `IterableDataset` or `dict`, *optional*):
            As `train_dataset`; always decoded live, or replayed where the target cannot be rolled back.
        processing_class, callbacks, optimizers, peft_config (*optional*):
            As in [`DraftSFTTrainer`].

    Raises:
        ValueError: If drafter, target, tokenizer and data do not belong together. The message names value and fix.
    """

    _tag_names = ["trl", "draft-opd", "speculative-decoding"]
    _method = "opd"
    _name = "DraftOPD"
    _config_class = DraftOPDConfig

    @staticmethod
    def _needs_rollback(args: DraftOPDConfig) -> bool:
        # Only replay of first rejections does without.
        return args.rollout == "live" or args.trains_suffix

    @staticmethod
    def _measures_tau(args: DraftOPDConfig) -> bool:
        return True

    @staticmethod
    def _read_rows(pair: Pair, args: DraftOPDConfig, dataset: AnyDataset, is_training: bool) -> AnyDataset:
        """Tokenize prompts, with the responses where they are the target's own and walked as they are."""
        if is_training:
            note_whole_vocabulary(pair.drafter)
        assert args.max_prompt_length is not None, "`fit_to` fills it in"
        reader = text_reader(pair.target, args, max_length=args.max_prompt_length + args.longest_response)
        by_replay = not is_training and pair.target.rollback_reason is not None
        has_responses = (is_training or by_replay) and args.completions_from_target
        if by_replay and not has_responses:
            prompts, has_responses = reader.read_prompts(dataset), True
            dataset = respond_to_all(pair.target, args, prompts, "the evaluation dataset")
        rows = reader.read_texts(dataset) if has_responses else reader.read_prompts(dataset)
        return check_mask_token(pair.drafter, pair.target, rows, "input_ids" if has_responses else "prompt_ids")

    def _set_up(self, args: DraftOPDConfig, drafter: PortableConfig) -> None:
        self.segment_length = args.segment_length(drafter)
        self.streams = {
            "accepted": StreamSettings(args.accepted_loss, args.accepted_weight, 1.0),
            "rejected": StreamSettings(args.rejected_loss, args.rejected_weight, args.slot_decay),
        }
        if args.supervised_weight > 0:
            self.streams["supervised"] = StreamSettings(args.accepted_loss, args.supervised_weight, args.slot_decay)
        self.slot_rules = SlotRules(args.d_pace_floor if args.uses_d_pace else None)
        self._responses = ResponseSource(self.target, args, self.train_dataset)
        self._console = Console()

    @staticmethod
    def _known_texts(
        pair: Pair, args: DraftOPDConfig, rows: Dataset, is_training: bool
    ) -> Iterator[np.ndarray] | None:
        target = pair.target
        if "input_ids" in rows.column_names:
            return stored_texts(rows)
        if not is_training or (target.has_body and store_of(target) is None):
            # What the body decodes, it reads; what it writes, servers do.
            return None
        store = open_store(target, args)
        require_responses(target, store, rows)
        return stored_texts(rows, store)

    def _texts_ahead(self, batches: list[dict[str, torch.Tensor]]) -> list[TargetText]:
        return self._responses.known_texts(batches)

    # -- the rollout: blocks of the current drafter along the target's text -------------------------------------------

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
        rollouts = [batch.rollout for batch in prepared if batch.rollout is not None]
        for rollout in rollouts:
            self._sums["train"].add(rollout_sums(rollout, self.target.eos_token_ids))
        if rollouts:
            self._print_rollout(rollouts[0])
        return prepared

    def _written_texts(self, batches: list[dict[str, torch.Tensor]]) -> list[TargetText]:
        """Return the prompts of a step with the target's responses, which it writes where there are none yet."""
        is_first = self._responses.audit is None
        texts = self._responses.texts(batches)
        # A run that resumes checks again, and logs what the uninterrupted one would have.
        if is_first and self._resumed is None and self._responses.audit is not None:
            self._sums["train"].add({"response_mismatch": (self._responses.audit.share, 1.0)})
        # A phase of the target ends before all ranks do anything else together.
        self.target.finish_together()
        return texts

    def _replay(self, texts: list[TargetText], epoch: int) -> list[PreparedBatch]:
        """Draft along the responses of every micro-batch; keep readings of the target for the loss while they fit."""
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

    @property
    def _segment_length(self) -> int:
        return self.segment_length

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
        """Decode the prompts live, or replay their responses; the loss is that of the blocks of this rollout."""
        # Epoch 0, so that every evaluation draws alike and looks at the same anchors.
        if self.target.rollback_reason is None:
            prepared = self._decode_prompts(batch, epoch=0)
            if self.target.source is not None:
                prepared = replace(prepared, reading=self._read_decoded(prepared.text))
            return prepared, prepared.rollout
        args, text = self.args, text_of(batch)
        limits = {"warn_above": args.warn_mismatch_share, "refuse_above": args.max_mismatch_share}
        rollout, reading = self._walk_evaluation(text, **limits)
        return PreparedBatch(text, rollout, self._mark(rollout, text.sample_ids, epoch=0), reading), rollout

    def _read_decoded(self, text: TargetText) -> TextReading:
        """Read what the body has just decoded, which no source of readings has."""
        layer_ids = self.drafter.config.target_layer_ids
        # With a cache, which a source does not have.
        reading = self.target.read_text(text.input_ids, text.attention_mask, layer_ids, keep_cache=True)
        return reading.without_caches()

    @property
    def _keeps_branches(self) -> bool:
        return self.args.trains_suffix

    def _print_rollout(self, rollout: Rollout) -> None:
        """Show a rollout every `logging_steps`, if asked for."""
        every = max(int(self.state.logging_steps or 1), 1)
        if self.args.log_completions and self.is_world_process_zero() and self.state.global_step % every == 0:
            assert self.target.tokenizer is not None, "the datasets were read with it"
            print_rollout(
                rollout,
                self.target.tokenizer,
                num_rows=self.args.num_completions_to_print,
                step=self.state.global_step,
                console=self._console,
            )

    # -- the streams: which slots are trained, and as what ------------------------------------------------------------

    def _mark(self, rollout: Rollout, sample_ids: Sequence[int], epoch: int) -> BlockBatch:
        """Mark accepted and rejected slots of a rollout, and add supervised blocks if they have a share."""
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
