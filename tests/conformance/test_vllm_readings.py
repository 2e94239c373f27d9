# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Readings from a real vLLM server on the CPU: they are the target's own, a server of another target is found out, one
that dies is waited for, and what is trained from them is what is trained in process.

Runs with `-m conformance --shared PATH`, in the environment that `make conformance` builds.
"""

import copy
import json
import re
import signal
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from helpers.vllm_process import find_port, require_vllm, serve, start, stop
from helpers.vllm_readings import MAX_MODEL_LEN, readings_command, readings_surroundings
from trl_draft_opd import (
    DFlashDraftModel,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    Eagle3DraftModel,
    FrozenTarget,
    SamplingSettings,
)
from trl_draft_opd.drafters.base import Drafter
from trl_draft_opd.readings.server import ReadingServers
from trl_draft_opd.responses import generate_responses


pytestmark = pytest.mark.conformance

# Those that EAGLE-3 and DFlash tap of eight layers: vLLM's 2 to 7, and 8, the last one.
LAYERS = (1, 2, 3, 4, 5, 6)
NUM_ROWS, MAX_COMPLETION_LENGTH, NUM_UPDATES = 16, 64, 8
# A third of the longest state, which is 25 long: float32, each layer in another order.
STATES_OFF, LOGITS_OFF = 1e-4, 1e-4
GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)


@pytest.fixture(scope="module")
def target_folder(shared_dir: Path) -> Path:
    return shared_dir / "targets" / "gsm8k-qwen3-7m"


@pytest.fixture(scope="module")
def target(target_folder: Path) -> FrozenTarget:
    return FrozenTarget.load(target_folder, dtype=torch.float32)


class Served(NamedTuple):
    """A server of readings, and the folder that it shares."""

    url: str
    states: Path

    def counted(self, name: str) -> float:
        """Return one of the server's counters."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            return float(re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", response.read().decode(), re.MULTILINE)[1])


@pytest.fixture(scope="module")
def served(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of the target's readings at `LAYERS`, started for this file."""
    require_vllm()
    place, port = tmp_path_factory.mktemp("served"), find_port()
    states = place / "states"
    states.mkdir()
    command = readings_command(target_folder, LAYERS, 8, states, port)
    with serve(command, port, place / "server.log", readings_surroundings()) as url:
        yield Served(url, states)


@pytest.fixture(scope="module")
def readings(served: Served, target: FrozenTarget) -> Iterator[ReadingServers]:
    servers = ReadingServers.connect(target, served.url, LAYERS, shared_folder=served.states)
    yield servers
    servers.close()


def make_text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 4096, (length,), generator=generator).tolist()


