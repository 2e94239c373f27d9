# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of how a target reads texts: end to end and in chunks, against padded rows and one pass; in its own precision.
"""

import contextlib
import math
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.counters import PeakBytes
from helpers.pretend_accelerator import DEVICE, pretend_accelerator
from helpers.tiny import TARGETS, VOCAB, make_causal_lm, make_target
from trl_draft_opd import FrozenTarget
from trl_draft_opd.target import attention, branches, texts
from trl_draft_opd.target.branches import score_branches
from trl_draft_opd.target.cache import text_cache
from trl_draft_opd.target.placement import Lockstep


TAPS = [0, 3, 6]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
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
PACKED = [kind for kind in TARGETS if kind != "gemma2"]


def make_rows(lengths, seed=0):
    ids = torch.randint(4, VOCAB, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def make_exact(kind):
    """A target in float64, where its family computes in it."""
    return FrozenTarget(make_causal_lm(kind).to(torch.float64 if kind in ("qwen3", "llama") else torch.float32))


def assert_same(actual, expected):
    if actual.last_hidden.dtype == torch.float64:
        torch.testing.assert_close(actual.features, expected.features, rtol=0, atol=1e-8)
        torch.testing.assert_close(actual.last_hidden, expected.last_hidden, rtol=0, atol=1e-8)
        return
    torch.testing.assert_close(actual.features, expected.features, **FEATURE_TOLERANCE)
    torch.testing.assert_close(actual.last_hidden, expected.last_hidden, **TOLERANCE)


@contextlib.contextmanager
def counting_tokens(target):
    """Count the tokens of every pass of the backbone."""
    counts = []
    handle = target.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield counts
    finally:
        handle.remove()


def make_long_target(**changes):
    """A target of one layer and one head, which reads tens of thousands of tokens in seconds."""
    torch.manual_seed(0)
    shape = SMALL | {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 65536}
    return FrozenTarget(Qwen3ForCausalLM(Qwen3Config(**shape | changes)))


# -- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [100, 13, 5])
@pytest.mark.parametrize("kind", PACKED)
def test_texts_end_to_end_read_as_padded_rows_do(monkeypatch, kind, limit):
    target = make_exact(kind)
    assert target.reads_packed
    ids, mask = make_rows([9, 4, 7, 1, 12])
    monkeypatch.setattr(texts, "_CPU_TOKENS_AT_ONCE", limit)
    actual = target.read_text(ids, mask, TAPS)
    monkeypatch.setattr(target, "_padding_reason", "is told to")
    monkeypatch.setattr(texts, "_CPU_TOKENS_AT_ONCE", 100)
    assert_same(actual, target.read_text(ids, mask, TAPS))


@pytest.mark.parametrize("limit", [64, 16, 5])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_a_text_read_in_chunks_is_the_text_read_at_once(monkeypatch, kind, limit):
    target = make_exact(kind)
    ids, mask = make_rows([61, 3])
    whole = target.read_text(ids, mask, TAPS)
    monkeypatch.setattr(attention, "_TILE", 7)
    monkeypatch.setattr(texts, "_CPU_TOKENS_AT_ONCE", limit)
    with counting_tokens(target) as counts:
        assert_same(target.read_text(ids, mask, TAPS), whole)
    assert max(counts) <= limit and sum(counts) == 64


def test_short_and_long_texts_cost_their_own_tokens_and_no_more():
    target = make_long_target()
    ids, mask = make_rows([200, 32_000])
    with counting_tokens(target) as counts:
        reading = target.read_text(ids, mask, [0])
    assert sum(counts) == 32_200 == len(reading.features) and max(counts) <= texts.tokens_at_once(target.device)
    alone = target.read_text(ids[:1, :200], mask[:1, :200], [0])
    assert torch.equal(reading.last_hidden[:200], alone.last_hidden)


class ElementsOutsideAttention(TorchDispatchMode):
    """Counts the elements that operations write, all but attention's."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if not func.is_view and "attention" not in str(func):
            outputs = output if isinstance(output, (tuple, list)) else [output]
            self.total += sum(tensor.numel() for tensor in outputs if isinstance(tensor, torch.Tensor))
        return output


def test_memory_and_work_outside_attention_grow_with_the_length_of_a_row():
    target = make_long_target()
    peaks, elements, lengths = [], [], (2048, 8192, 32_768)
    for length in lengths:
        ids, mask = make_rows([length])
        with PeakBytes() as peak, ElementsOutsideAttention() as count:
            target.read_text(ids, mask, [0])
        peaks.append(peak.peak)
        elements.append(count.total)
    for counts, most in ((peaks, 1.05), (elements, 1.1)):
        for shorter, longer in ((0, 1), (1, 2)):
            growth = math.log(counts[longer] / counts[shorter]) / math.log(lengths[longer] / lengths[shorter])
            assert growth <= most


