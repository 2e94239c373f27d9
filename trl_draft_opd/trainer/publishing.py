# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What both trainers do after their steps: measure, record, save the drafter with its card, and publish it.

A base class, because every part of it overrides a method of transformers' Trainer.
"""

import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, SaveStrategy, TrainOutput

from ..data.token_classes import token_classes
from ..drafters.auto import AutoDrafter
from ..export import Publication, TargetOfExport, export_drafter, hub_id_of, read_target
from ..export.card import write_card
from ..export.hub import push_folder, resumable_files
from ..export.record import (
    DatasetFacts,
    Measurement,
    StageRecord,
    TrainingRecord,
    describe_target,
    describe_versions,
    prompts_digest,
    recorded_curve,
    recorded_settings,
    write_record,
)
from ..export.serving import serving_settings
from ..rollout.counts import Counts
from ..rollout.types import Rollout
from ..runs.checkpoints import signed
from ..runs.distributed.launch import evaluating_before_training, is_sharded
from ..runs.distributed.ranks import first_rank_decides
from ..runs.distributed.sharding import full_weights
from ..runs.guard import check_weights
from ..utils.atomic_files import check_place, clear_leftovers, explaining_failure, writing_files
from ..utils.bars import library_bars
from ..utils.console import lasting_output
from .adapters import adapter_settings, check_adapter_launch, is_adapted, merged_drafter, save_drafter
from .common_config import DraftTrainingConfig, parsed
from .hub_names import make_repository, repo_name, require_target_id, target_id
from .metrics import DecodedPrompt, MetricSums, decoded_prompts, rollout_sums
from .pair import Pair
from .resuming import ResumingTrainer


logger = logging.getLogger(__name__)

PUBLICATION = "_publication"
ARGS_FILE = "training_args.bin"
# What a save in the making is called.
SAVED = "drafter"
_RESAMPLES = 2000


class PublishingTrainer(ResumingTrainer):
    """Base of both trainers; `repo_id` is the full name of the repository, if it is made already."""

    hub_model_id: str | None

    def __init__(self, pair: Pair, repo_id: str | None, args: DraftTrainingConfig, **kwargs: Any):
        super().__init__(pair, args, **kwargs)
        self.hub_model_id = repo_id
        # What was measured in this run, by metric prefix and step, and in the ones before it.
        self._measurements: dict[tuple[str, int], Measurement] = {}
        self._earlier = pair.earlier
        self._decoded: list[DecodedPrompt] = []
        self._token_classes: torch.Tensor | None = None
        # The step at which the best weights were loaded again, and their own.
        self._best_loaded: tuple[int, int] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._push: Future | None = None
        check_adapter_launch(self.model, self.accelerator)
        self.drafter.add_model_tags(self._tag_names)
        # Now rather than at the first save: what could not be written into the record.
        TrainingRecord.from_dict(self._record(self._stage(None)).to_dict())

    @lasting_output()
    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`ResumingTrainer.train`]; a later trainer of the same drafter continues its record."""
        output = super().train(*args, **kwargs)
        self.drafter.training_record = self.training_record()
        return output

    @lasting_output()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers' own; printing cannot fail."""
        return super().evaluate(*args, **kwargs)

    # -- measurements -------------------------------------------------------------------------------------------------

    def _count_rollout(self, rollout: Rollout, sample_ids: Sequence[int]) -> None:
        """Add a rollout of evaluation prompts to the metrics, and its rows to the measurement."""
        self._sums["eval"].add(rollout_sums(rollout, self.target.eos_token_ids))
        if self._token_classes is None and self.target.tokenizer is not None:
            self._token_classes = token_classes(self.target.tokenizer, self.target.vocab_size)
        self._decoded += decoded_prompts(rollout, sample_ids, self._token_classes)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate one dataset and add its own metrics under their prefix, tau with its 95 % interval."""
        self._sums["eval"], self._decoded = MetricSums(), []
        with evaluating_before_training(self):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        metrics = self._sums["eval"].pop()
        # Ranks whose share is short decode some prompts again, which count once.
        prompts = {prompt.sample_id: prompt for prompt in gather_object(self._decoded)}
        if sum(prompt.counts.num_blocks for prompt in prompts.values()):
            in_order = [prompts[number] for number in sorted(prompts)]
            measured = self._add_measurement(metric_key_prefix, in_order)
            metrics |= {"tau": measured.tau, "tau_low": measured.tau_low, "tau_high": measured.tau_high}
            metrics |= {f"acceptance/slot_{k}": rate for k, rate in enumerate(measured.acceptance_per_slot, 1)}
            rejections = MetricSums()
            for prompt in in_order:
                rejections.add(prompt.rejections)
            metrics |= rejections.ratios()
        assert output.metrics is not None, "transformers has its own in there"
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _add_measurement(self, prefix: str, prompts: Sequence[DecodedPrompt]) -> Measurement:
        """Add what was measured on a set of prompts; `prefix` is that of its metrics."""
        args, step = self.args, self.state.global_step
        counts = sum((prompt.counts for prompt in prompts), Counts())
        low, high = counts.interval(num_resamples=_RESAMPLES, seed=args.seed)
        measured = self._measurements[prefix, step] = Measurement(
            prompt_set=_one_word("evaluation" if prefix == "eval" else prefix.removeprefix("eval_")),
            prompts_sha256=prompts_digest([prompt.ids for prompt in prompts]),
            num_prompts=len(prompts),
            temperature=args.temperature,
            draft_sampling=args.draft_sampling,
            num_drafts=self.num_drafts,
            max_completion_length=args.longest_response,
            batch_size=args.per_device_eval_batch_size,
            ignore_eos=False,
            tau=counts.tau,
            tau_low=low,
            tau_high=high,
            acceptance_per_slot=counts.acceptance_per_slot,
            num_blocks=counts.num_blocks,
            num_different=None,
            target_dtype=str(self.target.causal_lm.dtype).removeprefix("torch."),
            after_steps=step,
            is_replay=self.target.rollback_reason is not None,
        )
        return measured

    def _load_best_model(self) -> None:
        """Load the best weights, and remember whose measurements are theirs."""
        super()._load_best_model()
        assert self.state.best_global_step is not None, "the best weights are those of a step"
        self._best_loaded = (self.state.global_step, self.state.best_global_step)

    @property
    def _steps_done(self) -> int:
        """Optimiser steps behind the weights: fewer than were run where the best ones were loaded again."""
        loaded_at, best = self._best_loaded or (-1, 0)
        return best if loaded_at == self.state.global_step else self.state.global_step

    # -- the record ---------------------------------------------------------------------------------------------------

    def training_record(self, *, dataset_name: str | None = None) -> TrainingRecord:
        """
        Return what was trained and measured so far, earlier stages included.

        Args:
            dataset_name (`str`, *optional*): Hub id of the training data, in place of `dataset_id`.
        """
        return self._record(self._stage(dataset_name) if self.state.global_step > 0 else None)

    def _record(self, stage: StageRecord | None) -> TrainingRecord:
        args, target, earlier = self.args, self.target, self._earlier
        assert target.tokenizer is not None, "the datasets were read with it"
        template = target.tokenizer.chat_template
        facts = describe_target(
            target.config,
            name=None,
            revision=args.target_revision,
            dtype=target.causal_lm.dtype,
            num_parameters=target.num_parameters,
            # Tokenizers may hold several.
            chat_template=args.chat_template or (template.get("default") if isinstance(template, dict) else template),
            chat_template_kwargs=parsed(args.chat_template_kwargs),
        )
        stages = list(earlier.stages) if earlier is not None else []
        # What was measured before the last updates is not this drafter's.
        measured = [m for m in self._measurements.values() if m.after_steps == self._steps_done]
        if stage is None and not measured and earlier is not None:
            measured = list(earlier.measurements)
        return TrainingRecord(
            target=replace(facts, name=target_id(args, target)),
            family=self.drafter.config.family,
            stages=stages if stage is None else [*stages, stage],
            measurements=measured,
            versions=describe_versions(),
            served=list(earlier.served) if stage is None and earlier is not None else [],
        )

    def _stage(self, dataset_name: str | None) -> StageRecord:
        """Return this run as a stage of the drafter's making."""
        # A stream has no length.
        num_rows = len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None
        log = [entry for entry in self.state.log_history if entry.get("step", 0) <= self._steps_done]
        return StageRecord(
            method=self._method,
            steps=self._steps_done,
            settings=self._recorded_settings(),
            dataset=DatasetFacts(
                hub_id_of(dataset_name) if dataset_name else self.args.dataset_id,
                self.args.dataset_license,
                num_rows,
                "dataset" if self.args.completions_are_given else "target",
            ),
            curve=recorded_curve(log),
        )

    def _recorded_settings(self) -> dict[str, Any]:
        """Return what the record states about how this run trains."""
        return recorded_settings(self.args) | adapter_settings(self.drafter)

    def _shared_state(self) -> dict[str, Any]:
        measured = [[prefix, step, asdict(m)] for (prefix, step), m in self._measurements.items()]
        return super()._shared_state() | {"measurements": measured}

    def _load_shared_state(self, shared: dict[str, Any]) -> None:
        super()._load_shared_state(shared)
        self._measurements = {
            (prefix, step): Measurement(**measured) for prefix, step, measured in shared["measurements"]
        }

    # -- saving -------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the drafter, whole and in float32 whatever wrapper it is trained in. Collective.

        Args:
            output_dir (`str`, *optional*):
                Folder; `output_dir` of the settings by default. Its files are replaced one by one, each whole.

        Raises:
            FloatingPointError: If a weight is not finite; nothing is written then.
            ValueError: If a file lies where the folder should be.
            OSError: If it cannot be written; what was in the folder is whole, and the drafter still in memory.
        """
        folder = Path(output_dir) if output_dir else self.args.output_folder
        weights = full_weights(self.accelerator, self.model_wrapped)
        fix = (
            f"What was in {str(folder)!r} is whole, and the drafter is still in memory: make room, or name another "
            "folder, and save again"
        )

        def write() -> None:
            check_weights(weights)
            check_place(folder, "The drafter's folder")
            with explaining_failure("The drafter", fix):
                clear_leftovers(folder, re.compile(SAVED))
                with writing_files(folder, SAVED) as staged:
                    self._save(str(staged), state_dict=weights, notes_of=folder)
                # Of transformers' own saves; pickled arguments can hold a token.
                (folder / ARGS_FILE).unlink(missing_ok=True)

        first_rank_decides(self.accelerator, write)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(
        self,
        output_dir: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        notes_of: Path | None = None,
    ) -> None:
        """
        Write the drafter with its record and card; a card in the folder `notes_of` hands on its notes.

        In place of transformers' own, which pickles the arguments beside the drafter, token and all.
        """
        folder = Path(output_dir) if output_dir else self.args.output_folder
        record = self.training_record()
        with library_bars(False):  # a drafter is one file
            save_drafter(self.drafter, folder, state_dict)
        write_record(record, folder)
        self._write_card(folder, record, notes_of=notes_of)

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the card into `output_dir`; of the arguments, `dataset_name` and `license` are used."""
        if self.is_world_process_zero():
            record = self.training_record(dataset_name=kwargs.get("dataset_name"))
            folder = self.args.output_folder
            self._write_card(folder, record, notes_of=folder, license=kwargs.get("license"))

    def _write_card(
        self, folder: Path, record: TrainingRecord, *, notes_of: Path | None, license: str | None = None
    ) -> None:
        """Write the card of a checkpoint, or of a saved drafter; both have the flat layout's names."""
        publication = Publication.of(
            self.drafter,
            dtype=torch.float32,
            layouts=("flat",),
            target=TargetOfExport(target_id(self.args, self.target), self.target.config),
            repo_id=self.hub_model_id or self.args.hub_model_id,
            license=license or self.args.hub_license,
            record=record,
        )
        write_card(
            folder,
            publication,
            serving_settings(publication),
            notes_of=notes_of,
            # Checkpoints are written often, and a picture takes longer than all else in a small one.
            draws_curve=notes_of is not None,
            is_adapter=is_adapted(self.drafter),
        )

    def export(
        self, folder: str | Path | None = None, *, dataset_name: str | None = None, license: str | None = None
    ) -> Path:
        """
        Write the drafter as it is now in every layout that can hold it; see [`export_drafter`].

        Where the drafter is sharded (FSDP2, ZeRO-3), every rank has to call it, and the drafter is saved to
        `output_dir` first.

        Args:
            folder (`str` or `Path`, *optional*): Where to; `_publication` in `output_dir` by default.
            dataset_name (`str`, *optional*), license (`str`, *optional*): In place of `dataset_id` and `hub_license`.

        Returns:
            `Path`: The folder, which the first rank writes.

        Raises:
            ValueError: If the target has no Hub id to be named by.
        """
        saved = self.args.output_folder
        folder = Path(folder) if folder is not None else saved / PUBLICATION
        if is_sharded(self.accelerator):
            self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self._export(folder, saved, dataset_name=dataset_name, license=license)
        return folder

    def _export(
        self, folder: Path, saved: Path, *, dataset_name: str | None = None, license: str | None = None
    ) -> None:
        """Write every layout of the drafter as it is now; of a sharded one, as the folder `saved` holds it."""
        args, target = self.args, self.target
        if is_sharded(self.accelerator):
            drafter = AutoDrafter.from_pretrained(saved, num_target_layers=target.num_layers)
        else:
            drafter = merged_drafter(self.drafter)
        if target.config.name_or_path and not target.is_merged:
            # As the target's file holds it.
            token = (parsed(args.target_init_kwargs) or {}).get("token")
            embedding = read_target(target.config.name_or_path, revision=args.target_revision, token=token).embedding
        else:
            table: Any = target.causal_lm.get_input_embeddings()
            embedding = table.weight
        export_drafter(
            drafter,
            folder,
            target=TargetOfExport(require_target_id(args, target), target.causal_lm.config, embedding),
            repo_id=self.hub_model_id or repo_name(args, drafter.config.family),
            record=self.training_record(dataset_name=dataset_name),
            license=license or args.hub_license,
        )

    # -- the Hub ------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Do nothing: the repository is made before this trainer is there, or at the first push."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        dataset_name: str | None = None,
        license: str | None = None,
        **kwargs: Any,
    ) -> "str | Future | None":
        """
        Save the drafter and publish it: every layout, settings to serve it and the card, as one commit.

        Args:
            commit_message (`str`, *optional*), blocking (`bool`, *optional*), token (`str`, *optional*),
            revision (`str`, *optional*), private (`bool`, *optional*):
                As in [`~transformers.Trainer.push_to_hub`].
            dataset_name (`str`, *optional*), license (`str`, *optional*):
                Hub id of the training data and licence of the drafter, in place of `dataset_id` and `hub_license`.
            kwargs: Accepted for transformers' sake; the card is written from the training record.

        Returns:
            `str`, the commit's address, or a `Future` of it if not `blocking`; `None` on other ranks than the first.

        Raises:
            ValueError: If the repository's name is refused, the target has no Hub id, or the repository is public
                where a private one is asked for; the drafter is saved by then.
            PermissionError, ConnectionError: If the Hub refuses or cannot be reached; the export in `_publication` is
                complete.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        # Before the Hub is asked, which may be far: the name is needed whatever it says.
        require_target_id(self.args, self.target)
        self._finish_current_push()
        if self._earlier is None and not self._measurements:
            logger.warning(
                "Nothing was measured, and the card will say so. Call `evaluate()` before a push to have tau on it."
            )
        folder = self.args.output_folder / PUBLICATION
        try:
            if self.hub_model_id is None:
                # Not asked for before training. Its full name goes into commands that can be pasted.
                self.hub_model_id = make_repository(self.args, self.drafter.config.family, token, private)
        finally:
            self._export(folder, self.args.output_folder, dataset_name=dataset_name, license=license)
        message = commit_message or "Upload drafter"
        push = self._make_push(folder, message, token=token, private=private, revision=revision)
        if blocking:
            return push()
        self._push = self._pool.submit(push)
        return self._push

    def _make_push(
        self,
        folder: Path,
        message: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        extra_folders: dict[str, dict[str, Path | bytes]] | None = None,
    ) -> Callable[[], str]:
        """Return the push of an export, see [`push_folder`]; what is not given is taken from the settings."""
        assert self.hub_model_id is not None, "the repository is made before the first push"
        return partial(
            push_folder,
            folder,
            self.hub_model_id,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=message,
            extra_folders=extra_folders,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Publish what a save just wrote, in the background; a push that fails is reported and training goes on.

        While one push runs, saves are not pushed, or, under `hub_always_push`, wait for it.
        """
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if self._push is not None and not self._push.done() and not args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        folder, checkpoint, extra = args.output_folder / PUBLICATION, Path(checkpoint_folder), {}
        try:
            self._export(folder, checkpoint)
            if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
                extra = {place: signed(resumable_files(checkpoint))}
        except (ValueError, OSError) as error:
            logger.warning("Nothing was pushed, training goes on: %s", error)
            return
        by_step = args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        self._push = self._pool.submit(self._make_push(folder, f"Training in progress, {when}", extra_folders=extra))
        if extra and args.save_total_limit is not None:
            # The folder that is being read is the next to be deleted.
            self._finish_current_push()

    def _finish_current_push(self) -> None:
        """Wait for a push in the background, and warn if it failed; transformers calls it when training ends."""
        push, self._push = self._push, None
        if push is not None and (error := push.exception()) is not None:
            logger.warning("A push failed, training goes on: %s", error)


def _one_word(name: str) -> str:
    """Return a user's name for a set of prompts as the record takes it: it may be a path, or a sentence."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-_")[:64] or "evaluation"
