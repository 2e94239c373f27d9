# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Every fast path has a plain reference in `benchmarks/reference`, and they agree: attention, loss, drafting, decoding,
replay, branch states, and whole training steps of all families.
"""

import pytest
import torch

from benchmarks.reference import attention, drafting, loss, rollout, step
from helpers.rollouts import Options, decode, replay
from helpers.tiny import EOS, FAMILIES, make_drafter, make_prompts, make_target
from trl_draft_opd import SamplingSettings, build_draft_vocabulary
from trl_draft_opd.drafters.attention import anchored_attention
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.losses import LOSS_TYPES, Head, chunked_divergence
from trl_draft_opd.rollout.blocks import mark_slots, sample_anchors
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.trainer.step import Objective, PreparedBatch, SlotRules, StreamSettings, step_loss, weight_sums


GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
CHUNK_BYTES = 4096
NUM_DRAFTS = 4


def replay_options(keep_branch_hidden=True, segment_length=3) -> Options:
    return Options(
        NUM_DRAFTS,
        keep_branch_hidden=keep_branch_hidden,
        segment_length=segment_length,
        chunk_bytes=CHUNK_BYTES,
    )


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def to_text(texts: list[list[int]], prompt_lengths: list[int]) -> TargetText:
    marks = [[i >= start for i in range(len(row))] for row, start in zip(texts, prompt_lengths, strict=True)]
    ones = [[1] * len(row) for row in texts]
    return TargetText(pad(texts, 0), pad(ones, 0), pad(marks, False), list(range(len(texts))))


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module", params=FAMILIES)
def drafter(request, target):
    return make_variant(request.param, target, "plain")


@pytest.fixture(scope="module")
def decoded(target, drafter):
    """Texts and blocks of plain speculative decoding, one prompt at a time, and where the responses begin."""
    prompts = make_prompts(5)
    options = {"num_drafts": NUM_DRAFTS, "max_completion_length": 17, "eos_token_ids": [EOS]}
    pairs = [rollout.decode(target.causal_lm, drafter, prompt, **options) for prompt in prompts]
    texts, chains = zip(*pairs, strict=True)
    return prompts, list(texts), list(chains)


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [attention.sdpa_attention, attention.written_out_attention])
@pytest.mark.parametrize("sizes", [[], [1, 1], [3]])
def test_attention_in_two_parts_equals_one_dense_mask(attend, sizes):
    heads, kv_heads, length, num_anchors, num_queries, dim = 4, 2, 13, 5, 3, 8
    query = torch.randn(2, heads, num_anchors, num_queries, dim, requires_grad=True)
    context = [torch.randn(2, kv_heads, length, dim, requires_grad=True) for _ in range(2)]
    pieces = [[torch.randn(2, kv_heads, num_anchors, n, dim, requires_grad=True) for n in sizes] for _ in range(2)]
    anchors = torch.randint(1, length + 1, (2, num_anchors))
    arguments = (query, *context, *pieces, anchors, dim**-0.5)
    leaves = [query, *context, *pieces[0], *pieces[1]]
    fast, plain = anchored_attention(*arguments), attention.dense_attention(*arguments, attend=attend)
    torch.testing.assert_close(fast, plain)
    weight = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(fast, leaves, weight), torch.autograd.grad(plain, leaves, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_dense_mask_shows_a_block_its_prefix_and_itself():
    visible = attention.visible_pairs(torch.tensor([[1, 3]]), 4, 2, [2])[0]
    assert visible.long().tolist() == [[1, 0, 0, 0, 1, 1, 0, 0]] * 2 + [[1, 1, 1, 0, 0, 0, 1, 1]] * 2


# ---- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_reduced", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_chunked_divergences_equal_those_of_full_logits(loss_type, is_reduced):
    rows, width, vocab = 11, 6, 23
    token_ids = torch.arange(1, vocab, 2) if is_reduced else None
    hidden = torch.randn(rows, width, requires_grad=True)
    head = torch.nn.Parameter(torch.randn(vocab if token_ids is None else len(token_ids), width))
    states, target_weight = torch.randn(4, width), torch.randn(vocab, width)
    target_rows = torch.arange(rows) % 4
    labels = torch.randint(vocab, (rows,)) if token_ids is None else token_ids[torch.randint(len(token_ids), (rows,))]
    labels[::3] = -1
    weights = torch.rand(rows)
    weights[2] = 0
    options = {"labels": labels, "weights": weights, "loss_type": loss_type, "draft_token_ids": token_ids}
    plain = loss.full_loss(hidden, head, states[target_rows], target_weight, **options)
    fast = chunked_divergence(
        hidden,
        Head.linear(head),
        states,
        Head.linear(target_weight),
        target_rows_N=target_rows,
        labels_N=labels,
        weights_N=weights,
        loss_type=loss_type,
        draft_token_ids=token_ids,
        chunk_bytes=200,
    ).total
    torch.testing.assert_close(fast, plain)
    for ours, theirs in zip(
        torch.autograd.grad(fast, [hidden, head]), torch.autograd.grad(plain, [hidden, head]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---- rollouts -------------------------------------------------------------------------------------------------------


def assert_same_blocks(result, chains: list[list[rollout.Block]]) -> None:
    for row, chain in enumerate(chains):
        count = int(result.num_rounds[row])
        assert result.anchors[row, :count].tolist() == [block.anchor for block in chain]
        assert result.drafts[row, :count].tolist() == [block.drafts for block in chain]
        assert result.accepted[row, :count].tolist() == [block.accepted for block in chain]
        assert result.is_censored[row, :count].tolist() == [block.is_censored for block in chain]


def test_batched_decoding_equals_one_prompt_at_a_time(target, drafter, decoded):
    prompts, texts, chains = decoded
    result = decode(target, drafter, prompts, Options(NUM_DRAFTS, max_completion_length=17, eos_token_ids=[EOS]))
    responses = [text[len(prompt) :] for prompt, text in zip(prompts, texts, strict=True)]
    assert result.responses() == responses
    assert_same_blocks(result, chains)


@pytest.mark.parametrize("segment_length", [1, 3, 100])
def test_replay_in_segments_equals_replay_block_by_block(target, drafter, decoded, segment_length):
    prompts, texts, chains = decoded
    lengths = [len(prompt) for prompt in prompts]
    plain = [
        rollout.replay(target.causal_lm, drafter, text, length, NUM_DRAFTS)
        for text, length in zip(texts, lengths, strict=True)
    ]
    assert plain == chains
    result = replay(target, drafter, to_text(texts, lengths), replay_options(segment_length=segment_length))
    # Behind the end of a text nothing is drafted along it: only what was judged can be compared.
    for row, chain in enumerate(plain):
        count = int(result.num_rounds[row])
        assert result.anchors[row, :count].tolist() == [block.anchor for block in chain]
        assert result.accepted[row, :count].tolist() == [block.accepted for block in chain]
        for index, block in enumerate(chain):
            inside = min(NUM_DRAFTS, len(texts[row]) - 1 - block.anchor) if block.is_censored else NUM_DRAFTS
            assert result.drafts[row, index, :inside].tolist() == block.drafts[:inside]


def test_packed_branches_equal_one_forward_per_branch(target, drafter, decoded):
    prompts, texts, _ = decoded
    text = to_text(texts, [len(prompt) for prompt in prompts])
    result = replay(target, drafter, text, replay_options())
    anchors = mark_slots(result, rejected_scope="suffix", eos_token_ids=[EOS])
    compared = 0
    for row, block, slot in anchors.is_branch.nonzero().tolist():
        anchor, drafts = int(result.anchors[row, block]), result.drafts[row, block].tolist()
        plain = rollout.branch_states(target.causal_lm, texts[row], rollout.Block(anchor, drafts, 0, False))
        torch.testing.assert_close(result.branch_hidden[row, block, slot], plain[slot], rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared > 10


# ---- drafting with gradient, and whole steps ------------------------------------------------------------------------


def gradients(total: torch.Tensor, drafter) -> dict[str, torch.Tensor]:
    trained = [(name, parameter) for name, parameter in drafter.named_parameters() if parameter.requires_grad]
    names, parameters = zip(*trained, strict=True)
    return dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))


def assert_same_gradients(ours: dict, theirs: dict) -> None:
    for name, gradient in theirs.items():
        ours_here = ours[name]
        if gradient is None:
            assert ours_here is None or not ours_here.any(), name
            continue
        largest = float(gradient.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(
            ours_here, gradient, rtol=1e-3, atol=1e-5 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


# Options of `from_target`, as far as they are not one flag of the variant's name.
VARIANTS = {
    "plain": {},
    "reduced vocabulary": {"draft_vocabulary": build_draft_vocabulary(torch.arange(64).flip(0), 24)},
    "four taps": {"target_layer_ids": [0, 2, 3, 6]},
    "sample_from_anchor": {"sample_from_anchor": True, "block_size": NUM_DRAFTS},
    "attention_bias": {},
}


def make_variant(family: str, target, variant: str):
    """Return a drafter with one of the options that change what is computed."""
    # The reference has no loss of confidences.
    fixed = {"enable_confidence_head": False, "confidence_head_with_markov": False} if family == "dspark" else {}
    drafter = make_drafter(family, target, **fixed | VARIANTS.get(variant, {variant: True}))
    if variant == "attention_bias":
        # Of public drafters alone, so no option of fresh ones.
        drafter.config.attention_bias = True
        drafter = type(drafter)(drafter.config).eval()
        biases = [parameter for name, parameter in drafter.named_parameters() if name.endswith("proj.bias")]
        assert len(biases) == 4 * drafter.config.num_hidden_layers
        with torch.no_grad():
            for bias in biases:
                bias.normal_()
    return drafter


@pytest.mark.parametrize(
    "family, variant",
    [
        ("eagle3", "plain"),
        ("eagle3", "fc_norm"),
        ("eagle3", "norm_output"),
        ("eagle3", "norm_before_fc"),
        ("eagle3", "four taps"),
        ("eagle3", "attention_bias"),
        ("dflash", "plain"),
        ("dflash", "attention_bias"),
        ("dflash", "sample_from_anchor"),
        ("dspark", "plain"),
        ("dspark", "sample_from_anchor"),
        ("dflash2", "plain"),
        ("dflash2", "sample_from_anchor"),
    ],
)
def test_packed_drafting_equals_the_layers_written_out(target, family, variant):
    drafter = make_variant(family, target, variant)
    text = make_prompts(1, seed=3, longest=1)[0] * 3 + make_prompts(1, seed=5)[0] + list(range(7, 20))
    anchors, drafts = [1, 4, 5, len(text) - 1], torch.randint(7, 60, (4, NUM_DRAFTS))
    reading = drafting.read_text(target.causal_lm, text, drafter.config.target_layer_ids)
    plain, _ = drafting.draft_states(drafter, target.causal_lm, reading.features, text, anchors, NUM_DRAFTS, drafts)
    fast = run_blocks(
        drafter, reading.features[None], torch.tensor([text]), torch.tensor([anchors]), drafts[None], target.embed
    )
    torch.testing.assert_close(fast[0], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["forward_kl", "ce"])
def test_a_supervised_step_equals_the_plain_one(target, drafter, decoded, loss_type):
    prompts, texts, _ = decoded
    lengths = [len(prompt) for prompt in prompts]
    text = to_text(texts, lengths)
    anchors = sample_anchors(
        text.input_ids, text.completion_mask, text.sample_ids, num_anchors=6, num_drafts=NUM_DRAFTS, seed=0, epoch=0
    )
    streams = {"accepted": StreamSettings(loss_type, 1.0, 0.8), "rejected": StreamSettings(loss_type, 0.0, 1.0)}
    sums = weight_sums([anchors], streams, drafter.draft_token_ids)
    objective = Objective(streams, SlotRules(), CHUNK_BYTES, sums)
    ours = step_loss(drafter, target, PreparedBatch(text, None, anchors, None), objective).loss
    places = [[a for a in row if a >= 0] for row in anchors.anchors.tolist()]
    pairs = [(ids, [i >= start for i in range(len(ids))]) for ids, start in zip(texts, lengths, strict=True)]
    plain = step.sft_step(target.causal_lm, drafter, pairs, places, NUM_DRAFTS, step.Stream(loss_type, 1.0, 0.8))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(ours, drafter), gradients(plain, drafter))


@pytest.mark.parametrize("scope", ["suffix", "first"])
@pytest.mark.parametrize(
    "family, variant",
    [
        ("eagle3", "plain"),
        ("eagle3", "reduced vocabulary"),
        ("dflash", "plain"),
        ("dflash", "reduced vocabulary"),
        ("dflash", "sample_from_anchor"),
        ("dspark", "plain"),
        ("dspark", "reduced vocabulary"),
        ("dspark", "sample_from_anchor"),
        ("dflash2", "plain"),
    ],
)
def test_a_draft_opd_step_equals_the_plain_one(target, family, variant, scope):
    drafter = make_variant(family, target, variant)
    prompts = make_prompts(4, seed=2)
    texts = decode(target, drafter, prompts, Options(NUM_DRAFTS, max_completion_length=15, eos_token_ids=[EOS]))
    responses = texts.responses()
    joined = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    lengths = [len(prompt) for prompt in prompts]
    text = to_text(joined, lengths)
    result = replay(target, drafter, text, replay_options(keep_branch_hidden=scope == "suffix"))
    anchors = mark_slots(result, rejected_scope=scope, eos_token_ids=[EOS])
    assert anchors.is_rejected.any()
    streams = {"accepted": ("forward_kl", 1.0, 1.0), "rejected": ("reverse_kl", 0.5, 0.8)}
    fast_streams = {name: StreamSettings(*values) for name, values in streams.items()}
    sums = weight_sums([anchors], fast_streams, drafter.draft_token_ids)
    objective = Objective(fast_streams, SlotRules(), CHUNK_BYTES, sums)
    ours = step_loss(drafter, target, PreparedBatch(text, result, anchors, None), objective).loss
    plain = step.opd_step(
        target.causal_lm,
        drafter,
        list(zip(joined, lengths, strict=True)),
        NUM_DRAFTS,
        {name: step.Stream(*values) for name, values in streams.items()},
        rejected_scope=scope,
        eos_token_ids=[EOS],
    )
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(ours, drafter), gradients(plain, drafter))
