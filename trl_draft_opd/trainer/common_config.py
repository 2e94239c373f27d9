# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Settings both trainers share. A default lives here or in one of the two config files, and nowhere else.
"""

import copy
import difflib
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import PartialState
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import SchedulerType

from ..data.templates import read_template
from ..drafters.base import Drafter
from ..losses import LOSS_TYPES
from ..readings.prefetch import PREFETCH_BYTES
from ..rollout.acceptance import SamplingSettings
from ..rollout.drafting import DRAFT_SAMPLING, check_draft_sampling
from ..runs.distributed.launch import check_launcher, check_processes, is_launched_on_cpus
from ..target.lengths import TRAINING_LENGTHS, Lengths, fit_lengths
from ..utils.bars import can_draw_bars
from ..utils.private_trl import _BaseConfig
from ..utils.settings import check_at_least, check_settings
from .metrics import is_loss
from .muon import check_muon_settings
from .unusable_options import check_options, check_readings


SLOT_WEIGHTINGS = ("decay", "d_pace")
ON_NONFINITE = ("stop", "skip")

PROMPT_LENGTH_HELP = (
    f"Prompts with more tokens are skipped; {TRAINING_LENGTHS.prompt} if unset, or what the response leaves of the "
    "target's positions."
)


CHAT_TEMPLATE_HELP = "Jinja chat template in place of the tokenizer's: its text, or the path of a file."


def length_help(defaults: Lengths) -> str:
    """Return the help text of `max_completion_length`."""
    return (
        f"Longest response, in tokens; {defaults.completion} if unset, or half of the target's positions where that "
        "is less."
    )


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Return a field of a config; its help text is that of the command line."""
    return field(default=default, metadata={"help": help} | metadata)


