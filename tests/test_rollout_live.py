# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Live rollouts: the text is the target's own at any temperature, and every block is recorded as it was verified.

Compares with `generate`, with full forwards without any cache, and with an enumerated distribution. Knows no trainer.
"""

import itertools

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from helpers.oracle import greedy_text, plant
from helpers.rollouts import Options, decode
from helpers.tiny import EOS, FAMILIES, MASK, VOCAB, make_causal_lm, make_drafter, make_prompts, make_target
from trl_draft_opd import FrozenTarget, SamplingSettings
from trl_draft_opd.rollout import keyed_random as draws
from trl_draft_opd.rollout import live
from trl_draft_opd.rollout.acceptance import token_probs
from trl_draft_opd.rollout.blocks import mark_slots
from trl_draft_opd.target.branches import score_branches


def roll_out(target, drafter, prompts, sample_ids=None, **options):
    return decode(target, drafter, prompts, Options(**options), sample_ids)


def generate(target, prompts, max_completion_length, eos_token_ids=()):
    """Greedy continuations by `generate` on one left-padded batch, cut behind the first EOS."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    target.causal_lm.generation_config.eos_token_id = list(eos_token_ids) or None
    output = target.causal_lm.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=max_completion_length, do_sample=False, pad_token_id=0
    )
    return [cut(row, eos_token_ids) for row in output[:, width:].tolist()]


def cut(response, eos_token_ids):
    return response[: next((i + 1 for i, token in enumerate(response) if token in eos_token_ids), len(response))]


