# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of the EAGLE-3 drafter against a reference that drafts one block at a time, token by token, head by head.

The reference shares nothing with the package but the weights and the target's embedding.
"""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.tiny import VOCAB, make_causal_lm, make_drafter, make_target
from trl_draft_opd import Eagle3DraftConfig, Eagle3DraftModel, SamplingSettings
from trl_draft_opd.drafters.base import DraftContext, run_blocks
from trl_draft_opd.drafters.draft_vocabulary import build_draft_vocabulary
from trl_draft_opd.drafters.portable_config import PortableConfig
from trl_draft_opd.rollout.drafting import DraftingSettings, draft_blocks


TARGET = make_target("llama")
OPTIONS = [
    {},
    {"norm_output": True},
    {"fc_norm": True},
    {"norm_before_fc": True},
    {"norm_before_residual": True},
    {"fc_norm": True, "norm_output": True, "norm_before_residual": True},
]
IDS = [str(sorted(options)) for options in OPTIONS]
B, L, K = 3, 11, 4
LENGTHS = torch.tensor([11, 7, 9])
ANCHORS = torch.tensor([[1, 4, 9], [5, 1, -1], [7, 3, 2]])


def make_lively(drafter, seed=3):
    """Give every weight, norms included, a size at which nothing the drafter computes is negligible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise)
            elif "q_proj" in name or "k_proj" in name:
                parameter.copy_(2 * noise / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
    return drafter


def make_eagle3(**options):
    base = make_drafter("eagle3", TARGET).config
    names = {**PortableConfig.__annotations__, **Eagle3DraftConfig.__annotations__}.keys() - {"family"}
    settings = {name: getattr(base, name) for name in names} | options
    return make_lively(Eagle3DraftModel(Eagle3DraftConfig(**settings)).eval())


def make_text():
    """Right-padded ids and the features of a made-up target, garbage behind each row's end."""
    generator = torch.Generator().manual_seed(0)
    width = 3 * TARGET.config.hidden_size
    input_ids = torch.randint(4, VOCAB, (B, L), generator=generator)
    features = torch.randn(B, L, width, generator=generator) * torch.linspace(0.5, 2, width)
    is_padding = torch.arange(L) >= LENGTHS[:, None]
    input_ids[is_padding], features[is_padding] = 0, 50.0
    return input_ids, features


def recorded_drafts(input_ids, kind):
    """Drafts of every block: the text itself (`"teacher"`) or tokens drawn at random (`"recorded"`)."""
    if kind == "recorded":
        return torch.randint(4, VOCAB, (B, ANCHORS.shape[1], K), generator=torch.Generator().manual_seed(5))
    positions = (ANCHORS.clamp(min=1)[..., None] + torch.arange(1, K + 1)).clamp(max=L - 1)
    return input_ids.gather(1, positions.flatten(1)).view(positions.shape)


# -- the reference ----------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rope(x_hd, position, theta):
    """Rotate pairs `(j, j + d / 2)` of each head by `position * theta ** (-2 j / d)`."""
    half = x_hd.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos(), angle.sin()
    first, second = x_hd[..., :half], x_hd[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class NaiveEagle3:
    """One block of one sequence, in float64."""

    def __init__(self, drafter):
        self.config = drafter.config
        self.weights = {name: tensor.double() for name, tensor in drafter.named_parameters()}
        self.theta = drafter.config.rope_parameters["rope_theta"]

    def norm(self, x, name):
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def fuse(self, feature):
        if self.config.fc_norm:
            parts = feature.chunk(3)
            feature = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)])
        if self.config.norm_before_fc:
            feature = self.norm(feature, "input_norm")
        return self.weights["fc.weight"] @ feature

    def project(self, x, name, heads, position=None):
        split = (self.weights[f"midlayer.self_attn.{name}.weight"] @ x).view(heads, self.config.head_dim)
        return split if position is None else rope(split, position, self.theta)

    def draft(self, features_LF, ids_L, anchor, drafts_K, embed):
        """Return the states of slots `1..K`, slot `k` reading `drafts_K[k - 2]`."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        keys, values = [], []

        def remember(token, state, position):
            joined = torch.cat(
                [
                    self.norm(embed(torch.tensor(token)).double(), "midlayer.input_layernorm"),
                    self.norm(state, "midlayer.hidden_norm"),
                ]
            )
            keys.append(self.project(joined, "k_proj", kv_heads, position))
            values.append(self.project(joined, "v_proj", kv_heads))
            return joined

        for position in range(anchor):
            state = self.fuse(features_LF[position].double())
            joined = remember(int(ids_L[position + 1]), state, position)
        outputs = []
        for slot in range(1, len(drafts_K) + 1):
            position = anchor - 1 + slot - 1
            if slot > 1:
                joined = remember(int(drafts_K[slot - 2]), state, position)
            query = self.project(joined, "q_proj", heads, position)
            mixed = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = torch.stack([query[head] @ key[group] for key in keys]) / math.sqrt(self.config.head_dim)
                weights = scores.softmax(dim=0)
                mixed.append(sum(w * value[group] for w, value in zip(weights, values, strict=True)))
            residual = self.norm(state, "midlayer.hidden_norm") if self.config.norm_before_residual else state
            hidden = residual + self.weights["midlayer.self_attn.o_proj.weight"] @ torch.cat(mixed)
            normed = self.norm(hidden, "midlayer.post_attention_layernorm")
            gate, up, down = (self.weights[f"midlayer.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            hidden = hidden + down @ (torch.nn.functional.silu(gate @ normed) * (up @ normed))
            outputs.append(self.norm(hidden, "norm"))
            state = outputs[-1] if self.config.norm_output else hidden
        return torch.stack(outputs)


# -- equal to the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["teacher", "recorded"])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_packed_blocks_equal_drafting_one_block_at_a_time(options, kind):
    drafter = make_eagle3(**options)
    input_ids, features = make_text()
    drafts = recorded_drafts(input_ids, kind)
    with torch.no_grad():
        hidden = run_blocks(drafter, features, input_ids, ANCHORS, drafts, TARGET.embed).double()
        naive = NaiveEagle3(drafter)
        for row, block in (ANCHORS >= 1).nonzero().tolist():
            anchor = int(ANCHORS[row, block])
            expected = naive.draft(features[row], input_ids[row], anchor, drafts[row, block], TARGET.embed)
            torch.testing.assert_close(hidden[row, block], expected, rtol=1e-4, atol=1e-5)


def test_norm_output_changes_what_is_fed_back_and_nothing_before():
    input_ids, features = make_text()
    drafts = recorded_drafts(input_ids, "recorded")
    plain, normed = make_eagle3(), make_eagle3(norm_output=True)
    assert plain.state_dict().keys() == normed.state_dict().keys()
    with torch.no_grad():
        before = run_blocks(plain, features, input_ids, ANCHORS, drafts, TARGET.embed)
        after = run_blocks(normed, features, input_ids, ANCHORS, drafts, TARGET.embed)
    assert not before[ANCHORS < 1].any()  # padding
    before, after = before[ANCHORS >= 1], after[ANCHORS >= 1]
    assert torch.equal(before[:, 0], after[:, 0])
    assert ((before - after)[:, 1:].abs().amax(dim=-1) > 1e-2).all()


# -- which token and which position each step reads -------------------------------------------------------------------


def test_feature_i_is_paired_with_token_i_plus_1():
    drafter = make_eagle3()
    input_ids, features = make_text()
    anchors, drafts = torch.tensor([[5]]), torch.randint(4, VOCAB, (1, 1, 1))
    features, input_ids = features[:1], input_ids[:1]
    clean = run_blocks(drafter, features, input_ids, anchors, drafts, TARGET.embed)

    def moves(position_of_token=None, position_of_feature=None):
        ids, changed = input_ids.clone(), features.clone()
        if position_of_token is not None:
            ids[0, position_of_token] = (ids[0, position_of_token] + 1) % VOCAB
        if position_of_feature is not None:
            changed[0, position_of_feature] += 1
        return not torch.equal(clean, run_blocks(drafter, changed, ids, anchors, drafts, TARGET.embed))

    # Token 0 belongs to no pair; the last pair is (feature 4, token 5), the anchor.
    assert [position for position in range(L) if moves(position_of_token=position)] == [1, 2, 3, 4, 5]
    assert [position for position in range(L) if moves(position_of_feature=position)] == [0, 1, 2, 3, 4]


def test_slot_s_stands_at_the_base_pairs_position_plus_s_minus_1():
    drafter = make_eagle3()
    input_ids, features = make_text()
    seen = []
    drafter.rotary_emb.register_forward_pre_hook(lambda module, args: seen.append(args[1].tolist()))
    anchors = torch.tensor([[2, 6]])
    run_blocks(drafter, features[:1], input_ids[:1], anchors, torch.zeros(1, 2, 3, dtype=torch.long), TARGET.embed)
    assert seen == [[list(range(L))], [[1, 5]], [[2, 6]], [[3, 7]]]


# -- recorded drafts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", [1, 2, 3, 4])
def test_a_changed_draft_moves_the_slots_behind_it_and_no_other(slot):
    drafter = make_eagle3()
    input_ids, features = make_text()
    drafts = recorded_drafts(input_ids, "recorded")
    changed = drafts.clone()
    changed[0, 1, slot - 1] = (drafts[0, 1, slot - 1] + 7) % VOCAB
    with torch.no_grad():
        before = run_blocks(drafter, features, input_ids, ANCHORS, drafts, TARGET.embed)
        after = run_blocks(drafter, features, input_ids, ANCHORS, changed, TARGET.embed)
    moved = (before != after).any(dim=-1)
    expected = torch.zeros_like(moved)
    expected[0, 1, slot:] = True
    assert torch.equal(moved, expected)


def draft(drafter, features, input_ids, anchors, num_drafts, uniforms=None, temperature=0.0):
    """Return drafts and their distributions: argmax, or drawn with the uniforms at the temperature."""
    with torch.no_grad():
        context = drafter.encode_text(features, input_ids, TARGET.embed)
    settings = DraftingSettings(num_drafts, SamplingSettings(temperature, 0, 1.0), "greedy", False)
    return draft_blocks(TARGET, drafter, context, anchors, input_ids.gather(1, anchors), settings, uniforms)[:2]


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_proposed_drafts_are_the_argmax_of_the_pass_that_reads_them(options):
    drafter = make_eagle3(**options)
    input_ids, features = make_text()
    anchors = ANCHORS.clamp(min=1)
    drafts, probs = draft(drafter, features, input_ids, anchors, K)
    assert probs is None
    hidden = run_blocks(drafter, features, input_ids, anchors, drafts, TARGET.embed)
    assert torch.equal(drafter.lm_head(hidden).argmax(dim=-1), drafts)
    assert len(drafts.unique()) > 5


def test_every_weight_gets_a_gradient_and_padding_gives_none():
    drafter = make_eagle3(fc_norm=True)
    input_ids, features = make_text()
    drafts = recorded_drafts(input_ids, "recorded")
    features.requires_grad_()
    hidden = run_blocks(drafter, features, input_ids, ANCHORS, drafts, TARGET.embed)
    drafter.lm_head(hidden[ANCHORS >= 1]).square().sum().backward()
    assert not [name for name, parameter in drafter.named_parameters() if not parameter.grad.abs().sum() > 0]
    last_seen = ANCHORS.amax(dim=1)
    is_before = torch.arange(L) < last_seen[:, None]
    assert torch.equal(features.grad.abs().sum(dim=-1) > 0, is_before)


# -- the context, piece by piece --------------------------------------------------------------------------------------


def test_a_context_written_in_pieces_equals_one_of_the_whole_text():
    drafter = make_eagle3(fc_norm=True)
    input_ids, features = make_text()
    next_ids = torch.cat([input_ids[:, 1:], input_ids[:, -1:]], dim=1)
    positions = torch.arange(L).expand(B, L)
    anchors = torch.tensor([[8, 3], [5, 6], [7, 8]])
    tokens = input_ids.gather(1, anchors)

    def draft(context):
        settings = DraftingSettings(K, SamplingSettings(0.0, 0, 1.0), "greedy", False)
        return draft_blocks(TARGET, drafter, context, anchors, tokens, settings, None)[0]

    with torch.no_grad():
        whole = drafter.encode_context(features, next_ids, positions, TARGET.embed)
        pieces = drafter.encode_context(features[:, :2], next_ids[:, :2], positions[:, :2], TARGET.embed)
        pieces = pieces.extended(L + 3)
        # First what a rejected block left there, then, from a start of its own in each row, the text.
        starts = torch.tensor([2, 1, 2])[:, None]
        for start in (starts, starts + 3):
            index = start + torch.arange(5)
            for wrong in (True, False):
                part = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1])) + wrong
                ids = next_ids.gather(1, index)
                pieces.write(drafter.encode_context(part, ids, index, TARGET.embed), index)
        for tensor, dim in ((pieces.keys[0], 2), (pieces.values[0], 2), (pieces.fused, 1)):
            tensor.narrow(dim, 8, tensor.shape[dim] - 8).fill_(1e4)
    assert torch.equal(draft(pieces), draft(whole))
    assert torch.equal(draft(pieces.prefix(8)), draft(whole))
    for own, other in zip([*pieces.keys, *pieces.values], [*whole.keys, *whole.values], strict=True):
        torch.testing.assert_close(own[0, :, :8], other[0, :, :8], rtol=1e-5, atol=1e-5)
    order = torch.tensor([2, 0])
    assert torch.equal(pieces.rows(order).fused, pieces.fused[order])
    assert isinstance(pieces.rows(order), DraftContext)


# -- reduced vocabulary -----------------------------------------------------------------------------------------------


def make_reduced():
    counts = torch.zeros(VOCAB, dtype=torch.long)
    counts[5::3] = 10
    vocabulary = build_draft_vocabulary(counts, 21, always_include=(2,))
    drafter = Eagle3DraftModel.from_target(TARGET, draft_vocabulary=vocabulary, ttt_steps=K).eval()
    return vocabulary, drafter


def test_a_reduced_drafter_proposes_target_ids_of_its_vocabulary():
    vocabulary, drafter = make_reduced()
    make_lively(drafter)
    assert drafter.lm_head.weight.shape[0] == 21 and drafter.draft_token_ids.tolist() == vocabulary.token_ids.tolist()
    input_ids, features = make_text()
    anchors = ANCHORS.clamp(min=1)
    drafts, probs = draft(drafter, features, input_ids, anchors, K)
    assert vocabulary.t2d[drafts].all()
    hidden = run_blocks(drafter, features, input_ids, anchors, drafts, TARGET.embed)
    rows = drafter.lm_head(hidden).argmax(dim=-1)
    assert torch.equal(vocabulary.token_ids[rows], drafts)
    assert len(drafts.unique()) > 5


def test_drawn_drafts_of_a_reduced_drafter_have_a_distribution_over_the_targets_vocabulary():
    vocabulary, drafter = make_reduced()
    make_lively(drafter)
    input_ids, features = make_text()
    anchors = ANCHORS.clamp(min=1)
    uniforms = torch.rand(B, ANCHORS.shape[1], K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    drafts, probs = draft(drafter, features, input_ids, anchors, K, uniforms, 0.7)
    assert probs.shape == (*drafts.shape, VOCAB)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones_like(probs[..., 0]))
    assert probs[..., ~vocabulary.t2d].eq(0).all()
    assert probs.gather(-1, drafts[..., None]).gt(0).all()
    hidden = run_blocks(drafter, features, input_ids, anchors, drafts, TARGET.embed)
    distribution = (drafter.lm_head(hidden) / 0.7).softmax(dim=-1)
    torch.testing.assert_close(probs[..., vocabulary.token_ids].float(), distribution, rtol=1e-4, atol=1e-6)


def test_the_head_starts_from_the_targets_rows():
    rows = TARGET.causal_lm.get_output_embeddings().weight
    assert torch.equal(make_drafter("eagle3", TARGET).lm_head.weight, rows)
    vocabulary, drafter = make_reduced()
    assert torch.equal(drafter.lm_head.weight, rows[vocabulary.token_ids])
    assert drafter.lm_head.weight.data_ptr() != rows.data_ptr() and drafter.lm_head.weight.requires_grad


# -- from_target ------------------------------------------------------------------------------------------------------


def make_layers(num_layers):
    shape = make_causal_lm("llama").config.to_dict() | {"num_hidden_layers": num_layers, "layer_types": None}
    return LlamaForCausalLM(LlamaConfig(**shape))


@pytest.mark.parametrize(("num_layers", "expected"), [(7, [1, 2, 3]), (8, [1, 3, 4]), (12, [1, 5, 8])])
def test_layer_ids_default_to_the_convention_of_the_engines(num_layers, expected):
    drafter = Eagle3DraftModel.from_target(make_layers(num_layers))
    assert drafter.config.target_layer_ids == expected
    assert drafter.config.ttt_steps == drafter.default_num_drafts == 7 and drafter.max_drafts is None


def test_a_drafter_takes_its_targets_shape():
    config, target = make_drafter("eagle3", TARGET).config, TARGET.config
    for name in (
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim rms_norm_eps "
        "max_position_embeddings eos_token_id pad_token_id"
    ).split():
        assert getattr(config, name) == getattr(target, name), name
    assert config.rope_parameters["rope_theta"] == target.rope_parameters["rope_theta"]
    assert (config.target_hidden_size, config.num_target_layers, config.num_hidden_layers) == (32, 8, 1)


def test_a_target_of_fewer_than_7_layers_needs_layer_ids():
    target = make_layers(6)
    with pytest.raises(ValueError, match=r"6 layers; the default layer ids need at least 7.*0\.\.4"):
        Eagle3DraftModel.from_target(target)
    assert Eagle3DraftModel.from_target(target, target_layer_ids=[0, 2, 4]).config.target_layer_ids == [0, 2, 4]


@pytest.mark.parametrize("layer_ids", [[], [3, 1, 4], [1, 1, 4], [-1, 3, 4], [1, 3, 7]])
def test_layer_ids_out_of_order_or_range_are_refused(layer_ids):
    with pytest.raises(ValueError, match="`target_layer_ids` must"):
        Eagle3DraftModel.from_target(TARGET, target_layer_ids=layer_ids)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="`ttt_steps` must be at least 1, got 0"):
        Eagle3DraftModel.from_target(TARGET, ttt_steps=0)
    other = build_draft_vocabulary(torch.ones(VOCAB + 1, dtype=torch.long), 8)
    with pytest.raises(ValueError, match=f"built over {VOCAB + 1} tokens but the target has {VOCAB}"):
        Eagle3DraftModel.from_target(TARGET, draft_vocabulary=other)
    with pytest.raises(ValueError, match="`fc_norm` and `norm_before_fc`"):
        make_eagle3(fc_norm=True, norm_before_fc=True)
    with pytest.raises(ValueError, match="1 layer, got num_hidden_layers=2"):
        make_eagle3(num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"1\.\.64 .*got 65"):
        make_eagle3(draft_vocab_size=VOCAB + 1)
    with pytest.raises(ValueError, match="from_target"):
        make_eagle3(target_layer_ids=None)
