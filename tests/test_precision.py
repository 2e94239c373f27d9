# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Under autocast a drafter's activations stay in autocast's dtype, from features to heads; without it nothing changes.
"""

import sys

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from helpers.tiny import VOCAB, make_drafter, make_target
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.drafters.precision import run_norm


TARGET = make_target()
OPTIONS = [
    ("eagle3", {}),
    ("eagle3", {"fc_norm": True, "norm_output": True}),
    ("dflash", {}),
]


def make_inputs(drafter):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, VOCAB, (2, 30), generator=generator)
    features = TARGET.read_text(ids, torch.ones_like(ids), drafter.config.target_layer_ids).padded().features
    drafts = torch.randint(7, VOCAB, (2, 3, 4), generator=generator)
    return features, ids, torch.tensor([[1, 9, 20], [4, 5, -1]]), drafts


def differentiate(drafter, inputs, is_mixed):
    drafter.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        hidden = run_blocks(drafter, *inputs, TARGET.embed)
        logits = drafter.draft_logits(hidden, TARGET.project)
    logits[inputs[2] >= 1].float().logsumexp(-1).square().sum().backward()
    grads = {name: weight.grad.clone() for name, weight in drafter.named_parameters() if weight.grad is not None}
    return hidden.detach(), grads


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_every_projection_and_every_norm_is_given_autocasts_dtype(family, options, monkeypatch):
    drafter = make_drafter(family, TARGET, **options)
    inputs, seen = make_inputs(drafter), {}
    for name, module in drafter.named_modules():
        if isinstance(module, nn.Linear):
            note = lambda _module, args, _out, name=name: seen.setdefault(name, set()).add(args[0].dtype)  # noqa: E731
            module.register_forward_hook(note)
    normed = []
    monkeypatch.setattr(
        sys.modules[type(drafter).__module__],
        "run_norm",
        lambda norm, hidden: (normed.append(hidden.dtype), run_norm(norm, hidden))[1],
    )
    with torch.autocast("cpu", torch.bfloat16):
        context = drafter.encode_text(inputs[0].bfloat16(), inputs[1], TARGET.embed)
        hidden = run_blocks(drafter, inputs[0].bfloat16(), *inputs[1:], TARGET.embed)
        drafter.draft_logits(hidden, TARGET.project)
    # Of a layer's feed-forward, the last projection is applied through its weight.
    assert set.union(*seen.values()) == set(normed) == {torch.bfloat16} and len(seen) >= 7
    wide = [*context.keys, *context.values, hidden, *([] if context.fused is None else [context.fused])]
    assert {tensor.dtype for tensor in wide} == {torch.bfloat16}


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_mixed_precision_stays_close_to_float32_and_its_gradients_are_the_weights(family, options):
    drafter = make_drafter(family, TARGET, **options)
    inputs = make_inputs(drafter)
    exact, exact_grads = differentiate(drafter, inputs, is_mixed=False)
    mixed, grads = differentiate(drafter, inputs, is_mixed=True)
    is_block = inputs[2] >= 1
    assert (mixed - exact)[is_block].norm() < 0.05 * exact[is_block].norm()
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - exact_grads[name]).norm() < 0.15 * exact_grads[name].norm(), name


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, Qwen3RMSNorm])
def test_a_norm_without_autocast_is_the_layer_itself(norm_class, monkeypatch):
    monkeypatch.setattr("trl_draft_opd.drafters.precision.rms_norm", None)
    norm, hidden = norm_class(8), torch.randn(3, 8, requires_grad=True)
    out = run_norm(norm, hidden)
    assert torch.equal(out, norm(hidden)) and out.dtype == torch.float32
    assert torch.equal(run_norm(norm.bfloat16(), hidden.bfloat16()), norm(hidden.bfloat16()))


@pytest.mark.parametrize("kind", ["plain", "other", "hooked"])
def test_a_norm_under_autocast_is_the_rounded_layer(kind, monkeypatch):
    norm = type("OtherNorm", (LlamaRMSNorm,), {})(64) if kind == "other" else LlamaRMSNorm(64, eps=1e-5)
    if kind == "hooked":
        norm.register_forward_pre_hook(lambda module, args: None)
    if kind != "plain":
        monkeypatch.setattr("trl_draft_opd.drafters.precision.rms_norm", None)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    hidden = torch.randn(50, 64).mul(3).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = run_norm(norm, hidden)
    grads = torch.autograd.grad(out.float().square().sum(), [hidden, norm.weight])
    exact = norm(hidden.float())
    expected = torch.autograd.grad(exact.square().sum(), [hidden, norm.weight])
    assert out.dtype == torch.bfloat16 and [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]
    # The normed value, the weight and the product are rounded, by 2 ** -9 each.
    assert ((out - exact).abs() <= 2**-7 * exact.abs()).all()
    for grad, reference in zip(grads, expected, strict=True):
        assert (grad - reference).float().norm() < 2**-6 * reference.float().norm()
