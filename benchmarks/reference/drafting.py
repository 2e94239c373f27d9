# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The drafters along one text, from their layers alone: every block of the text under one dense mask.

Reads the trained modules of a drafter (`fc`, norms, projections, MLPs) and calls none of its methods. The target is a
plain causal language model of transformers.

Shape letters:  L = text length, A = anchors, K = drafts per block, S = block size, H = hidden size, W = H and what a
                family's head reads besides, F = feature width
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trl_draft_opd.utils.versions import cache_name_of

from .attention import dense_attention


@dataclass(frozen=True)
class Reading:
    """
    What the target computes over a piece of one text.

    Attributes:
        features (`torch.Tensor` of shape `(L, F)`): Outputs of the tapped layers.
        hidden (`torch.Tensor` of shape `(L, H)`): What its head reads.
    """

    features: Tensor
    hidden: Tensor


@torch.no_grad()
def read_text(
    target: PreTrainedModel, token_ids: Sequence[int], layer_ids: Sequence[int], cache: Cache | None = None
) -> Reading:
    """Run the target over one text, or over its continuation behind a cache."""
    ids = torch.tensor([list(token_ids)], device=target.device)
    cached = {cache_name_of(target.base_model.forward): cache}
    output = target.base_model(input_ids=ids, **cached, use_cache=cache is not None, output_hidden_states=True)
    # The first entry is the embedding, so entry `i + 1` is what layer `i` returned.
    features = [output.hidden_states[layer_id + 1][0] for layer_id in layer_ids]
    return Reading(torch.cat(features, dim=-1), output.last_hidden_state[0])


def draft_states(
    drafter: PreTrainedModel,
    target: PreTrainedModel,
    features: Tensor,
    token_ids: Sequence[int],
    anchors: Sequence[int],
    num_drafts: int,
    recorded: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """
    Run a block from every anchor of one text.

    Args:
        drafter, target (`PreTrainedModel`): The drafter, and the target whose embedding (and, for DFlash, head) it
        uses.
        features (`torch.Tensor` of shape `(n, F)`):
            The target's features at positions before the last anchor, or more.
        token_ids (`Sequence[int]`): The text, up to the last anchor at least.
        anchors (`Sequence[int]`), num_drafts (`int`): `A` and `K`.
        recorded (`torch.LongTensor` of shape `(A, K)`, *optional*):
            Drafts that later slots read; without them, each block's own argmax.

    Returns:
        `tuple`: states ready for the head, `(A, K, W)`, and the argmax drafts, `(A, K)`.
    """
    run = _eagle3_states if drafter.config.family == "eagle3" else _block_states
    device = features.device
    text = torch.tensor(list(token_ids), dtype=torch.long, device=device)
    places = torch.tensor(list(anchors), dtype=torch.long, device=device)
    return run(drafter, target, features, text, places, num_drafts, recorded)


def _heads(states: Tensor, head_dim: int) -> Tensor:
    """Split `(n, heads * d)` into `(1, heads, n, d)`."""
    return states.unflatten(-1, (-1, head_dim)).transpose(0, 1)[None]


def _rotate(rotary: Callable, states: Tensor, positions: Tensor) -> Tensor:
    """Rotate `(1, heads, n, d)` to `positions` (`(n,)`)."""
    cos, sin = rotary(states, positions[None])
    return apply_rotary_pos_emb(states, states, cos, sin)[0]


def _eagle3_states(drafter, target, features, text, anchors, num_drafts, recorded):
    config, layer, attention = drafter.config, drafter.midlayer, drafter.midlayer.self_attn
    embed = target.get_input_embeddings()
    if config.fc_norm:
        parts = features.chunk(len(config.target_layer_ids), dim=-1)
        features = torch.cat([norm(part) for norm, part in zip(drafter.fc_norm, parts, strict=True)], dim=-1)
    if config.norm_before_fc:
        features = drafter.input_norm(features)
    # Pair `i`: the target's feature at position `i` and the token at `i + 1`.
    fused = drafter.fc(features[: len(text) - 1])
    pairs = torch.cat([layer.input_layernorm(embed(text[1 : len(fused) + 1])), layer.hidden_norm(fused)], dim=-1)
    positions = torch.arange(len(fused), device=text.device)
    context_key = _rotate(drafter.rotary_emb, _heads(attention.k_proj(pairs), attention.head_dim), positions)
    context_value = _heads(attention.v_proj(pairs), attention.head_dim)
    state, tokens = fused[anchors - 1], text[anchors]
    keys, values, states, drafts = [], [], [], []
    for slot in range(1, num_drafts + 1):
        joined = torch.cat([layer.input_layernorm(embed(tokens)), layer.hidden_norm(state)], dim=-1)
        place = anchors - 1 + slot - 1
        query = _rotate(drafter.rotary_emb, _heads(attention.q_proj(joined), attention.head_dim), place)
        if slot > 1:
            key = _rotate(drafter.rotary_emb, _heads(attention.k_proj(joined), attention.head_dim), place)
            keys.append(key[:, :, :, None])
            values.append(_heads(attention.v_proj(joined), attention.head_dim)[:, :, :, None])
        scaling = attention.head_dim**-0.5
        mixed = dense_attention(
            query[:, :, :, None], context_key, context_value, keys, values, anchors[None], scaling
        )[0, :, 0]
        hidden = (layer.hidden_norm(state) if config.norm_before_residual else state) + attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        states.append(drafter.norm(hidden))
        drafts.append(_to_target_ids(drafter, drafter.lm_head(states[-1]).argmax(dim=-1)))
        tokens = drafts[-1] if recorded is None else recorded[:, slot - 1]
        state = states[-1] if config.norm_output else hidden
    return torch.stack(states, dim=1), torch.stack(drafts, dim=1)


def _to_target_ids(drafter: PreTrainedModel, ids: Tensor) -> Tensor:
    return ids + drafter.d2t[ids] if drafter.config.has_reduced_vocabulary else ids


def _block_states(drafter, target, features, text, anchors, num_drafts, recorded):
    config = drafter.config
    S, A = config.block_size, len(anchors)
    block = torch.full((A, S), config.mask_token_id, device=text.device)
    block[:, 0] = text[anchors]
    hidden = target.get_input_embeddings()(block).flatten(0, 1)
    injected = drafter.hidden_norm(drafter.fc(features))
    context_positions = torch.arange(len(features), device=text.device)
    positions = (anchors[:, None] + torch.arange(S, device=text.device)).flatten()
    for layer in drafter.layers:
        attention = layer.self_attn
        normed, leave = _enter(layer, "attention_conv", layer.input_layernorm(hidden), S)

        def key_value(states, places, attention=attention):
            key = attention.k_norm(attention.k_proj(states).unflatten(-1, (-1, attention.head_dim))).flatten(1)
            key = _rotate(drafter.rotary_emb, _heads(key, attention.head_dim), places)
            return key, _heads(attention.v_proj(states), attention.head_dim)

        query = attention.q_norm(attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))).flatten(1)
        query = _rotate(drafter.rotary_emb, _heads(query, attention.head_dim), positions)
        context_key, context_value = key_value(injected, context_positions)
        key, value = (tensor.unflatten(2, (A, S)) for tensor in key_value(normed, positions))
        mixed = dense_attention(
            query.unflatten(2, (A, S)),
            context_key,
            context_value,
            [key],
            [value],
            anchors[None],
            attention.head_dim**-0.5,
        )
        hidden = hidden + leave(attention.o_proj(mixed[0].flatten(0, 1)))
        normed, leave = _enter(layer, "mlp_conv", layer.post_attention_layernorm(hidden), S)
        hidden = hidden + leave(layer.mlp(normed))
    first = 0 if config.sample_from_anchor else 1
    states = drafter.norm(hidden).unflatten(0, (A, S))[:, first : first + num_drafts]
    head = drafter.lm_head if config.has_reduced_vocabulary else target.get_output_embeddings()
    before, ready, drafts = text[anchors], [], []
    for slot in range(num_drafts):
        state, logits = _join(drafter, states[:, slot], head(states[:, slot]), before)
        ready.append(state)
        drafts.append(_to_target_ids(drafter, logits.argmax(dim=-1)))
        before = drafts[-1] if recorded is None else recorded[:, slot]
    return torch.stack(ready, dim=1), torch.stack(drafts, dim=1)


