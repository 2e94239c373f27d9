# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Losslessness on real text: a small real target and GSM8K prompts, for those who give `--shared PATH`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_rollout_replay import assert_same_blocks, text_of

from helpers import rollouts
from helpers.rollouts import GREEDY, Options
from trl_draft_opd import (
    AutoDrafter,
    DFlash2DraftModel,
    DFlashDraftModel,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    DSparkDraftModel,
    Eagle3DraftModel,
    FrozenTarget,
    evaluate_drafter,
    generate_responses,
    open_readings,
    write_readings,
)
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.rollout.types import Rollout


_BLOCKS = {"mask_token_id": 3, "num_hidden_layers": 2, "block_size": 8}
# The class, and settings of a fresh drafter of the small target. DSpark as published, and with DFlash's blocks.
FRESH: dict[str, tuple[Any, dict[str, Any]]] = {
    "eagle3": (Eagle3DraftModel, {"ttt_steps": 5}),
    "dflash": (DFlashDraftModel, _BLOCKS),
    "dspark": (DSparkDraftModel, _BLOCKS | {"block_size": 7, "markov_rank": 32}),
    "dspark-masks": (DSparkDraftModel, _BLOCKS | {"sample_from_anchor": False, "markov_rank": 32}),
    "dflash2": (DFlash2DraftModel, _BLOCKS | {"selector_rank": 32}),
}


@pytest.fixture(scope="module")
def target(shared_dir: Path) -> FrozenTarget:
    return FrozenTarget.load(shared_dir / "targets" / "gsm8k-qwen3-7m", dtype=torch.float32)


def read_prompts(shared_dir: Path, target: FrozenTarget, count: int) -> list[list[int]]:
    with (shared_dir / "data" / "gsm8k_test.jsonl").open(encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line in lines][:count]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    chats = [[{"role": "user", "content": question}] for question in questions]
    return [target.tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]


def fresh(family: str, target: FrozenTarget) -> Drafter:
    torch.manual_seed(0)
    family_class, settings = FRESH[family]
    return family_class.from_target(target, **settings)


def briefly_trained(family: str, target: FrozenTarget, folder: Path, rows: Dataset, **settings) -> Drafter:
    drafter = fresh(family, target)
    config = DraftSFTConfig(str(folder), report_to="none", save_strategy="no", disable_tqdm=True, **settings)
    DraftSFTTrainer(drafter, target, config, rows).train()
    return drafter


def options_for(target: FrozenTarget, drafter: Drafter, max_completion_length: int) -> Options:
    return Options(
        drafter.default_num_drafts, max_completion_length=max_completion_length, eos_token_ids=target.eos_token_ids
    )


def decode(
    target: FrozenTarget, drafter: Drafter, prompts: list, batch_size: int, max_completion_length: int
) -> list[Rollout]:
    options = options_for(target, drafter, max_completion_length)
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    return [rollouts.decode(target, drafter, batch, options) for batch in batches]


def own_texts(target: FrozenTarget, prompts: list, max_completion_length: int, batch_size: int) -> list[list[int]]:
    return generate_responses(
        target,
        prompts,
        max_completion_length=max_completion_length,
        sampling=GREEDY,
        batch_size=batch_size,
        seed=0,
        show_progress=False,
    )


@pytest.mark.parametrize(
    ("family", "num_steps"),
    [
        ("eagle3", 12),
        ("dspark", 30),
        pytest.param("dflash", 40, marks=pytest.mark.slow),
        pytest.param("dflash2", 30, marks=pytest.mark.slow),
    ],
)
def test_a_briefly_trained_drafter_keeps_the_text_of_real_prompts(family, num_steps, shared_dir, target, tmp_path):
    prompts = read_prompts(shared_dir, target, 4)
    texts = own_texts(target, prompts[:2], 48, 2)
    pairs = zip(prompts[:2], texts, strict=True)
    rows = Dataset.from_list([{"prompt_ids": prompt, "completion_ids": text} for prompt, text in pairs])
    # Two texts learnt by heart, every step reads both of them; two others are new to the drafter.
    settings = {"per_device_train_batch_size": 2, "num_anchors": 16, "learning_rate": 3e-3, "max_steps": num_steps}
    drafter = briefly_trained(family, target, tmp_path, rows, lr_scheduler_type="constant", **settings)
    report = evaluate_drafter(target, drafter, prompts, max_completion_length=48, batch_size=4, show_progress=False)
    assert report.num_different == 0
    # Nothing is proved by a drafter whose drafts are never kept.
    assert report.tau > 1.2


