# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Live decoding and replay give text and blocks one joint distribution, whatever the temperature: exact enumeration,
nothing drawn.

Both engines turn uniform numbers into decisions by comparing them with probabilities. Here a uniform is an interval
that a comparison cuts in two: one half is followed at once, the other in a later row of the batch. When nothing is
left to follow, the widths of the intervals are the exact distribution of what the engine did. Nothing in the engines
is rebuilt: their own formulas make every probability. Knows no trainer.
"""

import functools
import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from helpers import rollouts
from helpers.rollouts import Options, decode
from trl_draft_opd import (
    DFlash2DraftModel,
    DFlashDraftModel,
    DSparkDraftModel,
    Eagle3DraftModel,
    FrozenTarget,
    SamplingSettings,
)
from trl_draft_opd.drafters.draft_vocabulary import build_draft_vocabulary
from trl_draft_opd.rollout import acceptance as verification
from trl_draft_opd.rollout import keyed_random, live, replay
from trl_draft_opd.rollout.acceptance import choose_tokens, sample_posterior, token_probs
from trl_draft_opd.rollout.replay import TargetText


PROMPT = (0, 2)
# Thresholds this close to an interval's end cut nothing off: they differ from it by round-off.
ROUND_OFF = 1e-14
WARM, FILTERED = SamplingSettings(0.7, 0, 1.0), SamplingSettings(0.7, 2, 1.0)


# -- uniforms that are intervals --------------------------------------------------------------------------------------


@dataclass
class Cell:
    """What is known of one uniform number: it lies in `[low, high)`."""

    tape: "Tape"
    low: float = 0.0
    high: float = 1.0

    def is_below(self, threshold: float) -> bool:
        """Decide `u < threshold`, by the tape where both is possible."""
        if threshold <= self.low + ROUND_OFF:
            return False
        if threshold >= self.high - ROUND_OFF:
            return True
        outcome = self.tape.next_outcome()
        self.low, self.high = (self.low, threshold) if outcome else (threshold, self.high)
        return outcome


@dataclass
class Tape:
    """Outcomes of one row's open decisions, in the order they come up, and every uniform they were made with."""

    path: list[bool]
    num_known: int = 0
    cells: dict[object, Cell] = field(default_factory=dict)
    siblings: list[list[bool]] = field(default_factory=list)

    def cell(self, key: object) -> Cell:
        """Return the uniform of a key, a new one for a new key."""
        return self.cells.setdefault(key, Cell(self))

    def new_cell(self, key: object) -> Cell:
        """Return the uniform of a key that nothing was drawn with yet."""
        assert key not in self.cells, "a live rollout draws every number once"
        return self.cell(key)

    def next_outcome(self) -> bool:
        if self.num_known == len(self.path):
            self.siblings.append([*self.path, False])
            self.path.append(True)
        self.num_known += 1
        return self.path[self.num_known - 1]

    @property
    def probability(self) -> float:
        return math.prod(cell.high - cell.low for cell in self.cells.values())


class Uniforms:
    """Stands for a tensor of uniforms `u`, as `factor * u ** power`, in all that the engines do with one."""

    def __init__(self, cells: np.ndarray, factor: torch.Tensor | None = None, power: float = 1.0):
        self.cells, self.power = cells, power
        self.factor = torch.ones(cells.shape, dtype=torch.float64) if factor is None else factor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cells.shape

    def double(self) -> "Uniforms":
        return self

    def __getitem__(self, index: object) -> "Uniforms":
        # A list of one place is a list to numpy too.
        places = index.numpy() if isinstance(index, torch.Tensor) else index
        return Uniforms(self.cells[places], self.factor[index], self.power)

    def flatten(self) -> "Uniforms":
        return Uniforms(self.cells.flatten(), self.factor.flatten(), self.power)

    def unsqueeze(self, dim: int) -> "Uniforms":
        assert dim == -1
        return self[..., None]

    def __mul__(self, factor: torch.Tensor) -> "Uniforms":
        return Uniforms(self.cells, self.factor * factor, self.power)

    def __pow__(self, power: float) -> "Uniforms":
        return Uniforms(self.cells, self.factor, self.power * power)

    def __ge__(self, zero: int) -> torch.Tensor:
        assert zero == 0
        return torch.ones(self.shape, dtype=torch.bool)

    def __lt__(self, bound: torch.Tensor) -> torch.Tensor:
        shape = torch.broadcast_shapes(self.shape, bound.shape)
        cells = np.broadcast_to(self.cells, shape).ravel()
        bounds, factors = (t.double().expand(shape).flatten().tolist() for t in (bound, self.factor))
        is_below = [self._is_below(*each) for each in zip(cells, bounds, factors, strict=True)]
        return torch.tensor(is_below, dtype=torch.bool).view(shape)

    def _is_below(self, cell: Cell, bound: float, factor: float) -> bool:
        if bound <= 0 or factor == 0:
            return bound > 0
        return cell.is_below((bound / factor) ** (1 / self.power))