def _enter(layer, name: str, normed: Tensor, block_size: int) -> tuple[Tensor, Callable]:
    """Return what a sublayer reads in place of `(A * S, H)` states, and what its output passes through."""
    convolution = getattr(layer, name, None)
    if convolution is None:
        return normed, lambda added: added
    base = convolution.base_kernel
    own = convolution.kernel_projection(normed).unflatten(-1, (2, base.shape[1], -1))
    kernels = base + own.repeat_interleave(base.shape[2] // own.shape[-1], dim=-1)

    def run(side: int, states: Tensor) -> Tensor:
        mixed = []
        for place in range(len(states)):
            # No tap reaches out of its block.
            taps = range(min(base.shape[1], place % block_size + 1))
            mixed.append(sum(kernels[place, side, tap] * states[place - tap] for tap in taps))
        return torch.stack(mixed)

    return run(0, normed), lambda added: run(1, added)


def _join(drafter, state: Tensor, logits: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return a slot's states `(A, W)` and what its draft is chosen by, `(A, D)`, behind the tokens `before`."""
    if hasattr(drafter, "markov_head"):
        code = drafter.markov_head.markov_w1.weight[before]
        return torch.cat([state, code], dim=-1), logits + code @ drafter.markov_head.markov_w2.weight.T
    if hasattr(drafter, "candidate_selector"):
        selector = drafter.candidate_selector
        code = selector.predecessor_codebook[before] * selector.hidden_projection(state)
        scores = logits + code @ selector.successor_codebook.T
        weakest = logits.sort(dim=-1, descending=True).values[:, [drafter.config.selector_top_k - 1]]
        return torch.cat([state, code], dim=-1), scores.masked_fill(logits < weakest, float("-inf"))
    return state, logits