@dataclass
class DraftTrainingConfig(_BaseConfig):
    r"""
    Base of [`DraftSFTConfig`] and [`DraftOPDConfig`].

    Parameters:
        > Parameters that control the target

        target_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments for loading the target by id or path, e.g. a `quantization_config`. A quantised target is
            another target: the drafter is trained for its text and states.
        target_revision (`str`, *optional*):
            Revision of the target.
        target_dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the target's weights, in which it computes whatever `bf16` says of the drafter. `"auto"` keeps
            the checkpoint's; use `"float32"` where losslessness must hold to the last token.
        shard_target (`bool`, *optional*, defaults to `False`):
            Shard the target's layers over all processes. Off, because a target that fits is faster whole.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run model code that comes with the target. Off, because it executes whatever the repository holds.

        > Parameters that control the data and the target's responses

        max_prompt_length (`int`, *optional*):
            Prompts with more tokens are skipped and counted, never cut: a cut prompt is another task. Defaults to
            1024, or to what the response and a block leave of the target's positions.
        max_completion_length (`int`, *optional*):
            Longest response in rollouts and evaluation. Defaults to 2048, the paper's non-thinking setting, or to half
            of the target's positions where that is less. See [`fit_lengths`].
        chat_template (`str`, *optional*):
            Jinja template in place of the tokenizer's, as text or as the path of a file. Must be the one that the
            drafter will be served with.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the chat template, e.g. `{"enable_thinking": false}`.
        dataset_num_proc (`int`, *optional*):
            Processes that tokenize.

        responses (`str`, *optional*):
            Folder that keeps the target's responses, as `trl-draft-opd generate` writes it; missing ones are added.
            Defaults to `_responses` in `output_dir`, which is never pushed. SFT and Draft-OPD can share one.
        generation_batch_size (`int`, *optional*, defaults to `32`):
            Prompts that the target responds to together. Larger batches cost less per token until memory is full.

        > Parameters that control where the target's readings come from

        readings (`str`, *optional*):
            Where a step gets the target's states from. Unset, the target reads in this process. A folder that
            `trl-draft-opd read` wrote, or `http://...` of servers that extract states, several separated by commas:
            the target's decoder layers are not loaded then, unless the target is an instance. See
            docs/do/readings.md.
        shared_folder (`str`, *optional*):
            The folder in which these servers leave states (their `shared_storage_path`), as this machine sees it.
        api_key_file (`str`, *optional*):
            File with the servers' key, which is sent to them alone.
        prefetch_bytes (`int`, *optional*, defaults to `2147483648`):
            Host memory of a process for readings fetched ahead of their step: in bfloat16 65,536 tokens of an 8B
            target, 16 rows of the longest length. Less lets a step wait; no result depends on it.
        shuffle_by_shard (`bool`, *optional*, defaults to `False`):
            Order the rows of an epoch by the shards of a store: shards shuffled, then the rows of each, by seed and
            epoch. Off, for the order of a run in process; turn it on where the store lies on a disk that is slow to
            jump about.

        > Parameters that control the loss

        accepted_loss (`str`, *optional*, defaults to `"forward_kl"`):
            Divergence on accepted slots, one of `LOSS_TYPES` (docs/learn/losses.md). Forward KL covers the target
            where drafts are good, the paper's choice.
        slot_weighting (`str`, *optional*, defaults to `"decay"`):
            `"decay"`: by distance from the anchor, see `position_decay`. `"d_pace"`: by what the block's expected
            accepted length owes to a slot, see [`d_pace_weights`] (Source:
            [D-PACE](https://huggingface.co/papers/2605.18810)). Its loss is divided by the number of slots, so it
            rises and falls with the weights. Off: at equal FLOPs it gained nothing (docs/why/small_targets.md,
            section 4).
        d_pace_floor (`float`, *optional*, defaults to `0.5`):
            Floor of D-PACE, in [0, 1]: what a slot passes on to those behind it even where the drafter gives the
            committed token no probability.
        confidence_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a confidence head's loss beside the divergences, as DSpark is published; 0 only watches it. See
            docs/learn/losses.md. Drafters without such a head take no other value.
        selector_loss_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the divergence of a selector's choice among the likeliest tokens, beside that of the head, as
            DFlash 2 is published. Drafters without a selector take no other value.
        blocks_per_pass (`int`, *optional*):
            Most blocks of a micro-batch drafted at once in a step. More are drafted in several passes, each computed
            again in the backward pass: memory is that of one pass, however long a row is, for one more forward pass of
            the blocks. By default as many as have 65,536 slots. The gradient is the same.
        loss_chunk_bytes (`int`, *optional*):
            Bytes of logits, gradients and temporaries alive at a time, in the loss and in replay. By default 64 MiB on
            a CPU, whose caches like small chunks, and on CUDA 5 % of the card's memory, at most 4 GiB: each chunk
            reads the whole head and launches the same kernels, however few its rows. The result is the same.
        activation_checkpointing (`bool`, *optional*):
            Compute the drafter's layers again in the backward pass: a quarter to half off a step's peak memory for one
            more forward pass of its blocks (docs/do/scaling.md). Unlike in TRL's trainers, unset means on only where
            the first step is computed to exceed nine tenths of a CUDA card without: a drafter has one to a few layers.
            Under FSDP2 and ZeRO nothing is decided: unset is off. `gradient_checkpointing`, the older name, is read
            where this one is unset.

        > Parameters that control the optimizer, beside those of transformers

        muon_learning_rate (`float`, *optional*):
            Initial learning rate of Muon for the matrices of the drafter's layers; `learning_rate` stays that of
            AdamW, which trains heads, norms and biases. Its updates are scaled alike for matrices of every shape; try
            five to ten times AdamW's rate. Unset, AdamW trains everything. See docs/do/training.md.

        > Parameters that control drafting and evaluation

        num_drafts (`int`, *optional*):
            Drafts per block in rollouts and evaluation. Defaults to the drafter's own: `block_size - 1` or
            `ttt_steps`.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of the target in rollouts and evaluation; 0 decodes greedily, as the paper does.
        top_k (`int`, *optional*, defaults to `0`), top_p (`float`, *optional*, defaults to `1.0`):
            Filters of the target's distribution at a temperature above 0; 0 and 1.0 turn them off.
        draft_sampling (`str`, *optional*, defaults to `"greedy"`):
            `"greedy"`: drafts are the drafter's argmax, the engines' default; `"sample"`: drawn from its distribution.

        eval_rollouts (`bool`, *optional*, defaults to `True`):
            Decode the evaluation prompts and report tau and acceptance per slot, which the loss alone does not tell. A
            target whose cache cannot be rolled back writes responses to them once (those given as ids are taken), and
            the blocks are found along these by replay.

        on_nonfinite (`str`, *optional*, defaults to `"stop"`):
            What becomes of an update whose losses or gradients are not finite. `"stop"` ends training before it: in a
            small drafter's run it is a fault to be found. `"skip"` leaves it out and counts it (`skipped_updates`).
            Weights that are not finite after an update end training under both.
        max_skipped_updates (`int`, *optional*, defaults to `10`):
            Updates skipped in a row after which training ends all the same: by then most likely the weights are at
            fault.

        resume_from_checkpoint (`str`, *optional*):
            As the argument of `train` of that name; here `"true"` means `True`.

        > Parameters that control publishing

        hub_target_id (`str`, *optional*):
            The target's Hub id, `ORG/NAME`, by which a published drafter names it. Defaults to the id that the target
            was loaded by; needed to push when it was loaded from a folder or given as an instance.
        dataset_id (`str`, *optional*), dataset_license (`str`, *optional*):
            Hub id and licence of the training data, for the card. Never guessed.
        hub_license (`str`, *optional*):
            Licence of the published drafter, e.g. `apache-2.0`. Never guessed: that of data and target may bind it.

    > [!NOTE]
    > Defaults that differ from TRL's: `activation_checkpointing` only where a card needs it, `bf16` only where an
    > accelerator is present, `learning_rate=3e-4`, `lr_scheduler_type="cosine"`, `warmup_steps=0.05` (all three the
    > paper's), `remove_unused_columns=False`, `ddp_find_unused_parameters=False` (every step uses every parameter),
    > `disable_tqdm` unless a terminal or a notebook shows the bars (in a file they are garbage).
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["target_init_kwargs", "chat_template_kwargs"]

    # transformers renamed it in 5.23; both names work with every version, and without a value on the command line.
    activation_checkpointing: bool | None = setting(
        None,
        "Compute the drafter's layers again in the backward pass to save memory; unset, only where the first step is "
        "computed to exceed nine tenths of a CUDA card without.",
        nargs="?",
        const=True,
    )
    gradient_checkpointing: bool | None = setting(None, "Older name of the same.", nargs="?", const=True)
    resume_from_checkpoint: str | None = setting(
        None,
        "Checkpoint to go on from: its folder; `true` for the last one of `output_dir`; `auto` for that too, and to "
        "start anew where there is none.",
    )
    learning_rate: float = setting(3e-4, "Initial learning rate of AdamW.")
    muon_learning_rate: float | None = setting(
        None, "Initial learning rate of Muon for the matrices of layers; unset, AdamW trains everything."
    )
    lr_scheduler_type: str = setting(
        "cosine", "Learning rate schedule.", choices=tuple(each.value for each in SchedulerType)
    )
    warmup_steps: float = setting(0.05, "Warm-up: number of steps, or share of all steps when below 1.")
    remove_unused_columns: bool = setting(False, "Must stay off: the drafter's forward does not name the columns.")
    ddp_find_unused_parameters: bool | None = setting(False, "Let DDP look for unused parameters; drafters have none.")
    # JSON on the command line, parsed by transformers.
    target_init_kwargs: dict[str, Any] | str | None = setting(None, "Further arguments for loading the target.")
    target_revision: str | None = setting(None, "Revision of the target.")
    target_dtype: str = setting("auto", "Precision of the target's weights, e.g. `float32`.")
    shard_target: bool = setting(False, "Shard the target's layers over all processes, if it does not fit whole.")
    trust_remote_code: bool = setting(False, "Run model code that comes with the target's repository.")
    max_prompt_length: int | None = setting(None, PROMPT_LENGTH_HELP)
    max_completion_length: int | None = setting(None, length_help(TRAINING_LENGTHS))
    chat_template: str | None = setting(None, CHAT_TEMPLATE_HELP)
    chat_template_kwargs: dict[str, Any] | str | None = setting(None, "Arguments of the chat template, as JSON.")
    dataset_num_proc: int | None = setting(None, "Processes used to tokenize.")
    responses: str | None = setting(None, "Folder that keeps the target's responses.")
    generation_batch_size: int = setting(32, "Prompts the target responds to together.")
    readings: str | None = setting(
        None, "Where the target's states come from: a folder of `read`, or `http://...` servers; unset, the target."
    )
    shared_folder: str | None = setting(None, "Folder in which servers leave states, as this machine sees it.")
    api_key_file: str | None = setting(None, "File with the servers' API key.")
    prefetch_bytes: int = setting(PREFETCH_BYTES, "Host memory of a process for readings fetched ahead.")
    shuffle_by_shard: bool = setting(False, "Order rows by the shards of a store of readings, both shuffled.")
    accepted_loss: str = setting("forward_kl", "Divergence on accepted slots.", choices=LOSS_TYPES)
    slot_weighting: str = setting(
        "decay", "`decay`: by distance from the anchor; `d_pace`: by expected acceptance.", choices=SLOT_WEIGHTINGS
    )
    d_pace_floor: float = setting(0.5, "Floor of D-PACE's weights, in [0, 1].")
    confidence_loss_weight: float = setting(1.0, "Weight of a confidence head's loss, at least 0.")
    selector_loss_weight: float = setting(1.0, "Weight of the loss of a selector's choice, at least 0.")
    blocks_per_pass: int | None = setting(
        None, "Most blocks of a micro-batch drafted at once in a step; by default as many as have 65,536 slots."
    )
    loss_chunk_bytes: int | None = setting(
        None, "Bytes of logits alive at a time, all buffers together; by default as many as suit the device."
    )
    num_drafts: int | None = setting(None, "Drafts per block in rollouts and evaluation; the drafter's own if unset.")
    temperature: float = setting(0.0, "Temperature of the target; 0 decodes greedily.")
    top_k: int = setting(0, "Keep the k most likely tokens; 0 keeps all.")
    top_p: float = setting(1.0, "Keep the smallest set of tokens with this mass; 1.0 keeps all.")
    draft_sampling: str = setting(
        "greedy", "`greedy`: drafts are argmax; `sample`: drawn from the drafter.", choices=DRAFT_SAMPLING
    )
    eval_rollouts: bool = setting(True, "Decode the evaluation prompts and report tau and acceptance per slot.")
    on_nonfinite: str = setting(
        "stop", "`stop` before an update that is not finite, or `skip` and count it.", choices=ON_NONFINITE
    )
    max_skipped_updates: int = setting(10, "Updates skipped in a row after which training stops all the same.")
    hub_target_id: str | None = setting(None, "The target's Hub id, by which a published drafter names it.")
    dataset_id: str | None = setting(None, "Hub id of the training data, for the card.")
    dataset_license: str | None = setting(None, "Licence of the training data, for the card.")
    hub_license: str | None = setting(None, "Licence of the published drafter.")

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Refuse an unknown setting by its nearest name, before the generated `__init__` refuses it without."""
        known = [known.name for known in fields(cls) if known.init]
        for name in sorted(set(settings) - set(known)):
            near = difflib.get_close_matches(name, known, n=1)
            if near:
                raise TypeError(
                    f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}. Did you mean {near[0]!r}?"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("responses", "readings", "shared_folder", "api_key_file"):
            if isinstance(getattr(self, name), Path):
                setattr(self, name, str(getattr(self, name)))
        check_settings(self)
        check_options(self)
        check_launcher()
        # As text, so that a file that changes later changes no run, and a resumed one is told.
        self.chat_template = read_template(self.chat_template)
        if self.bf16 and not torch.accelerator.is_available():
            # transformers trains in bfloat16 on a CPU, but only where it is told to use the CPU.
            self.use_cpu = True
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers knows losses by their last word.
            self.greater_is_better = not is_loss(self.metric_for_best_model)
        if self.deepspeed is None and is_launched_on_cpus():
            # accelerate's launcher keeps `use_cpu: true` to itself, and without it each process would train alone.
            self.use_cpu = True
        if self.bf16 is None:
            # TRL turns bf16 on everywhere; without an accelerator that only makes training slower or fail.
            self.bf16 = not self.fp16 and torch.accelerator.is_available() and not self.use_cpu
        if not torch.accelerator.is_available():
            # There is nothing to pin memory for, and torch warns about it in every epoch.
            self.dataloader_pin_memory = False
        if self.disable_tqdm is None:
            self.disable_tqdm = not can_draw_bars()
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        checkpointing = self.activation_checkpointing
        self.gradient_checkpointing = self.activation_checkpointing = bool(checkpointing)
        super().__post_init__()
        # Unset, it stays so: a run on a card decides before its first step.
        self.activation_checkpointing = checkpointing
        check_processes(PartialState())
        # Again, because dictionaries are JSON until here.
        check_settings(self)
        options = parsed(self.gradient_checkpointing_kwargs)
        if options:
            check_checkpointing_kwargs(options)
            # torch's own default differs between versions.
            options.setdefault("use_reentrant", False)
        check_muon_settings(self)
        check_choice("accepted_loss", self.accepted_loss, LOSS_TYPES)
        check_choice("slot_weighting", self.slot_weighting, SLOT_WEIGHTINGS)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_draft_sampling(self.draft_sampling)
        self.sampling_settings()
        check_at_least(self, 0, "max_skipped_updates", "confidence_loss_weight", "selector_loss_weight")
        check_at_least(self, 1, "max_prompt_length", "max_completion_length", "generation_batch_size")
        check_at_least(self, 1, "blocks_per_pass", "loss_chunk_bytes", "num_drafts", "dataset_num_proc")
        check_at_least(self, 1, "prefetch_bytes")
        check_readings(self)
        if not 0 <= self.d_pace_floor <= 1:
            raise ValueError(f"`d_pace_floor` must be in [0, 1], got {self.d_pace_floor}.")
        for name in ("hub_target_id", "dataset_id"):
            try:
                validate_repo_id(getattr(self, name))
            except HFValidationError as error:
                raise ValueError(f"`{name}` must be a Hub id, ORG/NAME, got {getattr(self, name)!r}.") from error

    def fit_to(self, num_positions: int | None, num_drafts: int) -> Self:
        """
        Return these settings with every length a number that fits into the target's positions, block included.

        Raises:
            ValueError: If lengths that were given do not fit into the target's positions.
        """
        lengths = fit_lengths(
            num_positions,
            prompt=self.max_prompt_length,
            completion=self.max_completion_length,
            num_drafts=num_drafts,
            defaults=TRAINING_LENGTHS,
        )
        fitted = copy.copy(self)
        fitted.max_prompt_length, fitted.max_completion_length = lengths.prompt, lengths.completion
        return fitted

    def sampling_settings(self) -> SamplingSettings:
        """Return the target's sampling settings; raises `ValueError` where one is out of range."""
        return SamplingSettings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def longest_response(self) -> int:
        """`max_completion_length`, of the settings that a trainer works with."""
        assert self.max_completion_length is not None, "`fit_to` fills it in"
        return self.max_completion_length

    @property
    def trained_streams(self) -> tuple[str, ...]:
        """The streams of slots that have a share of the loss."""
        return ("accepted",)

    @property
    def completions_are_given(self) -> bool:
        """Whether the text trained on came with the data, and was not written by the target."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for logs and reports; in dictionaries, too, credentials are masked."""
        return {name: _masked(value) for name, value in super().to_dict().items()}

    @property
    def output_folder(self) -> Path:
        """Folder of everything that a run writes."""
        assert self.output_dir is not None, "transformers fills it in"
        return Path(self.output_dir)

    @property
    def uses_d_pace(self) -> bool:
        """Whether slots are weighed by D-PACE."""
        return self.slot_weighting == "d_pace"