@pytest.mark.parametrize("family", FRESH)
def test_a_published_drafter_starts_draft_opd_on_real_prompts(family, shared_dir, target, tmp_path):
    fresh(family, target).save_pretrained(tmp_path / "drafter")
    questions = [{"prompt": [{"role": "user", "content": f"What is {i} plus {i}?"}]} for i in range(4)]
    config = DraftOPDConfig(
        str(tmp_path / "opd"),
        max_steps=1,
        per_device_train_batch_size=4,
        max_completion_length=24,
        target_dtype="float32",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    path = shared_dir / "targets" / "gsm8k-qwen3-7m"
    trainer = DraftOPDTrainer(str(tmp_path / "drafter"), str(path), config, Dataset.from_list(questions))
    trainer.train()
    trainer.save_model()
    assert AutoDrafter.from_pretrained(tmp_path / "opd").config.num_target_layers == target.num_layers


@pytest.mark.slow
@pytest.mark.parametrize(("is_trained", "count"), [(False, 30), (True, 200)], ids=["random", "trained"])
@pytest.mark.parametrize("family", FRESH)
def test_text_and_replay_are_those_of_plain_decoding_on_many_real_prompts(
    family, is_trained, count, shared_dir, target, tmp_path, record_property
):
    prompts = read_prompts(shared_dir, target, count)
    expected = own_texts(target, prompts, 96, 20)
    drafter = fresh(family, target)
    if is_trained:
        pairs = zip(prompts[:100], expected[:100], strict=True)
        rows = Dataset.from_list([{"prompt_ids": p, "completion_ids": r} for p, r in pairs])
        settings = {"per_device_train_batch_size": 8, "num_anchors": 24, "learning_rate": 2e-3, "max_steps": 60}
        drafter = briefly_trained(family, target, tmp_path, rows, **settings)
    lives = {size: decode(target, drafter, prompts, size, 96) for size in (1, 8)}
    for rollouts_of_size in lives.values():
        assert [text for live in rollouts_of_size for text in live.responses()] == expected
    num_kept, num_blocks = 0, 0
    for live in lives[8]:
        options = options_for(target, drafter, 96)
        replayed = rollouts.replay(target, drafter, text_of(live), replace(options, segment_length=3))
        assert_same_blocks(live, replayed)
        num_kept, num_blocks = num_kept + int(live.accepted.sum()), num_blocks + int(live.is_block.sum())
    record_property("tokens per block", 1 + num_kept / num_blocks)
    # Nothing is proved by a drafter whose drafts are never kept.
    assert num_kept > (num_blocks / 2 if is_trained else 0)


@pytest.mark.slow
def test_tau_on_fifty_real_prompts_is_the_same_from_a_bfloat16_store(shared_dir, target, tmp_path):
    prompts = read_prompts(shared_dir, target, 50)
    responses = own_texts(target, prompts, 64, 10)
    rows = Dataset.from_dict({"prompt_ids": prompts[:8], "completion_ids": responses[:8]})
    drafter = briefly_trained("eagle3", target, tmp_path / "run", rows, max_steps=40, learning_rate=3e-3)
    whole = evaluate_drafter(target, drafter, prompts, responses=responses, max_completion_length=64)
    texts, layers = [[*p, *r] for p, r in zip(prompts, responses, strict=True)], drafter.config.target_layer_ids
    write_readings(target, texts, tmp_path / "store", layer_ids=layers, dtype="bfloat16", show_progress=False)
    bodiless = FrozenTarget.load(shared_dir / "targets" / "gsm8k-qwen3-7m", dtype=torch.float32, body=False)
    bodiless.source = open_readings(bodiless, str(tmp_path / "store"), layers)
    stored = evaluate_drafter(bodiless, drafter, prompts, responses=responses, max_completion_length=64)
    assert whole.tau > 1.3
    assert stored.tau_low <= whole.tau <= stored.tau_high and abs(stored.tau - whole.tau) <= 0.01
