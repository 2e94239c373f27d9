# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Options of transformers' Trainer that do nothing for a drafter, or do harm, and those that readings have no use for:
refused with a sentence, before any work.
"""

from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from ..readings.opening import check_shared_folder, is_address
from ..utils.settings import check_at_least


# Option -> the values that leave it off, and why it is refused.
UNUSABLE_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "neftune_noise_alpha": ((None,), "a drafter reads its target's embedding, to which no noise is added"),
    "label_smoothing_factor": (
        (0.0,),
        "a drafter learns its target's distribution; smoothed labels have no part in it",
    ),
    "use_liger_kernel": (
        (False,),
        "it patches models of transformers; the drafter's loss is computed in chunks anyway",
    ),
    "auto_find_batch_size": ((False,), "a checkpoint could not tell which rows an update of another size had seen"),
    "include_num_input_tokens_seen": (("no", False), "a drafter is trained on blocks, and its tokens are not counted"),
    "include_for_metrics": (([], None), "there is no `compute_metrics`: tau and acceptance are measured by decoding"),
    "batch_eval_metrics": ((False,), "there is no `compute_metrics`: tau and acceptance are measured by decoding"),
    "label_names": ((None,), "a drafter has no labels of its own"),
    "bf16_full_eval": (
        (False,),
        "it would round the drafter's weights for good; `bf16` evaluates in bfloat16 without",
    ),
    "fp16_full_eval": ((False,), "it would round the drafter's weights for good; `fp16` evaluates in float16 without"),
    "enable_jit_checkpoint": ((False,), "SIGTERM is answered with a checkpoint anyway"),
    "remove_unused_columns": ((False,), "a drafter's forward does not name the columns, so that all would be removed"),
    "parallelism_config": (
        (None,),
        "a drafter is trained by replicas (DDP), FSDP2 or ZeRO, see docs/do/distributed.md",
    ),
    "save_on_each_node": (
        (False,),
        "the first process writes checkpoints for all; put `output_dir` on storage that all machines share",
    ),
}
# Settings of transformers whose 0 it takes for "unset" or cannot work with, and which have a value that means so.
_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
    "eval_accumulation_steps",
    "torch_empty_cache_steps",
)
# Settings that mean nothing at 0, and what to do instead.
_ABOVE_ZERO = {
    "num_train_epochs": "At 0 nothing would be trained; to measure a drafter, use `trl-draft-opd evaluate`.",
    **{f"{what}_steps": f"Leave it out, or set `{what}_strategy='no'`." for what in ("logging", "save", "eval")},
}


def check_options(args: TrainingArguments) -> None:
    """
    Refuse options that cannot work, and counts of 0 that transformers would take for "unset".

    Raises:
        ValueError: Naming the option and the reason.
    """
    for name, (off, reason) in UNUSABLE_OPTIONS.items():
        value = getattr(args, name)
        # 0 and False are equal, and not the same setting.
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in off):
            raise ValueError(f"`{name}={value!r}` is not supported: {reason}. Leave it out.")
    check_at_least(args, 1, *_AT_LEAST_ONE)
    check_at_least(args, 0, "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps")
    for name, fix in _ABOVE_ZERO.items():
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"`{name}` must be above 0, got {value}. {fix}")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(
            f"`max_steps` must be at least 1, got {args.max_steps}. Leave it out to train for `num_train_epochs`."
        )
    check_reporters(args.report_to)


def check_reporters(report_to: str | list[str] | None) -> None:
    """Raise `ValueError` at a reporter that transformers does not know or that is not installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in names:
        if name in ("none", "all"):
            continue
        # Names those that exist, where it does not know this one.
        get_reporting_integration_callbacks([name])
        # transformers never lists flyte.
        installed = get_available_reporting_integrations()
        if name not in installed and name != "flyte":
            raise ValueError(
                f"`report_to` names {name!r}, which is not installed. Install it, or leave it out; installed: "
                f"{', '.join(installed) or 'none'}."
            )


def check_readings(args: Any) -> None:
    """
    Refuse settings of both trainers that a source of readings has no use for, and those that need one.

    Raises:
        ValueError: Naming the setting and the fix.
    """
    if args.readings is not None and not isinstance(args.readings, str):
        raise ValueError(
            f"`readings` must be one text, a folder or the addresses of servers separated by commas, got "
            f"{args.readings!r}."
        )
    is_served = args.readings is not None and is_address(args.readings)
    check_shared_folder(args.readings, args.shared_folder)
    if args.readings is not None and args.shard_target:
        raise ValueError(
            "`shard_target=True` shards the target's layers, which a run with `readings` does not load. Leave one "
            "of the two out."
        )
    if not args.shuffle_by_shard:
        return
    if args.readings is None or is_served:
        raise ValueError(
            "`shuffle_by_shard=True` orders rows by the shards of a store, and `readings` is "
            f"{args.readings!r}. Give the folder of a store there, or leave `shuffle_by_shard` out."
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"`shuffle_by_shard=True` and `train_sampling_strategy={args.train_sampling_strategy!r}` both order "
            "the rows. Leave one of the two out."
        )
