# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A trained DFlash drafter inside transformers' own `generate(..., speculation_type="dflash")`.

The text alone proves nothing, because verification makes it the target's whatever is drafted. The number of target
forwards is the proof: it is right only if layers, positions, masks and cache are those the drafter was trained with.
"""

import pytest
import torch

from helpers.rollouts import Options, decode
from helpers.tiny import EOS, MASK, VOCAB, make_causal_lm, make_drafter, make_prompts, make_tokenizer
from trl_draft_opd import AutoDrafter, DSparkDraftModel, FrozenTarget, build_draft_vocabulary
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.rollout.blocks import sample_anchors


NUM_DRAFTS, TRAINED_LENGTH = 4, 40
PROMPTS = make_prompts(2, seed=2)
UNSEEN = make_prompts(1, seed=7)


def greedy(target, prompt, max_new_tokens, **options):
    """Return the response and how often the target ran."""
    calls = []
    handle = target.causal_lm.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([prompt])
    output = target.causal_lm.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, **options
    )
    handle.remove()
    return output[0, len(prompt) :].tolist(), len(calls)


def native(target, drafter, prompt, max_new_tokens, **options):
    return greedy(target, prompt, max_new_tokens, assistant_model=drafter, speculation_type="dflash", **options)


def live(target, drafter, prompt, max_new_tokens, eos_token_ids=(EOS,)):
    options = Options(NUM_DRAFTS, max_completion_length=max_new_tokens, eos_token_ids=list(eos_token_ids))
    return decode(target, drafter, [prompt], options)


def train(target, drafter, texts, steps):
    """Overfit the drafter to a few of the target's texts, with the same forward that the trainers use."""
    lengths = [len(prompt) for prompt in PROMPTS]
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    index = torch.arange(input_ids.shape[1])
    mask = (index < torch.tensor([len(text) for text in texts])[:, None]).long()
    completion_mask = mask.bool() & (index >= torch.tensor(lengths)[:, None])
    features = target.read_text(input_ids, mask, drafter.config.target_layer_ids).padded().features
    anchors = sample_anchors(
        input_ids, completion_mask, range(len(texts)), num_anchors=None, num_drafts=NUM_DRAFTS, seed=0, epoch=0
    )
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    for _ in range(steps):
        hidden = run_blocks(drafter, features, input_ids, anchors.anchors, anchors.drafts, target.embed)
        logits = target.project(hidden[anchors.is_accepted])
        loss = torch.nn.functional.cross_entropy(logits, anchors.labels[anchors.is_accepted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    target = FrozenTarget(make_causal_lm("qwen3"), make_tokenizer())
    drafter = make_drafter("dflash", target, block_size=NUM_DRAFTS + 1, mask_token_id=MASK)
    texts = [prompt + greedy(target, prompt, TRAINED_LENGTH)[0] for prompt in PROMPTS]
    train(target, drafter, texts, steps=120)
    return target, drafter.eval()


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 5, 6, 17, TRAINED_LENGTH])
def test_native_generation_takes_exactly_our_number_of_target_forwards(pair, max_new_tokens):
    # Exactly, at every length: both spend one forward on the prompt, which commits one token, and one per round. Where
    # a single token is left, transformers runs the target on the anchor alone, and we draft a block: a forward each.
    target, drafter = pair
    for prompt in PROMPTS + UNSEEN:
        expected, plain_forwards = greedy(target, prompt, max_new_tokens)
        assert plain_forwards == len(expected)
        response, forwards = native(target, drafter, prompt, max_new_tokens)
        rollout = live(target, drafter, prompt, max_new_tokens)
        assert response == expected == rollout.responses()[0]
        assert forwards == rollout.num_target_forwards == 1 + int(rollout.num_rounds)


def test_the_drafter_is_trained_and_saves_forwards(pair):
    target, drafter = pair
    counts = [native(target, drafter, prompt, TRAINED_LENGTH) for prompt in PROMPTS]
    tau = sum(len(response) - 1 for response, _ in counts) / sum(forwards - 1 for _, forwards in counts)
    assert tau > 2


def test_layers_off_by_one_cost_forwards(pair):
    # What makes the equality of counts above a proof.
    target, drafter = pair
    right = sum(native(target, drafter, prompt, TRAINED_LENGTH)[1] for prompt in PROMPTS)
    layer_ids = drafter.config.target_layer_ids
    drafter.config.target_layer_ids = [i + 1 for i in layer_ids]
    wrong = sum(native(target, drafter, prompt, TRAINED_LENGTH)[1] for prompt in PROMPTS)
    drafter.config.target_layer_ids = layer_ids
    assert wrong > 1.2 * right


def test_a_response_that_ends_early_takes_the_same_number_of_forwards(pair):
    target, drafter = pair
    num_inside = 0
    for prompt in PROMPTS:
        whole, _ = greedy(target, prompt, TRAINED_LENGTH)
        for place in (0, 4, 9, 20):
            eos = whole[place]
            expected = whole[: whole.index(eos) + 1]
            response, forwards = native(target, drafter, prompt, TRAINED_LENGTH, eos_token_id=eos)
            rollout = live(target, drafter, prompt, TRAINED_LENGTH, [eos])
            assert response == expected == rollout.responses()[0]
            assert forwards == rollout.num_target_forwards
            num_inside += bool(rollout.is_censored.any())
    # Some end inside of a block that matched all along.
    assert num_inside > 0


def test_a_saved_drafter_decodes_natively_like_the_one_in_memory(pair, tmp_path):
    target, drafter = pair
    drafter.save_pretrained(tmp_path)
    loaded = AutoDrafter.from_pretrained(tmp_path)
    for prompt in PROMPTS + UNSEEN:
        assert native(target, loaded, prompt, 40) == native(target, drafter, prompt, 40)


@pytest.mark.parametrize(
    ("family", "options", "lacking"),
    [
        ("dspark", {}, "what DSpark adds to DFlash"),
        ("dspark", {"sample_from_anchor": True}, "what DSpark adds to DFlash, its draft in the anchor's slot"),
        ("dflash2", {}, "what DFlash 2 adds to DFlash"),
        ("dflash", {"sample_from_anchor": True}, "its draft in the anchor's slot"),
        (
            "dflash",
            {"draft_vocabulary": build_draft_vocabulary(torch.arange(VOCAB), 24)},
            "its head of a reduced vocabulary",
        ),
    ],
)
def test_a_drafter_of_which_native_generation_would_leave_a_part_out_is_refused(pair, family, options, lacking):
    target, _ = pair
    drafter = make_drafter(family, target, **options)
    with pytest.raises(ValueError, match=f"would draft without {lacking}, so .* `target.generate.*custom_generate="):
        native(target, drafter, PROMPTS[0], 8)


def test_a_drafter_without_a_markov_head_decodes_natively_as_the_dflash_it_is(pair):
    target, drafter = pair
    options = {"markov_rank": 0, "confidence_head_with_markov": False, "sample_from_anchor": False}
    of_deepspec = DSparkDraftModel.from_target(
        target, mask_token_id=MASK, num_hidden_layers=2, block_size=5, **options
    )
    of_deepspec.load_state_dict(drafter.state_dict(), strict=False)
    for prompt in PROMPTS:
        assert native(target, of_deepspec.eval(), prompt, 40) == native(target, drafter, prompt, 40)
