# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Settings both trainers share. A default lives here or in one of the two config files, and nowhere else.
"""

import difflib
import re
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..losses import LOSS_TYPES
from ..rollout.acceptance import SamplingSettings
from ..rollout.drafting import check_draft_sampling
from ..utils.private_trl import _BaseConfig


SLOT_WEIGHTINGS = ("decay", "d_pace")
ON_NONFINITE = ("stop", "skip")


@dataclass
class DraftTrainingConfig(_BaseConfig):
    r"""
    Base of [`DraftSFTConfig`] and [`DraftOPDConfig`].

    Parameters:
        > Parameters that control the target

        target_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments for loading the target by id or path, as JSON on the command line, e.g. a `quantization_config`. A quantised
            target is another target: the drafter is trained for its text and its states.
        target_revision (`str`, *optional*):
            Revision of the target.
        target_dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the target's weights. `"auto"` keeps the checkpoint's: the target is only read. Use
            `"float32"` where losslessness must hold to the last token.
        shard_target (`bool`, *optional*, defaults to `False`):
            Shard the target's decoder layers over all processes of the launch, whatever wraps the drafter. Off, because a
            target that fits is faster whole: sharded layers are sent around in every forward pass, and ranks wait for the one whose
            responses are longest.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run model code that comes with the target. Off, because it executes whatever the repository holds.

        > Parameters that control the data

        max_prompt_length (`int`, *optional*, defaults to `1024`):
            Prompts with more tokens are skipped and counted, never cut: a cut prompt is another task.
        max_completion_length (`int`, *optional*, defaults to `2048`):
            Longest response the target writes in rollouts and evaluation; 2048 is the paper's non-thinking setting.
        chat_template (`str`, *optional*):
            Jinja template in place of the tokenizer's. Must be the one the drafter will be served with.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the chat template, e.g. `{"enable_thinking": false}`.
        dataset_num_proc (`int`, *optional*):
            Processes used to tokenize.

        > Parameters that control the target's answers

        responses (`str`, *optional*):
            Folder that keeps the target's answers to the prompts, as `trl-draft-opd generate` writes it; answers missing there
            are added. Defaults to `_responses` in `output_dir`, which is never pushed. Give SFT and Draft-OPD one folder to have
            them written once.
        generation_batch_size (`int`, *optional*, defaults to `32`):
            Prompts the target answers together. Larger batches cost less per token until the device's memory is full.

        > Parameters that control the loss

        accepted_loss (`str`, *optional*, defaults to `"forward_kl"`):
            Divergence on accepted slots: one of `forward_kl`, `reverse_kl`, `jsd`, `tv`, `lk`, `lk_hybrid`, `ce`. Forward KL covers the
            target where drafts are good, the paper's choice.
        slot_weighting (`str`, *optional*, defaults to `"decay"`):
            `"decay"`: slots are weighed by their distance from the anchor, see `position_decay`. `"d_pace"`: slot `j` weighs
            `sum_{m >= j} prod_{i <= m} ((1 - a) q_i + a)`, with `q_i` the drafter's current probability of the committed token at slot `i` and
            `a` the floor below: what the block's expected accepted length owes to the slot (Source:
            [D-PACE](https://huggingface.co/papers/2605.18810)). The sum runs over the block's trained slots that stand for a committed
            token, and no position decay is applied. Each stream is still divided by its number of slots, not by the sum of these weights,
            which no rank knows before the first forward pass of a step: the loss is a mean of weighted divergences, and
            falls or rises with the weights. Off: at equal FLOPs D-PACE gained nothing over position decay (docs/why/results.md, section 4).
        d_pace_floor (`float`, *optional*, defaults to `0.5`):
            Floor `a` of D-PACE, in [0, 1]: what a slot passes on to those behind it even where the drafter gives the committed token no
            probability. Read under `slot_weighting="d_pace"` alone.
        loss_chunk_bytes (`int`, *optional*, defaults to `67108864`):
            Bytes of logits, gradients and temporaries alive at a time in the loss; 64 MiB is about 50 rows of a vocabulary of
            152k. More fills a GPU better, less saves memory; the result is the same.

        activation_checkpointing (`bool`, *optional*, defaults to `False`):
            Compute the inside of each DFlash layer and of each EAGLE-3 step again in the backward pass instead of keeping it: same loss
            and gradients, one more forward of the drafter's blocks, and less memory: a quarter off the step's peak of a small EAGLE-3, half
            off a DFlash's (docs/do/scaling.md).
            Off, where TRL's trainers have it on: a drafter has one to a few layers, and the target keeps nothing for a backward pass.
            `gradient_checkpointing`, the older name, is read where this one is unset.

        > Parameters that control drafting

        num_drafts (`int`, *optional*):
            Drafts per block in rollouts and evaluation. Defaults to what the drafter was built for: `block_size - 1` or `ttt_steps`.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of the target in rollouts and evaluation; 0 decodes greedily, as the paper does.
        top_k (`int`, *optional*, defaults to `0`), top_p (`float`, *optional*, defaults to `1.0`):
            Filters of the target's distribution at a temperature above 0; off, as 0 and 1.0.
        draft_sampling (`str`, *optional*, defaults to `"greedy"`):
            `"greedy"`: drafts are the drafter's argmax, the engines' default; `"sample"`: drafts are drawn from its distribution.

        > Parameters that control evaluation

        eval_rollouts (`bool`, *optional*, defaults to `True`):
            Decode the evaluation prompts and report tau and acceptance per slot; the loss alone does not tell them.

        > Parameters that control what is not finite

        on_nonfinite (`str`, *optional*, defaults to `"stop"`):
            What becomes of an update whose losses or gradients are not finite; the samples are named either way. `"stop"`: training ends
            before it, because one such update in a small drafter's run is a fault to be found, and the last checkpoint is as it was.
            `"skip"`: it is left out and counted (`skipped_updates`), and the learning rate goes on.
        max_skipped_updates (`int`, *optional*, defaults to `10`):
            Updates skipped in a row after which training ends all the same: by then the weights are at fault, and not the rows.

        > Parameters that control publishing

        hub_target_id (`str`, *optional*):
            The target's Hub id, `ORG/NAME`, by which a published drafter names it. Defaults to the id the target was loaded by; needed
            to push when it was loaded from a folder or given as an instance.
        dataset_id (`str`, *optional*), dataset_license (`str`, *optional*):
            Hub id and licence of the training data, for the card. Not guessed: without them the card says that they were not given.
        hub_license (`str`, *optional*):
            Licence of the published drafter, e.g. `apache-2.0`. Not guessed: that of data and target may bind it.

    > [!NOTE]
    > Defaults that differ from TRL's: `activation_checkpointing=False` (drafters are small), `bf16` only where an accelerator is present, `learning_rate=3e-4`, `lr_scheduler_type="cosine"`,
    > `warmup_steps=0.05` (all three the paper's), `remove_unused_columns=False`, `ddp_find_unused_parameters=False`
    > (every parameter is used in every step).
    """

    _VALID_DICT_FIELDS = _BaseConfig._VALID_DICT_FIELDS + ["target_init_kwargs", "chat_template_kwargs"]

    # transformers renamed it in 5.23; both names work with every version, and without a value on the command line.
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the drafter's layers again in the backward pass to save memory.",
            "nargs": "?",
            "const": True,
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Older name of the same.", "nargs": "?", "const": True}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Warm-up: number of steps, or share of all steps when below 1."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop dataset columns the model's forward does not name; must stay off."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP look for unused parameters; drafters have none."}
    )
    target_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments for loading the target by id or path."}
    )
    target_revision: str | None = field(default=None, metadata={"help": "Revision of the target."})
    target_dtype: str = field(default="auto", metadata={"help": "Precision of the target's weights, e.g. `float32`."})
    shard_target: bool = field(
        default=False,
        metadata={"help": "Shard the target's layers over all processes; for targets that do not fit whole."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes with the target's repository."}
    )
    max_prompt_length: int = field(default=1024, metadata={"help": "Prompts with more tokens are skipped."})
    max_completion_length: int = field(
        default=2048, metadata={"help": "Longest response in rollouts and evaluation, in tokens."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja chat template in place of the tokenizer's."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, as JSON on the command line."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes used to tokenize."})
    responses: str | None = field(default=None, metadata={"help": "Folder that keeps the target's answers."})
    generation_batch_size: int = field(default=32, metadata={"help": "Prompts the target answers together."})
    accepted_loss: str = field(
        default="forward_kl", metadata={"help": f"Divergence on accepted slots, one of {', '.join(LOSS_TYPES)}."}
    )
    slot_weighting: str = field(
        default="decay",
        metadata={"help": "`decay`: by distance from the anchor; `d_pace`: by the drafter's own probabilities."},
    )
    d_pace_floor: float = field(default=0.5, metadata={"help": "Floor of D-PACE's weights, in [0, 1]."})
    loss_chunk_bytes: int = field(
        default=64 * 2**20, metadata={"help": "Bytes of logits alive at a time in the loss, all buffers together."}
    )
    num_drafts: int | None = field(
        default=None, metadata={"help": "Drafts per block in rollouts and evaluation; the drafter's own if unset."}
    )
    temperature: float = field(default=0.0, metadata={"help": "Temperature of the target; 0 decodes greedily."})
    top_k: int = field(default=0, metadata={"help": "Keep the k most likely tokens; 0 keeps all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Keep the smallest set of tokens with this mass; 1.0 keeps all."}
    )
    draft_sampling: str = field(
        default="greedy",
        metadata={"help": "`greedy`: drafts are argmax; `sample`: drawn from the drafter's distribution."},
    )
    eval_rollouts: bool = field(
        default=True, metadata={"help": "Decode the evaluation prompts and report tau and acceptance per slot."}
    )

    on_nonfinite: str = field(
        default="stop",
        metadata={"help": "Before an update that is not finite: `stop` training, or `skip` the update and count it."},
    )
    max_skipped_updates: int = field(
        default=10, metadata={"help": "Updates skipped in a row after which training stops all the same."}
    )
    hub_target_id: str | None = field(
        default=None, metadata={"help": "The target's Hub id, by which a published drafter names it."}
    )
    dataset_id: str | None = field(default=None, metadata={"help": "Hub id of the training data, for the card."})
    dataset_license: str | None = field(default=None, metadata={"help": "Licence of the training data, for the card."})
    hub_license: str | None = field(default=None, metadata={"help": "Licence of the published drafter."})

    def __new__(cls, *args: Any, **settings: Any):
        """Refuse an unknown setting by its nearest name, before the generated `__init__` refuses it without."""
        known = [setting.name for setting in fields(cls) if setting.init]
        for name in sorted(set(settings) - set(known)):
            near = difflib.get_close_matches(name, known, n=1)
            if near:
                raise TypeError(
                    f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}. Did you mean {near[0]!r}?"
                )
        return super().__new__(cls)

    def __post_init__(self):
        if self.bf16 is None:
            # TRL turns bf16 on everywhere; without an accelerator that only makes training slower or fail.
            self.bf16 = not self.fp16 and torch.accelerator.is_available() and not self.use_cpu
        if not torch.accelerator.is_available():
            # There is nothing to pin memory for, and torch warns about it in every epoch.
            self.dataloader_pin_memory = False
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        self.gradient_checkpointing = self.activation_checkpointing
        super().__post_init__()
        check_checkpointing_kwargs(self.gradient_checkpointing_kwargs)
        if self.gradient_checkpointing_kwargs:
            # torch's own default differs between versions.
            self.gradient_checkpointing_kwargs.setdefault("use_reentrant", False)
        check_loss_type("accepted_loss", self.accepted_loss)
        check_choice("slot_weighting", self.slot_weighting, SLOT_WEIGHTINGS)
        check_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        if self.max_skipped_updates < 0:
            raise ValueError(f"`max_skipped_updates` must be at least 0, got {self.max_skipped_updates}.")
        if self.save_on_each_node:
            raise ValueError(
                "`save_on_each_node=True` is not supported: the first process writes checkpoints for all. Put `output_dir` on storage that all "
                "machines share."
            )
        if not 0 <= self.d_pace_floor <= 1:
            raise ValueError(
                f"`d_pace_floor` must be in [0, 1], got {self.d_pace_floor}. 0 goes by the drafter's probabilities alone, 1 by none of them."
            )
        check_draft_sampling(self.draft_sampling)
        self.sampling_settings()
        for name in ("max_prompt_length", "max_completion_length", "generation_batch_size", "loss_chunk_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("hub_target_id", "dataset_id"):
            check_hub_id(name, getattr(self, name))
        if self.num_drafts is not None and self.num_drafts < 1:
            raise ValueError(f"`num_drafts` must be at least 1, got {self.num_drafts}.")

    def sampling_settings(self) -> SamplingSettings:
        """Return the target's sampling distribution as one object; raises `ValueError` when a value is out of range."""
        return SamplingSettings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def completions_are_given(self) -> bool:
        """Whether the text trained on came with the data, and was not written by the target in this run or before it."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for logs and reports; what could be a credential inside of a dictionary is masked, too."""
        return {name: _masked(value) for name, value in super().to_dict().items()}

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


def check_checkpointing_kwargs(options: dict[str, Any] | None) -> None:
    """Raise `ValueError` at options of activation checkpointing that drafters do not keep to."""
    if (options or {}).get("use_reentrant"):
        raise ValueError(
            "`use_reentrant=True` in the options of activation checkpointing would lose the gradient of the drafter's context, which its "
            "layers share. Leave it out, or set it to false."
        )
    if (options or {}).get("every_n_layers", 1) != 1:
        raise ValueError(
            f"`every_n_layers` is {options['every_n_layers']}, but a drafter's layers and steps are all computed again or none is. Leave it out."
        )


def check_loss_type(name: str, loss_type: str) -> None:
    """Raise `ValueError` unless `loss_type`, given for the setting `name`, is known."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"`{name}` must be one of {LOSS_TYPES}, got {loss_type!r}.")


def check_hub_id(name: str, value: str | None) -> None:
    """Raise `ValueError` unless `value`, given for the setting `name`, is unset or can be a Hub id."""
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(f"`{name}` must be a Hub id, ORG/NAME, got {value!r}.") from error


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value`, given for the setting `name`, is one of `known`."""
    if value not in known:
        raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")


def check_position_decay(position_decay: float) -> None:
    """Raise `ValueError` unless the decay lies in (0, 1]."""
    if not 0 < position_decay <= 1:
        raise ValueError(f"`position_decay` must be in (0, 1], got {position_decay}. 1 weighs all slots alike.")