def test_chunks_of_a_text_are_written_where_they_stay_and_more_is_added_behind():
    config = make_causal_lm().config
    ours, plain = text_cache(config, 12), DynamicCache(config=config)
    places = []
    for length in (8, 4, 3):
        states = [torch.randn(1, 2, length, 8) for _ in range(2)]
        for kept, expected in zip(ours.update(*states, 0), plain.update(*states, 0), strict=True):
            assert torch.equal(kept, expected)
        places.append(ours.layers[0].keys.data_ptr())
    assert places[0] == places[1] and ours.get_seq_length() == 15
    ours.layers[0].crop(-3)
    assert ours.get_seq_length() == 12


def test_a_pass_over_texts_makes_no_mask_over_all_of_them(monkeypatch):
    # Every tensor of a pass is linear in its tokens; a mask would have 1,000 times 1,000 elements.
    target = make_long_target()
    ids, mask = make_rows([100] * 10)
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                largest.append(output.numel())
            return output

    with Largest():
        target.read_text(ids, mask, [0])
    assert max(largest) <= 1000 * VOCAB


def test_every_pass_of_a_sharded_target_is_announced_to_the_other_ranks(monkeypatch):
    # Ranks read texts of different lengths, so in different numbers of chunks.
    target = make_target()
    lockstep = Lockstep(target.backbone, torch.device("cpu"))
    needed = []
    monkeypatch.setattr(lockstep, "_is_needed", needed.append)
    monkeypatch.setattr(texts, "_CPU_TOKENS_AT_ONCE", 8)
    target.read_text(*make_rows([30, 3, 4]), TAPS)
    assert needed == [True] * target.num_forwards == [True] * 5


# -- which targets ----------------------------------------------------------------------------------------------------


UNPACKED = {
    "sinks": (
        lambda: GptOssForCausalLM(
            GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2)
        ),
        "attends by 'eager'",
    ),
    "a sliding window": (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)), "sliding window of 4"),
    "a window beside layer types": (
        lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4, layer_types=["full_attention"] * 2)),
        "its attention is given sliding_window",
    ),
    "soft caps": (TARGETS["gemma2"], "(attends by 'eager'|is given softcap)"),
    "rope that changes": (
        lambda: LlamaForCausalLM(
            LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
        ),
        r"rotary embeddings of type \['dynamic'\]",
    ),
}


@pytest.mark.parametrize("case", UNPACKED)
def test_a_target_that_texts_end_to_end_would_change_is_read_in_padded_rows(case):
    make, reason = UNPACKED[case]
    torch.manual_seed(0)
    model = make().eval()
    with pytest.warns(UserWarning, match=f"{reason}.*padded rows with a mask"):
        target = FrozenTarget(model)
    assert not target.reads_packed
    ids, mask = make_rows([9, 4, 7])
    reading = target.read_text(ids, mask, [0])
    own = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close(reading.last_hidden, own[-1][mask.bool()], **TOLERANCE)


@pytest.mark.parametrize(("kind", "has_remedy"), [("qwen3", True), ("sinks", False)])
def test_a_target_that_attends_on_its_own_is_told_how_to_load_it_if_there_is_a_way(kind, has_remedy):
    model = make_causal_lm(kind) if kind in TARGETS else UNPACKED[kind][0]().eval()
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="attends by 'eager'") as caught:
        FrozenTarget(model)
    message = next(str(warning.message) for warning in caught if "attends by" in str(warning.message))
    assert ("load it with `attn_implementation='sdpa'`" in message) == has_remedy
    if has_remedy:
        model.set_attn_implementation("sdpa")
        assert FrozenTarget(model).reads_packed


def test_attention_that_ignores_the_switch_is_found_on_loading(monkeypatch):
    # A model of its own code that names the interface, but attends over whatever lies before.
    model = make_causal_lm("llama")

    def everywhere(module, query, key, value, attention_mask, *, text_spans, scaling=None, **others):
        text_spans.num_uses += 1
        states = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True, scale=scaling
        )
        return states.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, everywhere)
    with pytest.warns(UserWarning, match="reads a text behind another one differently, by"):
        assert not FrozenTarget(model).reads_packed


def test_the_models_own_attention_is_back_after_a_pass_that_fails(monkeypatch):
    target = make_target()
    monkeypatch.setattr(target.layers[3], "forward", None)
    with pytest.raises(TypeError):
        target.read_text(*make_rows([4]), TAPS)
    assert target.config._attn_implementation == "sdpa"


# -- branches ---------------------------------------------------------------------------------------------------------


