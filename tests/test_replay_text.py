# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Replay of texts as they come: drawn blocks, chats of many turns, padding, impossible tokens, targets that cannot
branch.

Compares replay with itself under another cut of the same work, and with a walk of one block at a time. Knows no
trainer.
"""

import importlib
import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from benchmarks.counters import peak_bytes
from helpers.oracle import greedy_text
from helpers.rollouts import GREEDY, Options, decode, draft_at, replay
from helpers.tiny import FAMILIES, VOCAB, make_drafter, make_prompts, make_target
from trl_draft_opd import FrozenTarget, SamplingSettings
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.drafters.packing import RowPacking
from trl_draft_opd.rollout import replay as walks
from trl_draft_opd.rollout.acceptance import count_accepted, token_probs
from trl_draft_opd.rollout.drafting import DraftingSettings, draft_blocks
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.target.reading import TextReading


K = 4
# Hot, so that two random models agree now and then.
HOT = SamplingSettings(3.0, 0, 1.0)
DRAWN = Options(
    num_drafts=K,
    sampling=HOT,
    draft_sampling="sample",
    keep_branch_hidden=True,
    seed=7,
    epoch=1,
    segment_length=5,
    chunk_bytes=16 * VOCAB * 11,
)
ARGMAX = replace(DRAWN, sampling=GREEDY, draft_sampling="greedy")


@pytest.fixture(scope="module")
def target():
    target = make_target()
    # So that no decision hangs on the last bit of a float32.
    target.causal_lm.double()
    return target


@pytest.fixture(scope="module")
def drafters(target):
    drafters = {family: make_drafter(family, target).double() for family in FAMILIES}
    for drafter in drafters.values():
        for name, parameter in drafter.named_parameters():
            # A fresh drafter barely reads its context: a wrong key would change no draft.
            if parameter.ndim == 2 and not any(
                part in name for part in (*drafter.names_of_heads, "selector", "_conv")
            ):
                parameter.data *= 12
    return drafters


def make_text(rows: list[tuple[list[int], list[bool]]], sample_ids=None) -> TargetText:
    """Pad rows of ids and of whether the target wrote each."""
    ids = [torch.tensor(row) for row, _ in rows]
    written = [torch.tensor(mask) for _, mask in rows]
    return TargetText(
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        torch.nn.utils.rnn.pad_sequence(written, batch_first=True),
        range(len(rows)) if sample_ids is None else sample_ids,
    )


def one_turn(ids: list[int], prompt_length: int) -> tuple[list[int], list[bool]]:
    return ids, [position >= prompt_length for position in range(len(ids))]


def random_rows(lengths, seed=0) -> list[tuple[list[int], list[bool]]]:
    """Return prompts with responses of the given lengths; under an unfiltered distribution every text is possible."""
    generator = torch.Generator().manual_seed(seed)
    prompts = make_prompts(len(lengths), seed=seed)
    responses = [torch.randint(7, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [one_turn(prompt + response, len(prompt)) for prompt, response in zip(prompts, responses, strict=True)]


def blocks_of(rollout, row: int) -> list[dict]:
    """Return a row's blocks as plain values, with the states of its branch slots where they were kept."""
    blocks = []
    for number in range(int(rollout.num_rounds[row])):
        accepted, is_censored = int(rollout.accepted[row, number]), bool(rollout.is_censored[row, number])
        drafts = rollout.drafts[row, number].tolist()
        hidden = None
        if rollout.branch_hidden is not None and not is_censored:
            hidden = rollout.branch_hidden[row, number, accepted + 1 :]
        blocks.append(
            {
                "anchor": int(rollout.anchors[row, number]),
                "accepted": accepted,
                "is_censored": is_censored,
                "is_counted": bool(rollout.is_counted[row, number]),
                "drafts": drafts if rollout.has_suffix else drafts[: accepted + (not is_censored)],
                "hidden": hidden,
            }
        )
    return blocks


