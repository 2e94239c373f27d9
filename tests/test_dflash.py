# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of the DFlash drafter: packed blocks against its own native forward, and that against transformers' own model.
"""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel
from transformers.cache_utils import DFlashCache

from helpers.tiny import EOS, MASK, PAD, VOCAB, make_causal_lm, make_drafter, make_target
from trl_draft_opd import DFlashDraftConfig, DFlashDraftModel, SamplingSettings
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.rollout.drafting import DraftingSettings, draft_blocks
from trl_draft_opd.utils.versions import CACHE_NAME


TARGET = make_target("llama")
BLOCK, L = 5, 12
ANCHORS = torch.tensor([[1, 4, 11, 5], [6, 2, 9, -1]])
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def make_lively(drafter, seed=3):
    """Give every weight, norms included, a size at which nothing the drafter computes is negligible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # Twice the scale in the head norms: attention far from uniform.
                parameter.copy_((1.5 if "q_norm" in name or "k_norm" in name else 1) + 0.3 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
    return drafter


def make_dflash(**options):
    return make_lively(make_drafter("dflash", TARGET, **{"block_size": BLOCK} | options))


def make_text():
    """Ids, and the features of a made-up target."""
    generator = torch.Generator().manual_seed(0)
    width = 5 * TARGET.config.hidden_size
    input_ids = torch.randint(4, VOCAB, (2, L), generator=generator)
    return input_ids, torch.randn(2, L, width, generator=generator) * torch.linspace(0.5, 2, width)


def embed_block(token, block_size=BLOCK):
    return TARGET.embed(torch.tensor([[int(token)] + [MASK] * (block_size - 1)]))


def no_drafts(num_drafts=BLOCK - 1):
    return torch.zeros(*ANCHORS.shape, num_drafts, dtype=torch.long)


def draft(drafter, features, input_ids, anchors, num_drafts, uniforms=None, temperature=0.0):
    """Return drafts and their distributions: argmax, or drawn with the uniforms at the temperature."""
    with torch.no_grad():
        context = drafter.encode_text(features, input_ids, TARGET.embed)
    settings = DraftingSettings(num_drafts, SamplingSettings(temperature, 0, 1.0), "greedy", False)
    return draft_blocks(TARGET, drafter, context, anchors, input_ids.gather(1, anchors), settings, uniforms)[:2]


# -- packed blocks equal one block at a time --------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [2, BLOCK])
def test_packed_blocks_equal_the_native_forward_of_each(block_size):
    drafter = make_dflash(block_size=block_size)
    input_ids, features = make_text()
    with torch.no_grad():
        hidden = run_blocks(drafter, features, input_ids, ANCHORS, no_drafts(block_size - 1), TARGET.embed)
        assert hidden.shape == (*ANCHORS.shape, block_size - 1, 32)
        for row, block in (ANCHORS >= 1).nonzero().tolist():
            anchor = int(ANCHORS[row, block])
            native = drafter(
                embed_block(input_ids[row, anchor], block_size),
                features[row : row + 1, :anchor],
                position_ids=torch.arange(anchor + block_size)[None],
            ).last_hidden_state
            torch.testing.assert_close(hidden[row, block], native[0, 1:], **TOLERANCE)


def test_with_sample_from_anchor_every_position_of_a_block_drafts_the_token_behind_it():
    """A plain loop over blocks: position 0 is the anchor's, whose state is slot 1's."""
    drafter, other = make_dflash(sample_from_anchor=True), make_dflash()
    assert drafter.max_drafts == drafter.default_num_drafts == BLOCK
    input_ids, features = make_text()
    with torch.no_grad():
        context = drafter.encode_text(features, input_ids, TARGET.embed)
        state = drafter.begin(context, ANCHORS, input_ids.gather(1, ANCHORS.clamp(min=1)), BLOCK, TARGET.embed)
        _, slots = drafter.run_along(state, no_drafts(BLOCK - 1))
        trained = run_blocks(drafter, features, input_ids, ANCHORS, no_drafts(BLOCK), TARGET.embed)
        for row, block in (ANCHORS >= 1).nonzero().tolist():
            anchor = int(ANCHORS[row, block])
            native = other(embed_block(input_ids[row, anchor]), features[row : row + 1, :anchor]).last_hidden_state
            torch.testing.assert_close(trained[row, block], native[0], **TOLERANCE)
            torch.testing.assert_close(slots[row, block], native[0], **TOLERANCE)


def native_chain(model, features, input_ids, anchors, embeds_of):
    """
    Run a chain of blocks of one row as transformers' generation does: new context each round, noise dropped after.
    """
    cache = DFlashCache(config=model.config)
    cache.activate_past_recording()
    seen, outputs = 0, []
    for anchor in anchors:
        cache.set_previous_accepted_tokens(anchor - seen)
        if seen:
            cache.crop(-BLOCK)
        outputs.append(
            model(
                noise_embeds=embeds_of(input_ids[anchor]),
                context_hidden_states=features[None, seen:anchor],
                position_ids=torch.arange(seen, anchor + BLOCK)[None],
                attention_mask=torch.ones(1, anchor + BLOCK, dtype=torch.long),
                **{CACHE_NAME: cache},
            ).last_hidden_state[0, 1:]
        )
        seen = anchor
    return torch.stack(outputs)


def test_packed_blocks_equal_the_native_forward_with_a_growing_cache():
    drafter = make_dflash()
    input_ids, features = make_text()
    chain = [3, 4, 8, 11]
    with torch.no_grad():
        native = native_chain(drafter, features[0], input_ids[0], chain, embed_block)
        packed = run_blocks(drafter, features[:1], input_ids[:1], torch.tensor([chain]), no_drafts()[:1], TARGET.embed)
    torch.testing.assert_close(packed[0], native, **TOLERANCE)


def test_a_masked_key_of_the_native_forward_is_as_if_absent():
    drafter = make_dflash()
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


def test_positions_left_out_count_on_from_the_cache():
    drafter = make_dflash()
    input_ids, features = make_text()
    cache = DFlashCache(config=drafter.config)
    with torch.no_grad():
        explicit = drafter(
            embed_block(input_ids[0, 6]), features[:1, :6], position_ids=torch.arange(6 + BLOCK)[None]
        ).last_hidden_state
        implicit = drafter(embed_block(input_ids[0, 6]), features[:1, :6], cache=cache).last_hidden_state
        cache.crop(-BLOCK)
        later = drafter(embed_block(input_ids[0, 9]), features[:1, 6:9], cache=cache).last_hidden_state
        whole = drafter(embed_block(input_ids[0, 9]), features[:1, :9]).last_hidden_state
    assert torch.equal(implicit, explicit)
    torch.testing.assert_close(later, whole, **TOLERANCE)


def test_the_cache_is_taken_under_both_of_its_names():
    drafter, caches = make_dflash(), []
    input_ids, features = make_text()
    for name in ("past_key_values", "cache"):
        cache = DFlashCache(config=drafter.config)
        with torch.no_grad():
            output = drafter(embed_block(input_ids[0, 6]), features[:1, :6], **{name: cache})
        assert output[CACHE_NAME] is cache
        caches.append(cache)
    assert [cache.get_seq_length() for cache in caches] == [6 + BLOCK] * 2


# -- equal to transformers' own model ---------------------------------------------------------------------------------


def make_assistant(drafter, **options):
    """transformers' own DFlash model with this drafter's weights under its two other names."""
    config = drafter.config
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "rms_norm_eps rope_parameters max_position_embeddings layer_types block_size mask_token_id target_layer_ids"
    ).split()
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    assistant = MuseGlimmerAssistantModel(
        MuseGlimmerAssistantConfig(**{name: getattr(config, name) for name in names} | special | options)
    ).eval()
    renamed = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    assistant.load_state_dict({renamed.get(name, name): tensor for name, tensor in drafter.state_dict().items()})
    return assistant