def make_branches(lengths, num_blocks, num_drafts=4):
    generator = torch.Generator().manual_seed(2)
    ids, mask = make_rows(lengths)
    anchors = torch.stack([torch.randint(0, length - 1, (num_blocks,), generator=generator) for length in lengths])
    drafts = torch.randint(4, VOCAB, (*anchors.shape, num_drafts), generator=generator)
    is_branch = torch.arange(1, num_drafts + 1) > torch.randint(1, 6, (*anchors.shape, 1), generator=generator)
    return ids, mask, anchors, drafts, is_branch


@pytest.mark.parametrize(("limit", "elements"), [(1000, 2**24), (40, 2**24), (1000, 1500), (5, 60)])
@pytest.mark.parametrize("kind", ["qwen3", "moe", "gemma2"])
def test_branches_scored_in_bounded_passes_are_those_scored_at_once(monkeypatch, kind, limit, elements):
    target = make_exact(kind)
    ids, mask, anchors, drafts, is_branch = make_branches([30, 5, 17], 9)
    expected = score_branches(target, target.read_text(ids, mask, (), keep_cache=True), anchors, drafts, is_branch)
    monkeypatch.setattr(texts, "_CPU_TOKENS_AT_ONCE", limit)
    monkeypatch.setattr(branches, "_MASK_ELEMENTS", elements)
    sizes, branch_mask = [], branches.branch_mask
    monkeypatch.setattr(
        branches, "branch_mask", lambda *args: (sizes.append(branch_mask(*args).numel()), branch_mask(*args))[1]
    )
    reading = target.read_text(ids, mask, (), keep_cache=True)
    with counting_tokens(target) as counts:
        actual = score_branches(target, reading, anchors, drafts, is_branch)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert sum(counts) == is_branch.sum() and max(counts) <= max(limit, 3)
    # A single branch is scored whatever it takes.
    assert max(sizes) <= max(elements, 3 * 33)
    assert [texts.cache.get_seq_length() for texts in reading.caches] == [
        sum(reading.packing.lengths[row] for row in texts.rows) for texts in reading.caches
    ]


# -- its own precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_bit_of_what_the_target_computes(dtype):
    target = FrozenTarget(make_causal_lm("qwen3").to(dtype))
    ids, mask = make_rows([9, 4])
    positions = torch.arange(9).expand(2, -1)

    def outputs():
        reading = target.read_text(ids, mask, TAPS)
        stepped = target.step(ids, mask, positions, None, TAPS)
        logits = target.project(reading.last_hidden)
        return [reading.features, reading.last_hidden, stepped.last_hidden, logits, target.embed(ids)]

    plain = outputs()
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs()
        # It is not off outside of the target.
        assert torch.is_autocast_enabled("cpu")
    assert all(tensor.dtype == dtype and torch.equal(tensor, other) for tensor, other in zip(cast, plain, strict=True))


def test_states_in_half_precision_train_through_a_float32_head():
    target = make_target()
    hidden = torch.randn(3, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = target.project(hidden)
    logits.sum().backward()
    assert logits.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16 and hidden.grad.any()


# -- on an accelerator ------------------------------------------------------------------------------------------------


def waits_of_a_reading(limit):
    """Return the waits of reading and scoring on a pretend device, and whether the states are the CPU's."""
    ids, mask, anchors, drafts, is_branch = make_branches([30, 5, 17], 9)
    waits, states = [], []
    limits = patch.multiple(texts, _TOKENS_AT_ONCE=limit, _CPU_TOKENS_AT_ONCE=limit)
    with limits, pretend_accelerator() as counts:
        for device in ("cpu", DEVICE):
            target = FrozenTarget(make_causal_lm().to(device))
            inputs = [tensor.to(device) for tensor in (ids, mask, anchors, drafts, is_branch)]
            counts.clear()
            reading = target.read_text(*inputs[:2], TAPS, keep_cache=True)
            waits.append((counts.totals(), counts.table("syncs") + counts.table("uploads")))
            counts.clear()
            branch_states = score_branches(target, reading, *inputs[2:])
            waits.append((counts.totals(), counts.table("syncs") + counts.table("uploads")))
            states.append([tensor.cpu() for tensor in (reading.features, reading.last_hidden, branch_states)])
    for other, own in zip(*states, strict=True):
        torch.testing.assert_close(own, other, **FEATURE_TOLERANCE)
    return waits[2:]


def test_an_accelerator_is_waited_for_twice_by_a_reading_and_twice_by_its_branches(call):
    # In one pass, and in several.
    for limit in (1000, 8):
        (reading, lines), (scoring, more_lines) = call(waits_of_a_reading, limit)
        # The lengths and whether all is finite; how many branch tokens there are in all, and in each block.
        assert reading["syncs"] <= 2 and reading["uploads"] == 0, lines
        assert scoring["syncs"] <= 2 and scoring["uploads"] == 0, more_lines