def follow_all(run, keys: list) -> list[dict[object, float]]:
    """
    Return, for each key, the distribution of what `run` returns for it.

    `run(keys, tapes)` returns one outcome per row. All paths that are still open make the next batch.
    """
    distributions = [defaultdict(float) for _ in keys]
    open_rows = [(number, []) for number in range(len(keys))]
    while open_rows:
        tapes = [Tape(list(path)) for _, path in open_rows]
        outcomes = run([keys[number] for number, _ in open_rows], tapes)
        following = []
        for (number, _), tape, outcome in zip(open_rows, tapes, outcomes, strict=True):
            distributions[number][outcome] += tape.probability
            following += [(number, path) for path in tape.siblings]
        open_rows = following
    return distributions


# -- the two engines under it -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A pair, the distribution it decodes with, and what of its blocks is compared."""

    target: FrozenTarget
    drafter: nn.Module
    sampling: SamplingSettings
    draft_sampling: str = "sample"
    has_suffix: bool = True
    segment_length: int = 100
    num_drafts: int = 2
    max_completion_length: int = 3
    eos: int = 1
    min_confidence: float | None = None


def blocks_of(rollout, row: int, has_suffix: bool) -> tuple:
    """
    Return a row's text and blocks; drafts behind the first refused slot only where both engines have them. Of blocks
    of several lengths, the number of verified drafts comes last.
    """
    blocks = []
    for number in range(int(rollout.num_rounds[row])):
        accepted, is_censored = int(rollout.accepted[row, number]), bool(rollout.is_censored[row, number])
        drafts = rollout.drafts[row, number].tolist()
        drafts = tuple(drafts if has_suffix else drafts[: accepted + (not is_censored)])
        block = (int(rollout.anchors[row, number]), accepted, is_censored, drafts)
        blocks.append(block if rollout.verified is None else (*block, int(rollout.verified[row, number])))
    return tuple(rollout.responses()[row]), tuple(blocks)


@functools.cache
def live_distribution(name: str) -> dict[tuple, float]:
    """Return the joint distribution of text and blocks under live decoding."""
    case = CASES[name]()
    options = Options(
        case.num_drafts,
        case.sampling,
        case.draft_sampling,
        max_completion_length=case.max_completion_length,
        eos_token_ids=[case.eos],
        min_confidence=case.min_confidence,
    )

    def run(prompts, tapes):
        def uniforms(batch, anchors, slots, purpose):
            rows, is_single = [tapes[row] for row in batch.active], isinstance(slots, int)
            cells = np.empty((len(rows), 1 if is_single else len(slots)), dtype=object)
            for index, (tape, anchor) in enumerate(zip(rows, anchors.tolist(), strict=True)):
                for column, slot in enumerate([slots] if is_single else slots.tolist()):
                    cells[index, column] = tape.new_cell((anchor, slot, purpose))
            return Uniforms(cells[:, 0] if is_single else cells)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(live._LiveBatch, "_uniforms", uniforms)
            rollout = decode(case.target, case.drafter, prompts, options)
        return [blocks_of(rollout, row, case.has_suffix) for row in range(len(prompts))]

    return follow_all(run, [PROMPT])[0]


