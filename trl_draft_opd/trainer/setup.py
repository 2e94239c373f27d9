# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What both trainers do before the first step: load the pair, check that it belongs together, prepare data and messages.
"""

import logging
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from ..drafters.auto import AutoDrafter
from ..drafters.base import Drafter
from ..drafters.target_shape import check_layer_ids
from ..target import FrozenTarget
from ..target_placement import check_placement, load_in_turns
from ..trajectories.origin import fingerprint_weights
from .common_config import DraftTrainingConfig


logger = logging.getLogger(__name__)


def load_target(
    target_model: str | Path | PreTrainedModel | FrozenTarget,
    args: DraftTrainingConfig,
    processing_class: PreTrainedTokenizerBase | None,
) -> FrozenTarget:
    """
    Load or wrap the target as the config says. Collective if it is to be sharded.

    Raises:
        ValueError: If it is spread over devices, or quantised, where the launch has no use for that.
    """

    def load() -> FrozenTarget:
        target = FrozenTarget.load(
            target_model,
            dtype=args.target_dtype,
            revision=args.target_model_revision,
            trust_remote_code=args.trust_remote_code,
            tokenizer=processing_class,
            init_kwargs=args.target_model_init_kwargs,
        )
        check_placement(target.causal_lm, shard=args.shard_target, num_processes=args.world_size)
        if shard and not target.is_sharded:
            target.shard(args.device, fingerprint_weights(target.causal_lm))
        return target

    shard = args.shard_target and args.world_size > 1
    if args.shard_target and not shard:
        logger.warning("`shard_target=True` has no effect with one process: the target stays whole.")
    target = load_in_turns(load) if shard else load()
    if processing_class is not None:
        target.tokenizer = processing_class
    return target


def load_drafter(model: str | Path | Drafter, target: FrozenTarget, args: DraftTrainingConfig) -> Drafter:
    """
    Load the drafter, or take the instance, and check that it fits the target.

    Raises:
        ValueError: If vocabulary, hidden size or layer ids are another target's.
        TypeError: If `model` is no drafter.
    """
    if isinstance(model, (str, Path)):
        model = AutoDrafter.from_pretrained(model, num_target_layers=target.num_layers)
    if not isinstance(model, Drafter):
        raise TypeError(
            f"`model` must be a drafter, its id or its path, got {type(model).__name__}. Make a fresh one with "
            "`Eagle3DraftModel.from_target(target)` or `DFlashDraftModel.from_target(target, ...)`."
        )
    check_pair(model, target)
    if args.num_drafts is not None and model.max_drafts is not None and args.num_drafts > model.max_drafts:
        raise ValueError(
            f"`num_drafts` {args.num_drafts} exceeds the {model.max_drafts} drafts of the drafter's blocks. Lower it, or make a drafter "
            "with a larger `block_size`."
        )
    if target.config.name_or_path:
        model.config.target_model_name_or_path = target.config.name_or_path
        model.config.target_model_revision = args.target_model_revision
    model.config.num_target_layers = target.num_layers
    return model


def check_pair(drafter: Drafter, target: FrozenTarget) -> None:
    """
    Check that a drafter was made for this target.

    Raises:
        ValueError: Naming both values and the way out.
    """
    config, name = drafter.config, type(drafter).__name__
    if config.vocab_size != target.vocab_size:
        raise ValueError(
            f"The drafter has vocab_size {config.vocab_size} but the target has {target.vocab_size}. Verification compares token ids, so "
            f"both must share one tokenizer. Build the drafter with `{name}.from_target(target)`."
        )
    if config.target_hidden_size != target.config.hidden_size:
        raise ValueError(
            f"The drafter reads features of width {config.target_hidden_size} per layer but the target's hidden size is "
            f"{target.config.hidden_size}. It was made for another target; build one with `{name}.from_target(target)`."
        )
    if config.num_target_layers is not None and config.num_target_layers != target.num_layers:
        raise ValueError(
            f"The drafter's layer ids {config.target_layer_ids} belong to a target of {config.num_target_layers} layers, but this one has "
            f"{target.num_layers}. Build a drafter with `{name}.from_target(target)`."
        )
    check_layer_ids(config.target_layer_ids, target.num_layers)


def require_tokenizer(target: FrozenTarget) -> PreTrainedTokenizerBase:
    """Return the target's tokenizer, or raise `ValueError` when there is none and its vocabulary does not fit."""
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise ValueError(
            "No tokenizer: the target was given as an instance. Pass `processing_class=AutoTokenizer.from_pretrained(...)` of "
            "that target."
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= target.vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest} but the target's vocabulary ends at {target.vocab_size - 1}. Use the target's own tokenizer."
        )
    return tokenizer


def check_mask_token(drafter: Drafter, target: FrozenTarget, dataset: Dataset | IterableDataset, column: str) -> None:
    """
    Check that DFlash's mask token stands for nothing else.

    Raises:
        ValueError: If it is an end-of-sequence or padding token of the target, or occurs in the data.
    """
    mask_token_id = getattr(drafter.config, "mask_token_id", None)
    if mask_token_id is None:
        return
    pad = target.tokenizer.pad_token_id if target.tokenizer is not None else target.config.pad_token_id
    bos = target.tokenizer.bos_token_id if target.tokenizer is not None else target.config.bos_token_id
    if mask_token_id in {*target.eos_token_ids, pad, bos}:
        raise ValueError(
            f"`mask_token_id` {mask_token_id} is an eos, bos or pad token of the target. Choose an id that text never uses."
        )
    if isinstance(dataset, IterableDataset):
        return
    for row, ids in enumerate(dataset[column]):
        if mask_token_id in ids:
            raise ValueError(
                f"`mask_token_id` {mask_token_id} occurs in the data (row {row} after tokenization). The drafter could not tell a mask from "
                "text; choose an id that text never uses."
            )


def compile_drafter(drafter: Drafter, args: DraftTrainingConfig) -> None:
    """
    Compile the drafter's feed-forward and norm layers in place if `torch_compile` asks for it.

    The attention is fused already, and heads and losses run in chunks outside of the drafter.
    """
    if not args.torch_compile:
        return
    for module in drafter.modules():
        if isinstance(module, (LlamaMLP, LlamaRMSNorm, Qwen3MLP, Qwen3RMSNorm)):
            # Rollouts and steps differ in the number of rows every time.
            module.compile(
                backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode, dynamic=True
            )
    # Else accelerate would compile the model as a whole, whose forward is redirected to the training step.
    args.torch_compile_backend = args.torch_compile_mode = None


def check_finite(loss: torch.Tensor, sample_ids: torch.Tensor, global_step: int) -> None:
    """
    Stop before an update with a loss that is not finite.

    Raises:
        FloatingPointError: Naming the step and the samples.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"The loss is {loss.item()} at step {global_step} on samples {sample_ids.tolist()} (row indices of the dataset). Nothing was "
            "updated. Look at these rows, lower `learning_rate`, or use `bf16` instead of `fp16`."
        )
