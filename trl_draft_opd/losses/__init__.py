# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Losses: divergences row by row, their chunked form from hidden states, and the weights of rows."""

from .chunked import Head, RowLosses, chunked_divergence
from .divergences import LOSS_TYPES, divergence
from .weights import position_weights, stream_scale


__all__ = [
    "LOSS_TYPES",
    "Head",
    "RowLosses",
    "chunked_divergence",
    "divergence",
    "position_weights",
    "stream_scale",
]
