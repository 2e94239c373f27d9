# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What both trainers do behind their steps: log, measure, keep a record of training, and publish.

A base class and no functions, because every part of it takes the place of a method of transformers' Trainer.
"""

import logging
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, SaveStrategy

from .._trl import _BaseTrainer
from ..drafters.base import Drafter
from ..evaluation import bootstrap_tau
from ..export import export_drafter, hub_id_of, read_target
from ..export.card import write_card
from ..export.flat import flat_config
from ..export.hub import create_repository, push_folder, validate_repo_id
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
from ..rollout.types import Rollout
from ..target import FrozenTarget
from .common_config import DraftTrainingConfig
from .metrics import MetricSums, rollout_sums


logger = logging.getLogger(__name__)

PUBLICATION = "_publication"
ARGS_FILE = "training_args.bin"
_FAMILY_WORDS = {"eagle3": "EAGLE3", "dflash": "DFlash"}
_RESAMPLES = 2000


def check_publishing(args: DraftTrainingConfig, drafter: Drafter, target: FrozenTarget) -> None:
    """
    Before training: settle where a run with `push_to_hub=True` publishes to.

    Raises:
        ValueError: If the repository's name is refused, or the target has no Hub id to be named by.
    """
    if not args.push_to_hub:
        return
    args.hub_model_id = repository_name(args, drafter)
    validate_repo_id(args.hub_model_id, drafter.config.family)
    require_target_id(args, target)


def repository_name(args: DraftTrainingConfig, drafter: Drafter) -> str:
    """Return `hub_model_id`, or a name from the output folder that says the family, as vLLM wants it."""
    if args.hub_model_id is not None:
        return args.hub_model_id
    name, word = Path(args.output_dir).absolute().name, _FAMILY_WORDS[drafter.config.family]
    return name if word.lower() in name.lower() else f"{name}-{word}"


def require_target_id(args: DraftTrainingConfig, target: FrozenTarget) -> str:
    """
    Return the Hub id by which a published drafter names its target.

    Raises:
        ValueError: If there is none.
    """
    found = args.hub_target_id or hub_id_of(target.config.name_or_path)
    if found is None or hub_id_of(found) is None:
        raise ValueError(
            f"A published drafter names its target by its Hub id, in the card and in the speculators config, but this target is known as "
            f"{target.config.name_or_path or 'an instance'!r} only. Set `hub_target_id='ORG/NAME'`."
        )
    return found


class PublishingTrainer(_BaseTrainer):
    """Base of both trainers; expects `target`, `num_drafts` and a `_method`, `"sft"` or `"opd"`."""

    _method = ""
    target: FrozenTarget
    num_drafts: int

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Now rather than at the first save: what could not be written into the record.
        TrainingRecord.from_dict(self.training_record().to_dict())

    def _prepare_publishing(self, args: DraftTrainingConfig, drafter: Drafter) -> None:
        """Refuse now what could not be pushed later, and start logs, measurements and the record."""
        check_publishing(args, drafter, self.target)
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._eval_rows: list[tuple[int, int, list[int]]] = []
        self._measurements: dict[str, Measurement] = {}
        self._earlier = _read_earlier_record(drafter)
        self._pushes = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        self._push: Future | None = None

    # -- logs and measurements -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered in training since the last log."""
        if not next(iter(logs)).startswith("eval_"):
            logs.update(self._sums["train"].pop())
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: transformers' estimate counts a language model's tokens, which says nothing about blocks."""
        return 0

    def _count_rollout(self, rollout: Rollout, prompts: Sequence[Sequence[int]]) -> None:
        """Add a rollout of evaluation prompts to the metrics, and its rows to the measurement."""
        self._sums["eval"].add(rollout_sums(rollout))
        counted = rollout.is_counted
        accepted = ((rollout.accepted + 1) * counted).sum(dim=1).tolist()
        blocks = counted.sum(dim=1).tolist()
        self._eval_rows += [(a, b, list(p)) for a, b, p in zip(accepted, blocks, prompts, strict=True)]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate one dataset and add the metrics gathered on it, under its own prefix, tau with its 95 % interval."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = self._sums["eval"].pop()
        rows, self._eval_rows = gather_object(self._eval_rows), []
        if metrics.get("tau") is not None:
            low, high = bootstrap_tau(
                [row[0] for row in rows], [row[1] for row in rows], num_resamples=_RESAMPLES, seed=self.args.seed
            )
            metrics |= {"tau_low": low, "tau_high": high}
            self._measurements[metric_key_prefix] = self._measurement(metric_key_prefix, metrics, rows)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _measurement(
        self, prefix: str, metrics: dict[str, float], rows: list[tuple[int, int, list[int]]]
    ) -> Measurement:
        return Measurement(
            # One word: a name that users choose may hold anything.
            prompt_set=re.sub(r"[^A-Za-z0-9_.-]+", "-", prefix.removeprefix("eval_").replace("eval", "evaluation"))[
                :64
            ],
            # Ranks hand their rows over one after the other.
            prompts_sha256=prompts_digest(sorted(row[2] for row in rows)),
            num_prompts=len(rows),
            temperature=self.args.temperature,
            draft_sampling=self.args.draft_sampling,
            num_drafts=self.num_drafts,
            max_new_tokens=self.args.max_completion_length,
            batch_size=self.args.per_device_eval_batch_size,
            ignore_eos=False,
            tau=metrics["tau"],
            tau_low=metrics["tau_low"],
            tau_high=metrics["tau_high"],
            acceptance_per_slot=[metrics[f"acceptance/slot_{k}"] for k in range(1, self.num_drafts + 1)],
            num_blocks=sum(row[1] for row in rows),
            num_different=None,
            target_dtype=str(self.target.causal_lm.dtype).removeprefix("torch."),
            after_steps=self.state.global_step,
        )

    # -- the record ----------------------------------------------------------------------------------------------------

    def training_record(self, *, dataset_name: str | None = None) -> TrainingRecord:
        """
        Return what was trained and measured so far, earlier stages included.

        Args:
            dataset_name (`str`, *optional*): Hub id of the training data, in place of `dataset_id`.
        """
        args, drafter = self.args, self.accelerator.unwrap_model(self.model)
        completions = "dataset" if args.completions_are_given else "target"
        try:
            num_rows = len(self.train_dataset) if self.train_dataset is not None else None
        except TypeError:  # a stream
            num_rows = None
        stage = StageRecord(
            method=self._method,
            steps=self.state.global_step,
            settings=recorded_settings(args),
            dataset=DatasetFacts(
                hub_id_of(dataset_name or args.dataset_id), args.dataset_license, num_rows, completions
            ),
            curve=recorded_curve(self.state.log_history),
        )
        target = describe_target(
            self.target.config,
            name=args.hub_target_id or self.target.config.name_or_path,
            revision=args.target_model_revision,
            dtype=self.target.causal_lm.dtype,
            num_parameters=self.target.causal_lm.num_parameters(),
            chat_template=args.chat_template or self.target.tokenizer.chat_template,
            chat_template_kwargs=args.chat_template_kwargs,
        )
        trained = self.state.global_step > 0
        stages = list(self._earlier.stages) if self._earlier is not None else []
        measured = list(self._measurements.values())
        if not trained and self._earlier is not None and not measured:
            measured = list(self._earlier.measurements)
        return TrainingRecord(
            target=target,
            family=drafter.config.family,
            stages=[*stages, stage] if trained else stages,
            # What was measured before the last updates is not this drafter's.
            measurements=[m for m in measured if m.after_steps in (None, self.state.global_step) or not trained],
            versions=describe_versions(),
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the drafter with its record and card, and no pickle of the arguments, which may hold a token."""
        folder = Path(output_dir or self.args.output_dir)
        with _hidden_token(self.args):
            super()._save(output_dir, state_dict)
        (folder / ARGS_FILE).unlink(missing_ok=True)
        write_record(self.training_record(), folder)

    # -- publishing ----------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Make the repository a run with `push_to_hub=True` publishes to; transformers calls it before training.

        Raises:
            PermissionError, ConnectionError: If the Hub refuses or cannot be reached.
        """
        if not self.is_world_process_zero():
            return
        self.hub_model_id = create_repository(
            self.args.hub_model_id,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
        )

    def export(
        self, folder: str | Path | None = None, *, dataset_name: str | None = None, license: str | None = None
    ) -> Path:
        """
        Write the drafter as it is now in every layout that can hold it; see [`export_drafter`].

        Args:
            folder (`str` or `Path`, *optional*): Where to; `_publication` in `output_dir` by default.
            dataset_name (`str`, *optional*), license (`str`, *optional*): In place of `dataset_id` and `hub_license`.

        Returns:
            `Path`: The folder.

        Raises:
            ValueError: If the target has no Hub id to be named by.
        """
        folder = Path(folder) if folder is not None else Path(self.args.output_dir) / PUBLICATION
        drafter = self.accelerator.unwrap_model(self.model)
        target_id = require_target_id(self.args, self.target)
        repo_id = self.hub_model_id or repository_name(self.args, drafter)
        export_drafter(
            drafter,
            folder,
            embedding=self._target_embedding(),
            target_config=self.target.causal_lm.config,
            target_id=target_id,
            repo_id=repo_id,
            record=self.training_record(dataset_name=dataset_name),
            license=license or self.args.hub_license,
        )
        return folder

    def _target_embedding(self) -> torch.Tensor:
        """Return the target's embedding as its file holds it, or, of an instance, as it is in memory."""
        name = self.target.config.name_or_path
        if name:
            return read_target(name, revision=self.args.target_model_revision).embedding
        return self.target.causal_lm.get_input_embeddings().weight

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the card of the drafter into `output_dir`; see [`write_card`]. Arguments of transformers' card have no part in it."""
        if not self.is_world_process_zero():
            return
        drafter = self.accelerator.unwrap_model(self.model)
        target_id = self.args.hub_target_id or hub_id_of(self.target.config.name_or_path)
        write_card(
            self.args.output_dir,
            config=flat_config(drafter, target_id=target_id, dtype=torch.float32),
            record=self.training_record(dataset_name=kwargs.get("dataset_name")),
            license=kwargs.get("license") or self.args.hub_license,
            repo_id=self.hub_model_id or self.args.hub_model_id,
            layouts=["flat"],
            target_id=target_id,
            target_architectures=list(self.target.config.architectures or []),
        )

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
            ValueError: If the repository's name is refused or the target has no Hub id; the drafter is saved by then.
            PermissionError, ConnectionError: If the Hub refuses or cannot be reached; the export lies in `_publication`, complete.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id = self.hub_model_id or repository_name(self.args, self.accelerator.unwrap_model(self.model))
        validate_repo_id(repo_id)
        self._finish_current_push()
        folder = self.export(dataset_name=dataset_name, license=license)
        options = {
            "token": token or self.args.hub_token,
            "private": self.args.hub_private_repo if private is None else private,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message or "Upload drafter",
        }
        if blocking:
            return push_folder(folder, repo_id, **options)
        self._push = self._pushes.submit(push_folder, folder, repo_id, **options)
        return self._push

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish what a save just wrote, in the background; a push that fails is reported and training goes on."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_busy = self._push is not None and not self._push.done()
        if is_busy and not self.args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        unit = "step" if self.args.save_strategy == SaveStrategy.STEPS else "epoch"
        when = self.state.global_step if unit == "step" else int(self.state.epoch or 0)
        extra = {}
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            extra = {"last-checkpoint": checkpoint_folder}
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            extra = {Path(checkpoint_folder).name: checkpoint_folder}
        self._push = self._pushes.submit(
            push_folder,
            self.export(),
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
        """Wait for a push in the background and say if it failed."""
        if self._push is None:
            return
        push, self._push = self._push, None
        try:
            push.result()
        except (ValueError, OSError) as error:
            logger.warning("A push failed, training goes on: %s", error)


@contextmanager
def _hidden_token(args: DraftTrainingConfig):
    token, args.hub_token = args.hub_token, None
    try:
        yield
    finally:
        args.hub_token = token


def _read_earlier_record(drafter: Drafter) -> TrainingRecord | None:
    """Return the record in the folder a drafter was loaded from, if that is a folder with one."""
    name = drafter.config.name_or_path
    record = read_record(name) if name and Path(name).is_dir() else None
    return (
        replace(record, measurements=[replace(m, after_steps=None) for m in record.measurements]) if record else None
    )