_CREDENTIAL = re.compile("token|secret|passw|api_?key|credential|authorization", re.IGNORECASE)


def _masked(value: Any) -> Any:
    """Return a setting with the values of keys that name credentials left out."""
    if not isinstance(value, dict):
        return value
    return {
        key: f"<{str(key).upper()}>" if _CREDENTIAL.search(str(key)) and isinstance(inner, str) else _masked(inner)
        for key, inner in value.items()
    }


def parsed(value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Return a setting that is JSON on the command line, which transformers has parsed by now."""
    assert not isinstance(value, str), "`__post_init__` parses it"
    return value


def check_checkpointing_kwargs(options: dict[str, Any]) -> None:
    """Raise `ValueError` at options of activation checkpointing that drafters do not support."""
    if options.get("use_reentrant"):
        raise ValueError(
            "`use_reentrant=True` in the options of activation checkpointing would lose the gradient of the drafter's "
            "context, which its layers share. Leave it out, or set it to false."
        )
    if options.get("every_n_layers", 1) != 1:
        raise ValueError(
            f"`every_n_layers` is {options['every_n_layers']}, but a drafter's layers are all computed again or none "
            "is. Leave it out."
        )


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value`, given for the setting `name`, is one of `known`."""
    if value not in known:
        raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")


def check_part_weights(args: DraftTrainingConfig, drafter: Drafter) -> None:
    """Raise `ValueError` if the loss of a part is weighed of a drafter that has no such part."""
    config: Any = drafter.config
    for name, part, has_part in (
        ("confidence_loss_weight", "confidence head", config.has_confidence_head),
        ("selector_loss_weight", "selector", drafter.candidates is not None),
    ):
        weight = getattr(args, name)
        if weight != getattr(DraftTrainingConfig, name) and not has_part:
            raise ValueError(f"`{name}` is {weight}, but this {config.title} drafter has no {part}. Leave it out.")


def check_position_decay(position_decay: float) -> None:
    """Raise `ValueError` unless the decay lies in (0, 1]."""
    if not 0 < position_decay <= 1:
        raise ValueError(f"`position_decay` must be in (0, 1], got {position_decay}. 1 weighs all slots alike.")
