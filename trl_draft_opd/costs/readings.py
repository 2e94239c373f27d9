# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What readings that come from elsewhere cost: bytes of a token, of a store, of a shared folder and of a server's cache,
and the bandwidth and servers that keep a trainer busy. Measures nothing.

Shape letters:  H = hidden size
"""

import math
from dataclasses import dataclass

from .gpus import Gpu
from .roofline import Prediction
from .shapes import TargetShape


BF16 = 2


def bytes_per_token(hidden_size: int, num_layers: int, itemsize: int = BF16) -> int:
    """Return the bytes of a token's reading: its states at `num_layers` tapped layers, and the input of the head."""
    return (num_layers + 1) * hidden_size * itemsize


def bodiless_bytes(target: TargetShape, itemsize: int = BF16) -> int:
    """Return the bytes of the weights of a target without its body: embedding, final norm, and the head of its own."""
    return (target.parameters - target.layers * target.layer_parameters) * itemsize


def cache_bytes_per_token(
    target: TargetShape, num_layers: int, tensor_parallel: int = 1, itemsize: int = BF16
) -> tuple[int, int]:
    """
    Return the bytes a token takes of the cache of every card of a server: its keys and values, whose heads the cards
    share while there are enough, and its states, of which each card keeps all.
    """
    heads = max(1, target.kv_heads // tensor_parallel)
    keys = 2 * heads * target.head_dim * target.layers * itemsize
    return keys, bytes_per_token(target.hidden, num_layers, itemsize)


def shared_folder_bytes(concurrency: int, longest_text: int, token_bytes: int) -> int:
    """Return the most that the files of `concurrency` texts under way take of the folder that a server writes to."""
    return concurrency * longest_text * token_bytes


def served_tokens_per_second(target: TargetShape, length: int, gpu: Gpu, num_gpus: int = 1) -> float:
    """
    Return the tokens that cards read in a second at most: the FLOPs of the body, which works on texts of `length`
    tokens, at the speed that large bf16 products reach.
    """
    # Two products of a query and a key, which is half of the text away on average.
    attention = 2 * 2 * (length / 2) * target.query_width * target.layers
    return num_gpus * gpu.flops / (2 * target.layers * target.active_matrices + attention)


@dataclass(frozen=True)
class Flow:
    """
    What a trainer takes in where it never waits for its input.

    Attributes:
        tokens_per_second (`float`): Text tokens of a step over its seconds, the target's own reading left out.
        token_bytes (`int`): Bytes of a token's reading.
        reading_share (`float`): Share of a step in process that is the target's reading.
    """

    tokens_per_second: float
    token_bytes: int
    reading_share: float

    @classmethod
    def of(cls, prediction: Prediction, token_bytes: int) -> "Flow":
        """Return what the predicted job takes in on its card."""
        reading = prediction.seconds_of("target")
        rest = prediction.total - reading
        return cls(prediction.volume.tokens / rest, token_bytes, reading / prediction.total)

    @property
    def bytes_per_second(self) -> float:
        """Bytes a second that have to arrive."""
        return self.tokens_per_second * self.token_bytes

    def servers(self, tokens_per_second: float, num_trainers: int = 1) -> int:
        """Return how many servers of a speed share the load of `num_trainers` cards that train."""
        return math.ceil(num_trainers * self.tokens_per_second / tokens_per_second)
