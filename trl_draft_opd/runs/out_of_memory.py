# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Out of memory, reported so that it helps: what was being done, how large it was, and which settings make it smaller.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


# Torch's allocator for the CPU has no error type of its own.
_CPU_MESSAGE = "DefaultCPUAllocator"


@contextmanager
def explained_memory(doing: str, describe: Callable[[], str], settings: Sequence[str]) -> Iterator[None]:
    """
    Turn an allocation that failed inside into a `torch.OutOfMemoryError` that names what was done, its sizes and the
    settings that help, the most effective first.

    `describe` is called only then, and returns `""` if it cannot tell.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and _CPU_MESSAGE not in str(error):
            raise
        first_line = (str(error).strip().splitlines() or ["no further details"])[0]
        raise torch.OutOfMemoryError(
            f"Out of memory in {doing} ({describe() or 'sizes unknown'}): {first_line} To need less: "
            f"{', '.join(settings)}. Checkpoints are as they were; continue with `resume_from_checkpoint=True`."
        ) from error
