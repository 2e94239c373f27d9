# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The arms that search for a gain on a real model, in miniature: a drafter with a reduced vocabulary."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.lab.__main__ import diagnose
from benchmarks.lab.arms import make_trainer
from benchmarks.lab.plan import Pair, PromptSet, SftPlan, read_arms
from benchmarks.lab.workbench import Machine, Workbench
from helpers.tiny import VOCAB, make_causal_lm, make_drafter, make_tokenizer
from trl_draft_opd import build_draft_vocabulary


pytestmark = pytest.mark.lab

SEARCH_TIER = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Workbench:
    """Return a workbench of a tiny target and a few prompts."""
    folder = tmp_path_factory.mktemp("search")
    make_causal_lm().save_pretrained(folder / "targets" / "tiny")
    make_tokenizer().save_pretrained(folder / "targets" / "tiny")
    (folder / "data").mkdir()
    ids = torch.randint(7, VOCAB, (8, 5), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [json.dumps({"question": " ".join(f"w{i}" for i in row)}) for row in ids]
    (folder / "data" / "words.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = PromptSet(field="question", count=4, file="data/words.jsonl")
    pair = Pair(
        name="search",
        family="eagle3",
        target="targets/tiny",
        drafter={"ttt_steps": 3},
        max_completion_length=16,
        prompts_per_update=2,
        train=[words],
        dev=[PromptSet(field="question", count=2, start=-2, file="data/words.jsonl")],
        tests={"words": PromptSet(field="question", count=2, start=-4, file="data/words.jsonl")},
        sft=SftPlan({}, 1, 1, 1, 1),
        budgets={SEARCH_TIER: 1.0},
        seeds={SEARCH_TIER: 1},
        common={"learning_rate": 3e-4},
        opd={"rejected_scope": "suffix"},
        continued_sft={"num_anchors": 4},
    )
    return Workbench(pair, Machine(folder, Path(folder / "out"), "cpu", "float32", 10**7, 8, None, False))


def test_every_arm_in_search_of_the_gain_trains_a_drafter_with_a_reduced_vocabulary(bench, tmp_path):
    arms = read_arms(bench.pair, SEARCH_TIER)
    assert len(arms) > 12
    rows, vocabulary = bench.training_rows(), build_draft_vocabulary(torch.arange(VOCAB), VOCAB // 2)
    for arm in arms:
        drafter = make_drafter("eagle3", bench.target, draft_vocabulary=vocabulary)
        before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
        options = {"max_steps": 2, "save_strategy": "no", "warmup_steps": 0, "logging_steps": 1}
        trainer = make_trainer(bench, arm, drafter, rows, tmp_path / arm.name, 0, **options)
        trainer.train()
        assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row), arm.name
        assert any(not torch.equal(before[name], now) for name, now in trainer.model.state_dict().items()), arm.name


def test_the_diagnosis_of_drafters_is_printed_written_and_drawn(bench, tmp_path, capsys):
    for name in ("first", "second"):
        make_drafter("eagle3", bench.target).save_pretrained(tmp_path / name)
    args = argparse.Namespace(of=[tmp_path / "first", tmp_path / "second"], prompts=2, out=tmp_path)
    diagnose(bench, args)
    printed = capsys.readouterr().out
    assert "## first" in printed and "## second" in printed and "| always right | 5.000" in printed
    found = json.loads((tmp_path / "diagnosis-search-words.json").read_text(encoding="utf-8"))
    assert found["first"] == found["second"] and found["first"]["mismatch"]
    assert (tmp_path / "diagnosis-search-words.png").exists()
