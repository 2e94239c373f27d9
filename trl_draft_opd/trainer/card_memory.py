# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A card that is too small for a run, told before the memory runs out: refused where weights alone exceed it, warned of
where a step is computed to.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from ..costs.memory import Stages, Workload, checkpointing_pays, count_stages, describe_shortage, refuse_small_card
from ..costs.shapes import DrafterShape, TargetShape
from ..drafters.base import Drafter
from ..target.frozen import FrozenTarget
from ..utils.versions import switch_checkpointing
from .common_config import DraftTrainingConfig, parsed
from .muon import is_matrix
from .pair import Pair
from .step import PreparedBatch


logger = logging.getLogger(__name__)


def smaller_settings(is_checkpointing: bool) -> tuple[str, ...]:
    """Return the settings that make a step smaller, but for activation checkpointing where it is on already."""
    return (
        "lower `per_device_train_batch_size` (and raise `gradient_accumulation_steps`)",
        *(() if is_checkpointing else ("set `activation_checkpointing=True`",)),
        "lower `blocks_per_pass`, `loss_chunk_bytes`, `max_completion_length` or `num_anchors`",
    )


def card_bytes(device: torch.device) -> int | None:
    """Return the memory of a CUDA card in bytes; `None` of any other device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def check_weights_fit(pair: Pair, args: DraftTrainingConfig, is_given: bool) -> None:
    """
    Refuse a card that cannot hold the weights and what an optimizer keeps of them, before they are moved there;
    `is_given`: whether the optimizer is the user's own.

    Raises:
        ValueError: With the sizes and what makes them smaller.
    """
    card = card_bytes(args.device)
    if card is None:
        return
    # What a `device_map` has placed stays there; the rest is to come, unless it will be sharded.
    is_placed = getattr(pair.target.causal_lm, "hf_device_map", None) is not None
    # A fresh EAGLE-3 may lose most of its head once the responses are known.
    is_whole = args.world_size == 1 and not pair.drafter.vocabulary_is_open
    refuse_small_card(
        target=0 if args.shard_target else target_bytes(pair.target, device=args.device if is_placed else None),
        trained=trained_bytes(pair.drafter) if is_whole else 0,
        optimizer=optimizer_bytes(args, pair.drafter, is_given) if is_whole else 0,
        card=card,
    )


def fit_to_card(
    drafter: Drafter,
    target: FrozenTarget,
    batches: Sequence[PreparedBatch],
    args: DraftTrainingConfig,
    chunk_bytes: int,
    is_given: bool,
) -> None:
    """
    Compute what the largest of some micro-batches needs. Turn activation checkpointing on where it was left open and a
    card would be nearly full without; warn if the card is too small all the same. `is_given`: whether the optimizer is
    the user's own.
    """
    card = card_bytes(args.device)
    if card is None or not batches:
        return
    fixed = target_bytes(target, args.device) + 2 * trained_bytes(drafter) + optimizer_bytes(args, drafter, is_given)
    shapes = TargetShape.of(target.config), DrafterShape.of(drafter.config)

    def largest() -> Stages:
        settings = Workload(
            *(1, 0, 0),
            accumulation=len(batches),
            checkpointing=drafter.gradient_checkpointing,
            chunk_bytes=chunk_bytes,
            blocks_per_pass=args.blocks_per_pass,
        )
        found = [count_stages(*shapes, _workload(batch, settings)) for batch in batches]
        return max(found, key=lambda stages: stages.working)

    stages = largest()
    if args.activation_checkpointing is None and checkpointing_pays(fixed + stages.step, card):
        logger.warning("The drafter's layers are computed again in the backward pass: they would fill the card.")
        options = {"use_reentrant": False} | (parsed(args.gradient_checkpointing_kwargs) or {})
        switch_checkpointing(drafter, "enable", options)
        stages = largest()
    message = describe_shortage(stages, fixed, card, smaller_settings(drafter.gradient_checkpointing))
    if message is not None:
        warnings.warn(message, stacklevel=2)


def _workload(batch: PreparedBatch, settings: Workload) -> Workload:
    """Return what a micro-batch is, its rows end to end as one, with everything else of `settings`."""
    lengths = batch.text.attention_mask.sum(1)
    blocks = int((batch.blocks.anchors >= 0).sum())
    return replace(settings, length=int(lengths.sum()), blocks=blocks, longest=int(lengths.max()))


def target_bytes(target: FrozenTarget, device: torch.device | None = None) -> int:
    """Return the bytes of the target's weights, or of those, and of this rank's shards, that lie on `device`."""
    parameters = target.causal_lm.parameters()
    local = [each.to_local() if isinstance(each, DTensor) else each for each in parameters]
    return sum(each.nbytes for each in local if device is None or each.device == device)


def trained_bytes(drafter: Drafter) -> int:
    """Return the bytes of the weights that are trained."""
    return sum(parameter.nbytes for parameter in drafter.parameters() if parameter.requires_grad)


def optimizer_bytes(args: DraftTrainingConfig, drafter: Drafter, is_given: bool) -> int:
    """
    Return the bytes that the optimizer keeps of the trained weights: AdamW two numbers of each, Muon one. 0 of
    another optimizer, or one that is given: unknown.
    """
    if is_given or args.optim not in ("adamw_torch", "adamw_torch_fused"):
        return 0
    has_muon = args.muon_learning_rate is not None
    trained = [(name, parameter) for name, parameter in drafter.named_parameters() if parameter.requires_grad]
    return sum((1 if has_muon and is_matrix(drafter, name, each) else 2) * each.nbytes for name, each in trained)
