# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What both trainers do behind their steps: log, measure, keep a record of training, and publish.

A base class and no functions, because every part of it takes the place of a method of transformers' Trainer.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, SaveStrategy

from ..drafters.auto import AutoDrafter
from ..drafters.base import Drafter
from ..export import Publication, TargetOfExport, export_drafter, hub_id_of, read_target
from ..export.card import CARD_FILE, write_card
from ..export.hub import create_repository, push_folder
from ..export.record import (
    DatasetFacts,
    Measurement,
    StageRecord,
    TrainingRecord,
    describe_target,
    describe_versions,
    prompts_digest,
    read_record,
    recorded_curve,
    recorded_settings,
    write_record,
)
from ..export.serving import serving_settings
from ..rollout.counts import bootstrap_tau
from ..rollout.types import Rollout
from ..runs.distributed.launch import evaluating_before_training, is_sharded
from ..runs.distributed.sharding import full_weights
from ..runs.guard import check_weights
from ..utils.atomic_files import clear_leftovers, move_files, staging_folder
from .adapters import (
    adapter_settings,
    check_adapter_launch,
    is_adapted,
    merged_drafter,
    save_drafter,
)
from .common_config import DraftTrainingConfig
from .hub_names import check_publishing, repository_name, require_target_id, target_id_of
from .metrics import MetricSums, rollout_sums
from .resuming import ResumingTrainer


logger = logging.getLogger(__name__)

PUBLICATION = "_publication"
ARGS_FILE = "training_args.bin"
# What a save in the making is called.
SAVED = "drafter"
_RESAMPLES = 2000


