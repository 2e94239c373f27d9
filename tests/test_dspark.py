# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of the DSpark drafter: its slots against a loop over tokens, its warm start against DFlash, and its file.
"""

import pytest
import torch

from helpers.tiny import FAMILIES, MASK, VOCAB, make_drafter, make_target
from trl_draft_opd import AutoDrafter, DSparkDraftConfig, DSparkDraftModel
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.drafters.draft_vocabulary import build_draft_vocabulary


TARGET = make_target("llama")
L, K, RANK = 12, 4, 8
ANCHORS = torch.tensor([[1, 4, 8, 5], [6, 2, 7, -1]])
IS_BLOCK = ANCHORS >= 1
# Where slot 1 is the anchor's own position, a block of four drafts is one position shorter.
BLOCKS = {
    False: {"block_size": K + 1, "sample_from_anchor": False},
    True: {"block_size": K, "sample_from_anchor": True},
}


def make_text():
    """Ids, features of a made-up target, and drafts of every block."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(4, VOCAB, (2, L), generator=generator)
    drafts = torch.randint(4, VOCAB, (*ANCHORS.shape, K), generator=generator)
    return input_ids, torch.randn(2, L, 5 * TARGET.config.hidden_size, generator=generator), drafts


def run(drafter):
    input_ids, features, drafts = make_text()
    return run_blocks(drafter, features, input_ids, ANCHORS, drafts, TARGET.embed)


def logits_of(drafter, hidden):
    return drafter.draft_logits(hidden, TARGET.project)[IS_BLOCK]


# -- slots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_anchor", [False, True])
def test_logits_are_those_of_the_block_and_a_row_for_the_token_before_each_slot(from_anchor):
    drafter = make_drafter("dspark", TARGET, **BLOCKS[from_anchor])
    assert drafter.max_drafts == drafter.default_num_drafts == K
    layers = make_drafter("dflash", TARGET, block_size=drafter.config.block_size)
    layers.load_state_dict({name: value for name, value in drafter.state_dict().items() if "_head." not in name})
    input_ids, features, drafts = make_text()
    with torch.no_grad():
        logits = drafter.draft_logits(run(drafter), TARGET.project)
        for row, block in IS_BLOCK.nonzero().tolist():
            anchor = int(ANCHORS[row, block])
            block_ids = torch.tensor([[int(input_ids[row, anchor])] + [MASK] * (drafter.config.block_size - 1)])
            states = layers(TARGET.embed(block_ids), features[row : row + 1, :anchor]).last_hidden_state[0]
            states = states if from_anchor else states[1:]
            before = [int(input_ids[row, anchor]), *drafts[row, block, :-1].tolist()]
            for slot, token in enumerate(before):
                bias = drafter.markov_head.markov_w2.weight @ drafter.markov_head.markov_w1.weight[token]
                expected = TARGET.project(states[slot]) + bias
                torch.testing.assert_close(logits[row, block, slot], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "eagle3"])
def test_slots_run_along_drafts_are_those_of_single_steps_of_any_blocks(family):
    drafter = make_drafter(family, TARGET)
    input_ids, features, drafts = make_text()
    with torch.no_grad():
        context = drafter.encode_text(features, input_ids, TARGET.embed)
        state = drafter.begin(context, ANCHORS, input_ids.gather(1, ANCHORS.clamp(min=1)), K, TARGET.embed)
        _, hidden = drafter.run_along(state, drafts[..., :-1])
        assert torch.equal(hidden[:, :, 0], state.hidden)
        # The first and the third block go on from slot 2, the third alone from slot 3.
        for columns in ([0, 2], [1]):
            index = torch.tensor([columns, columns])
            state = drafter.advance(state, drafts[:, [0, 2], state.slot - 1][:, -len(columns) :], index)
            hidden = hidden[:, columns]
            assert torch.equal(state.hidden, hidden[:, :, state.slot - 1])
        last, following = drafter.run_along(state, drafts[:, [2], 2:3])
        assert (
            torch.equal(following, hidden[:, :, 2:4]) and last.slot == K and torch.equal(last.hidden, hidden[:, :, 3])
        )


def test_without_a_markov_head_it_is_a_dflash_drafter_that_drafts_all_slots_at_once():
    options = BLOCKS[False] | {"markov_rank": 0, "confidence_head_with_markov": False}
    torch.manual_seed(1)
    drafter = DSparkDraftModel.from_target(TARGET, mask_token_id=MASK, num_hidden_layers=2, **options).eval()
    dflash = make_drafter("dflash", TARGET)
    dflash.load_state_dict({name: value for name, value in drafter.state_dict().items() if "confidence" not in name})
    assert not drafter.reads_drafts and torch.equal(run(drafter), run(dflash))


