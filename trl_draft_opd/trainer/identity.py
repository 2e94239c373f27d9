# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What makes a trainer's run this one and no other, as digests and settings.
"""

from typing import Any

from ..export.record import recorded_settings
from ..responses.origin import fingerprint_weights, hash_config, hash_tokenizer
from ..runs.run_state import RunIdentity, dataset_digest, digest_of


# What the config of a drafter calls itself or its target by, which changes nothing.
_NAMES = {
    "_name_or_path",
    "name_or_path",
    "target_model_name_or_path",
    "target_model_revision",
    "transformers_version",
}
# Settings beside those of the training record that shape what is computed.
_FURTHER = ("adam_epsilon", "chat_template", "target_revision", "on_nonfinite")
# How an update's rows are dealt to batches and processes: their product is compared by itself.
_DEALING = {"per_device_train_batch_size", "gradient_accumulation_steps", "generation_batch_size"}


def describe_run(trainer: Any) -> RunIdentity:
    """
    Return the identity of a run.

    Args:
        trainer ([`DraftSFTTrainer`] or [`DraftOPDTrainer`]): The trainer.
    """
    args, target = trainer.args, trainer.target
    drafter = trainer.accelerator.unwrap_model(trainer.model)
    shape = {name: value for name, value in drafter.config.to_dict().items() if name not in _NAMES}
    trained = sorted(name for name, parameter in drafter.named_parameters() if parameter.requires_grad)
    tokenizer = None if target.tokenizer is None else hash_tokenizer(target.tokenizer)
    weights = target.weights_fingerprint or fingerprint_weights(target.causal_lm)
    settings = recorded_settings(args) | {name: getattr(args, name) for name in _FURTHER}
    return RunIdentity(
        method=trainer._method,
        drafter=digest_of([shape, trained]),
        target=digest_of([hash_config(target.config), weights, tokenizer]),
        dataset=dataset_digest(trainer.train_dataset),
        rows_per_update=args.train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes,
        settings={name: value for name, value in settings.items() if name not in _DEALING},
    )