def replay_distributions(case: Case, texts: list[tuple[int, ...]]) -> list[dict[tuple, float]]:
    """Return, for each text, the distribution of its blocks under replay."""
    options = Options(
        case.num_drafts,
        case.sampling,
        case.draft_sampling,
        case.has_suffix and case.min_confidence is None,
        segment_length=case.segment_length,
        chunk_bytes=10_000,
        min_confidence=case.min_confidence,
    )

    def run(responses, tapes):
        def keyed_uniforms(seed, epoch, sample_ids, anchors, slot, purpose):
            cells = np.empty((len(anchors), len(slot)), dtype=object)
            keys = zip(sample_ids[:, 0].tolist(), anchors[:, 0].tolist(), strict=True)
            for index, (row, anchor) in enumerate(keys):
                cells[index] = [tapes[row].cell((anchor, each, purpose)) for each in slot.tolist()]
            return Uniforms(cells)

        rows = [torch.tensor([*PROMPT, *response]) for response in responses]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        index = torch.arange(ids.shape[1])
        is_text = index < torch.tensor([len(row) for row in rows])[:, None]
        text = TargetText(ids, is_text.long(), is_text & (index >= len(PROMPT)), range(len(rows)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(keyed_random, "keyed_uniforms", keyed_uniforms)
            rollout = rollouts.replay(case.target, case.drafter, text, options)
        assert rollout.num_refused == 0
        return [blocks_of(rollout, row, case.has_suffix) for row in range(len(rows))]

    return follow_all(run, texts)


def text_distribution(case: Case) -> dict[tuple[int, ...], float]:
    """Return the probability of every response, each token from a forward over its whole prefix."""
    distribution, open_texts = {}, {(): 1.0}
    for length in range(1, case.max_completion_length + 1):
        ids = torch.tensor([[*PROMPT, *text] for text in open_texts])
        logits = case.target.causal_lm(input_ids=ids, use_cache=False).logits[:, -1]
        longer = {
            (*text, token): mass * share
            for (text, mass), probs in zip(
                open_texts.items(), token_probs(logits, case.sampling).tolist(), strict=True
            )
            for token, share in enumerate(probs)
            if share > 0
        }
        distribution |= {
            text: mass for text, mass in longer.items() if text[-1] == case.eos or length == case.max_completion_length
        }
        open_texts = {text: mass for text, mass in longer.items() if text[-1] != case.eos}
    return distribution


def replayed_distribution(name: str) -> dict[tuple, float]:
    """
    Return the joint distribution of text and blocks as the text's own distribution times the distribution of its
    replay.
    """
    case = CASES[name]()
    texts = text_distribution(case)
    joint = defaultdict(float)
    for distribution, mass in zip(replay_distributions(case, list(texts)), texts.values(), strict=True):
        for outcome, share in distribution.items():
            joint[outcome] += mass * share
    return joint


def total_variation(first: dict[tuple, float], second: dict[tuple, float]) -> float:
    return sum(abs(first.get(each, 0) - second.get(each, 0)) for each in first.keys() | second.keys()) / 2


# -- pairs small enough -----------------------------------------------------------------------------------------------


def make_exact(model: nn.Module) -> nn.Module:
    """Put a model in float64, its norms included, which round to float32 whatever their input."""

    def exact_norm(norm: nn.Module):
        return lambda x: norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = exact_norm(module)
    return model.double().eval()


def make_dspark(target: FrozenTarget, **options) -> DSparkDraftModel:
    """Return a DSpark drafter whose slots follow the token before them."""
    drafter = DSparkDraftModel.from_target(target, **options, markov_rank=3)
    for factor in drafter.markov_head.parameters():
        nn.init.normal_(factor)
    return drafter


def make_dflash2(target: FrozenTarget, **options) -> DFlash2DraftModel:
    """Return a DFlash 2 drafter that never drafts one of the tokens, and whose choice follows the one before."""
    sizes = {"conv_group_size": 1, "selector_rank": 3, "selector_top_k": target.vocab_size - 1}
    drafter = DFlash2DraftModel.from_target(target, **options, **sizes)
    for parameter in drafter.candidate_selector.parameters():
        nn.init.normal_(parameter)
    return drafter


WHOLE_BLOCKS = {
    "dflash": DFlashDraftModel.from_target,
    "dflash2": make_dflash2,
    "dspark": functools.partial(make_dspark, sample_from_anchor=False),
    "dspark-anchor": functools.partial(make_dspark, sample_from_anchor=True),
}


def make_pair(
    family: str, vocab_size: int, seed: int = 3, draft_ids: tuple[int, ...] = ()
) -> tuple[FrozenTarget, nn.Module]:
    """
    Return a random pair whose distributions overlap but differ; `draft_ids` makes a drafter of a reduced vocabulary.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    target = FrozenTarget(Qwen3ForCausalLM(config).eval())
    counts = torch.tensor([int(token in draft_ids) for token in range(vocab_size)])
    vocabulary = build_draft_vocabulary(counts, len(draft_ids)) if draft_ids else None
    if family == "eagle3":
        drafter = Eagle3DraftModel.from_target(target, target_layer_ids=[0], draft_vocabulary=vocabulary, ttt_steps=3)
    else:
        sizes = {"mask_token_id": vocab_size - 1, "num_hidden_layers": 1, "block_size": 4, "target_layer_ids": [0]}
        drafter = WHOLE_BLOCKS[family](target, **sizes)
        if vocabulary is not None:
            drafter.reduce_vocabulary(vocabulary, target)
    make_exact(target.causal_lm)
    return target, make_exact(drafter)


# Seeds and EOS ids for which everything that the first test below asks for can happen.
CASES = {
    "dflash": lambda: Case(*make_pair("dflash", 3), WARM),
    "eagle3": lambda: Case(*make_pair("eagle3", 3), WARM),
    "dflash-filtered": lambda: Case(*make_pair("dflash", 4), FILTERED, segment_length=1, eos=2),
    "dspark": lambda: Case(*make_pair("dspark", 3), WARM),
    "dspark-anchor": lambda: Case(*make_pair("dspark-anchor", 3), WARM),
    "dflash2": lambda: Case(*make_pair("dflash2", 3), WARM, eos=0),
    "dflash2-filtered": lambda: Case(*make_pair("dflash2", 4), FILTERED, segment_length=1, eos=2),
    "dflash2-no-suffix": lambda: Case(*make_pair("dflash2", 3), WARM, eos=0, has_suffix=False),
    "dflash2-argmax": lambda: Case(*make_pair("dflash2", 4), WARM, draft_sampling="greedy", eos=2),
    "dspark-filtered": lambda: Case(*make_pair("dspark", 4, seed=23), FILTERED, segment_length=1, eos=2),
    "dspark-reduced": lambda: Case(*make_pair("dspark", 4, seed=35, draft_ids=(0, 1, 3)), FILTERED, eos=3),
    "dspark-no-suffix": lambda: Case(*make_pair("dspark", 3), WARM, has_suffix=False),
    "dspark-argmax": lambda: Case(*make_pair("dspark", 4), WARM, draft_sampling="greedy", eos=2),
    "dspark-longer": lambda: Case(*make_pair("dspark", 4, seed=3), FILTERED, max_completion_length=4, eos=3),
    "eagle3-filtered": lambda: Case(*make_pair("eagle3", 4, seed=17), FILTERED, segment_length=1, eos=0),
    "eagle3-reduced": lambda: Case(*make_pair("eagle3", 4, seed=14, draft_ids=(0, 1, 3)), FILTERED, eos=3),
    "dflash-no-suffix": lambda: Case(*make_pair("dflash", 3), WARM, has_suffix=False),
    "eagle3-no-suffix": lambda: Case(*make_pair("eagle3", 3), WARM, has_suffix=False),
    "dflash-argmax": lambda: Case(*make_pair("dflash", 4), WARM, draft_sampling="greedy"),
    "eagle3-argmax": lambda: Case(*make_pair("eagle3", 4, seed=5), WARM, draft_sampling="greedy", eos=3),
    "dflash-longer": lambda: Case(*make_pair("dflash", 4), FILTERED, max_completion_length=4, eos=2),
    "eagle3-longer": lambda: Case(
        *make_pair("eagle3", 4, seed=17), FILTERED, num_drafts=3, max_completion_length=4, eos=0
    ),
}


# -- claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_replay_of_sampled_text_has_the_joint_distribution_of_live_decoding(name):
    forward, replayed = live_distribution(name), replayed_distribution(name)
    assert abs(sum(forward.values()) - 1) <= 1e-12 and abs(sum(replayed.values()) - 1) <= 1e-12
    assert total_variation(forward, replayed) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_every_way_a_block_can_end_is_in_the_enumeration(name):
    eos, num_drafts = CASES[name]().eos, CASES[name]().num_drafts
    texts = [text for text, _ in live_distribution(name)]
    assert {text[-1] == eos for text in texts} == {True, False} and {len(text) for text in texts} >= {1, 2, 3}
    blocks = [(text, *block) for text, chain in live_distribution(name) for block in chain]
    assert {accepted for _, _, accepted, _, _ in blocks} == set(range(num_drafts + 1))
    assert {is_censored for _, _, _, is_censored, _ in blocks} == {True, False}
    ends_in_drafts = [
        text[-1] for text, anchor, accepted, _, _ in blocks if anchor + accepted == len(PROMPT + text) - 1
    ]
    # That drafter's argmax is the same token everywhere, and not EOS.
    assert (eos in ends_in_drafts) == (name != "dflash-argmax")


@pytest.mark.parametrize("name", CASES)
def test_live_decoding_writes_text_of_the_targets_own_distribution(name):
    written = defaultdict(float)
    for (text, _), mass in live_distribution(name).items():
        written[text] += mass
    assert total_variation(written, text_distribution(CASES[name]())) <= 1e-12


# -- the comparison finds a wrong distribution ------------------------------------------------------------------------


def test_a_bent_acceptance_ratio_is_found(monkeypatch):
    def bent(committed, draft_distribution, target_distribution, accept_uniforms, draft_uniforms, is_in_text):
        # u < ratio ** 0.9 in place of u < ratio
        bent_uniforms = accept_uniforms ** (1 / 0.9)
        return sample_posterior(
            committed, draft_distribution, target_distribution, bent_uniforms, draft_uniforms, is_in_text
        )

    monkeypatch.setattr(replay, "sample_posterior", bent)
    assert_found("eagle3")
    assert_found("dflash")


def test_a_refused_draft_from_the_plain_draft_distribution_is_found(monkeypatch):
    def plain(*args):
        with monkeypatch.context() as patch:
            patch.setattr(
                verification, "residual_probs", lambda draft_distribution, target_distribution: draft_distribution
            )
            return sample_posterior(*args)

    monkeypatch.setattr(replay, "sample_posterior", plain)
    assert_found("eagle3")
    assert_found("dflash")


def test_a_suffix_from_another_distribution_is_found(monkeypatch):
    def choose_flatly(walk, hidden, index, uniforms):
        return choose_tokens(torch.ones(len(index), walk.target.vocab_size), uniforms[index])

    monkeypatch.setattr(replay.ReplayWalk, "_choose", choose_flatly)
    assert_found("eagle3")
    assert_found("dflash")


def test_one_uniform_for_acceptance_and_for_the_refused_draft_is_found(monkeypatch):
    monkeypatch.setattr(replay, "REPLAY_DRAFT", replay.REPLAY_ACCEPT)
    assert_found("eagle3")
    assert_found("dflash")


def test_a_suffix_that_follows_the_text_and_not_the_refused_draft_is_found(monkeypatch):
    draft_suffixes = replay.ReplayWalk._draft_suffixes

    def follow_text(walk, places, drafts):
        slots = torch.arange(1, drafts.shape[-1] + 1)
        found = walk.ids[(places[:, None] + slots).clamp(max=len(walk.ids) - 1)]
        draft_suffixes(walk, places, found)
        drafts.copy_(torch.where(slots <= walk._num_known(places)[:, None], drafts, found))

    monkeypatch.setattr(replay.ReplayWalk, "_draft_suffixes", follow_text)
    assert_found("eagle3")
    assert_found("dspark")
    assert_found("dflash2")
    # A parallel drafter's slots do not read its drafts.
    assert total_variation(live_distribution("dflash"), replayed_distribution("dflash")) <= 1e-12


@pytest.mark.parametrize("name", ["dspark", "dspark-anchor"])
def test_a_slot_that_reads_the_token_before_the_one_it_should_read_is_found(monkeypatch, name):
    tokens_at = replay.ReplayWalk._tokens
    monkeypatch.setattr(replay.ReplayWalk, "_tokens", lambda walk, places: tokens_at(walk, places - 1))
    assert_found(name)


def assert_found(name: str) -> None:
    assert total_variation(live_distribution(name), replayed_distribution(name)) > 1e-3
