# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Faults of engines that are known and can be imitated, so that a difference is laid at the right door: where our loop with the fault
takes exactly the engine's rounds, the export is not to blame.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from ..drafters.base import DraftContext
from ..drafters.dflash import DFlashDraftModel
from .report import Outcome
from .scene import Scene


@dataclass(frozen=True)
class KnownFault:
    """
    Attributes:
        text (`str`): What the engine does, since when, and where it is reported.
        imitate (`Callable`): Given the drafter, a context in which it computes as the engine does.
    """

    text: str
    imitate: Callable[[DFlashDraftModel], AbstractContextManager[None]]


@contextmanager
def _first_key_norm_everywhere(drafter: DFlashDraftModel) -> Iterator[None]:
    """Norm the context's keys of every layer with the weights of the first; those of the block stay right."""
    norms = [layer.self_attn.k_norm for layer in drafter.layers]
    encode = drafter.encode_context

    def encode_as_engine(*args, **options) -> DraftContext:
        own = [norm.weight.data for norm in norms]
        try:
            for norm in norms:
                norm.weight.data = own[0]
            return encode(*args, **options)
        finally:
            for norm, weight in zip(norms, own, strict=True):
                norm.weight.data = weight

    drafter.encode_context = encode_as_engine
    try:
        yield
    finally:
        del drafter.encode_context


def find_known_fault(name: str, scene: Scene, outcome: Outcome) -> KnownFault | None:
    """Return the fault an engine is known to have with such a drafter on such a device, or `None`."""
    if name == "vllm" and scene.drafter.config.family == "dflash" and outcome.device == "cpu":
        return KnownFault(
            "on the CPU, vLLM norms the context's keys of every DFlash layer with the first layer's weights (seen in 0.32.0; vLLM PR "
            "56431 mends the same fault on XPU)",
            _first_key_norm_everywhere,
        )
    return None
