# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The feed-forward layer that forgets its activation gives the values and gradients of the one that keeps it.
"""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from trl_draft_opd.drafters.feed_forward import run_mlp


def make_mlp(**options):
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=2, **options)).double()


def gradients(run, mlp, hidden):
    hidden = hidden.clone().requires_grad_()
    out = run(hidden)
    grads = torch.autograd.grad(
        out, [hidden, *mlp.parameters()], torch.linspace(-1, 1, out.numel()).view_as(out).double()
    )
    return [out, *grads]


@pytest.mark.parametrize("options", [{}, {"hidden_act": "gelu"}, {"mlp_bias": True}])
def test_values_and_gradients_are_those_of_the_layer(options):
    mlp = make_mlp(**options)
    hidden = torch.randn(3, 4, 6, dtype=torch.float64) * 3
    for ours, theirs in zip(
        gradients(lambda h: run_mlp(mlp, h), mlp, hidden), gradients(mlp, mlp, hidden), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_frozen_last_projection_gets_no_gradient():
    mlp = make_mlp()
    mlp.down_proj.requires_grad_(False)
    hidden = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    run_mlp(mlp, hidden).sum().backward()
    assert mlp.down_proj.weight.grad is None and hidden.grad.abs().sum() > 0


def test_less_is_kept_for_the_backward_pass():
    mlp = make_mlp()
    hidden = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)

    def num_kept(run):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.__setitem__(t.data_ptr(), t.numel()) or t, lambda t: t
        ):
            run(hidden)
        return sum(sizes.values())

    # Per row the plain layer keeps two tensors of the intermediate size more: the activation and the product.
    assert num_kept(mlp) - num_kept(lambda h: run_mlp(mlp, h)) == 2 * 50 * 10


def test_under_autocast_gradients_have_the_parameters_type():
    mlp = make_mlp().float()
    hidden = torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_mlp(mlp, hidden)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert mlp.down_proj.weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    reference = make_mlp().float()
    reference(hidden.detach()).sum().backward()
    torch.testing.assert_close(mlp.down_proj.weight.grad, reference.down_proj.weight.grad, rtol=0.05, atol=0.05)