def test_the_drafter_computes_what_transformers_own_model_computes():
    drafter = make_dflash(num_hidden_layers=3)
    assistant = make_assistant(drafter)
    input_ids, features = make_text()
    chain = [1, 2, 6, 10]
    with torch.no_grad():
        theirs = native_chain(assistant, features[1], input_ids[1], chain, embed_block)
        ours = native_chain(drafter, features[1], input_ids[1], chain, embed_block)
        packed = run_blocks(drafter, features[1:], input_ids[1:], torch.tensor([chain]), no_drafts()[:1], TARGET.embed)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    torch.testing.assert_close(packed[0], theirs, **TOLERANCE)


# -- who sees what ----------------------------------------------------------------------------------------------------


def test_a_context_token_is_visible_iff_it_stands_before_the_anchor():
    drafter = make_dflash()
    input_ids, features = make_text()
    with torch.no_grad():
        clean = run_blocks(drafter, features, input_ids, ANCHORS, no_drafts(), TARGET.embed)
        for position in range(L):
            changed = features.clone()
            changed[:, position] += 3
            hidden = run_blocks(drafter, changed, input_ids, ANCHORS, no_drafts(), TARGET.embed)
            moved = (hidden != clean).flatten(2).any(dim=-1)
            assert torch.equal(moved, (position < ANCHORS) & (ANCHORS >= 1))


