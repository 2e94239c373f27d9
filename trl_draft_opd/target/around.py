# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What lies around a target's layers, computed as its own class computes it: the embedding and the head.

Shape letters:  H = the target's hidden size, V = vocabulary
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .placement import device_of


def embed_tokens(causal_lm: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Embed token ids as transformers' DFlash decoding does: with the family's scale, without an input norm."""
    embedding: Any = causal_lm.get_input_embeddings()
    norm = getattr(embedding, "embed_norm", None)
    if norm is None:
        return embedding(input_ids)
    embedding.embed_norm = nn.Identity()
    try:
        return embedding(input_ids)
    finally:
        embedding.embed_norm = norm


def project_states(causal_lm: PreTrainedModel, config: PreTrainedConfig, hidden: torch.Tensor) -> torch.Tensor:
    """Turn inputs of the head `(..., H)` into logits `(..., V)`, the family's scales and soft cap included."""
    head: Any = causal_lm.get_output_embeddings()
    # A head on another device hands its logits back to where the states are.
    logits = head(hidden.to(device_of(head), head.weight.dtype)).to(hidden.device)
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def count_logit_buffers(config: PreTrainedConfig) -> int:
    """Return how many tensors of the logits' size [`project_states`] and its backward pass hold at once."""
    if getattr(config, "final_logit_softcapping", None) is not None:
        return 4
    return 2 if getattr(config, "logits_scaling", None) or getattr(config, "logit_scale", None) else 1
