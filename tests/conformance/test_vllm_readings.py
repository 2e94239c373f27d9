# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Readings from a real vLLM server on the CPU: they are the target's own, a server of another target is found out, one
that dies is waited for, and what is trained from them is what is trained in process.

Runs with `-m conformance --shared PATH`, in the environment that `make conformance` builds.
"""

import copy
import json
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback

from helpers.vllm_process import require_vllm
from helpers.vllm_readings import MAX_MODEL_LEN, ReadingsServer
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
from trl_draft_opd.readings.store import ReadingStore
from trl_draft_opd.readings.write import write_readings
from trl_draft_opd.responses import generate_responses
from trl_draft_opd.target.reading import TextStates


pytestmark = pytest.mark.conformance

# What EAGLE-3 taps of eight layers: vLLM's states 2, 4, 5, and 8, that of the last layer.
LAYERS = (1, 3, 4)
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


@pytest.fixture(scope="module")
def served(target_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReadingsServer]:
    """A server of the target's readings at `LAYERS`, started for this file."""
    require_vllm()
    with ReadingsServer(target_folder, LAYERS, 8, tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture(scope="module")
def readings(served: ReadingsServer, target: FrozenTarget) -> Iterator[ReadingServers]:
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


def with_other_norm(model: PreTrainedModel) -> None:
    # As a family that adds one to its weights would.
    model.model.norm.weight.data += 1


def with_other_head(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.roll(1, dims=0))


def with_swapped_layers(model: PreTrainedModel) -> None:
    third, fourth = (model.model.layers[layer].state_dict() for layer in (3, 4))
    third = {name: part.clone() for name, part in third.items()}
    model.model.layers[3].load_state_dict(fourth)
    model.model.layers[4].load_state_dict(third)


def with_one_other_layer(model: PreTrainedModel) -> None:
    model.model.layers[2].mlp.down_proj.weight.data *= 0.5


OTHERS = {
    "norm": (with_other_norm, "target's norm and head on its last state"),
    "head": (with_other_head, "target's norm and head on its last state"),
    "swapped": (with_swapped_layers, "state 1 is the output of layer 4 .*not of layer 3"),
    "weights": (with_one_other_layer, "state 1 differs from the output of the target's layer 3"),
}


@pytest.mark.parametrize("body", [True, False], ids=["with body", "without body"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_server_of_another_target_is_found_out(other, body, served, target, tmp_path):
    change, found = OTHERS[other]
    changed = copy.deepcopy(target.causal_lm)
    change(changed)
    changed.save_pretrained(tmp_path)
    mine = FrozenTarget.load(tmp_path, tokenizer=target.tokenizer, dtype=torch.float32, body=body)
    with pytest.raises(ValueError, match=found):
        ReadingServers.connect(mine, served.url, LAYERS, shared_folder=served.states)
    assert list(served.states.glob("cmpl-*")) == []


@pytest.mark.parametrize("asked", [(0, 2, 3), (0, 3, 4)], ids=["all", "one"])
def test_layer_ids_off_by_one_are_found_out(asked, served, target):
    with pytest.raises(ValueError, match="state 0 is the output of layer 1 .*not of layer 0"):
        ReadingServers.connect(target, served.url, asked, shared_folder=served.states)


@pytest.mark.parametrize("asked", [(1, 3), (1, 3, 4, 5)], ids=["fewer", "more"])
def test_another_number_of_layers_is_found_out(asked, served, target):
    with pytest.raises(ValueError, match="was started for (other|more) layers"):
        ReadingServers.connect(target, served.url, asked, shared_folder=served.states)


def assert_same_store(target: FrozenTarget, store: ReadingStore, texts: list[list[int]]) -> None:
    """Assert that a store holds what the target computes in process: its taps, and the input of its head."""
    assert [text for text in texts if text not in store] == []
    for text in texts:
        ids = torch.tensor([text])
        own = target.read_text(ids, torch.ones_like(ids), LAYERS)
        kept = store.fetch(text, LAYERS)
        torch.testing.assert_close(kept.features, own.features, rtol=0, atol=STATES_OFF)
        torch.testing.assert_close(kept.last_hidden, own.last_hidden, rtol=0, atol=STATES_OFF)
    assert list(store.verify()) == []


def test_a_server_that_is_killed_and_started_again_loses_no_text(served, target, tmp_path):
    texts = [make_text(500 + row, seed=100 + row) for row in range(48)]
    servers = ReadingServers.connect(target, served.url, LAYERS, shared_folder=served.states, retry_wait=0.5)
    num_fetched, is_under_way, fetch = 0, threading.Event(), servers.fetch

    def count(text: list[int], layer_ids: tuple[int, ...]) -> TextStates:
        nonlocal num_fetched
        found = fetch(text, layer_ids)
        num_fetched += 1
        if num_fetched == 8:
            is_under_way.set()
        return found

    servers.fetch = count
    options = {"layer_ids": LAYERS, "source": servers, "show_progress": False}
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write_readings, target, texts, tmp_path, **options)
        assert is_under_way.wait(120)
        served.kill()
        assert not written.done()
        served.start()
        store = written.result(timeout=300)
    servers.close()
    assert_same_store(target, store, texts)
    assert list(served.states.glob("cmpl-*")) == []


def quantize(source: Path, folder: Path) -> None:
    """Write a copy of a target whose layers' matrices are 8-bit integers, in the form of compressed-tensors."""
    shutil.copytree(source, folder)
    weights = {}
    for name, part in load_file(source / "model.safetensors").items():
        if re.search(r"layers\..*proj\.weight$", name):
            scale = part.float().abs().amax(dim=1, keepdim=True) / 127
            weights[f"{name}_scale"] = scale.bfloat16()
            part = (part.float() / scale).round().to(torch.int8)
        weights[name] = part
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    of_weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    of_inputs = of_weights | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": of_weights, "input_activations": of_inputs}
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_a_quantised_target_is_read_without_its_body(target_folder, tmp_path):
    quantize(target_folder, tmp_path / "quantised")
    whole, bodiless = (
        FrozenTarget.load(target_folder),
        FrozenTarget.load(tmp_path / "quantised", body=False),
    )
    with ReadingsServer(tmp_path / "quantised", LAYERS, 8, tmp_path, dtype="bfloat16") as server:
        with pytest.warns(UserWarning, match="Which layers the servers deliver is not proven"):
            servers = ReadingServers.connect(bodiless, server.url, LAYERS, shared_folder=server.states)
        text = make_text(300)
        states = servers.fetch(text, LAYERS)
        servers.close()
    assert states.features.dtype == torch.bfloat16
    ids = torch.tensor([text])
    own = whole.read_text(ids, torch.ones_like(ids), LAYERS).features.float()
    # Close to the target that it was rounded from, and another.
    off = (states.features.float() - own).norm() / own.norm()
    assert 1e-3 < off < 0.1


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
        shape = {"mask_token_id": 3, "num_hidden_layers": 2, "block_size": 6}
        return DFlashDraftModel.from_target(target, target_layer_ids=list(LAYERS), **shape)
    return Eagle3DraftModel.from_target(target, target_layer_ids=list(LAYERS), ttt_steps=4)


def train(method: str, family: str, target: FrozenTarget, trained_on, rows: Dataset, place: Path, **readings) -> Watch:
    drafter = make_drafter(family, target)
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
        # The run in process writes the target's responses, and the other one finds them.
        options |= {"rejected_scope": "first", "responses": str(place.parent / "responses")}
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
    place = {"readings": served.url, "shared_folder": str(served.states)}
    read = train(method, family, target, str(target_folder), rows, tmp_path / "served", **place)
    assert own.losses[0] != own.losses[-1]
    torch.testing.assert_close(read.losses, own.losses, rtol=1e-5, atol=0)
    assert read.gradient.keys() == own.gradient.keys()
    for name, part in own.gradient.items():
        assert (read.gradient[name] - part).norm() <= 1e-4 * part.norm(), name
    assert list(served.states.glob("cmpl-*")) == []