def test_a_block_reads_no_token_but_its_anchors():
    drafter = make_dflash()
    input_ids, features = make_text()
    with torch.no_grad():
        clean = run_blocks(drafter, features, input_ids, ANCHORS, no_drafts(), TARGET.embed)
        recorded = torch.randint(4, VOCAB, no_drafts().shape)
        assert torch.equal(run_blocks(drafter, features, input_ids, ANCHORS, recorded, TARGET.embed), clean)
        for position in range(L):
            ids = input_ids.clone()
            ids[:, position] = (ids[:, position] + 1) % VOCAB
            hidden = run_blocks(drafter, features, ids, ANCHORS, no_drafts(), TARGET.embed)
            moved = (hidden != clean).flatten(2).any(dim=-1)
            assert torch.equal(moved, (position == ANCHORS) & (ANCHORS >= 1))


def test_blocks_do_not_see_each_other_and_slots_of_a_block_do():
    drafter = make_dflash()
    input_ids, features = make_text()
    anchors = ANCHORS[:1]
    noise = torch.stack([embed_block(input_ids[0, anchor]) for anchor in anchors[0]], dim=1)
    with torch.no_grad():
        context = drafter.encode_text(features[:1], input_ids[:1], TARGET.embed)

        def run(embeds):
            tokens = input_ids[:1].gather(1, anchors.clamp(min=1))
            return drafter.begin(context, anchors, tokens, BLOCK - 1, lambda ids: embeds).block_hidden

        clean = run(noise)
        for slot in range(BLOCK):
            changed = noise.clone()
            changed[:, 1, slot] += 1
            moved = (run(changed) != clean).any(dim=-1)[0]
            # A later slot moves an earlier one: attention inside the block is bidirectional.
            assert moved[1].all() and not moved[[0, 2, 3]].any()


def test_a_block_is_the_anchor_and_masks_up_to_the_block_size():
    drafter = make_dflash()
    input_ids, features = make_text()
    seen = []

    def embed(ids):
        seen.append(ids)
        return TARGET.embed(ids)

    for num_drafts in (1, 3, BLOCK - 1):
        hidden = run_blocks(drafter, features, input_ids, ANCHORS, no_drafts(num_drafts), embed)
        assert hidden.shape == (*ANCHORS.shape, num_drafts, 32)
        ids = seen.pop()
        assert torch.equal(ids[..., 0], input_ids.gather(1, ANCHORS.clamp(min=1)))
        assert ids.shape[-1] == BLOCK and ids[..., 1:].eq(MASK).all()