def test_the_confidence_head_reads_no_draft_of_its_slot_and_is_in_float32_under_autocast():
    drafter = make_drafter("dspark", TARGET)
    hidden = run(drafter)
    with torch.autocast("cpu", torch.bfloat16):
        logits = drafter.confidence_logits(hidden)
    projection = drafter.confidence_head.proj
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden @ projection.weight[0] + projection.bias)
    options = BLOCKS[False] | {"markov_rank": RANK, "confidence_head_with_markov": False}
    plain = make_drafter("dspark", TARGET, **options)
    assert plain.confidence_head.proj.in_features == TARGET.config.hidden_size
    assert plain.confidence_logits(hidden).shape == hidden.shape[:-1]
    assert make_drafter("dspark", TARGET, enable_confidence_head=False).confidence_logits(hidden) is None


# -- warm start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_anchor", [False, True])
@pytest.mark.parametrize("is_reduced", [False, True])
def test_a_drafter_made_from_a_dflash_has_its_logits_bit_for_bit(from_anchor, is_reduced):
    dflash = make_drafter("dflash", TARGET, **BLOCKS[from_anchor])
    if is_reduced:
        dflash.reduce_vocabulary(build_draft_vocabulary(torch.arange(VOCAB), 30), TARGET)
    drafter = DSparkDraftModel.from_dflash(dflash, markov_rank=RANK)
    assert torch.equal(logits_of(drafter, run(drafter)), logits_of(dflash, run(dflash)))
    assert drafter.config.sample_from_anchor is from_anchor
    # Without a gradient of the first factor yet, but with one of the second.
    logits_of(drafter, run(drafter)).square().sum().backward()
    first, second = drafter.markov_head.markov_w1.weight, drafter.markov_head.markov_w2.weight
    assert not first.grad.any() and second.grad.abs().amax(dim=0).min() > 0 and first.std() > 0.01


def test_a_warm_start_begins_at_a_drafter_without_a_markov_head_alone():
    options = BLOCKS[False] | {"markov_rank": 0, "confidence_head_with_markov": False}
    of_deepspec = DSparkDraftModel.from_target(TARGET, mask_token_id=MASK, num_hidden_layers=2, **options)
    drafter = DSparkDraftModel.from_dflash(of_deepspec, markov_rank=RANK)
    assert torch.equal(logits_of(drafter, run(drafter)), logits_of(of_deepspec, run(of_deepspec)))
    for family in ("dflash2", "dspark", "eagle3"):
        with pytest.raises(ValueError, match="starts from a DFlash drafter"):
            DSparkDraftModel.from_dflash(make_drafter(family, TARGET))


# -- configuration and files ------------------------------------------------------------------------------------------


def test_a_fresh_drafter_has_the_published_settings():
    config = DSparkDraftModel.from_target(TARGET, mask_token_id=MASK).config
    assert (config.block_size, config.sample_from_anchor, config.markov_rank) == (7, True, 256)
    assert config.enable_confidence_head and config.confidence_head_with_markov
    saved = config.to_diff_dict()
    assert saved["architectures"] == ["Qwen3DSparkModel"] and saved["markov_head_type"] == "vanilla"
    # Engines read it here, and vLLM refuses a drafter that has it there.
    assert saved["sample_from_anchor"] is True and "sample_from_anchor" not in saved["dflash_config"]


@pytest.mark.parametrize("from_anchor", [False, True])
def test_a_saved_drafter_loads_bit_for_bit_under_the_published_names(tmp_path, from_anchor):
    drafter = make_drafter("dspark", TARGET, **BLOCKS[from_anchor])
    drafter.save_pretrained(tmp_path)
    loaded = AutoDrafter.from_pretrained(tmp_path)
    assert type(loaded) is DSparkDraftModel and torch.equal(run(loaded), run(drafter))
    assert loaded.config.to_diff_dict() == drafter.config.to_diff_dict()
    heads = {name: tuple(each.shape) for name, each in loaded.state_dict().items() if "_head" in name}
    assert heads == {
        "markov_head.markov_w1.weight": (VOCAB, RANK),
        "markov_head.markov_w2.weight": (VOCAB, RANK),
        "confidence_head.proj.weight": (1, 32 + RANK),
        "confidence_head.proj.bias": (1,),
    }


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"markov_rank": -1}, "at least 0"), ({"markov_rank": 0}, "reads the Markov head")],
)
def test_settings_out_of_range_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        DSparkDraftConfig(block_size=4, mask_token_id=31, **settings)