def assert_same_blocks(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert {**one, "hidden": None} == {**other, "hidden": None}
        if one["hidden"] is not None:
            torch.testing.assert_close(one["hidden"], other["hidden"], rtol=1e-9, atol=1e-9)


# -- drawn blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_blocks_do_not_depend_on_segments_or_batch(family, target, drafters):
    rows = random_rows([30, 17, 2, 9])
    ids = [50, 8, 10**12, 9]
    whole = replay(target, drafters[family], make_text(rows, ids), DRAWN)
    blocks = [blocks_of(whole, row) for row in range(4)]
    seen = {(block["accepted"], block["is_censored"]) for row in blocks for block in row}
    assert {accepted for accepted, _ in seen} >= {0, 1, 2} and {ended for _, ended in seen} == {True, False}
    for segment_length, chunk_rows in [(1, 1000), (3, 1), (100, 7)]:
        settings = replace(DRAWN, segment_length=segment_length, chunk_bytes=16 * VOCAB * chunk_rows)
        again = replay(target, drafters[family], make_text(rows, ids), settings)
        for row in range(4):
            assert_same_blocks(blocks_of(again, row), blocks[row])
            alone = replay(target, drafters[family], make_text(rows[row : row + 1], ids[row : row + 1]), settings)
            assert_same_blocks(blocks_of(alone, 0), blocks[row])
    backwards = replay(target, drafters[family], make_text(rows[::-1], ids[::-1]), DRAWN)
    for row in range(4):
        assert_same_blocks(blocks_of(backwards, 3 - row), blocks[row])


def test_without_suffixes_the_decided_slots_stay_the_same(target, drafters):
    text = make_text(random_rows([30, 17]))
    kept = replay(target, drafters["eagle3"], text, DRAWN)
    bare = replay(target, drafters["eagle3"], text, replace(DRAWN, keep_branch_hidden=False))
    assert bare.branch_hidden is None and not bare.has_suffix
    for row in range(2):
        for one, other in zip(blocks_of(kept, row), blocks_of(bare, row), strict=True):
            assert one["drafts"][: len(other["drafts"])] == other["drafts"]
            assert (one["anchor"], one["accepted"]) == (other["anchor"], other["accepted"])


@pytest.mark.parametrize("changes", [{"seed": 8}, {"epoch": 2}, {"sample_ids": [51, 9]}], ids=lambda c: next(iter(c)))
def test_each_key_of_the_draws_changes_the_blocks(changes, target, drafters):
    rows, changes = random_rows([30, 30]), dict(changes)
    sample_ids = changes.pop("sample_ids", [50, 8])
    first = replay(target, drafters["dflash"], make_text(rows, [50, 8]), DRAWN)
    again = replay(target, drafters["dflash"], make_text(rows, [50, 8]), DRAWN)
    other = replay(target, drafters["dflash"], make_text(rows, sample_ids), replace(DRAWN, **changes))
    for row in range(2):
        assert_same_blocks(blocks_of(first, row), blocks_of(again, row))
        mine, theirs = ([b["drafts"] for b in blocks_of(rollout, row)] for rollout in (first, other))
        # The first block stands at the same anchor: under equal draws its slots would be the same.
        assert mine[0] != theirs[0] and mine != theirs


def test_argmax_drafts_do_not_read_the_keys(target, drafters):
    text = make_text(random_rows([20, 11]))
    first = replay(target, drafters["eagle3"], text, replace(DRAWN, draft_sampling="greedy"))
    other = replay(target, drafters["eagle3"], text, replace(DRAWN, draft_sampling="greedy", seed=1, epoch=5))
    assert torch.equal(first.drafts, other.drafts) and torch.equal(first.anchors, other.anchors)


@pytest.mark.parametrize("family", FAMILIES)
def test_redrafting_draws_the_chains_own_blocks(family, target, drafters):
    text = make_text(random_rows([25, 14], seed=3), [4, 90])
    chain = replay(target, drafters[family], text, DRAWN)
    again = draft_at(target, drafters[family], text, chain.anchors, DRAWN)
    for row in range(2):
        assert_same_blocks(blocks_of(again, row), blocks_of(chain, row))
    # Any other anchor, however near the end, draws the block of a response that begins there.
    ends = text.attention_mask.sum(dim=1) - 1
    anchors = ends[:, None] - torch.tensor([[7, 3, 2, 1]])
    late = draft_at(target, drafters[family], text, anchors, DRAWN)
    for column in range(4):
        mask = text.completion_mask & (torch.arange(text.input_ids.shape[1]) >= anchors[:, column, None])
        begun = replay(target, drafters[family], replace(text, completion_mask=mask), DRAWN)
        for row in range(2):
            assert_same_blocks(blocks_of(late, row)[column : column + 1], blocks_of(begun, row)[:1])


@pytest.mark.parametrize("keep_branch_hidden", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reading_handed_in_changes_nothing(family, keep_branch_hidden, target, drafters, monkeypatch):
    text, drafter = make_text(random_rows([18, 7])), drafters[family]
    settings = replace(DRAWN, keep_branch_hidden=keep_branch_hidden)
    own = replay(target, drafter, text, settings)
    reading = target.read_text(
        text.input_ids, text.attention_mask, drafter.config.target_layer_ids, keep_cache=keep_branch_hidden
    )
    monkeypatch.setattr(target, "read_text", None, raising=False)
    given = replay(target, drafter, text, settings, reading)
    for row in range(2):
        assert_same_blocks(blocks_of(given, row), blocks_of(own, row))


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [DRAWN, ARGMAX], ids=["drawn", "argmax"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_sees_each_decided_slot_once_and_no_other(family, settings, target, drafters, monkeypatch):
    drafter = drafters[family]
    text = make_text(random_rows([40, 23, 1]))
    num_rows, draft_logits = [], drafter.draft_logits

    def counted(hidden, project):
        num_rows.append(len(hidden))
        return draft_logits(hidden, project)

    monkeypatch.setattr(drafter, "draft_logits", counted, raising=False)
    one_walk = replace(settings, segment_length=100, keep_branch_hidden=False)
    rollout = replay(target, drafter, text, one_walk)
    num_blocks = int(rollout.num_rounds.sum())
    num_decided = sum(
        min(block["accepted"] + (not block["is_censored"]), K) for row in range(3) for block in blocks_of(rollout, row)
    )
    assert sum(num_rows) == num_decided < K * num_blocks
    assert max(num_rows) <= settings.chunk_bytes // (16 * VOCAB if settings is DRAWN else 4 * VOCAB)
    num_rows.clear()
    replay(target, drafter, text, replace(one_walk, keep_branch_hidden=True))
    assert sum(num_rows) == K * num_blocks


@pytest.mark.parametrize("slots,ahead,tokens", [(2, 1, 2**15), (3, 4, 2**15), (K, 2, 2**15), (2, 3, 2 * (K + 1))])
@pytest.mark.parametrize("settings", [DRAWN, ARGMAX, replace(DRAWN, keep_branch_hidden=False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_does_not_depend_on_how_many_slots_and_blocks_a_card_takes_at_once(
    family, settings, slots, ahead, tokens, target, drafters, monkeypatch
):
    text = make_text(random_rows([40, 23, 1, 9]))
    expected = replay(target, drafters[family], text, settings)
    taken, blocks_drafted, begin = set(), [], drafters[family].begin

    def some_slots(num_blocks, num_slots, device_type):
        taken.add(min(slots, num_slots))
        return min(slots, num_slots)

    def counted(context, anchors, *args):
        blocks_drafted.append(anchors.shape[1])
        return begin(context, anchors, *args)

    monkeypatch.setattr(walks, "slots_at_once", some_slots)
    monkeypatch.setattr(walks, "blocks_ahead", lambda num_walkers, device_type: ahead)
    monkeypatch.setattr(walks, "TOKENS_AT_ONCE", tokens)
    monkeypatch.setattr(drafters[family], "begin", counted, raising=False)
    actual = replay(target, drafters[family], text, settings)
    assert slots in taken and max(blocks_drafted) <= (tokens if family == "eagle3" else tokens // (K + 1))
    for row in range(4):
        assert_same_blocks(blocks_of(actual, row), blocks_of(expected, row))


def test_a_card_judges_more_slots_of_fewer_blocks_and_a_cpu_one_at_a_time():
    def first_groups(num_blocks):
        return [walks.slots_at_once(num_blocks, 15, device) for device in ("cpu", "cuda")]

    assert [first_groups(count) for count in (1, 43, 160, 400, 10**5)] == [[1, 15], [1, 14], [1, 4], [1, 1], [1, 1]]
    assert walks.slots_at_once(1, 2, "cuda") == 2
    ahead = [[walks.blocks_ahead(count, device) for device in ("cpu", "cuda")] for count in (1, 10, 33)]
    assert ahead == [[1, 32], [1, 3], [1, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_go_on_are_untouched_by_those_that_stop(family, target, drafters):
    drafter = drafters[family]
    ids = torch.randint(7, VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))
    anchors = torch.tensor([[1, 3, 5, 9], [8, 2, 6, 4]])
    slots = torch.arange(1, K + 1)
    drafts = ids.gather(1, (anchors[..., None] + slots).flatten(1)).view(2, 4, K)
    features = target.read_text(ids, torch.ones_like(ids), drafter.config.target_layer_ids).padded().features
    expected = run_blocks(drafter, features, ids, anchors, drafts, target.embed)
    # Columns of the first call that are left behind each slot, in any order; -1 is padding.
    left = [torch.tensor([[0, 1, 2, 3]] * 2), torch.tensor([[3, 0, 2], [1, 2, 0]]), torch.tensor([[2, 3], [0, -1]])]
    left.append(left[-1])
    with torch.no_grad():
        context = drafter.encode_text(features, ids, target.embed)
        state = drafter.begin(context, anchors, ids.gather(1, anchors), K, target.embed)
        for slot in range(1, K + 1):
            columns, is_block = left[slot - 1], left[slot - 1] >= 0
            wanted = expected[torch.arange(2)[:, None], columns.clamp(min=0), slot - 1]
            torch.testing.assert_close(state.hidden[is_block], wanted[is_block], rtol=1e-9, atol=1e-9)
            assert state.slot == slot
            if slot == K:
                break
            following = left[slot]
            places = (following[:, :, None] == columns[:, None]).to(torch.uint8).argmax(dim=2)
            tokens = drafts[:, :, slot - 1].gather(1, following.clamp(min=0))
            places = None if following is columns else torch.where(following >= 0, places, -1)
            state = drafter.advance(state, tokens, places)
    assert (expected[:, 1:] - expected[:, :-1]).abs().max() > 0.1


def walk_in_memory(family, target, length, monkeypatch):
    """Return the peak bytes of a walk along one row, without the attention, whose memory is tested where it is."""
    options = {"ttt_steps": 7} if family == "eagle3" else {"block_size": 16, "num_hidden_layers": 1}
    drafter = make_drafter(family, target, **options)
    module = importlib.import_module(type(drafter).begin.__module__)

    def no_attention(query, context_key, *_, **__):
        return query.transpose(1, 2).transpose(2, 3).flatten(3)

    monkeypatch.setattr(module, "anchored_attention", no_attention)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, VOCAB, (length,), generator=generator).tolist()
    text = make_text([one_turn(ids, 16)])
    features = torch.randn(length, drafter.fc.in_features, generator=generator)
    hidden = torch.randn(length, drafter.config.hidden_size, generator=generator, dtype=torch.float64)
    reading = TextReading(features, hidden, RowPacking.of(text.attention_mask))
    settings = replace(DRAWN, num_drafts=7, keep_branch_hidden=False, segment_length=16, chunk_bytes=2**16)
    return peak_bytes(lambda: replay(target, drafter, text, settings, reading))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_takes_memory_in_proportion_to_the_text(family, target, monkeypatch):
    lengths = (1024, 8192)
    peaks = [walk_in_memory(family, target, length, monkeypatch) for length in lengths]
    for (length, peak), (longer, higher) in itertools.pairwise(zip(lengths, peaks, strict=True)):
        assert math.log(higher / peak) / math.log(longer / length) <= 1.05, peaks


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafter_of_nan_is_refused_with_the_place(family, target):
    drafter = make_drafter(family, target)
    drafter.norm.weight.data.fill_(float("nan"))
    for keep_branch_hidden in (False, True):
        settings = replace(DRAWN, keep_branch_hidden=keep_branch_hidden)
        with pytest.raises(ValueError, match=r"No draft can be drawn for .* token \d+ of row 0: .* NaN"):
            replay(target, drafter, make_text(random_rows([30])), settings)


# -- chats and odd rows -----------------------------------------------------------------------------------------------


def make_chat(parts: list[tuple[str, list[int]]]) -> tuple[list[int], list[bool]]:
    ids = [token for _, part in parts for token in part]
    return ids, [who == "target" for who, part in parts for _ in part]


def runs_of(mask: list[bool]) -> list[tuple[int, int]]:
    """Return first and last index of every run the target wrote."""
    runs = []
    for position, is_written in enumerate(mask):
        if is_written and not mask[position - 1]:
            runs.append((position, position))
        elif is_written:
            runs[-1] = (runs[-1][0], position)
    return runs


@pytest.mark.parametrize("segment_length", [1, 4, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_response_of_a_chat_has_the_chain_it_has_alone(family, segment_length, target, drafters):
    words = itertools.cycle(torch.randperm(VOCAB - 7, generator=torch.Generator().manual_seed(2)).add(7).tolist())

    def say(who, length):
        return who, [next(words) for _ in range(length)]

    chats = [
        make_chat([say("user", 3), say("target", 9), say("user", 2), say("target", 12), say("user", 1)]),
        make_chat(
            [say("user", 1), say("target", 2), say("user", 4), say("target", 1), say("user", 1), say("target", 7)]
        ),
    ]
    settings = replace(DRAWN, segment_length=segment_length)
    rollout = replay(target, drafters[family], make_text(chats, [3, 4]), settings)
    censored = []
    for row, (ids, mask) in enumerate(chats):
        blocks, expected = blocks_of(rollout, row), []
        for start, end in runs_of(mask):
            own = [block for block in blocks if start <= block["anchor"] <= end]
            assert [block["anchor"] for block in own[:1]] == ([start] if end > start else [])
            assert all(block["anchor"] + block["accepted"] <= end for block in own)
            assert all(block["is_counted"] == (block["anchor"] + K <= end) for block in own)
            alone = make_text([(ids[: end + 1], [start <= position for position in range(end + 1)])], [3 + row])
            expected += blocks_of(replay(target, drafters[family], alone, settings), 0)
            censored += [block["is_censored"] for block in own]
        assert_same_blocks(blocks, expected)
    assert set(censored) == {True, False}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_of_a_greedy_chat_has_the_chain_of_live_decoding(family, target, drafters):
    ids, mask = [9, 10, 11], [False] * 3
    for length, question in [(9, [12, 13]), (6, [14]), (11, [15])]:
        ids = greedy_text(target, ids, length) + question
        mask += [True] * length + [False] * len(question)
    rollout = replay(target, drafters[family], make_text([(ids, mask)]), ARGMAX)
    expected = []
    for start, end in runs_of(mask):
        options = Options(K, keep_branch_hidden=True, max_completion_length=end + 1 - start)
        alone = decode(target, drafters[family], [ids[:start]], options)
        assert alone.responses()[0] == ids[start : end + 1]
        expected += blocks_of(alone, 0)
    assert_same_blocks(blocks_of(rollout, 0), expected)


@pytest.mark.parametrize("settings", [DRAWN, ARGMAX], ids=["drawn", "argmax"])
def test_rows_without_room_for_a_block_have_none(settings, target, drafters):
    rows = [*random_rows([15, 1, 1]), ([9, 8, 7], [False] * 3), *random_rows([6], seed=5)]
    rollout = replay(target, drafters["dflash"], make_text(rows), settings)
    assert [int(n) == 0 for n in rollout.num_rounds] == [False, True, True, True, False]
    assert rollout.num_refused == 0 and rollout.responses()[3] == []
    for row in (0, 4):
        alone = replay(target, drafters["dflash"], make_text([rows[row]], [row]), settings)
        assert_same_blocks(blocks_of(rollout, row), blocks_of(alone, 0))
    is_padding = ~rollout.is_block
    for tensor in (rollout.drafts, rollout.accepted, rollout.is_censored, rollout.is_counted, rollout.branch_hidden):
        assert not tensor[is_padding].any()
    none = replay(target, drafters["dflash"], make_text(rows[1:4]), settings)
    assert none.anchors.tolist() == [[-1]] * 3 and none.drafts.shape == (3, 1, K)


# -- impossible tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment_length", [1, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_with_an_impossible_token_is_refused_and_leaves_the_others_alone(
    family, segment_length, target, drafters
):
    narrow = SamplingSettings(1.0, 2, 1.0)
    settings = replace(DRAWN, sampling=narrow, segment_length=segment_length)
    prompts = make_prompts(3, seed=1)
    written = decode(
        target, drafters[family], prompts, Options(K, narrow, "sample", max_completion_length=16)
    ).responses()
    rows = [one_turn(prompt + response, len(prompt)) for prompt, response in zip(prompts, written, strict=True)]
    clean = replay(target, drafters[family], make_text(rows), settings)
    assert clean.num_refused == 0 and clean.is_block[:, 0].all()
    # The last token: every text before it is possible, and the walk gets there.
    ids = list(rows[1][0])
    distribution = token_probs(target.causal_lm(torch.tensor([ids[:-1]])).logits[0, -1], narrow)
    ids[-1] = int(distribution[7:].argmin()) + 7
    assert distribution[ids[-1]] == 0 and distribution.count_nonzero() == 2
    broken = replay(target, drafters[family], make_text([rows[0], (ids, rows[1][1]), rows[2]]), settings)
    assert broken.num_refused == 1 and broken.num_rounds.tolist()[1] == 0 and broken.branch_hidden.isfinite().all()
    assert not broken.is_counted[1].any() and not broken.is_censored[1].any() and not broken.drafts[1].any()
    for row in (0, 2):
        assert_same_blocks(blocks_of(broken, row), blocks_of(clean, row))
    only = replay(target, drafters[family], make_text([(ids, rows[1][1])], [1]), settings)
    assert only.num_refused == 1 and only.anchors.tolist() == [[-1]]


def test_what_the_user_wrote_may_be_impossible(target, drafters):
    narrow = SamplingSettings(1.0, 1, 1.0)
    ids, mask = greedy_text(target, [9, 10], 8), [False] * 2 + [True] * 8
    distribution = token_probs(target.causal_lm(torch.tensor([ids])).logits[0, -1], narrow)
    ids, mask = [*ids, int(distribution[7:].argmin()) + 7], [*mask, False]
    ids, mask = greedy_text(target, ids, 8), mask + [True] * 8
    rollout = replay(target, drafters["dflash"], make_text([(ids, mask)]), replace(DRAWN, sampling=narrow))
    assert rollout.num_refused == 0 and {2, 11} <= set(rollout.anchors[0].tolist())


# -- targets that cannot branch ---------------------------------------------------------------------------------------


_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
_STATE_SPACE = {
    "mamba_d_ssm": 16,
    "mamba_n_heads": 2,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 4,
    "mamba_chunk_size": 8,
}
UNBRANCHED = {
    "linear-attention": (lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**_SHAPE, **_LINEAR)), "recurrent state"),
    "state-space": (lambda: FalconH1ForCausalLM(FalconH1Config(**_SHAPE, **_STATE_SPACE)), "recurrent state"),
    "sliding-window": (lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=6)), "sliding window of 6"),
}


def walk_one_by_one(target, drafter, ids, start):
    """Draft greedily from the target's features of one unpadded text, a block at a time."""
    ids = torch.tensor([ids])
    features = target.read_text(ids, torch.ones_like(ids), drafter.config.target_layer_ids).padded().features
    with torch.no_grad():
        context = drafter.encode_text(features, ids, target.embed)
    settings = DraftingSettings(K, GREEDY, "greedy", False)
    anchor, end, chain = start, ids.shape[1] - 1, []
    while anchor < end:
        place = torch.tensor([[anchor]])
        drafts = draft_blocks(target, drafter, context.prefix(anchor), place, ids[:, [anchor]], settings, None).ids
        drafts = drafts[0, 0, : end - anchor]
        accepted = int(count_accepted(drafts, ids[0, anchor + 1 : anchor + 1 + len(drafts)][:K]))
        chain.append((anchor, accepted, drafts[: accepted + 1].tolist()))
        anchor += accepted + 1
    return chain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", UNBRANCHED)
def test_targets_that_cannot_branch_are_replayed_without_suffixes(kind, family):
    make, reason = UNBRANCHED[kind]
    torch.manual_seed(0)
    target = FrozenTarget(make().eval())
    drafter = make_drafter(family, target)
    prompts = make_prompts(2, seed=4)
    texts = [greedy_text(target, prompt, length) for prompt, length in zip(prompts, (14, 9), strict=True)]
    rows = [one_turn(text, len(prompt)) for text, prompt in zip(texts, prompts, strict=True)]
    bare = replace(ARGMAX, keep_branch_hidden=False)
    rollout = replay(target, drafter, make_text(rows), bare)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        chain = [(block["anchor"], block["accepted"], block["drafts"]) for block in blocks_of(rollout, row)]
        assert chain == walk_one_by_one(target, drafter, text, len(prompt))
    drawn = replay(target, drafter, make_text(rows), replace(DRAWN, keep_branch_hidden=False))
    assert drawn.num_rounds.min() > 1 and drawn.num_refused == 0
    with pytest.raises(ValueError, match=reason):
        replay(target, drafter, make_text(rows), ARGMAX)
