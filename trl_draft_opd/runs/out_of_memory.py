# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Out of memory, said so that it helps: what was being done, how large it was, and which settings make it smaller.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..rollout.blocks import BlockBatch
from ..rollout.types import Rollout


# How torch's allocator for the CPU says it; it has no error type of its own.
_CPU_MESSAGE = "DefaultCPUAllocator"


@contextmanager
def explained_memory(doing: str, batches: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> Iterator[None]:
    """
    Turn an allocation that failed inside into an error that names sizes and settings.

    Args:
        doing (`str`): What is being done, e.g. `"a training step"`.
        batches (`Sequence[Mapping]`): What it is done with; looked at only when it fails.
        settings (`Sequence[str]`): Settings to lower or turn on, as the message shall name them, the most effective first.

    Raises:
        torch.OutOfMemoryError: In place of the allocator's own error, which is its cause.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_MESSAGE in str(error)
        if not is_memory:
            raise
        sizes = "; ".join(filter(None, map(_describe, batches)))
        first_line = (str(error).strip().splitlines() or ["no further details"])[0]
        raise torch.OutOfMemoryError(
            f"Out of memory in {doing} ({sizes or 'sizes unknown'}): {first_line} To need less: {', '.join(settings)}. Checkpoints are as "
            "they were; go on with `resume_from_checkpoint=True`."
        ) from error


def _describe(batch: Mapping[str, Any]) -> str:
    """Return rows, length and blocks of a batch, as far as it has them."""
    rollout: Rollout | None = batch.get("rollout")
    anchors: BlockBatch | None = batch.get("anchors")
    ids = rollout.input_ids if rollout is not None else batch.get("input_ids", batch.get("prompt_ids"))
    if ids is None:
        return ""
    text = f"{ids.shape[0]} rows of up to {ids.shape[1]} tokens"
    if anchors is not None:
        text += f", {int((anchors.anchors >= 1).sum())} blocks of {anchors.drafts.shape[-1]} drafts"
    return text