@pytest.mark.parametrize("num_drafts", [1, 2, BLOCK - 1])
def test_proposed_drafts_are_the_argmax_of_the_pass_with_gradient(num_drafts):
    drafter = make_dflash()
    input_ids, features = make_text()
    anchors = ANCHORS.clamp(min=1)
    drafts, probs = draft(drafter, features, input_ids, anchors, num_drafts)
    assert probs is None and drafts.shape == (*anchors.shape, num_drafts)
    hidden = run_blocks(drafter, features, input_ids, anchors, drafts, TARGET.embed)
    assert torch.equal(TARGET.project(hidden).argmax(dim=-1), drafts)
    longest, _ = draft(drafter, features, input_ids, anchors, BLOCK - 1)
    assert torch.equal(longest[..., :num_drafts], drafts)
    assert len(longest.unique()) > 5


def test_drawn_drafts_come_with_the_distribution_they_were_drawn_from():
    drafter = make_dflash()
    input_ids, features = make_text()
    anchors = ANCHORS.clamp(min=1)
    uniforms = torch.rand(*anchors.shape, BLOCK - 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drafts, probs = draft(drafter, features, input_ids, anchors, BLOCK - 1, uniforms, 0.8)
    hidden = run_blocks(drafter, features, input_ids, anchors, drafts, TARGET.embed)
    distribution = (TARGET.project(hidden) / 0.8).softmax(dim=-1)
    torch.testing.assert_close(probs.float(), distribution, rtol=1e-3, atol=1e-6)
    assert probs.gather(-1, drafts[..., None]).gt(0).all()


def test_every_weight_gets_a_gradient():
    drafter = make_dflash()
    input_ids, features = make_text()
    hidden = run_blocks(drafter, features, input_ids, ANCHORS, no_drafts(), TARGET.embed)
    (hidden[ANCHORS >= 1] * torch.randn(32)).sum().backward()
    assert not [name for name, parameter in drafter.named_parameters() if not parameter.grad.abs().sum() > 0]


def test_a_context_written_in_pieces_equals_one_of_the_whole_text():
    drafter = make_dflash()
    input_ids, features = make_text()
    positions = torch.arange(L).expand(2, L)
    anchors = torch.tensor([[8, 3], [5, 8]])
    tokens = input_ids.gather(1, anchors)

    def draft(context):
        settings = DraftingSettings(BLOCK - 1, SamplingSettings(0.0, 0, 1.0), "greedy", False)
        return draft_blocks(TARGET, drafter, context, anchors, tokens, settings, None)[0]

    with torch.no_grad():
        whole = drafter.encode_context(features, input_ids, positions, TARGET.embed)
        pieces = drafter.encode_context(features[:, :2], input_ids[:, :2], positions[:, :2], TARGET.embed)
        pieces = pieces.extended(L + 3)
        for start in torch.tensor([[[2], [1]], [[5], [4]]]):
            index = start + torch.arange(4)
            for wrong in (1, 0):
                part = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1])) + wrong
                pieces.write(drafter.encode_context(part, input_ids[:, :4], index, TARGET.embed), index)
        for tensor in pieces.keys + pieces.values:
            tensor[:, :, 8:] = 1e4
    assert len(pieces.keys) == 2 and pieces.fused is None
    assert torch.equal(draft(pieces), draft(whole))
    assert torch.equal(draft(pieces.prefix(8)), draft(whole))
    for own, other in zip(pieces.keys + pieces.values, whole.keys + whole.values, strict=True):
        torch.testing.assert_close(own[:, :, :8], other[:, :, :8], **TOLERANCE)


# -- from_target ------------------------------------------------------------------------------------------------------


def make_layers(num_layers):
    shape = make_causal_lm("llama").config.to_dict() | {"num_hidden_layers": num_layers, "layer_types": None}
    return LlamaForCausalLM(LlamaConfig(**shape))


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(7, [1, 2, 3, 4]), (8, [1, 2, 3, 4, 5]), (12, [1, 3, 5, 7, 9]), (36, [1, 9, 17, 25, 33])],
)
def test_layer_ids_are_spread_by_the_published_rule(num_layers, expected):
    drafter = DFlashDraftModel.from_target(make_layers(num_layers), mask_token_id=MASK, num_hidden_layers=1)
    assert drafter.config.target_layer_ids == expected
    assert drafter.config.block_size == 16 and drafter.max_drafts == drafter.default_num_drafts == 15
    assert drafter.fc.weight.shape == (32, 32 * len(expected))


