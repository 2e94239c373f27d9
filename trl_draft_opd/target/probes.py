# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Short texts that a target reads when it is loaded, to prove what is relied on afterwards.

Shape letters:  H = the target's hidden size
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .attention import Spans, UnknownAttentionError, text_spans
from .checks import chunking_reason, refuse_not_finite
from .placement import device_of


# Implementations of transformers that attend within texts by positions that start anew, without a mask.
_OWN_VARLEN = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")

# Ids and positions of a row of several texts, their spans, and whether the implementation handles them itself.
ReadTexts = Callable[[torch.Tensor, torch.Tensor, Spans, bool], torch.Tensor]


def is_quantized(causal_lm: PreTrainedModel) -> bool:
    """Return whether the layers' weights are quantised."""
    return getattr(causal_lm.config, "quantization_config", None) is not None


@torch.no_grad()
def check_head(
    causal_lm: PreTrainedModel, config: PreTrainedConfig, project: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Prove on three tokens that `project` reproduces the model's own logits; return their states, `(3, H)`."""
    ids = _probe(causal_lm, config, 3)
    expected = causal_lm(input_ids=ids, use_cache=False).logits
    hidden = causal_lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    refuse_not_finite(hidden[0], hidden.new_zeros(3))
    actual = project(hidden)
    if actual.shape != expected.shape or not torch.allclose(actual.float(), expected.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"The head of target type {config.model_type!r} changes its logits in a way that this package does not "
            "know. Please report the family."
        )
    return hidden[0]


@torch.no_grad()
def find_norm(causal_lm: PreTrainedModel, config: PreTrainedConfig, layers: nn.ModuleList) -> nn.Module:
    """
    Return the module that turns what leaves the last of `layers` into the input of the head: the last one to run in a
    forward pass without them, if what it returns is that input.
    """
    backbone, calls = causal_lm.base_model, []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if args and all(isinstance(each, torch.Tensor) and each.is_floating_point() for each in (args[0], output)):
            calls.append((module, args[0], output))

    handles = [module.register_forward_hook(note) for module in backbone.modules() if module is not backbone]
    held, layers._modules = layers._modules, {}
    try:
        hidden = backbone(input_ids=_probe(causal_lm, config, 3), use_cache=False).last_hidden_state
    finally:
        layers._modules = held
        for handle in handles:
            handle.remove()
    if calls:
        module, states, output = calls[-1]
        is_last = output.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
        if is_last and torch.equal(module(states).view_as(hidden), hidden):
            return module
    raise ValueError(
        f"Target of type {config.model_type!r} does not end its layers with a norm that can be applied alone, which "
        "states from outside need. Load the whole target and let it read its texts in this process."
    )


@torch.no_grad()
def find_padding_reason(
    causal_lm: PreTrainedModel, config: PreTrainedConfig, alone: torch.Tensor, read: ReadTexts
) -> str | None:
    """
    Return why texts cannot be read end to end, or `None`: proven by the states of three tokens that were read `alone`,
    `(3, H)`, and `read` behind another text.
    """
    name = str(config._attn_implementation)
    if (reason := chunking_reason(causal_lm, config)) is not None:
        return reason
    if not causal_lm._supports_attention_backend or name not in ("sdpa", *_OWN_VARLEN):
        # Only a family of the general interface would be read end to end then.
        can_sdpa = causal_lm._supports_attention_backend and causal_lm._supports_sdpa
        remedy = " (load it with `attn_implementation='sdpa'`)" if can_sdpa else ""
        return f"attends by {name!r} in a way of its own{remedy}"
    is_exact = alone.dtype in (torch.float32, torch.float64) and not is_quantized(causal_lm)
    # Rounding of half precision adds up over layers; a text that sees another is off by more than its own size.
    tolerance = 1e-3 if is_exact else 0.1
    for has_own_varlen in (False, True) if name in _OWN_VARLEN else (False,):
        spans = text_spans((5, 3))
        ids = torch.cat([_probe(causal_lm, config, length) for length in (5, 3)], dim=1)
        positions = torch.cat([torch.arange(length, device=ids.device) for length in (5, 3)])[None]
        try:
            hidden = read(ids, positions, spans, has_own_varlen)
        except (UnknownAttentionError, TypeError) as error:
            return f"does not attend within single texts: {error}"
        error = float((hidden[0, 5:] - alone).norm() / alone.norm())
        if not error <= tolerance or (not has_own_varlen and spans.num_uses < config.num_hidden_layers):
            return f"reads a text behind another one differently, by {error:.1%}"
    return None


def _probe(causal_lm: PreTrainedModel, config: PreTrainedConfig, num_tokens: int) -> torch.Tensor:
    device = device_of(causal_lm.get_input_embeddings())
    return torch.arange(num_tokens, device=device)[None] % config.vocab_size
