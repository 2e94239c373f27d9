# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Out of memory, said so that it helps: what was being done, how large it was, and which settings make it smaller.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


# How torch's allocator for the CPU says it; it has no error type of its own.
_CPU_MESSAGE = "DefaultCPUAllocator"


@contextmanager
def explained_memory(doing: str, batches: Sequence[Any], settings: Sequence[str]) -> Iterator[None]:
    """
    Turn an allocation that failed inside into an error that names sizes and settings.

    Args:
        doing (`str`): What is being done, e.g. `"a training step"`.
        batches (`Sequence`): What it is done with, mappings or objects with a `describe` method; looked at only when it fails.
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


def _describe(batch: Any) -> str:
    """Return rows and length of a batch, or what it says of itself."""
    if hasattr(batch, "describe"):
        return batch.describe()
    ids = batch.get("input_ids")
    return "" if ids is None else f"{ids.shape[0]} rows of up to {ids.shape[1]} tokens"
