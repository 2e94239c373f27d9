# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of `trl_draft_opd/target/frozen.py` against the model's own public outputs, on four families.
"""

import copy
import weakref

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from helpers.tiny import EOS, MASK, PAD, TARGETS, VOCAB, make_causal_lm, make_target, make_tokenizer
from trl_draft_opd import FrozenTarget
from trl_draft_opd.target import reading as target_rows
from trl_draft_opd.target.branches import score_branches
from trl_draft_opd.target.reading import rows_of_similar_width


LAYER_IDS = [0, 3, 6]
TOLERANCE = {"rtol": 0, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 1e-9}
# Features of these random targets are not normed: entries of about 20, up to 100.
FEATURE_TOLERANCE = {"rtol": 1e-5, "atol": 3e-4}
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
_made = {}


@pytest.fixture(params=TARGETS)
def target(request):
    if request.param not in _made:
        _made[request.param] = make_target(request.param)
    return _made[request.param]


def make_rows():
    """Three right-padded rows of different lengths."""
    lengths = torch.tensor([9, 4, 7])
    input_ids = torch.randint(4, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < lengths[:, None]).long()
    return input_ids.masked_fill(mask == 0, PAD), mask, lengths


def positions(start, stop, rows=1):
    return torch.arange(start, stop).expand(rows, -1)


# -- what is read is the model's own ----------------------------------------------------------------------------------


def test_taps_are_the_models_own_hidden_states(target):
    input_ids, mask, _ = make_rows()
    own = target.causal_lm(input_ids=input_ids[:1], attention_mask=mask[:1], output_hidden_states=True).hidden_states
    assert len(own) == target.num_layers + 1 == 9
    # Every layer but the last, whose entry is replaced by the normed state.
    for layer in range(target.num_layers - 1):
        features = target.read_text(input_ids[:1], mask[:1], [layer]).padded().features
        torch.testing.assert_close(features, own[layer + 1], **TOLERANCE)
    joined = target.read_text(input_ids[:1], mask[:1], LAYER_IDS).padded()
    torch.testing.assert_close(joined.features, torch.cat([own[i + 1] for i in LAYER_IDS], dim=-1), **TOLERANCE)
    torch.testing.assert_close(joined.last_hidden, own[-1], **TOLERANCE)


def test_projected_states_are_the_models_own_logits(target):
    input_ids, mask, _ = make_rows()
    logits = target.causal_lm(input_ids=input_ids[:1], attention_mask=mask[:1]).logits
    reading = target.read_text(input_ids[:1], mask[:1], []).padded()
    torch.testing.assert_close(target.project(reading.last_hidden), logits, **TOLERANCE)
    assert reading.features.shape == (1, 9, 0)


def test_the_soft_cap_is_part_of_the_projection():
    target = make_target("gemma2")
    logits = target.project(10 * torch.randn(4, 32))
    assert 4 < logits.abs().max() <= 5
    target.config.final_logit_softcapping = None
    assert target.project(10 * torch.randn(4, 32)).abs().max() > 6


def test_scales_of_the_logits_are_part_of_the_projection():
    target, hidden = make_target("llama"), torch.randn(2, 3, 32)
    plain = target.project(hidden)
    target.config.logits_scaling = 4.0
    torch.testing.assert_close(target.project(hidden), plain / 4)
    target.config.logit_scale = 2.0
    torch.testing.assert_close(target.project(hidden), plain / 2)


def test_embedded_tokens_are_what_the_first_layer_reads(target):
    input_ids, mask, _ = make_rows()
    own = target.causal_lm(input_ids=input_ids[:1], attention_mask=mask[:1], output_hidden_states=True).hidden_states
    assert torch.equal(target.embed(input_ids[:1]), own[0])
    table = target.causal_lm.get_input_embeddings().weight[input_ids[:1]]
    scale = 32**0.5 if target.config.model_type == "gemma2" else 1.0
    torch.testing.assert_close(target.embed(input_ids[:1]), table * scale)


def test_an_input_norm_of_the_embedding_is_left_out_and_put_back():
    target = make_target("llama")
    embedding = target.causal_lm.get_input_embeddings()
    plain = target.embed(torch.tensor([[5]]))

    class Normed(torch.nn.Embedding):
        def forward(self, input_ids):
            return self.embed_norm(super().forward(input_ids))

    embedding.__class__ = Normed
    embedding.embed_norm = norm = torch.nn.LayerNorm(32)
    assert torch.equal(target.embed(torch.tensor([[5]])), plain)
    assert embedding.embed_norm is norm and not torch.allclose(embedding(torch.tensor([[5]])), plain)


# -- batches, caches, branches ----------------------------------------------------------------------------------------


def test_a_padded_row_reads_as_it_does_alone(target):
    input_ids, mask, lengths = make_rows()
    batch = target.read_text(input_ids, mask, LAYER_IDS).padded()
    for row, length in enumerate(lengths.tolist()):
        alone = target.read_text(input_ids[row : row + 1, :length], mask[row : row + 1, :length], LAYER_IDS).padded()
        torch.testing.assert_close(batch.features[row, :length], alone.features[0], **FEATURE_TOLERANCE)
        torch.testing.assert_close(batch.last_hidden[row, :length], alone.last_hidden[0], **TOLERANCE)


def test_steps_over_masked_holes_equal_a_clean_run(target):
    input_ids, _, _ = make_rows()
    clean = target.read_text(input_ids[:1], torch.ones(1, 9, dtype=torch.long), LAYER_IDS).padded()
    cache = DynamicCache(config=target.config)
    # A slot of left padding, four tokens, three of which two are kept, then the rest.
    first = torch.cat([torch.tensor([[PAD]]), input_ids[:1, :4]], dim=1)
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    target.step(first, mask, torch.tensor([[0, 0, 1, 2, 3]]), cache, LAYER_IDS)
    rejected = torch.tensor([[7]])
    mask = torch.cat([mask, torch.ones(1, 3, dtype=torch.long)], dim=1)
    block = torch.cat([input_ids[:1, 4:6], rejected], dim=1)
    middle = target.step(block, mask, positions(4, 7), cache, LAYER_IDS)
    torch.testing.assert_close(middle.features[:, :2], clean.features[:, 4:6], **FEATURE_TOLERANCE)
    mask[:, -1] = 0
    mask = torch.cat([mask, torch.ones(1, 3, dtype=torch.long)], dim=1)
    last = target.step(input_ids[:1, 6:9], mask, positions(6, 9), cache, LAYER_IDS)
    torch.testing.assert_close(last.features, clean.features[:, 6:9], **FEATURE_TOLERANCE)
    torch.testing.assert_close(last.last_hidden, clean.last_hidden[:, 6:9], **TOLERANCE)
    assert cache.get_seq_length() == mask.shape[1] == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_drafts", [1, 2, 4])
def test_packed_branches_equal_one_forward_each(target, num_drafts, dtype):
    if dtype == torch.float64 and target.config.model_type not in ("qwen3", "llama"):
        dtype = torch.float32  # The expert kernels know no float64, and Gemma 2 rounds to float32 inside.
    input_ids, mask, _ = make_rows()
    anchors = torch.tensor([[1, 4, 3], [3, -1, 2], [0, 2, -1]])
    accepted = torch.tensor([[0, 1, 2], [0, 0, 3], [1, 0, 0]]).clamp(max=num_drafts)
    drafts = torch.randint(4, VOCAB, (3, 3, num_drafts), generator=torch.Generator().manual_seed(1))
    slots = torch.arange(1, num_drafts + 1)
    committed = input_ids.gather(1, (anchors[..., None] + slots).clamp(0, 8).flatten(1)).view_as(drafts)
    drafts = torch.where(slots <= accepted[..., None], committed, drafts)
    is_branch = (slots > accepted[..., None] + 1) & (anchors >= 0)[..., None]
    exact = FrozenTarget(copy.deepcopy(target.causal_lm).to(dtype))
    reading = exact.read_text(input_ids, mask, LAYER_IDS, keep_cache=True)
    hidden = score_branches(exact, reading, anchors, drafts, is_branch)
    assert hidden.shape == (3, 3, num_drafts, 32) and not hidden[~is_branch].any()
    for row, block, slot in is_branch.nonzero().tolist():
        branch = torch.cat([input_ids[row, : anchors[row, block] + 1], drafts[row, block, :slot]])[None]
        alone = exact.read_text(branch, torch.ones_like(branch), []).padded().last_hidden[0, -1]
        torch.testing.assert_close(hidden[row, block, slot], alone, **(TOLERANCE if dtype == torch.float32 else EXACT))


def test_rows_are_scored_with_others_of_similar_width():
    widths = [1000, 0, 300, 900, 600, 250, 1]
    assert rows_of_similar_width(widths, 10_000) == [[0, 3, 4], [2, 5], [6]]
    assert rows_of_similar_width(widths, 2000) == [[0, 3], [4], [2, 5], [6]]
    assert rows_of_similar_width([60, 1], 120) == [[0, 1]] and rows_of_similar_width([0, 0], 9) == []


def test_padded_rows_read_apart_are_those_read_together(monkeypatch):
    target = make_target("gemma2")
    input_ids, mask, _ = make_rows()
    readings, forwards = [], []
    for tokens in (64, 0):
        monkeypatch.setattr(target_rows, "SIMILAR_TOKENS", tokens)
        before = target.num_forwards
        readings.append(target.read_text(input_ids, mask, LAYER_IDS))
        forwards.append(target.num_forwards - before)
    # Texts of 9 and 7 tokens apart from one of 4.
    assert forwards == [1, 2]
    torch.testing.assert_close(readings[1].features, readings[0].features, **FEATURE_TOLERANCE)
    torch.testing.assert_close(readings[1].last_hidden, readings[0].last_hidden, **TOLERANCE)


def test_nothing_is_kept_but_the_layers_asked_for(target):
    input_ids, mask, _ = make_rows()
    outputs = {}

    def watch(index):
        def keep(module, args, output):
            outputs[index] = weakref.ref(output[0] if isinstance(output, tuple) else output)

        return keep

    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(target.layers)]
    taps = {}
    with target._tapped(LAYER_IDS, taps.__setitem__):
        with torch.no_grad():
            target.backbone(input_ids=input_ids, attention_mask=mask, use_cache=False)
        assert sorted(taps) == [0, 1, 2]
        assert [index for index, output in sorted(outputs.items()) if output() is not None] == LAYER_IDS
    for handle in handles:
        handle.remove()


def test_taps_are_taken_away_even_when_the_forward_fails():
    target = make_target("llama")
    before = [len(layer._forward_hooks) for layer in target.layers]
    target.read_text(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.long), LAYER_IDS)
    assert [len(layer._forward_hooks) for layer in target.layers] == before
    with pytest.raises(RuntimeError), target._tapped(LAYER_IDS, lambda *_: None):
        raise RuntimeError
    assert [len(layer._forward_hooks) for layer in target.layers] == before


def test_the_target_is_frozen_and_in_evaluation_mode(target):
    assert not any(parameter.requires_grad for parameter in target.causal_lm.parameters())
    assert not target.causal_lm.training and not isinstance(target, torch.nn.Module)
    input_ids, mask, _ = make_rows()
    assert not target.read_text(input_ids, mask, LAYER_IDS).padded().features.requires_grad


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_multimodal_target_is_refused(monkeypatch):
    model = make_causal_lm("llama")
    inner = make_causal_lm("qwen3").config
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self, **_: inner)
    with pytest.raises(ValueError, match="'llama' is a multimodal model.*language model alone"):
        FrozenTarget(model)


def test_an_encoder_decoder_target_is_refused():
    config = BartConfig(
        vocab_size=VOCAB,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
    )
    # Newer releases take the decoder's part out of such a config, older ones hand it back whole.
    with pytest.raises(ValueError, match="'bart' is (an encoder-decoder|a multimodal) model"):
        FrozenTarget(BartForConditionalGeneration(config))


def test_a_head_that_does_something_unknown_is_refused(monkeypatch):
    model = make_causal_lm("llama")
    own = type(model).forward

    def scaled(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ValueError, match="head of target type 'llama' changes its logits"):
        FrozenTarget(model)


def test_a_backbone_without_its_layers_is_refused():
    model = make_causal_lm("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="no list of 5 decoder layers in its backbone LlamaModel"):
        FrozenTarget(model)


REFUSED = {
    "sliding window": (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)), "sliding"),
    "sliding layers": (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)), "sliding_attention"),
    "recurrent": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)),
        "keeps a recurrent state",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_target_that_cannot_be_rolled_back_is_read_but_not_branched(case):
    make, reason = REFUSED[case]
    target = FrozenTarget(make())
    input_ids = torch.tensor([[5, 6, 7]])
    assert target.read_text(input_ids, torch.ones_like(input_ids), [0]).padded().features.shape == (1, 3, 16)
    with pytest.raises(ValueError, match=f"{reason}.*Live rollouts and branches need full attention"):
        target.require_rollback()
    with pytest.raises(ValueError, match=reason):
        reading = target.read_text(input_ids, torch.ones_like(input_ids), [0])
        score_branches(target, reading, torch.tensor([[1]]), torch.tensor([[[4, 5]]]), torch.tensor([[[False, True]]]))


def test_a_target_of_full_attention_can_be_rolled_back(target):
    target.require_rollback()
    FrozenTarget(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None))).require_rollback()


# -- special tokens ---------------------------------------------------------------------------------------------------


def test_the_mask_token_is_the_tokenizers_own_before_any_other():
    target = make_target("llama")
    assert target.find_mask_token_id() == MASK
    target.tokenizer.mask_token = "w9"
    assert target.find_mask_token_id() == 9


def test_every_id_that_ends_a_response_counts():
    target = make_target("llama")
    assert target.eos_token_ids == [EOS]
    target.causal_lm.generation_config.eos_token_id = [9, 7, 9]
    assert target.eos_token_ids == [EOS, 7, 9]
    target.tokenizer = None
    assert target.eos_token_ids == [7, 9]
    target.causal_lm.generation_config.eos_token_id = None
    assert target.eos_token_ids == [EOS]
    target.config.eos_token_id = None
    assert target.eos_token_ids == [] and target.pad_token_id == PAD


def test_rows_are_padded_with_the_tokenizers_pad_then_the_models_then_an_eos():
    target = make_target("llama")
    target.tokenizer.pad_token = "w11"
    assert target.pad_token_id == 11
    target.tokenizer.pad_token = None
    target.config.pad_token_id = 13
    assert target.pad_token_id == 13
    target.config.pad_token_id = None
    assert target.pad_token_id == EOS


# -- loading ----------------------------------------------------------------------------------------------------------


def test_a_target_is_loaded_by_path_wrapped_or_handed_back(tmp_path):
    model = make_causal_lm("llama")
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded = FrozenTarget.load(tmp_path, init_kwargs={"attn_implementation": "eager"})
    assert loaded.causal_lm.config._attn_implementation == "eager"
    assert len(loaded.tokenizer) == VOCAB and loaded.device.type == "cpu" and loaded.vocab_size == VOCAB
    assert all(torch.equal(a, b) for a, b in zip(loaded.causal_lm.parameters(), model.parameters(), strict=True))
    assert FrozenTarget.load(tmp_path, dtype="bfloat16").causal_lm.dtype == torch.bfloat16
    assert FrozenTarget.load(loaded) is loaded
    assert FrozenTarget.load(model).causal_lm is model
    with pytest.raises(ValueError, match=r"`target_init_kwargs` \['device_map'\] were given with an instantiated"):
        FrozenTarget.load(model, init_kwargs={"device_map": "auto"})
