# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What makes a run last: checkpoints that survive any stop, resuming bit for bit, a guard before every update, stops.

A base class, because every part of it overrides a method of transformers' Trainer; what they are made of is in `runs`.
"""

import logging
import uuid
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from ..drafters.base import Drafter
from ..drafters.published.checkpoint import SAFETENSORS_FILE
from ..runs.checkpoints import (
    Checkpoint,
    DamagedCheckpoint,
    check_output_dir,
    checkpoint_name,
    choose_checkpoint,
    keep_newest,
    read_checkpoint,
    writing_checkpoint,
)
from ..runs.distributed.launch import prepare_drafter
from ..runs.distributed.ranks import first_rank_decides
from ..runs.distributed.sharding import (
    OptimizerState,
    full_optimizer_state,
    full_weights,
    load_full_optimizer_state,
    load_full_weights,
    whole_drafter,
)
from ..runs.folder_lock import locked
from ..runs.guard import NonFiniteGuard, check_weights
from ..runs.identity import RunIdentity
from ..runs.out_of_memory import explained_memory
from ..runs.run_state import RankState, RunState, random_states, set_random_states
from ..runs.stopping import StopOnSignal
from ..utils.atomic_files import explaining_failure
from ..utils.private_trl import _BaseTrainer
from .adapters import is_adapted, load_adapter_weights
from .card_memory import smaller_settings
from .common_config import DraftTrainingConfig
from .metrics import MetricSums
from .muon import check_muon, make_optimizer
from .pair import Pair, compile_drafter
from .step import PreparedBatch


logger = logging.getLogger(__name__)

TRAINER_STATE_FILE = "trainer_state.json"


class ResumingTrainer(_BaseTrainer):
    """Base of both trainers. A subclass names its `_method`, saves in `_save` and evaluates in `_measure`."""

    _method: str
    # Narrower than transformers declares them: what they are once a drafter is trained.
    args: DraftTrainingConfig
    model: nn.Module
    model_wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    train_dataset: Dataset | IterableDataset | None
    # The model, and what is in its distributed wrapper.
    _unwrapped: tuple[nn.Module, Any] | None = None

    def __init__(self, pair: Pair, args: DraftTrainingConfig, **kwargs: Any):
        super().__init__(model=pair.drafter, args=compile_drafter(pair.drafter, args), **kwargs)
        self.target, self.num_drafts = pair.target, pair.num_drafts
        prepare_drafter(self.accelerator, self.model, self.args.n_gpu)
        check_muon(self.args, self.accelerator, self.model, self.optimizer)
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        self._guard = NonFiniteGuard(self.accelerator, self.args.on_nonfinite, self.args.max_skipped_updates)
        self._stop = StopOnSignal(self.accelerator, handles_interrupt=not self.args.dataloader_num_workers)
        self.add_callback(self._guard)
        self.add_callback(self._stop)
        # Of the run that `train` starts: its id and identity, and the state it resumes from.
        self._run_id = ""
        self._identity: RunIdentity | None = None
        self._resumed: RunState | None = None
        # Whether that state is the run's end, and the last step that was saved, with what it says about the end.
        self._is_complete = False
        self._saved: tuple[int, int | None] | None = None

    @property
    def drafter(self) -> Drafter:
        """The drafter, or the [`~peft.PeftModel`] around it, without its distributed wrapper."""
        # accelerate looks at what is installed each time, which takes milliseconds, and a step asks several times.
        if self._unwrapped is None or self._unwrapped[0] is not self.model:
            drafter: Any = self.accelerator.unwrap_model(self.model)
            self._unwrapped = self.model, drafter
        return self._unwrapped[1]

    @abstractmethod
    def _measure(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the loss on an evaluation batch, and add what was measured on it to the metrics."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW as transformers does, with Muon beside it where it has a learning rate."""
        if self.args.muon_learning_rate is not None and self.optimizer is None:
            drafter: Any = self.model if model is None else model
            _, adamw = self.get_optimizer_cls_and_kwargs(self.args, drafter)
            decayed = set(self.get_decay_parameter_names(drafter))
            self.optimizer = make_optimizer(drafter, self.args, decayed, adamw)
        return super().create_optimizer(model)

    # -- beginning and end of a run -----------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train, from the start or from a checkpoint. A run that has ended stays as it is: only its weights are loaded,
        unless more steps are asked for than when it ended.

        On SIGTERM the current step is finished, a checkpoint is written, and `SystemExit(143)` is raised, which ends a
        script quietly with the exit code that schedulers expect of a job they stopped. Ctrl-C does the same with
        `KeyboardInterrupt`, unless `dataloader_num_workers` are set; a second one ends at once.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*):
                `True`: resume from the newest valid checkpoint in `output_dir`; damaged ones are passed over and
                named. `"auto"`: the same, or start where there is none yet, so that one command starts a job and
                resumes it. A path: from that one. Defaults to the setting of that name, where `"true"` means `True`.
                Continuation is bit for bit on as many processes as before.
            trial, ignore_keys_for_eval (*optional*): As in [`~transformers.Trainer.train`].

        Raises:
            ValueError: If there is no such checkpoint, it is damaged or belongs to another run, a new run would write
                its checkpoints among those of another, or another process trains into `output_dir`. Nothing was
                touched.
            FloatingPointError: If losses or gradients are not finite under `on_nonfinite="stop"`, and nothing was
                updated; or if an update left weights that are not finite, and nothing of it was written.
            SystemExit: After SIGTERM.
            KeyboardInterrupt: After Ctrl-C.
        """
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        output_dir = self.args.output_folder

        lock = ExitStack()

        def begin() -> tuple[Checkpoint | None, str]:
            # First of all: what another process is writing looks like something left over.
            lock.enter_context(locked(output_dir))
            checkpoint = choose_checkpoint(output_dir, asked)
            if self.args.save_strategy != "no":
                check_output_dir(output_dir, checkpoint.run_id if checkpoint else None)
            return checkpoint, checkpoint.run_id if checkpoint else uuid.uuid4().hex

        with lock:
            checkpoint, self._run_id = first_rank_decides(self.accelerator, begin)
            self._identity = RunIdentity.of(self._method, self.args, self.drafter, self.target, self.train_dataset)
            self._resumed = self._read_state(checkpoint.folder, self._identity) if checkpoint else None
            self._is_complete, self._saved = False, None
            with self._stop.handling():
                return super().train(str(checkpoint.folder) if checkpoint else None, trial, ignore_keys_for_eval)

    def _read_state(self, folder: Path, identity: RunIdentity) -> RunState:
        """Read the state in a checkpoint, and check this run against the one that wrote it."""
        state = RunState.read(folder)
        changed = identity.check_continues(state.identity, ignores_position=self.args.ignore_data_skip)
        if changed and self.is_world_process_zero():
            logger.warning(
                "Resuming from %s under other settings; but for those that are kept, the run will differ by them: %s.",
                folder.name,
                "; ".join(changed),
            )
        return state

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Return the epoch to begin with and how far it has come: the one behind the last if the run has ended."""
        begun = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self._resumed is None:
            return begun
        step, ended_of = self.state.global_step, self._resumed.shared["ended_of"]
        self._is_complete = step >= max_steps or (ended_of is not None and max_steps <= ended_of)
        if not self._is_complete:
            return begun
        if self.is_world_process_zero():
            logger.warning(
                "This run is complete, so nothing is trained: it ended after step %d%s. To train further, raise "
                "`max_steps` or `num_train_epochs`, or start a new run from its drafter (`--drafter`, or `model`).",
                step,
                "" if step >= max_steps else f" of {max_steps}, at the word of a callback",
            )
        # transformers would ask only after one more step, unless the end is that of an epoch.
        return num_train_epochs, 0

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        """Evaluate in training; a run that is complete does not begin with an evaluation (`eval_on_start`)."""
        return None if self._is_complete else super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        """Save the last step, whatever asked for the end, so that a later start knows the run as complete."""
        if not (self.args.save_strategy == "no" or self.args.save_only_model or self._stop.stopped_at is not None):
            if not self._is_complete and self._saved != (self.state.global_step, self._ended_of):
                self._save_checkpoint(self.model_wrapped, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        best = self.state.best_global_step
        if self.args.load_best_model_at_end and best and self.state.best_model_checkpoint is None:
            logger.warning(
                "The best weights, of step %d, are not here: their checkpoint is gone. The last stay.", best
            )
        # Under a limit of 1 transformers would delete all but the best, the last step among them.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    @property
    def _ended_of(self) -> int | None:
        """The steps that were asked for, where a callback has ended the run before them."""
        is_ended = self.control.should_training_stop and self._stop.stopped_at is None
        return self.state.max_steps if is_ended and self.state.global_step < self.state.max_steps else None

    # -- steps --------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: PreparedBatch, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one micro-batch forward and backward; see [`~transformers.Trainer.training_step`]."""
        settings = smaller_settings(self.drafter.gradient_checkpointing)
        batch: Any = inputs
        with explained_memory("a training step", inputs.describe, settings):
            return super().training_step(model, batch, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Return the loss on an evaluation batch, and add its measurements to the metrics. Collective if sharded."""
        settings = ("lower `per_device_eval_batch_size`", "lower `loss_chunk_bytes` or `max_completion_length`")
        inputs = self._prepare_inputs(inputs)
        explained = explained_memory("an evaluation step", lambda: describe_batches([inputs]), settings)
        with explained, whole_drafter(self.accelerator, self.model):
            return self._measure(inputs), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered in training since the last log."""
        if not next(iter(logs)).startswith("eval_"):
            logs.update(self._sums["train"].pop())
            if self._guard.num_skipped:
                logs["skipped_updates"] = float(self._guard.num_skipped)
        super().log(logs, start_time)

    # -- writing ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that proves itself; see `runs/checkpoints.py`. Collective."""
        run_dir, step = Path(self._get_output_dir(trial=trial)), self.state.global_step
        weights = full_weights(self.accelerator, self.model_wrapped)
        is_resumable = not self.args.save_only_model
        state, optimizer = self._gather_state() if is_resumable else (None, None)
        best = self.state.best_global_step
        if best and (best == step or (run_dir / checkpoint_name(best)).is_dir()):
            self.state.best_model_checkpoint = str(run_dir / checkpoint_name(best))
        fix = (
            f"Its temporary folder was removed, and earlier checkpoints in {str(run_dir)!r} are as they were. Make "
            "room or repair the folder, then continue with `resume_from_checkpoint=True`"
        )

        def write() -> None:
            check_weights(weights)
            with (
                explaining_failure(f"Checkpoint {step}", fix),
                writing_checkpoint(run_dir, step, is_resumable=is_resumable, run_id=self._run_id) as folder,
            ):
                self._save(str(folder), state_dict=weights)
                if state is not None and optimizer is not None:
                    state.write(folder, optimizer.tensors)
                self._note_callbacks()
                self.state.save_to_json(str(folder / TRAINER_STATE_FILE))

        first_rank_decides(self.accelerator, write)
        self._saved = (step, self._ended_of)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / checkpoint_name(step)))
        protected = Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None
        first_rank_decides(
            self.accelerator, lambda: keep_newest(run_dir, self.args.save_total_limit, protected=protected)
        )

    def _note_callbacks(self) -> None:
        """Put the state of callbacks that have one into the trainer's, in transformers' form."""
        callbacks = [*self.callback_handler.callbacks, self.control]
        exportable: Any = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        # A dictionary once the state is made, whatever it is declared as.
        held: Any = self.state.stateful_callbacks
        held |= TrainerState(stateful_callbacks=exportable).stateful_callbacks

    def _gather_state(self) -> tuple[RunState, OptimizerState]:
        """Return everything besides the weights, complete on the first rank. Collective."""
        optimizer = full_optimizer_state(self.accelerator, self.model_wrapped, self.optimizer)
        own = RankState(
            random=random_states(self.accelerator.device),
            sums=self._sums["train"].state(),
            loss_since_log=float(self._tr_loss),
        )
        scaler = self.accelerator.scaler
        assert self._identity is not None, "`train` describes the run before it begins"
        state = RunState(
            identity=self._identity,
            optimizer=optimizer.values,
            scheduler=self.lr_scheduler.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            last_logged_step=self._globalstep_last_logged,
            ranks=gather_object([own]),
            shared=self._shared_state(),
        )
        return state, optimizer

    def _shared_state(self) -> dict[str, Any]:
        """Return further JSON values that all ranks hold alike."""
        return {"guard": self._guard.state(), "ended_of": self._ended_of}

    def _load_shared_state(self, shared: dict[str, Any]) -> None:
        """Undo `_shared_state`."""
        self._guard.load(shared["guard"])

    # -- reading ------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing yet: weights, optimizer and the rest are loaded together once the drafter is wrapped."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """Wrap the drafter and load a checkpoint into it and its optimizer, the same way under every wrapper."""
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self._resumed is None:
            return model, train_dataloader
        assert resume_from_checkpoint is not None, "`train` hands on the checkpoint it resumes from"
        folder, state = Path(resume_from_checkpoint), self._resumed
        self._load_weights(folder)
        optimizer = state.optimizer_state(folder)
        load_full_optimizer_state(self.accelerator, self.model_wrapped, self.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(state.scheduler)
        self._set_rates()
        if self.accelerator.scaler is not None and state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self._sums["train"].load(self._own_state(state).sums)
        self._load_shared_state(state.shared)
        return model, train_dataloader

    def _set_rates(self) -> None:
        """Set this run's rates for the next update: the stored ones are those of the earlier number of steps."""
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if isinstance(scheduler, LambdaLR):
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, (base, share) in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = base * share(scheduler.last_epoch)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put back what transformers resets before the first step: random generators, the loss since the last log."""
        if self._resumed is None:
            return
        own = self._own_state(self._resumed)
        set_random_states(own.random, self.accelerator.device)
        self._load_running_loss(own.loss_since_log, self._resumed.last_logged_step)

    def _load_running_loss(self, loss: float, last_logged_step: int) -> None:
        self._tr_loss += loss
        self._globalstep_last_logged = last_logged_step
        # What `train` returns is the mean over this call's own steps.
        self._total_loss_scalar -= float(self._tr_loss)

    def _own_state(self, state: RunState) -> RankState:
        return state.rank(self.accelerator.process_index, self.accelerator.num_processes)

    def _load_weights(self, folder: Path) -> None:
        """Load the drafter of a checkpoint, or its adapter. Collective."""
        if is_adapted(self.drafter):
            load_adapter_weights(self.drafter, folder)
        else:
            load_full_weights(self.accelerator, self.model_wrapped, load_file(folder / SAFETENSORS_FILE))

    def _load_best_model(self) -> None:
        """Load the best weights into the drafter, if their checkpoint is as it was written."""
        assert self.state.best_model_checkpoint is not None, "transformers calls this where there is one"
        folder = Path(self.state.best_model_checkpoint)
        try:
            first_rank_decides(self.accelerator, lambda: read_checkpoint(folder))
        except DamagedCheckpoint as error:
            raise ValueError(
                f"The best checkpoint {str(folder)!r} cannot be loaded: {error}. The last weights were kept; save "
                "them with `save_model`."
            ) from error
        self._load_weights(folder)


def check_resumes(method: str, pair: Pair, args: DraftTrainingConfig) -> None:
    """
    Refuse to resume another run by all that is known before the target writes the dataset's responses. Collective.

    Raises:
        ValueError: As [`ResumingTrainer.train`], of a checkpoint that the setting `resume_from_checkpoint` asks for.
    """

    def find() -> Path | None:
        with locked(args.output_folder):
            checkpoint = choose_checkpoint(args.output_folder, args.resume_from_checkpoint)
        return checkpoint.folder if checkpoint else None

    folder = first_rank_decides(PartialState(), find)
    if folder is None:
        return
    stored = RunState.read(folder).identity
    identity = RunIdentity.of(method, args, pair.drafter, pair.target, None)
    drafter = identity.drafter
    if pair.drafter.vocabulary_is_open or getattr(args, "draft_vocab_size", None):
        # The responses settle it.
        drafter = drafter | {"draft_vocab_size": stored.drafter["draft_vocab_size"]}
    known = replace(identity, drafter=drafter, dataset=stored.dataset)
    known.check_continues(stored, ignores_position=args.ignore_data_skip)


def describe_batches(batches: Sequence[Mapping[str, Any]]) -> str:
    """Return rows and length of collated batches, for [`explained_memory`]."""
    shapes = [batch["input_ids"].shape for batch in batches]
    return "; ".join(f"{num_rows} rows of up to {length} tokens" for num_rows, length in shapes)
