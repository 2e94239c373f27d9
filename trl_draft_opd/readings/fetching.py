# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What a store and servers have in common: they fetch the states of one text at a time."""

from collections.abc import Sequence
from typing import Protocol

from ..target.reading import TextStates


class Fetcher(Protocol):
    """
    Fetches the states of single texts; called from several threads.

    Attributes:
        is_before_norm (`bool`): As of [`ReadingSource`].
        concurrency (`int`): Texts that are best fetched at a time.
        layer_ids (`tuple[int, ...]`): Layers that can be had, ascending.
        digest (`str`): Identifies what is delivered, for the identity of a run.
    """

    is_before_norm: bool
    concurrency: int
    layer_ids: tuple[int, ...]
    digest: str

    def fetch(self, text: Sequence[int], layer_ids: Sequence[int]) -> TextStates:
        """Return the states of a text at some of the layers; raises as [`ReadingSource.read`]."""
        ...

    def num_bytes(self, num_tokens: int, num_layers: int) -> int:
        """Return the bytes of a text's states on the host."""
        ...

    def close(self) -> None:
        """Let go of files and connections; what is under way may fail."""
        ...
