# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Under autocast every layer hands on its output in autocast's dtype, so that nothing is cast or kept twice; without it
nothing changes. Knows nothing of drafters.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def activation_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that a layer of this weight works in and hands on: autocast's, or the weight's without it."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def run_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """
    Run a norm on hidden states `(..., n)`; under autocast return its dtype, where the layer would return float32.

    The norm is then one kernel that keeps nothing but its input, with a weight rounded as autocast rounds those of
    projections. Any other layer (an adapter's copy, compiled, with hooks that fetch its weight) is called as it is.
    """
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return norm(hidden)
    dtype = torch.get_autocast_dtype(kind)
    is_plain = type(norm) in (LlamaRMSNorm, Qwen3RMSNorm) and norm._compiled_call_impl is None
    if not is_plain or norm._forward_pre_hooks or norm._forward_hooks:
        return norm(hidden).to(dtype)
    weight = cast(Tensor, norm.weight)
    with torch.autocast(kind, enabled=False):
        return rms_norm(hidden.to(dtype), weight.shape, weight.to(dtype), cast(float, norm.variance_epsilon))