def test_five_layers_are_the_default_and_the_shape_is_the_targets():
    drafter, target = DFlashDraftModel.from_target(TARGET, mask_token_id=MASK), TARGET.config
    config = drafter.config
    assert len(drafter.layers) == 5 and config.layer_types == ["full_attention"] * 5
    assert config.mask_token_id == MASK and drafter.draft_token_ids is None and not drafter.config.owns_head
    for name in (
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim rms_norm_eps "
        "max_position_embeddings eos_token_id pad_token_id"
    ).split():
        assert getattr(config, name) == getattr(target, name), name
    assert config.rope_parameters["rope_theta"] == target.rope_parameters["rope_theta"]


def test_a_target_of_fewer_than_7_layers_needs_layer_ids():
    target = make_layers(6)
    with pytest.raises(ValueError, match="6 layers; the default layer ids need at least 7"):
        DFlashDraftModel.from_target(target, mask_token_id=MASK)
    drafter = DFlashDraftModel.from_target(target, mask_token_id=MASK, target_layer_ids=[0, 4], num_hidden_layers=1)
    assert drafter.config.target_layer_ids == [0, 4]


@pytest.mark.parametrize("layer_ids", [[], [3, 1, 4], [1, 1, 4], [-1, 3, 4], [1, 3, 7]])
def test_layer_ids_out_of_order_or_range_are_refused(layer_ids):
    with pytest.raises(ValueError, match="`target_layer_ids` must"):
        DFlashDraftModel.from_target(TARGET, mask_token_id=MASK, target_layer_ids=layer_ids)


@pytest.mark.parametrize("block_size", [0, 1])
def test_a_block_without_drafts_is_refused(block_size):
    with pytest.raises(ValueError, match=f"at least 2, got {block_size}"):
        DFlashDraftModel.from_target(TARGET, mask_token_id=MASK, block_size=block_size)


@pytest.mark.parametrize("mask_token_id", [-1, VOCAB, VOCAB + 5])
def test_a_mask_token_outside_the_vocabulary_is_refused(mask_token_id):
    with pytest.raises(ValueError, match=rf"{mask_token_id} lies outside the target's vocabulary 0\.\.63"):
        DFlashDraftModel.from_target(TARGET, mask_token_id=mask_token_id)


@pytest.mark.parametrize("mask_token_id", [EOS, 9, 10, PAD])
def test_a_mask_token_with_another_meaning_is_refused(mask_token_id):
    target = make_causal_lm("llama")
    target.config.eos_token_id, target.config.bos_token_id = [EOS, 9], 10
    with pytest.raises(ValueError, match="is the target's eos, bos or pad token"):
        DFlashDraftModel.from_target(target, mask_token_id=mask_token_id)


def test_what_cannot_be_built_or_served_is_refused():
    shape = {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    mixed = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    for sliding_window in (None, 16):
        with pytest.raises(ValueError, match=rf"must exceed `block_size` \(16\).*got\s{sliding_window}"):
            DFlashDraftConfig(**shape, **mixed, sliding_window=sliding_window)
    with pytest.raises(ValueError, match="`sliding_window` is 20, but no layer"):
        DFlashDraftConfig(**shape, num_hidden_layers=2, sliding_window=20)
    for layer_types in (["full_attention"], ["full_attention", "chunked_attention"]):
        with pytest.raises(ValueError, match="layer"):
            DFlashDraftConfig(**shape, num_hidden_layers=2, layer_types=layer_types)
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`attention_value_scale` must be a number above 0"):
            DFlashDraftConfig(**shape, attention_value_scale=scale)
    with pytest.raises(ValueError, match=r"`target_layer_ids` \(None\) and `mask_token_id` \(3\) must both be set"):
        DFlashDraftModel(DFlashDraftConfig(**shape, num_hidden_layers=1, mask_token_id=3))