class PublishingTrainer(ResumingTrainer):
    """Base of both trainers; expects `target`, `num_drafts` and a `_method`, `"sft"` or `"opd"`."""

    num_drafts: int

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_adapter_launch(self.model, self.accelerator)
        self.model.add_model_tags(self._tag_names)
        # Now rather than at the first save: what could not be written into the record.
        record = self.training_record()
        TrainingRecord.from_dict(replace(record, stages=[*record.stages, self._stage(None)]).to_dict())

    def _prepare_publishing(self, args: DraftTrainingConfig, drafter: Drafter) -> None:
        """Refuse now what could not be pushed later, and start logs, measurements and the record."""
        check_publishing(args, drafter, self.target)
        self._eval_rows: list[_DecodedPrompt] = []
        self._measurements: dict[tuple[str, int], Measurement] = {}
        self._best_loaded: tuple[int, int] | None = None
        self._earlier = _read_earlier_record(drafter)
        self._pushes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._push: Future | None = None

    # -- logs and measurements -----------------------------------------------------------------------------------------

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: transformers' estimate counts a language model's tokens, which says nothing about blocks."""
        return 0

    def _count_rollout(self, rollout: Rollout, prompts: Sequence[Sequence[int]], sample_ids: Sequence[int]) -> None:
        """Add a rollout of evaluation prompts to the metrics, and its rows to the measurement."""
        self._sums["eval"].add(rollout_sums(rollout, self.target.eos_token_ids))
        counted = rollout.is_counted
        accepted = rollout.accepted * counted
        sums = (accepted + counted.long()).sum(dim=1).tolist()
        slots = torch.arange(1, rollout.drafts.shape[-1] + 1, device=accepted.device)
        kept = (accepted[:, :, None] >= slots).sum(dim=1).tolist()
        rows = zip(sample_ids, prompts, sums, counted.sum(dim=1).tolist(), kept, strict=True)
        self._eval_rows += [_DecodedPrompt(number, list(prompt), *counts) for number, prompt, *counts in rows]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate one dataset and add the metrics gathered on it, under its own prefix, tau with its 95 % interval."""
        self._sums["eval"], self._eval_rows = MetricSums(), []
        with evaluating_before_training(self):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        metrics = self._sums["eval"].pop()
        # Ranks whose share is short decode some prompts again, which count once.
        rows = {row.sample_id: row for row in gather_object(self._eval_rows)}
        if sum(row.num_blocks for row in rows.values()):
            measured = self._measurement(metric_key_prefix, [rows[number] for number in sorted(rows)])
            self._measurements[metric_key_prefix, self.state.global_step] = measured
            metrics |= {"tau": measured.tau, "tau_low": measured.tau_low, "tau_high": measured.tau_high}
            metrics |= {f"acceptance/slot_{k}": rate for k, rate in enumerate(measured.acceptance_per_slot, 1)}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _measurement(self, prefix: str, rows: "list[_DecodedPrompt]") -> Measurement:
        sums, blocks = [row.accepted_sum for row in rows], [row.num_blocks for row in rows]
        low, high = bootstrap_tau(sums, blocks, num_resamples=_RESAMPLES, seed=self.args.seed)
        return Measurement(
            prompt_set=_one_word("evaluation" if prefix == "eval" else prefix.removeprefix("eval_")),
            prompts_sha256=prompts_digest([row.prompt for row in rows]),
            num_prompts=len(rows),
            temperature=self.args.temperature,
            draft_sampling=self.args.draft_sampling,
            num_drafts=self.num_drafts,
            max_new_tokens=self.args.max_completion_length,
            batch_size=self.args.per_device_eval_batch_size,
            ignore_eos=False,
            tau=sum(sums) / sum(blocks),
            tau_low=low,
            tau_high=high,
            acceptance_per_slot=[sum(row.kept[k] for row in rows) / sum(blocks) for k in range(self.num_drafts)],
            num_blocks=sum(blocks),
            num_different=None,
            target_dtype=str(self.target.causal_lm.dtype).removeprefix("torch."),
            after_steps=self.state.global_step,
        )

    def _load_best_model(self) -> None:
        """Load the best weights, and remember whose measurements are theirs."""
        super()._load_best_model()
        self._best_loaded = (self.state.global_step, self.state.best_global_step)

    @property
    def _steps_done(self) -> int:
        """Optimiser steps behind the weights as they are now: fewer than were run where the best ones were loaded again."""
        is_best = self._best_loaded is not None and self._best_loaded[0] == self.state.global_step
        return self._best_loaded[1] if is_best else self.state.global_step

    # -- the record ----------------------------------------------------------------------------------------------------

    def training_record(self, *, dataset_name: str | None = None) -> TrainingRecord:
        """
        Return what was trained and measured so far, earlier stages included.

        Args:
            dataset_name (`str`, *optional*): Hub id of the training data, in place of `dataset_id`.
        """
        args = self.args
        target = describe_target(
            self.target.config,
            name=None,
            revision=args.target_model_revision,
            dtype=self.target.causal_lm.dtype,
            num_parameters=self.target.causal_lm.num_parameters(),
            chat_template=args.chat_template or _template_text(self.target.tokenizer.chat_template),
            chat_template_kwargs=args.chat_template_kwargs,
        )
        target = replace(target, name=target_id_of(args, self.target))
        trained = self.state.global_step > 0
        stages = list(self._earlier.stages) if self._earlier is not None else []
        # What was measured before the last updates is not this drafter's.
        measured = [m for m in self._measurements.values() if m.after_steps == self._steps_done]
        if not trained and not measured and self._earlier is not None:
            measured = list(self._earlier.measurements)
        return TrainingRecord(
            target=target,
            family=self.accelerator.unwrap_model(self.model).config.family,
            stages=[*stages, self._stage(dataset_name)] if trained else stages,
            measurements=measured,
            versions=describe_versions(),
        )

    def _stage(self, dataset_name: str | None) -> StageRecord:
        """Return this run as a stage of the drafter's making."""
        try:
            num_rows = len(self.train_dataset) if self.train_dataset is not None else None
        except TypeError:  # a stream
            num_rows = None
        return StageRecord(
            method=self._method,
            steps=self._steps_done,
            settings=recorded_settings(self.args) | adapter_settings(self.accelerator.unwrap_model(self.model)),
            dataset=DatasetFacts(
                hub_id_of(dataset_name) if dataset_name else self.args.dataset_id,
                self.args.dataset_license,
                num_rows,
                "dataset" if self.args.completions_are_given else "target",
            ),
            curve=recorded_curve(
                [entry for entry in self.state.log_history if entry.get("step", 0) <= self._steps_done]
            ),
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the drafter, whole and in float32 whatever wrapper it is trained in. Collective.

        Args:
            output_dir (`str`, *optional*): Folder; `output_dir` of the settings by default. Its files are replaced one by one, each whole.

        Raises:
            FloatingPointError: If a weight is not finite; nothing is written then.
        """
        folder = Path(output_dir or self.args.output_dir)
        weights = full_weights(self.accelerator, self.model_wrapped)

        def write() -> None:
            check_weights(weights)
            folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(folder, re.compile(SAVED))
            with staging_folder(folder, SAVED) as staged:
                self._save(str(staged), state_dict=weights, notes_of=folder)
                move_files(staged, folder)
            # Written by earlier versions; pickled arguments can hold a token.
            (folder / ARGS_FILE).unlink(missing_ok=True)

        self._first_rank_decides(write)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(
        self,
        output_dir: str | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        notes_of: Path | None = None,
    ) -> None:
        """Write the drafter with its record and card. In place of transformers' own, which pickles the arguments beside it, token and all."""
        folder = Path(output_dir or self.args.output_dir)
        drafter = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        save_drafter(drafter, folder, state_dict)
        write_record(self.training_record(), folder)
        if notes_of is not None and (notes_of / CARD_FILE).is_file():
            # The new card keeps the notes people wrote into the earlier one.
            shutil.copy(notes_of / CARD_FILE, folder / CARD_FILE)
        # Checkpoints are written often, and a picture takes longer than all else in a small one.
        self._write_card(folder, draws_curve=notes_of is not None)

    def _shared_state(self) -> dict[str, Any]:
        measured = [[prefix, step, asdict(m)] for (prefix, step), m in self._measurements.items()]
        return super()._shared_state() | {"measurements": measured}

    def _load_shared_state(self, shared: dict[str, Any]) -> None:
        super()._load_shared_state(shared)
        self._measurements = {(prefix, step): Measurement(**m) for prefix, step, m in shared["measurements"]}

    # -- publishing ----------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Make the repository to publish to; transformers calls it before training where `push_to_hub=True`.

        Raises:
            ValueError, PermissionError, ConnectionError: As [`push_to_hub`].
        """
        if not self.is_world_process_zero():
            return
        self.hub_model_id = create_repository(
            repository_name(self.args, self.accelerator.unwrap_model(self.model)),
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
        )

    def export(
        self, folder: str | Path | None = None, *, dataset_name: str | None = None, license: str | None = None
    ) -> Path:
        """
        Write the drafter as it is now in every layout that can hold it; see [`export_drafter`].

        Where the drafter is sharded (FSDP2, ZeRO-3), every rank has to call it, and the drafter is saved to `output_dir` first.

        Args:
            folder (`str` or `Path`, *optional*): Where to; `_publication` in `output_dir` by default.
            dataset_name (`str`, *optional*), license (`str`, *optional*): In place of `dataset_id` and `hub_license`.

        Returns:
            `Path`: The folder, which the first rank writes.

        Raises:
            ValueError: If the target has no Hub id to be named by.
        """
        folder = Path(folder) if folder is not None else Path(self.args.output_dir) / PUBLICATION
        if is_sharded(self.accelerator):
            self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self._export(folder, Path(self.args.output_dir), dataset_name=dataset_name, license=license)
        return folder

    def _export(
        self, folder: Path, saved: Path, *, dataset_name: str | None = None, license: str | None = None
    ) -> Path:
        """Write every layout of the drafter as it is now; of a sharded one, as the folder `saved` holds it."""
        drafter = merged_drafter(self.accelerator.unwrap_model(self.model))
        if is_sharded(self.accelerator):
            drafter = AutoDrafter.from_pretrained(saved, num_target_layers=self.target.num_layers)
        export_drafter(
            drafter,
            folder,
            target=TargetOfExport(
                require_target_id(self.args, self.target), self.target.causal_lm.config, self._target_embedding()
            ),
            repo_id=self.hub_model_id or repository_name(self.args, drafter),
            record=self.training_record(dataset_name=dataset_name),
            license=license or self.args.hub_license,
        )
        return folder

    def _target_embedding(self) -> torch.Tensor:
        """Return the target's embedding as its file holds it, or, of an instance, as it is in memory."""
        name = self.target.config.name_or_path
        if name:
            token = (self.args.target_model_init_kwargs or {}).get("token")
            return read_target(name, revision=self.args.target_model_revision, token=token).embedding
        return self.target.causal_lm.get_input_embeddings().weight

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the card of the drafter into `output_dir`; see [`write_card`]. Arguments of transformers' card have no part in it."""
        if self.is_world_process_zero():
            self._write_card(
                Path(self.args.output_dir), dataset_name=kwargs.get("dataset_name"), license=kwargs.get("license")
            )

    def _write_card(
        self, folder: Path, *, dataset_name: str | None = None, license: str | None = None, draws_curve: bool = True
    ) -> None:
        """Write the card of a checkpoint, which has the flat layout's names."""
        drafter = self.accelerator.unwrap_model(self.model)
        publication = Publication.of(
            drafter,
            dtype=torch.float32,
            layouts=("flat",),
            target=TargetOfExport(target_id_of(self.args, self.target), self.target.config),
            repo_id=self.hub_model_id or self.args.hub_model_id,
            license=license or self.args.hub_license,
            record=self.training_record(dataset_name=dataset_name),
        )
        settings = serving_settings(publication)
        write_card(folder, publication, settings, draws_curve=draws_curve, is_adapter=is_adapted(drafter))

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
            commit_message (`str`, *optional*), blocking (`bool`, *optional*), token (`str`, *optional*), revision (`str`, *optional*), private (`bool`, *optional*):
                As in [`~transformers.Trainer.push_to_hub`].
            dataset_name (`str`, *optional*), license (`str`, *optional*):
                Hub id of the training data and licence of the drafter, in place of `dataset_id` and `hub_license`.
            kwargs: Accepted for transformers' sake; the card is written from the training record.

        Returns:
            `str`, the commit's address, or a `Future` of it if not `blocking`; `None` on other ranks than the first.

        Raises:
            ValueError: If the repository's name is refused, the target has no Hub id, or the repository is public where a private
                one is asked for; the drafter is saved by then.
            PermissionError, ConnectionError: If the Hub refuses or cannot be reached; the export lies in `_publication`, complete.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        if self._earlier is None and not self._measurements:
            logger.warning(
                "Nothing was measured, and the card will say so. Call `evaluate()` before a push to have tau on it."
            )
        try:
            if self.hub_model_id is None:
                # Not asked for before training. Its full name goes into commands that can be pasted.
                self.init_hf_repo(token=token, private=private)
        finally:
            output_dir = Path(self.args.output_dir)
            folder = self._export(output_dir / PUBLICATION, output_dir, dataset_name=dataset_name, license=license)
        options = {
            "token": token or self.args.hub_token,
            "private": self.args.hub_private_repo if private is None else private,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message or "Upload drafter",
        }
        if blocking:
            return push_folder(folder, self.hub_model_id, **options)
        self._push = self._pushes.submit(push_folder, folder, self.hub_model_id, **options)
        return self._push

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Publish what a save just wrote, in the background; a push that fails is reported and training goes on.

        One push runs at a time: while one does, saves are not pushed, or, under `hub_always_push`, wait for it.
        """
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_busy = self._push is not None and not self._push.done()
        if is_busy and not self.args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            folder = self._export(Path(self.args.output_dir) / PUBLICATION, Path(checkpoint_folder))
        except (ValueError, OSError) as error:
            logger.warning("Nothing was pushed, training goes on: %s", error)
            return
        unit = "step" if self.args.save_strategy == SaveStrategy.STEPS else "epoch"
        when = self.state.global_step if unit == "step" else int(self.state.epoch or 0)
        extra = {}
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            extra = {"last-checkpoint": checkpoint_folder}
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            extra = {Path(checkpoint_folder).name: checkpoint_folder}
        self._push = self._pushes.submit(
            push_folder,
            folder,
            self.hub_model_id,
            token=self.args.hub_token,
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, {unit} {when}",
            extra_folders=extra,
        )
        if extra and self.args.save_total_limit is not None:
            # The folder that is being read is the next to be deleted.
            self._finish_current_push()

    def _finish_current_push(self) -> None:
        """Wait for a push in the background and say if it failed, whatever the reason."""
        if self._push is None:
            return
        push, self._push = self._push, None
        error = push.exception()
        if error is not None:
            logger.warning("A push failed, training goes on: %s", error)


@dataclass(frozen=True)
class _DecodedPrompt:
    """What one evaluation prompt adds to a measurement: its tokens, `sum (r + 1)`, blocks, and blocks that keep each slot."""

    sample_id: int
    prompt: list[int]
    accepted_sum: int
    num_blocks: int
    kept: list[int]


def _one_word(name: str) -> str:
    """Return a user's name for a set of prompts as the record takes it: it may be a path, or a sentence."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-_")[:64] or "evaluation"


def _template_text(template: str | dict[str, str] | None) -> str | None:
    """Return the template that is used where none is named; tokenizers may hold several."""
    return template.get("default") if isinstance(template, dict) else template


def _read_earlier_record(drafter: Drafter) -> TrainingRecord | None:
    """Return the record in the folder a drafter was loaded from, if that is a folder with one."""
    name = drafter.config.name_or_path
    record = read_record(name) if name and Path(name).is_dir() else None
    return (
        replace(record, measurements=[replace(m, after_steps=None) for m in record.measurements]) if record else None
    )
