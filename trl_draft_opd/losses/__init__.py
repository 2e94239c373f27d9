# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Losses: divergences row by row, their chunked form from hidden states, and the weights of rows."""

from .budget import default_chunk_bytes
from .candidates import Selector
from .chunked import LabelScores, RowLosses, chunked_divergence, score_labels
from .divergences import LOSS_TYPES, divergence
from .heads import Head
from .keeping import Verification
from .weights import d_pace_weights, mark_until_fail, position_weights, stream_scale


__all__ = [
    "LOSS_TYPES",
    "Head",
    "LabelScores",
    "RowLosses",
    "Selector",
    "Verification",
    "chunked_divergence",
    "d_pace_weights",
    "default_chunk_bytes",
    "divergence",
    "mark_until_fail",
    "position_weights",
    "score_labels",
    "stream_scale",
]
