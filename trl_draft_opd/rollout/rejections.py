# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Where drafts are rejected: by the class of the token that the target wrote, and by the position along the response.
Sums that add up over batches and ranks. Knows no model.

Shape letters:  B = sequences, L = text length, A = blocks per sequence, K = drafts per block, V = vocabulary
"""

import torch

from .types import Rollout


# First token of each stretch of a response; the last one has no end.
STRETCHES = (0, 64, 256, 1024, 4096)


def rejection_sums(
    rollout: Rollout, classes: torch.Tensor | None, class_names: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
    """
    Return rejected and decided drafts by metric name. The blocks are those that tau counts; a draft is decided if it
    was accepted, or is the first of its block that the target rejected.

    Args:
        rollout ([`Rollout`]): Of any engine.
        classes (`torch.LongTensor` of shape `(V,)`, *optional*): The class of each id, an index into `class_names`.
        class_names (`tuple[str, ...]`): Their names.

    Returns:
        `dict`: `rejection/class_NAME` by the class of the target's token, `rejection/from_token_N` by where in its
        response the token stands. What was not met has no entry.
    """
    counted, ids = rollout.is_counted.cpu(), rollout.input_ids.cpu()
    accepted, anchors = rollout.accepted.cpu()[counted], rollout.anchors.cpu()[counted]
    rows = torch.arange(len(ids))[:, None].expand_as(counted)[counted]
    num_verified = torch.full_like(accepted, rollout.drafts.shape[-1])
    if rollout.verified is not None:
        num_verified = rollout.verified.cpu()[counted]
    slots = torch.arange(1, rollout.drafts.shape[-1] + 1)
    is_decided = slots <= torch.minimum(accepted + 1, num_verified)[:, None]
    is_rejected = (slots > accepted[:, None])[is_decided]
    places = (anchors[:, None] + slots)[is_decided]
    rows = rows[:, None].expand_as(is_decided)[is_decided]
    found: dict[str, tuple[float, float]] = {}

    def add(name: str, is_here: torch.Tensor) -> None:
        if num_decided := int(is_here.sum()):
            found[name] = (float(is_rejected[is_here].sum()), float(num_decided))

    if classes is not None:
        kinds = classes[ids[rows, places]]
        for number, name in enumerate(class_names):
            add(f"rejection/class_{name}", kinds == number)
    offsets = _offsets(rollout.completion_mask.cpu())[rows, places]
    for first, end in zip(STRETCHES, (*STRETCHES[1:], None), strict=True):
        add(f"rejection/from_token_{first}", (offsets >= first) & (offsets < (end or torch.inf)))
    return found


def _offsets(completion_mask: torch.Tensor) -> torch.Tensor:
    """Return how many tokens of its own response are before each one the target wrote, `(B, L)`."""
    index = torch.arange(completion_mask.shape[1]).expand_as(completion_mask)
    before = torch.where(completion_mask, -1, index).cummax(dim=1).values
    return index - before - 1