def assert_equal(first, second):
    for name in ("input_ids", "attention_mask", "prompt_lengths", "lengths", "anchors", "drafts", "accepted"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for name in ("is_censored", "is_counted"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.fixture(scope="module")
def target():
    return make_target()


# -- temperature 0 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama", "moe", "gemma2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_targets_own(family, kind):
    target = make_target(kind)
    drafter = make_drafter(family, target)
    prompts = make_prompts(4)
    own = generate(target, prompts, 24)
    # The soft-capped target soon repeats itself.
    assert len({tuple(text) for text in own}) == 4 and len({token for text in own for token in text}) > 6
    rollout = roll_out(target, drafter, prompts)
    assert rollout.responses() == own
    assert rollout.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    assert [row[:n] for row, n in zip(rollout.input_ids.tolist(), map(len, prompts), strict=True)] == prompts
    assert roll_out(target, drafter, prompts[1:2]).responses() == own[1:2]


@pytest.mark.parametrize("seed", [1, 2])
def test_accepted_and_wrong_drafts_in_one_batch_leave_the_text_alone(monkeypatch, target, seed):
    generator = torch.Generator().manual_seed(seed)
    prompts = make_prompts(5, seed=seed)
    truths = [greedy_text(target, prompt, 36) for prompt in prompts]
    wrong = [
        set((torch.rand(60, generator=generator) < rate).nonzero()[:, 0].tolist()) for rate in (0, 0.1, 0.3, 0.6, 1)
    ]
    drafter = make_drafter("dflash", target)
    plant(monkeypatch, drafter, truths, lambda row: wrong[row])
    rollout = roll_out(target, drafter, prompts, max_completion_length=30)
    expected = [truth[len(prompt) : len(prompt) + 30] for truth, prompt in zip(truths, prompts, strict=True)]
    assert rollout.responses() == expected
    assert rollout.accepted.max() == 4 and len(set(rollout.num_rounds.tolist())) > 3
    assert rollout.num_target_forwards == 1 + int(rollout.num_rounds.max())


def test_an_eos_inside_a_block_ends_the_row_there(monkeypatch, target):
    prompts = make_prompts(3)
    truths = [greedy_text(target, prompt, 36) for prompt in prompts]
    drafter = make_drafter("dflash", target)
    plant(monkeypatch, drafter, truths, lambda row: set())
    # Anchors of a perfect drafter stand at 0, 5, 10 of the response: index 7 is the second draft of a block.
    response = truths[0][len(prompts[0]) :]
    eos = next(token for token in response[6:9] if token not in response[:6])
    rollout = roll_out(target, drafter, prompts, max_completion_length=30, eos_token_ids=[eos])
    assert rollout.responses() == generate(target, prompts, 30, [eos])
    end = response.index(eos)
    assert end % 5 not in (0, 4) and rollout.responses()[0] == response[: end + 1]
    last = int(rollout.num_rounds[0]) - 1
    assert int(rollout.accepted[0, last]) == end % 5 and bool(rollout.is_censored[0, last])
    assert not bool(rollout.is_counted[0, last])


@pytest.mark.parametrize("family", FAMILIES)
def test_any_of_several_eos_ids_ends_a_row(family, target):
    prompts = make_prompts(5, seed=3)
    free = generate(target, prompts, 30)
    eos = sorted({free[0][5], free[1][9], free[2][2]})
    rollout = roll_out(target, make_drafter(family, target), prompts, max_completion_length=30, eos_token_ids=eos)
    assert rollout.responses() == [cut(text, eos) for text in free] == generate(target, prompts, 30, eos)
    assert len(set(rollout.lengths.tolist())) > 2


@pytest.mark.parametrize("limit", [1, 2, 6, 7, 8])
def test_the_length_limit_cuts_a_block_in_the_middle(monkeypatch, target, limit):
    prompts = make_prompts(2)
    truths = [greedy_text(target, prompt, 20) for prompt in prompts]
    drafter = make_drafter("dflash", target)
    plant(monkeypatch, drafter, truths, lambda row: set())
    rollout = roll_out(target, drafter, prompts, max_completion_length=limit)
    assert rollout.responses() == [t[len(p) : len(p) + limit] for t, p in zip(truths, prompts, strict=True)]
    # Response index 0 is the prefill's; blocks at 0 and 5 commit five tokens each, a block at the last token is not
    # drafted.
    assert rollout.num_rounds.tolist() == [-(-(limit - 1) // 5)] * 2
    assert rollout.num_target_forwards == 1 + -(-(limit - 1) // 5)


def test_a_first_token_that_is_eos_leaves_no_block(target):
    prompts = make_prompts(3)
    free = generate(target, prompts, 8)
    eos = [next(text[0] for text in free if sum(text[0] in other for other in free) == 1)]
    row = next(index for index, text in enumerate(free) if text[0] in eos)
    drafter = make_drafter("eagle3", target)
    rollout = roll_out(target, drafter, prompts, max_completion_length=8, eos_token_ids=eos, keep_branch_hidden=True)
    assert rollout.responses() == [cut(text, eos) for text in free] and rollout.responses()[row] == eos
    assert (
        int(rollout.num_rounds[row]) == 0 and not rollout.is_counted[row].any() and not rollout.is_censored[row].any()
    )
    alone = roll_out(target, drafter, prompts[row : row + 1], eos_token_ids=eos, keep_branch_hidden=True)
    assert alone.responses() == [eos] and alone.num_target_forwards == 1
    assert alone.anchors.tolist() == [[-1]] and alone.drafts.shape == (1, 1, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_one_token_is_enough(family, target):
    assert roll_out(target, make_drafter(family, target), [[9], [11]]).responses() == generate(target, [[9], [11]], 24)


def test_without_eos_ids_rows_run_to_the_limit(target):
    prompts = make_prompts(3)
    eos = generate(target, prompts, 6)[0][3]
    rollout = roll_out(target, make_drafter("dflash", target), prompts, max_completion_length=17)
    assert (rollout.lengths - rollout.prompt_lengths).tolist() == [17] * 3 and eos in rollout.responses()[0][:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_drafts_than_the_drafter_can_make_are_allowed(family, target):
    prompts = make_prompts(2)
    drafter = make_drafter(family, target)
    rollout = roll_out(target, drafter, prompts, num_drafts=2)
    assert rollout.drafts.shape[-1] == 2 and rollout.responses() == generate(target, prompts, 24)
    longer = roll_out(target, drafter, prompts, num_drafts=4)
    assert torch.equal(rollout.drafts[:, 0], longer.drafts[:, 0, :2])


@pytest.mark.parametrize("family", FAMILIES)
def test_compaction_happens_and_changes_nothing(monkeypatch, family, target):
    prompts = make_prompts(4)
    drafter = make_drafter(family, target)
    compact, widths = live._LiveBatch._compact, []

    def counted(self, kept):
        compact(self, kept)
        widths.append((self.cache_mask.shape[1], kept, self.cache.layers[0].keys.shape[2]))

    monkeypatch.setattr(live._LiveBatch, "_compact", counted)
    compacted = roll_out(target, drafter, prompts, max_completion_length=40, keep_branch_hidden=True)
    assert len(widths) >= 2 and all(mask == kept == keys for mask, kept, keys in widths)
    monkeypatch.setattr(live._LiveBatch, "_compact", lambda self, kept: None)
    plain = roll_out(target, drafter, prompts, max_completion_length=40, keep_branch_hidden=True)
    assert_equal(compacted, plain)
    torch.testing.assert_close(compacted.branch_hidden, plain.branch_hidden, rtol=1e-4, atol=1e-4)


# -- what is recorded -------------------------------------------------------------------------------------------------


def test_planted_errors_give_exactly_the_expected_chain(monkeypatch, target):
    prompt = [9, 10, 11]
    truth = greedy_text(target, prompt, 30)
    drafter = make_drafter("dflash", target)
    # Anchors start at index 3. Wrong at 6: two accepted. Wrong at 7: none. Then a full accept. Wrong at 15: two
    # accepted.
    plant(monkeypatch, drafter, [truth], lambda row: {6, 7, 15, 17})
    rollout = roll_out(target, drafter, [prompt], max_completion_length=16)
    assert rollout.anchors.tolist() == [[3, 6, 7, 12, 15, 17]]
    assert rollout.accepted.tolist() == [[2, 0, 4, 2, 1, 1]]
    # The last token stands at 18. From 17, one draft fits and matches: what follows is unknown.
    assert rollout.is_censored.tolist() == [[False, False, False, False, False, True]]
    assert rollout.is_counted.tolist() == [[True, True, True, True, False, False]]
    assert rollout.num_target_forwards == 7
    assert rollout.drafts[0, 0].tolist() == [truth[4], truth[5], (truth[6] + 1) % VOCAB, (truth[7] + 1) % VOCAB]


def test_a_full_accept_that_ends_with_the_text_is_counted_and_not_censored(monkeypatch, target):
    prompt = [9, 10, 11]
    truth = greedy_text(target, prompt, 30)
    drafter = make_drafter("dflash", target)
    plant(monkeypatch, drafter, [truth], lambda row: set())
    rollout = roll_out(target, drafter, [prompt], max_completion_length=10)
    # Blocks at 3 and 8; the second ends at 12, the last token: no room for a bonus.
    assert rollout.anchors.tolist() == [[3, 8]] and rollout.accepted.tolist() == [[4, 4]]
    assert not rollout.is_censored.any() and rollout.is_counted.all() and int(rollout.lengths) == 13


def test_a_mismatch_at_the_last_token_is_an_ordinary_rejection(monkeypatch, target):
    prompt = [9, 10, 11]
    truth = greedy_text(target, prompt, 30)
    drafter = make_drafter("dflash", target)
    plant(monkeypatch, drafter, [truth], lambda row: {10})
    rollout = roll_out(target, drafter, [prompt], max_completion_length=8)
    assert rollout.anchors.tolist() == [[3, 8]] and rollout.accepted.tolist() == [[4, 1]]
    assert not rollout.is_censored.any() and rollout.is_counted.tolist() == [[True, False]]


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_branch_states_are_those_of_a_packed_forward(family, kind):
    target = make_target(kind)
    rollout = roll_out(target, make_drafter(family, target), make_prompts(3), keep_branch_hidden=True)
    is_branch = mark_slots(rollout, rejected_scope="suffix", eos_token_ids=[]).is_branch
    reading = target.read_text(rollout.input_ids, rollout.attention_mask, (), keep_cache=True)
    packed = score_branches(target, reading, rollout.anchors, rollout.drafts, is_branch)
    assert rollout.branch_hidden.shape == packed.shape and is_branch.sum() > 30
    torch.testing.assert_close(rollout.branch_hidden[is_branch], packed[is_branch], rtol=1e-4, atol=1e-4)
    assert not packed[~is_branch].any()


def test_branch_states_are_those_of_the_target_on_prompt_text_and_drafts(target):
    prompts = make_prompts(2)
    rollout = roll_out(
        target, make_drafter("dflash", target), prompts, keep_branch_hidden=True, max_completion_length=9
    )
    for row, block in itertools.product(range(2), (0, 3)):
        anchor = int(rollout.anchors[row, block])
        ids = torch.cat([rollout.input_ids[row, : anchor + 1], rollout.drafts[row, block, :-1]])[None]
        expected = target.read_text(ids, torch.ones_like(ids), ()).padded().last_hidden[0, anchor:]
        torch.testing.assert_close(rollout.branch_hidden[row, block], expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_rollout_are_the_rollout_of_those_rows(target):
    prompts = make_prompts(4)
    drafter = make_drafter("dflash", target)
    whole = roll_out(
        target, drafter, prompts, max_completion_length=12, eos_token_ids=[generate(target, prompts, 12)[0][4]]
    )
    part = whole.rows(1, 3)
    assert part.responses() == whole.responses()[1:3]
    assert torch.equal(part.anchors, whole.anchors[1:3, : part.anchors.shape[1]])


# -- temperature above 0 ----------------------------------------------------------------------------------------------


def small_target() -> FrozenTarget:
    torch.manual_seed(5)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}
    config = Qwen3Config(
        vocab_size=6, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.4, **shape
    )
    return FrozenTarget(Qwen3ForCausalLM(config).double().eval())


def enumerate_distribution(target, prompt, sampling, length):
    """Return the probability of every text of `length` tokens, from full forwards."""
    texts = list(itertools.product(range(target.vocab_size), repeat=length))
    ids = torch.tensor([prompt + list(text) for text in texts])
    probs = token_probs(target.causal_lm(input_ids=ids, use_cache=False).logits, sampling)
    distribution = torch.ones(len(texts), dtype=torch.float64)
    for step in range(length):
        distribution *= probs[torch.arange(len(texts)), len(prompt) - 1 + step, ids[:, len(prompt) + step]]
    return distribution


def chi_square_p(counts, distribution):
    """P-value of the chi-square test, cells with small expectation pooled."""
    expected = distribution * counts.sum()
    assert counts[expected == 0].sum() == 0
    is_large = expected >= 5
    observed = torch.cat([counts[is_large], counts[~is_large].sum()[None]])
    expected = torch.cat([expected[is_large], expected[~is_large].sum()[None]])
    keep = expected > 0
    statistic = ((observed[keep] - expected[keep]) ** 2 / expected[keep]).sum()
    freedom = torch.tensor((int(keep.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize(
    "sampling", [SamplingSettings(0.8, 0, 1.0), SamplingSettings(1.5, 4, 0.9)], ids=["plain", "filtered"]
)
@pytest.mark.parametrize("draft_sampling", ["greedy", "sample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_has_the_targets_distribution(family, draft_sampling, sampling):
    target, num_rows, prompt = small_target(), 3000, [1, 4]
    options = {"ttt_steps": 2} if family == "eagle3" else {"block_size": 3, "mask_token_id": 3}
    # Of six tokens, so that some are never drafted.
    drafter = make_drafter(family, target, **options, **({"selector_top_k": 4} if family == "dflash2" else {}))
    counts = torch.zeros(6**3, dtype=torch.float64)
    accepted = set()
    for seed in range(2):
        rollout = roll_out(
            target,
            drafter,
            [prompt] * num_rows,
            seed=seed,
            num_drafts=2,
            max_completion_length=3,
            sampling=sampling,
            draft_sampling=draft_sampling,
        )
        text = torch.tensor(rollout.responses())
        counts += torch.bincount(text @ torch.tensor([36, 6, 1]), minlength=6**3).double()
        accepted |= set(rollout.accepted[:, 0].tolist())
    distribution = enumerate_distribution(target, prompt, sampling, 3)
    assert accepted >= {0, 1} and (distribution * counts.sum() >= 5).sum() > 15
    assert chi_square_p(counts, distribution) > 1e-6


@pytest.mark.parametrize("draft_sampling", ["greedy", "sample"])
def test_a_seed_reproduces_a_sampled_rollout(draft_sampling, target):
    drafter = make_drafter("dflash", target)
    options = {"sampling": SamplingSettings(1.0, 0, 1.0), "draft_sampling": draft_sampling}
    first, again, other = (roll_out(target, drafter, make_prompts(3), seed=seed, **options) for seed in (4, 4, 5))
    assert_equal(first, again)
    assert first.responses() != other.responses()


@pytest.mark.parametrize("draft_sampling", ["greedy", "sample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_draws_depend_on_no_other_row(family, draft_sampling, target):
    drafter = make_drafter(family, target)
    prompts, sample_ids = make_prompts(5), [31, 4, 4 + 2**40, 0, 7]
    options = {
        "sampling": SamplingSettings(1.0, 0, 1.0),
        "draft_sampling": draft_sampling,
        "max_completion_length": 12,
    }

    def rows(order):
        picked = {"prompts": [prompts[i] for i in order], "sample_ids": [sample_ids[i] for i in order]}
        rollout = roll_out(target, drafter, **picked, **options)
        chains = [rollout.is_block[row] for row in range(len(order))]
        return {
            i: (rollout.responses()[row], rollout.anchors[row][chain].tolist(), rollout.drafts[row][chain].tolist())
            for row, (i, chain) in enumerate(zip(order, chains, strict=True))
        }

    together = rows(range(5))
    assert len({tuple(response) for response, _, _ in together.values()}) == 5
    assert rows([3, 1, 4, 0, 2]) == together
    assert rows([0, 1]) | rows([2, 3, 4]) == together
    assert rows([2]) == {2: together[2]}


def test_draws_are_told_apart_by_every_key(target, monkeypatch):
    drawn, keyed_uniforms = [], draws.keyed_uniforms

    def recorded(seed, epoch, sample_ids, anchors, slot, purpose):
        keys = torch.broadcast_tensors(sample_ids, anchors, torch.as_tensor(slot), torch.tensor(purpose))
        drawn.extend(zip(*(key.flatten().tolist() for key in keys), strict=True))
        return keyed_uniforms(seed, epoch, sample_ids, anchors, slot, purpose)

    monkeypatch.setattr(draws, "keyed_uniforms", recorded)
    options = {"sampling": SamplingSettings(1.0, 0, 1.0), "draft_sampling": "sample"}
    rollout = roll_out(target, make_drafter("eagle3", target), make_prompts(3), **options)
    # Per row: the first token, and for every block its drafts, their fates, and the token behind the accepted ones.
    assert len(drawn) == 3 + int(rollout.num_rounds.sum()) * (4 + 4 + 1)
    assert len(set(drawn)) == len(drawn)
    assert {purpose for *_, purpose in drawn}.isdisjoint({draws.REPLAY_ACCEPT, draws.REPLAY_DRAFT})


def test_another_epoch_draws_other_text(target):
    drafter, prompts = make_drafter("dflash", target), make_prompts(3)
    warm = SamplingSettings(1.0, 0, 1.0)
    first, second = (roll_out(target, drafter, prompts, sampling=warm, epoch=epoch) for epoch in (0, 1))
    assert first.responses() != second.responses()


def test_rows_without_a_key_are_refused(target):
    with pytest.raises(ValueError, match="3 prompts need as many sample ids in `keys`, got 2"):
        roll_out(target, make_drafter("dflash", target), make_prompts(3), sample_ids=[0, 1])


def test_greedy_rollouts_draw_nothing(target, monkeypatch):
    monkeypatch.delattr(draws, "keyed_uniforms")
    drafter, ambient = make_drafter("dflash", target), torch.get_rng_state()
    roll_out(target, drafter, make_prompts(2), draft_sampling="sample")
    assert torch.equal(ambient, torch.get_rng_state())


# -- manners ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_training", [True, False])
def test_the_drafters_mode_is_restored(is_training, target):
    drafter = make_drafter("dflash", target).train(is_training)
    seen, begin = [], drafter.begin
    drafter.begin = lambda *args: (seen.append(drafter.training), begin(*args))[1]
    roll_out(target, drafter, make_prompts(1), max_completion_length=4)
    assert drafter.training is is_training and seen and not any(seen)


def test_the_drafters_mode_is_restored_after_an_error(target):
    drafter = make_drafter("dflash", target).train()
    drafter.begin = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        roll_out(target, drafter, make_prompts(1))
    assert drafter.training


def test_finished_rows_are_reported_once_each(target):
    prompts = make_prompts(4)
    eos = [generate(target, prompts, 10)[1][3]]
    ended = []
    options = Options(max_completion_length=10, eos_token_ids=eos)
    decode(target, make_drafter("dflash", target), prompts, options, on_finished=ended.append)
    assert sum(ended) == 4 and len(ended) > 1


def test_empty_prompts_are_refused_by_row(target):
    drafter = make_drafter("dflash", target)
    with pytest.raises(ValueError, match=r"at least one token; 3 prompts given, empty rows: \[1\]"):
        roll_out(target, drafter, [[9], [], [8]])
    with pytest.raises(ValueError, match="0 prompts given"):
        roll_out(target, drafter, [])


def test_text_beyond_the_targets_positions_is_refused(target):
    drafter = make_drafter("dflash", target)
    with pytest.raises(ValueError, match="take 257 positions, but the target has 256"):
        roll_out(target, drafter, [[9] * 5], max_completion_length=248)
    assert roll_out(target, drafter, [[9] * 5, [9]], max_completion_length=4).lengths.tolist() == [9, 5]


def test_more_drafts_than_a_block_holds_are_refused(target):
    with pytest.raises(ValueError, match="`num_drafts` 5 exceeds the 4 drafts"):
        roll_out(target, make_drafter("dflash", target), [[9]], num_drafts=5)
    assert roll_out(target, make_drafter("eagle3", target), [[9]], num_drafts=6).drafts.shape[-1] == 6


@pytest.mark.parametrize("changes", [{"num_drafts": 0}, {"max_completion_length": 0}])
def test_counts_below_one_are_refused(changes, target):
    with pytest.raises(ValueError, match="must be at least 1"):
        roll_out(target, make_drafter("dflash", target), [[9]], **changes)


def test_an_unknown_draft_sampling_is_refused(target):
    with pytest.raises(ValueError, match=r"`draft_sampling` must be one of .* got 'argmax'"):
        roll_out(
            target,
            make_drafter("dflash", target),
            [[9]],
            sampling=SamplingSettings(1.0, 0, 1.0),
            draft_sampling="argmax",
        )


def test_a_sliding_window_target_is_refused():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=VOCAB, num_key_value_heads=1, head_dim=8, sliding_window=6, **shape)
    target = FrozenTarget(MistralForCausalLM(config).eval())
    with pytest.raises(ValueError, match="'mistral' uses a sliding window of 6 tokens.*full attention in every layer"):
        roll_out(target, make_drafter("dflash", target), [[9]])


def test_special_ids_of_the_target_do_not_matter_to_padding(target):
    # Padding id equal to a token of the text: rows are told apart by length alone.
    prompts = [[EOS, MASK, 0, 0], [9]]
    assert roll_out(target, make_drafter("dflash", target), prompts).responses() == [
        greedy_text(target, prompt, 24)[len(prompt) :] for prompt in prompts
    ]
    assert make_causal_lm().config.pad_token_id == 0