def assert_own(target: FrozenTarget, readings: ReadingServers, texts: list[list[int]]) -> None:
    """Assert that the served states of texts, asked for at once, are those that the target computes in process."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: readings.fetch(text, LAYERS), texts))
    for text, states in zip(texts, found, strict=True):
        ids = torch.tensor([text])
        own = target.read_text(ids, torch.ones_like(ids), LAYERS)
        torch.testing.assert_close(states.features, own.features, rtol=0, atol=STATES_OFF)
        logits = target.project(target.norm(states.last_hidden))
        torch.testing.assert_close(logits, target.project(own.last_hidden), rtol=0, atol=LOGITS_OFF)


def test_states_of_vllm_are_those_of_transformers_up_to_the_longest_text(readings, target):
    # Around the 128 tokens of a block of memory and the 256 that are read at a time.
    lengths = (1, 2, 127, 128, 129, 255, 256, 257, 511, 700, MAX_MODEL_LEN - 1)
    for length in lengths:
        assert_own(target, readings, [make_text(length, seed=length)])
    with pytest.raises(ValueError, match=f"text 0 has {MAX_MODEL_LEN} tokens, and they read 1 to {MAX_MODEL_LEN - 1}"):
        readings.fetch(make_text(MAX_MODEL_LEN), LAYERS)


def test_states_of_prefixes_that_vllm_kept_are_the_same(readings, served, target):
    text = make_text(400, seed=1)
    before = served.counted("prefix_cache_hits_total")
    for length in (400, 400, 300, 257):
        assert_own(target, readings, [text[:length]])
    assert_own(target, readings, [text[:300] + make_text(300, seed=2)])
    assert served.counted("prefix_cache_hits_total") - before >= 4 * 256


def test_eight_texts_at_once_are_read_whole_and_leave_no_file(readings, served, target):
    # More than there is memory for, so that some wait.
    assert_own(target, readings, [make_text(200 + 45 * i, seed=10 + i) for i in range(16)])
    assert list(served.states.glob("cmpl-*")) == []


def with_other_norm(target: FrozenTarget) -> None:
    # As a family that adds one to its weights would.
    target.causal_lm.model.norm.weight.data += 1


def with_other_head(target: FrozenTarget) -> None:
    head = target.causal_lm.lm_head
    head.weight = torch.nn.Parameter(head.weight.data.roll(1, dims=0), requires_grad=False)


def with_swapped_layers(target: FrozenTarget) -> None:
    layers = target.layers
    layers[3], layers[4] = layers[4], layers[3]


def with_one_other_layer(target: FrozenTarget) -> None:
    target.layers[2].mlp.down_proj.weight.data *= 0.5


OTHERS = {
    "norm": (with_other_norm, "target's norm and head on its last state"),
    "head": (with_other_head, "target's norm and head on its last state"),
    "swapped": (with_swapped_layers, "state 2 is the output of layer 4 .*not of layer 3"),
    "weights": (with_one_other_layer, "state 1"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_server_of_another_target_is_found_out(other, served, target):
    change, found = OTHERS[other]
    changed = FrozenTarget(copy.deepcopy(target.causal_lm), target.tokenizer)
    change(changed)
    with pytest.raises(ValueError, match=found):
        ReadingServers.connect(changed, served.url, LAYERS, shared_folder=served.states)
    assert list(served.states.glob("cmpl-*")) == []


@pytest.mark.parametrize("asked", [(0, 1, 2, 3, 4, 5), (0, 2, 3, 4, 5, 6)], ids=["all by one", "one by one"])
def test_layer_ids_off_by_one_are_found_out(asked, served, target):
    with pytest.raises(ValueError, match="state 0 is the output of layer 1 .*not of layer 0"):
        ReadingServers.connect(target, served.url, asked, shared_folder=served.states)


@pytest.mark.parametrize("asked", [LAYERS[1:], (0, *LAYERS)], ids=["fewer", "more"])
def test_another_number_of_layers_is_found_out(asked, served, target):
    with pytest.raises(ValueError, match="was started for (other|more) layers"):
        ReadingServers.connect(target, served.url, asked, shared_folder=served.states)


@pytest.fixture(scope="module")
def rows(shared_dir: Path, target: FrozenTarget) -> Dataset:
    """Real prompts with the target's own responses."""
    with (shared_dir / "data" / "gsm8k_train.jsonl").open(encoding="utf-8") as lines:
        questions = [json.loads(next(lines))["question"] for _ in range(NUM_ROWS)]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [target.tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]
    settings = {"sampling": GREEDY, "batch_size": NUM_ROWS, "seed": 0, "show_progress": False}
    responses = generate_responses(target, prompts, max_completion_length=MAX_COMPLETION_LENGTH, **settings)
    return Dataset.from_dict({"prompt_ids": prompts, "completion_ids": responses})


class Watch(TrainerCallback):
    """Keeps the loss of each update, and the gradient of the first."""

    def __init__(self, drafter: Drafter):
        self.drafter, self.losses, self.gradient = drafter, [], {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            named = self.drafter.named_parameters()
            self.gradient = {name: part.grad.clone() for name, part in named if part.grad is not None}

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def make_drafter(family: str, target: FrozenTarget) -> Drafter:
    torch.manual_seed(0)
    if family == "dflash":
        return DFlashDraftModel.from_target(target, mask_token_id=3, num_hidden_layers=2, block_size=6)
    return Eagle3DraftModel.from_target(target, ttt_steps=4)


def train(method: str, family: str, target: FrozenTarget, trained_on, rows: Dataset, place: Path, **readings) -> Watch:
    drafter = make_drafter(family, target)
    assert set(drafter.config.target_layer_ids) <= set(LAYERS)
    options = {
        "output_dir": str(place),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": NUM_UPDATES,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "target_dtype": "float32",
    }
    config, trainer = {"sft": (DraftSFTConfig, DraftSFTTrainer), "opd": (DraftOPDConfig, DraftOPDTrainer)}[method]
    if method == "opd":
        options["rejected_scope"] = "first"
    watch = Watch(drafter)
    trainer(drafter, trained_on, config(**options | readings), rows, callbacks=[watch]).train()
    assert len(watch.losses) == NUM_UPDATES
    return watch


@pytest.mark.parametrize("family", ["eagle3", "dflash"])
@pytest.mark.parametrize("method", ["sft", "opd"])
def test_training_from_vllm_without_the_body_is_training_in_process(
    method, family, served, target, target_folder, rows, tmp_path
):
    own = train(method, family, target, target, rows, tmp_path / "own")
    place = {"readings": served.url, "readings_folder": str(served.states)}
    read = train(method, family, target, str(target_folder), rows, tmp_path / "served", **place)
    assert own.losses[0] != own.losses[-1]
    torch.testing.assert_close(read.losses, own.losses, rtol=1e-5, atol=0)
    assert read.gradient.keys() == own.gradient.keys()
    for name, part in own.gradient.items():
        assert (read.gradient[name] - part).norm() <= 1e-4 * part.norm(), name
    assert list(served.states.glob("cmpl-*")) == []
