# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
DFlash layers with windows, causal blocks, attention sinks and scaled values: against one block at a time under a mask
written out pair by pair, in transformers' generation, and in every caller of the rollouts.
"""

import pytest
import torch
from test_dflash import (
    ANCHORS,
    BLOCK,
    TARGET,
    TOLERANCE,
    L,
    embed_block,
    make_assistant,
    make_dflash,
    make_lively,
    make_text,
    native_chain,
    no_drafts,
)
from transformers.models.qwen3.modeling_qwen3 import rotate_half

from helpers.oracle import greedy_text
from helpers.rollouts import Options, decode, replay
from helpers.tiny import make_prompts
from trl_draft_opd import AutoDrafter, DFlashDraftConfig, DFlashDraftModel
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.utils.versions import switch_checkpointing


FULL, SLIDING = "full_attention", "sliding_attention"
# The last slot of a block sees one entry of the context.
NARROW = BLOCK + 1
VARIANTS = {
    "windows": {"layer_types": [SLIDING] * 2, "sliding_window": NARROW, "is_causal": False},
    "mixed windows": {"layer_types": [FULL, SLIDING], "sliding_window": NARROW + 2, "is_causal": False},
    "causal windows": {"layer_types": [SLIDING, FULL], "sliding_window": NARROW, "is_causal": None},
    "causal": {"is_causal": True},
    "sinks": {"attention_sinks": True},
    "scaled values": {"attention_value_scale": 0.7},
    "all": {
        "layer_types": [SLIDING, FULL],
        "sliding_window": NARROW,
        "is_causal": True,
        "attention_sinks": True,
        "attention_value_scale": 0.7,
    },
}


def make_variant(name, **options):
    """A drafter of a variant, all of whose weights matter."""
    shape = make_dflash().config.to_dict()
    drafter = make_lively(DFlashDraftModel(DFlashDraftConfig.from_dict(shape | VARIANTS[name] | options)).eval())
    for layer in drafter.layers:
        if layer.self_attn.attention_sink_bias is not None:
            torch.nn.init.normal_(layer.self_attn.attention_sink_bias, std=2)
    return drafter


def plain_block(drafter, features, token, anchor):
    """
    Hidden states of the drafts of one block, `(K, H)`, from the text's features `(L, F)`: products, softmax and sum
    over the context before the anchor and the block, with who sees whom said pair by pair.
    """
    config = drafter.config
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    injected = drafter.hidden_norm(drafter.fc(features[:anchor]))
    hidden = embed_block(token)[0].to(injected)
    cos, sin = (part[0] for part in drafter.rotary_emb(injected, torch.arange(anchor + BLOCK)[None]))
    for index, layer in enumerate(drafter.layers):
        attention = layer.self_attn
        is_sliding = config.layer_types[index] == SLIDING
        is_causal = is_sliding if config.is_causal is None else config.is_causal
        normed = layer.input_layernorm(hidden)
        rows = torch.cat([injected, normed])
        key = attention.k_norm(attention.k_proj(rows).view(-1, groups, dim)).transpose(0, 1)
        value = attention.v_proj(rows).view(-1, groups, dim).transpose(0, 1) * config.attention_value_scale
        query = attention.q_norm(attention.q_proj(normed).view(-1, heads, dim)).transpose(0, 1)
        key = key * cos + rotate_half(key) * sin
        query = query * cos[anchor:] + rotate_half(query) * sin[anchor:]
        mixed = []
        for head in range(heads):
            group = head // (heads // groups)
            for slot in range(BLOCK):
                position = anchor + slot
                seen = [
                    other
                    for other in range(anchor + BLOCK)
                    if not (is_sliding and abs(position - other) >= config.sliding_window)
                    and not (is_causal and other > position)
                ]
                scores = query[head, slot] @ key[group, seen].T * dim**-0.5
                if config.attention_sinks:
                    scores = torch.cat([scores, attention.attention_sink_bias[head, None]])
                weights = scores.softmax(dim=-1)[: len(seen)]
                mixed.append(weights @ value[group, seen])
        mixed = torch.stack(mixed).view(heads, BLOCK, dim).transpose(0, 1).flatten(1)
        hidden = hidden + attention.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return drafter.norm(hidden)[1:]


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_blocks_and_their_gradients_equal_a_mask_written_out(name):
    drafter = make_variant(name).double()
    input_ids, features = make_text()
    features = features.double()
    is_block = ANCHORS >= 1
    hidden = run_blocks(drafter, features, input_ids, ANCHORS, no_drafts(), TARGET.embed)[is_block]
    places = is_block.nonzero().tolist()
    anchors = [(row, int(ANCHORS[row, block])) for row, block in places]
    plain = torch.stack([plain_block(drafter, features[row], input_ids[row, at], at) for row, at in anchors])
    torch.testing.assert_close(hidden, plain, rtol=0, atol=1e-10)
    upstream, weights = torch.randn_like(plain), list(drafter.parameters())
    actual = torch.autograd.grad(hidden, weights, upstream)
    assert all(grad.abs().sum() > 0 for grad in actual)
    for grad, expected in zip(actual, torch.autograd.grad(plain, weights, upstream), strict=True):
        # Norms are of float32.
        assert (grad - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_another_function_than_the_plain_drafters(name):
    drafter = make_variant(name)
    plain = DFlashDraftModel(make_dflash().config).eval()
    plain.load_state_dict(drafter.state_dict(), strict=False)
    input_ids, features = make_text()
    with torch.no_grad():
        one, other = (run_blocks(d, features, input_ids, ANCHORS, no_drafts(), TARGET.embed) for d in (drafter, plain))
    assert ((one - other)[ANCHORS == 11].abs().amax(dim=-1) > 1e-2).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_native_forward_with_a_growing_cache_equals_packed_blocks(name):
    drafter = make_variant(name)
    input_ids, features = make_text()
    # Rounds on which the cache of a window drops entries, and one without.
    for chain in ([1, 2, 6, 10], [3, 4, 8, 11], [11]):
        with torch.no_grad():
            native = native_chain(drafter, features[1], input_ids[1], chain, embed_block)
            packed = run_blocks(
                drafter, features[1:], input_ids[1:], torch.tensor([chain]), no_drafts()[:1], TARGET.embed
            )
        torch.testing.assert_close(native, packed[0], **TOLERANCE)


def test_a_masked_key_of_the_native_forward_is_as_if_absent():
    drafter = make_variant("all")
    input_ids, features = make_text()
    block = embed_block(input_ids[0, 7])
    with torch.no_grad():
        clean = drafter(block, features[:1, :7], position_ids=torch.arange(7 + BLOCK)[None]).last_hidden_state
        padded = drafter(
            block,
            torch.cat([torch.full_like(features[:1, :2], 9.0), features[:1, :7]], dim=1),
            attention_mask=torch.tensor([[0] * 2 + [1] * (7 + BLOCK)]),
            position_ids=torch.tensor([[0, 0, *range(7 + BLOCK)]]),
        ).last_hidden_state
    torch.testing.assert_close(padded, clean, **TOLERANCE)


@pytest.mark.parametrize("name", ["windows", "mixed windows"])
def test_transformers_own_model_counts_one_less_for_the_same_window(name):
    drafter = make_variant(name)
    # It shows keys at a distance of up to the window, where engines' windows hold the query itself.
    assistant = make_assistant(drafter, sliding_window=drafter.config.sliding_window - 1)
    input_ids, features = make_text()
    with torch.no_grad():
        for chain in ([1, 2, 6, 10], [11]):
            anchors = torch.tensor([chain])
            packed = run_blocks(drafter, features[1:], input_ids[1:], anchors, no_drafts()[:1], TARGET.embed)
            theirs = native_chain(assistant, features[1], input_ids[1], chain, embed_block)
            torch.testing.assert_close(packed[0], theirs, **TOLERANCE)


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
def test_packed_texts_equal_each_text_alone(is_recomputed):
    drafter = make_variant("all").train()
    if is_recomputed:
        switch_checkpointing(drafter, "enable")
    input_ids, features = make_text()
    lengths = [L, 9]
    starts = torch.tensor([[0] * L + [L] * 9])
    chains = [[1, 6, 7, 11], [2, 3, 8]]
    packed_anchors = torch.tensor([chains[0] + [L + anchor for anchor in chains[1]]])
    packed_ids, packed_features = (torch.cat([whole[0], whole[1, :9]])[None] for whole in (input_ids, features))
    drafts = torch.zeros(1, 7, BLOCK - 1, dtype=torch.long)
    packed = run_blocks(drafter, packed_features, packed_ids, packed_anchors, drafts, TARGET.embed, starts)
    packed.square().sum().backward()
    together = [parameter.grad.clone() for parameter in drafter.parameters()]
    drafter.zero_grad()
    alone = []
    for row, (length, chain) in enumerate(zip(lengths, chains, strict=True)):
        text = (features[row : row + 1, :length], input_ids[row : row + 1, :length], torch.tensor([chain]))
        alone.append(run_blocks(drafter, *text, drafts[:, : len(chain)], TARGET.embed))
        alone[-1].square().sum().backward()
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), **TOLERANCE)
    for grad, parameter in zip(together, drafter.parameters(), strict=True):
        assert (grad - parameter.grad).norm() < 1e-5 * parameter.grad.norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_decoding_gives_the_targets_text_and_replay_the_same_blocks(name):
    drafter = make_variant(name)
    prompts, options = make_prompts(3, seed=4), Options(max_completion_length=24)
    live = decode(TARGET, drafter, prompts, options)
    for prompt, response in zip(prompts, live.responses(), strict=True):
        assert prompt + response == greedy_text(TARGET, prompt, 24)
    text = TargetText(live.input_ids, live.attention_mask, live.completion_mask, range(3))
    replayed = replay(TARGET, drafter, text, options)
    assert torch.equal(replayed.anchors, live.anchors) and torch.equal(replayed.accepted, live.accepted)
    # The text at which a window drops what a plain drafter sees is longer than the window.
    assert (live.anchors > 2 * NARROW).any()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_drafter_is_read_back_the_same(name, tmp_path):
    drafter = make_variant(name)
    drafter.save_pretrained(tmp_path)
    loaded = AutoDrafter.from_pretrained(tmp_path)
    settings = ("layer_types", "sliding_window", "is_causal", "attention_sinks", "attention_value_scale")
    assert [getattr(loaded.config, name) for name in settings] == [getattr(drafter.config, name) for name in settings]
    assert loaded.state_dict().keys() == drafter.state_dict().keys()
    assert all(torch.equal(tensor, drafter.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_which_layers_are_causal():
    def sights(**options):
        config = make_dflash().config.to_dict() | {"layer_types": [FULL, SLIDING], "sliding_window": 9} | options
        config = DFlashDraftConfig.from_dict(config)
        return [tuple(config.sight_of(layer)) for layer in range(2)]

    assert sights(is_causal=False) == [(None, False), (9, False)]
    assert sights(is_causal=True) == [(None, True), (9, True)]
    # As engines read a config.json that does not say.
    assert sights(is_causal=None) == [(None, False), (9, True)]
    plain = DFlashDraftConfig.from_dict(make_dflash().config.to_dict() | {"is_causal": None})
    assert plain.is_causal is False
