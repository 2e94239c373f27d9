# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What makes a run last: checkpoints that survive any stop, continuation bit for bit, a guard before every update, SIGTERM.

A base class and no functions, because every part of it takes the place of a method of transformers' Trainer.
"""

import errno
import logging
import uuid
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from ..drafters.published.checkpoint import SAFETENSORS_FILE
from ..runs.checkpoints import (
    Checkpoint,
    DamagedCheckpoint,
    check_output_dir,
    checkpoint_name,
    keep_newest,
    list_checkpoints,
    newest_valid,
    read_checkpoint,
    writing_checkpoint,
)
from ..runs.distributed.launch import prepare_drafter
from ..runs.distributed.sharding import (
    OptimizerState,
    full_optimizer_state,
    full_weights,
    load_full_optimizer_state,
    load_full_weights,
    whole_drafter,
)
from ..runs.guard import NonFiniteGuard, check_weights
from ..runs.out_of_memory import explained_memory
from ..runs.run_state import RankState, RunIdentity, RunState, random_states, set_random_states
from ..runs.sigterm import EXIT_CODE, StopRequest
from ..target.frozen import FrozenTarget
from ..utils.private_trl import _BaseTrainer
from .adapters import is_adapted, load_adapter_weights
from .common_config import DraftTrainingConfig
from .identity import describe_run
from .metrics import MetricSums


logger = logging.getLogger(__name__)

T = TypeVar("T")

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
TRAINER_STATE_FILE = "trainer_state.json"


class ResumingTrainer(_BaseTrainer):
    """Base of both trainers; expects `target`, a `_method`, `"sft"` or `"opd"`, `_save`, which writes the drafter, and `_measure`."""

    _method = ""
    args: DraftTrainingConfig
    target: FrozenTarget

    def __init__(self, *args: Any, **kwargs: Any):
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        super().__init__(*args, **kwargs)
        prepare_drafter(self.accelerator, self.model, self.args.n_gpu)
        self._guard = NonFiniteGuard(self.accelerator, self.args.on_nonfinite, self.args.max_skipped_updates)
        self._stop = StopRequest()
        self._stopped_at: int | None = None
        self._run_id = ""
        self._resumed: RunState | None = None
        self._identity: RunIdentity | None = None
        self.add_callback(_RunCallback(self))

    # -- beginning and end of a run -----------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train, from the start or from a checkpoint.

        On SIGTERM the step at hand is finished, a checkpoint is written, and `SystemExit(143)` is raised, which ends a script quietly
        with the exit code that schedulers expect of a job they stopped.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*):
                `True`: go on from the newest valid checkpoint in `output_dir`; damaged ones are passed over and named. `"auto"`: the
                same, or begin where there is none yet, so that one command starts a job and goes on with it. A path: from that one.
                Defaults to the setting of that name, where `"true"` means `True`. Continuation is bit for bit on as many processes
                as before.
            trial, ignore_keys_for_eval (*optional*): As in [`~transformers.Trainer.train`].

        Raises:
            ValueError: If there is no such checkpoint, it is damaged or belongs to another run, or a new run would write its
                checkpoints among those of another. Nothing was touched.
            FloatingPointError: If losses or gradients are not finite under `on_nonfinite="stop"`; nothing was updated.
            SystemExit: After SIGTERM.
        """
        checkpoint = self._first_rank_decides(lambda: self._choose_checkpoint(resume_from_checkpoint))
        self._run_id = checkpoint.run_id if checkpoint else self._first_rank_decides(lambda: uuid.uuid4().hex)
        if self.args.save_strategy != "no":
            run_id = checkpoint.run_id if checkpoint else None
            self._first_rank_decides(lambda: check_output_dir(Path(self.args.output_dir), run_id))
        self._identity, self._stopped_at = describe_run(self), None
        self._resumed = self._read_state(checkpoint, self._identity) if checkpoint else None
        with StopRequest() as self._stop:
            folder = str(checkpoint.folder) if checkpoint else None
            output = super().train(folder, trial, ignore_keys_for_eval)
            is_stopped = self._is_stop_requested()
        if is_stopped:
            what = "after the last step" if self._stopped_at is None else f"saved after step {self._stopped_at}"
            logger.warning("SIGTERM came: %s, leaving.", what)
            raise SystemExit(EXIT_CODE)
        return output

    def _choose_checkpoint(self, asked: str | Path | bool | None) -> Checkpoint | None:
        output_dir = Path(self.args.output_dir)
        if asked is None:
            asked = self.args.resume_from_checkpoint
        word = str(asked).lower()
        if asked in (None, False) or (word == "auto" and not list_checkpoints(output_dir)):
            return None
        if word in ("true", "auto"):
            return newest_valid(output_dir)
        folder = Path(asked)
        if not folder.is_dir():
            raise ValueError(f"There is no checkpoint {str(folder)!r} to go on from. Check the path, or give `True`.")
        try:
            found = read_checkpoint(folder)
        except DamagedCheckpoint as error:
            raise ValueError(
                f"{str(folder)!r} is no checkpoint to go on from: {error}. Give `resume_from_checkpoint=True` for the newest valid one in "
                "`output_dir`, or start a new run from its drafter: give the folder as `model`."
            ) from error
        if not found.is_resumable:
            raise ValueError(
                f"{str(folder)!r} holds the drafter alone (`save_only_model=True`). Start a new run from it: give the folder as `model`."
            )
        return found

    def _read_state(self, checkpoint: Checkpoint, identity: RunIdentity) -> RunState:
        """Read what a checkpoint holds beside tensors, and hold this run to it."""
        path = checkpoint.folder / STATE_FILE
        try:
            state = RunState.from_json(path.read_text("utf-8"))
        except OSError as error:
            raise ValueError(
                f"Process {self.accelerator.process_index} cannot read {str(path)!r} ({error.strerror}). All machines need the same "
                "`output_dir`, on storage that they share."
            ) from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}.") from error
        changed = identity.check_goes_on(state.identity, ignores_position=self.args.ignore_data_skip)
        if changed and self.is_world_process_zero():
            logger.warning(
                "Going on from %s under other settings, so not as the run would have gone on by itself: %s.",
                checkpoint.folder.name,
                "; ".join(changed),
            )
        return state

    def _is_stop_requested(self) -> bool:
        """Whether SIGTERM came to any rank. Collective."""
        flag = torch.tensor(float(self._stop.has_come), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _first_rank_decides(self, decide: Callable[[], T]) -> T:
        """Run `decide` on the first rank alone; all ranks get its result, or its error. Collective."""
        outcome: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                outcome[0] = decide()
            except (ValueError, TypeError, RuntimeError, OSError, FloatingPointError) as error:
                if self.accelerator.num_processes == 1:
                    raise
                outcome[1] = error
        if self.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    # -- an update ----------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run one micro-batch forward and backward; see [`~transformers.Trainer.training_step`]."""
        settings = (
            "lower `per_device_train_batch_size` (and raise `gradient_accumulation_steps`)",
            "set `gradient_checkpointing=True`",
            "lower `loss_chunk_bytes`, `max_completion_length` or `num_anchors`",
        )
        with explained_memory("a training step", [inputs], settings):
            return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics gathered in training since the last log."""
        if not next(iter(logs)).startswith("eval_"):
            logs.update(self._sums["train"].pop())
            if self._guard.num_skipped:
                logs["skipped_updates"] = float(self._guard.num_skipped)
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Return the loss on an evaluation batch, and add what was measured on it to the metrics. Collective where anything is sharded."""
        settings = ("lower `per_device_eval_batch_size`", "lower `loss_chunk_bytes` or `max_completion_length`")
        inputs = self._prepare_inputs(inputs)
        with explained_memory("an evaluation step", [inputs], settings), whole_drafter(self.accelerator, self.model):
            return self._measure(inputs), None, None

    @abstractmethod
    def _measure(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the loss on an evaluation batch, and add what was measured on it to the metrics."""

    # -- writing ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint that proves itself; see `checkpoints.py`. Collective."""
        run_dir, step = Path(self._get_output_dir(trial=trial)), self.state.global_step
        weights = full_weights(self.accelerator, self.model_wrapped)
        is_resumable = not self.args.save_only_model
        state, optimizer = self._gather_state() if is_resumable else (None, None)
        self._note_best(run_dir)

        def write() -> None:
            check_weights(weights)
            with writing_checkpoint(run_dir, step, is_resumable=is_resumable, run_id=self._run_id) as folder:
                self._save(str(folder), state_dict=weights)
                if state is not None and optimizer is not None:
                    (folder / STATE_FILE).write_text(state.to_json(), "utf-8")
                    save_file(optimizer.tensors, folder / OPTIMIZER_FILE)
                self._export_callbacks()
                self.state.save_to_json(str(folder / TRAINER_STATE_FILE))

        def write_or_say_why() -> None:
            try:
                write()
            except (OSError, SafetensorError) as error:
                raise OSError(
                    getattr(error, "errno", None) or errno.EIO,
                    f"Checkpoint {step} could not be written ({error}); what was begun was removed, and earlier checkpoints are as they were. "
                    "Make room or mend the folder, then go on with `resume_from_checkpoint=True`",
                    str(run_dir),
                ) from error

        self._first_rank_decides(write_or_say_why)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / checkpoint_name(step)))
        best = Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None
        self._first_rank_decides(lambda: keep_newest(run_dir, self.args.save_total_limit, protected=best))

    def _note_best(self, run_dir: Path) -> None:
        """Remember where the best weights are, if they were or are about to be written."""
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (run_dir / checkpoint_name(best)).is_dir()):
            self.state.best_model_checkpoint = str(run_dir / checkpoint_name(best))

    def _export_callbacks(self) -> None:
        """Put the state of callbacks that have one into the trainer's, as transformers does."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            name, held = type(callback).__name__, self.state.stateful_callbacks
            if isinstance(held.get(name), list):
                held[name].append(callback.state())
            else:
                held[name] = callback.state()

    def _gather_state(self) -> tuple[RunState, OptimizerState]:
        """Return everything beside the weights, complete on the first rank. Collective."""
        optimizer = full_optimizer_state(self.accelerator, self.model_wrapped, self.optimizer)
        own = RankState(
            random=random_states(self.accelerator.device),
            sums=self._sums["train"].state(),
            loss_since_log=float(self._tr_loss),
        )
        scaler = self.accelerator.scaler
        assert self._identity is not None, "`train` says first what the run is"
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
        return {"guard": self._guard.state()}

    def _load_shared_state(self, shared: dict[str, Any]) -> None:
        """Undo `_shared_state`."""
        self._guard.load(shared["guard"])

    # -- reading ------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing yet: weights, optimiser and the rest are loaded together once the drafter is wrapped."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        """Wrap the drafter, watch its optimiser, and load a checkpoint into both, the same way under every wrapper."""
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._guard.attach(self.optimizer)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        return model, train_dataloader

    def _restore(self, folder: Path) -> None:
        state = self._resumed
        assert state is not None, "`train` reads the state first"
        self._load_weights(folder)
        optimizer = OptimizerState(load_file(folder / OPTIMIZER_FILE), state.optimizer)
        load_full_optimizer_state(self.accelerator, self.model_wrapped, self.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(state.scheduler)
        if self.accelerator.scaler is not None and state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self._sums["train"].load(self._own_state(state).sums)
        self._load_shared_state(state.shared)

    def _load_weights(self, folder: Path) -> None:
        """Load the drafter of a checkpoint, or its adapter. Collective."""
        drafter = self.accelerator.unwrap_model(self.model)
        if is_adapted(drafter):
            load_adapter_weights(drafter, folder)
            return
        load_full_weights(self.accelerator, self.model_wrapped, load_file(folder / SAFETENSORS_FILE))

    def _own_state(self, state: RunState) -> RankState:
        return state.rank(self.accelerator.process_index, self.accelerator.num_processes)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Put the random generators where the checkpoint left them; transformers calls it once the data stands where it did."""
        if checkpoint is not None and self._resumed is not None:
            set_random_states(self._own_state(self._resumed).random, self.accelerator.device)

    def _load_running_loss(self) -> None:
        """Go on with the loss since the last log, which transformers has just set to 0."""
        if self._resumed is None:
            return
        self._tr_loss += self._own_state(self._resumed).loss_since_log
        self._globalstep_last_logged = self._resumed.last_logged_step
        # What `train` returns is the mean of this call's own steps.
        self._total_loss_scalar -= float(self._tr_loss)

    def _load_best_model(self) -> None:
        """Load the best weights into the drafter, if their checkpoint is as it was written."""
        folder = Path(self.state.best_model_checkpoint)
        try:
            self._first_rank_decides(lambda: read_checkpoint(folder))
        except DamagedCheckpoint as error:
            raise ValueError(
                f"The best checkpoint {str(folder)!r} cannot be loaded: {error}. The last weights were kept; save them with `save_model`."
            ) from error
        self._load_weights(folder)


class _RunCallback(TrainerCallback):
    """Ties a run to the points of transformers' loop that have no method of their own."""

    def __init__(self, trainer: ResumingTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: DraftTrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._load_running_loss()

    def on_step_begin(
        self, args: DraftTrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._guard.begin_update(state.global_step)

    def on_pre_optimizer_step(
        self, args: DraftTrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # DeepSpeed has made its step by now, at the end of the backward pass.
        self.trainer._guard.look_back()

    def on_step_end(
        self, args: DraftTrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer._is_stop_requested():
            # The time that is left is for the checkpoint.
            self.trainer._stopped_at = state.global_step
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def on_epoch_end(
        self, args: DraftTrainingConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer._is_stop_requested():
            control.should_save = control.should_evaluate = False
