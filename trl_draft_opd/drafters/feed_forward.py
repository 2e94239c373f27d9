# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The gated feed-forward layer of transformers with half the memory in training: the backward pass computes the
activation again from the two projections it keeps anyway. Knows nothing of drafters.

Shape letters:  H = hidden size, I = intermediate size
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP


def run_mlp(mlp: LlamaMLP | Qwen3MLP, hidden: Tensor) -> Tensor:
    """
    Run `mlp` on hidden states `(..., H)`; values and gradients are those of calling it.

    Any other layer (activation, bias, an adapter around the last projection, compiled) is called as it is.
    """
    down = mlp.down_proj
    is_plain = isinstance(mlp.act_fn, (SiLUActivation, nn.SiLU)) and type(down) is nn.Linear and down.bias is None
    if not is_plain or mlp._compiled_call_impl is not None or not torch.is_grad_enabled():
        return mlp(hidden)
    return _GatedDown.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden), down.weight)


class _GatedDown(torch.autograd.Function):
    """`(silu(gate) * up) @ weight.T`, whose backward pass computes the product again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(silu(gate).mul_(up), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        grad_product = grad @ weight.to(grad.dtype)
        grad_weight = None
        activated = silu(gate)
        if ctx.needs_input_grad[2]:
            product = (activated * up).flatten(0, -2)
            grad_weight = (grad.flatten(0, -2).t() @ product.to(grad.dtype)).to(weight.dtype)
        grad_up = (grad_product * activated).to(up.dtype)
        # silu'(g) = s (1 + g (1 - s)) = s + silu(g) (1 - s) with s = sigmoid(g)
        slope = torch.sigmoid(gate)
        slope += activated * (1 - slope)
        grad_gate = grad_product.mul_(up).mul_(slope).to(gate.dtype)
        return grad_gate, grad_up, grad_weight
