# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Readings from servers that extract hidden states: what is asked, what comes, and what the probe proves.

The server here is a thread that computes the states of a tiny target and writes them as vLLM does.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.extraction_server import Trouble, serving
from helpers.tiny import make_target
from trl_draft_opd import FrozenTarget
from trl_draft_opd.readings.probe import probe_texts, read_all_layers
from trl_draft_opd.readings.server import ReadingServers


LAYERS = (1, 4, 6)
TEXTS = [[7 + (3 * i + k) % 50 for i in range(5 + k)] for k in range(6)]


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    return make_target()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "states"
    made.mkdir()
    return made


def connect(target: FrozenTarget, urls: Any, folder: Path, layer_ids: Any = LAYERS, **settings: Any) -> ReadingServers:
    settings = {"timeout": 5.0, "max_retries": 2, "retry_wait": 0.01} | settings
    return ReadingServers.connect(target, urls, layer_ids, shared_folder=folder, **settings)


def in_process(target: FrozenTarget, text: list[int], layer_ids: Any) -> Any:
    ids = torch.tensor([text])
    return target.read_text(ids, torch.ones_like(ids), layer_ids)


def assert_right(target: FrozenTarget, readings: ReadingServers, texts: Any = TEXTS, layer_ids: Any = LAYERS) -> None:
    for text in texts:
        ours, theirs = in_process(target, text, layer_ids), readings.fetch(text, layer_ids)
        torch.testing.assert_close(theirs.features, ours.features, rtol=0, atol=0)
        torch.testing.assert_close(target.norm(theirs.last_hidden), ours.last_hidden, rtol=0, atol=0)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".alive"))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "moe", "gemma2"])
def test_served_states_are_those_of_the_target_and_no_file_is_left(kind: str, folder: Path):
    target = make_target(kind)
    with serving(target, LAYERS, folder) as server:
        readings = connect(target, server.url, folder)
        assert_right(target, readings)
        assert left_in(folder) == []
        readings.close()
    assert list(folder.iterdir()) == []


def test_a_part_of_the_layers_and_none_of_them_can_be_asked_for(target: FrozenTarget, folder: Path):
    with serving(target, LAYERS, folder) as server:
        readings = connect(target, server.url, folder)
        assert_right(target, readings, TEXTS[:2], layer_ids=(4,))
        assert readings.fetch(TEXTS[0], ()).features.shape == (len(TEXTS[0]), 0)
        with pytest.raises(ValueError, match=r"deliver the layers \[1, 4, 6\], and not \[5\]."):
            readings.fetch(TEXTS[0], (5,))
        readings.close()


def test_a_tapped_last_layer_is_the_input_of_the_norm(target: FrozenTarget, folder: Path):
    last = target.config.num_hidden_layers - 1
    with serving(target, (2, last), folder) as server:
        readings = connect(target, server.url, folder, (2, last))
        states = readings.fetch(TEXTS[0], (2, last))
        assert torch.equal(states.features[:, target.config.hidden_size :], states.last_hidden)
        assert_right(target, readings, TEXTS[:2], layer_ids=(2, last))
        readings.close()


def test_one_text_is_asked_for_at_a_time_by_its_ids_under_a_number_of_its_own(target: FrozenTarget, folder: Path):
    with serving(target, LAYERS, folder) as server:
        readings = connect(target, server.url + "/v1/", folder, api_key="canary")
        readings.fetch(TEXTS[0], LAYERS)
        readings.close()
    body = server.seen[-1]
    assert body["prompt"] == TEXTS[0]
    assert {name: body[name] for name in ("model", "max_tokens", "temperature", "n", "return_token_ids")} == {
        "model": "tiny",
        "max_tokens": 1,
        "temperature": 0.0,
        "n": 1,
        "return_token_ids": True,
    }
    assert "prompt_logprobs" not in body and "prompt_logprobs" in server.seen[0]
    assert len({seen["request_id"] for seen in server.seen}) == len(server.seen)
    assert all(headers["Authorization"] == "Bearer canary" for headers in server.headers_seen)


def test_requests_under_way_are_bounded_at_each_server(target: FrozenTarget, folder: Path):
    slow = Trouble(reply_after=0.05)
    with (
        serving(target, LAYERS, folder, trouble=lambda number, body: slow) as one,
        serving(target, LAYERS, folder, trouble=lambda number, body: slow) as other,
    ):
        readings = connect(target, [one.url, other.url], folder, concurrency=2)
        assert readings.concurrency == 4
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda text: readings.fetch(text, LAYERS), TEXTS * 4))
        readings.close()
    assert [len(states.features) for states in found] == [len(text) for text in TEXTS * 4]
    assert (one.most_at_once, other.most_at_once) == (2, 2)
    # Two probe texts each, and every text once.
    assert len(one.seen) + len(other.seen) == 4 + 24
    assert min(len(one.seen), len(other.seen)) > 6


def test_the_digest_is_of_the_target_and_its_layers_and_not_of_the_address(target: FrozenTarget, folder: Path):
    def digest(served: FrozenTarget, layer_ids: Any = LAYERS) -> str:
        with serving(served, layer_ids, folder) as server:
            readings = connect(served, server.url, folder, layer_ids)
            readings.close()
            return readings.digest

    assert digest(target) == digest(target)
    assert digest(target) != digest(target, (1, 4))
    assert digest(target) != digest(make_target(seed=1))


def test_bytes_are_those_of_the_states(target: FrozenTarget, folder: Path):
    with serving(target, LAYERS, folder) as server:
        readings = connect(target, server.url, folder)
        states = readings.fetch(TEXTS[0], LAYERS)
        held = sum(part.numel() * part.element_size() for part in states)
        assert readings.num_bytes(len(TEXTS[0]), 3) == held
        readings.close()


def test_a_text_that_the_server_cannot_read_is_refused_by_its_number_before_it_is_sent(target, folder: Path):
    with serving(target, LAYERS, folder, max_model_len=64) as server:
        readings = connect(target, server.url, folder)
        assert readings.most_tokens == 63
        readings.require_lengths([63, 1])
        readings.fetch([7] * 63, LAYERS)
        num_seen = len(server.seen)
        with pytest.raises(
            ValueError, match="1 of 3 texts .* text 1 has 70 tokens, .* read 1 to 63.*model-len 71` or"
        ):
            readings.require_lengths([5, 70, 63])
        with pytest.raises(ValueError, match="text 0 has 64 tokens"):
            readings.fetch([7] * 64, LAYERS)
        with pytest.raises(ValueError, match="text 0 has 0 tokens"):
            readings.fetch([], LAYERS)
        assert len(server.seen) == num_seen
        readings.close()


# ---- what the probe proves ------------------------------------------------------------------------------------------


def _changed(target: FrozenTarget, part: str) -> FrozenTarget:
    """Return a copy of a target with other weights in one part."""
    model = copy.deepcopy(target.causal_lm)
    weights = {
        "norm": model.base_model.norm.weight,
        "head": model.get_output_embeddings().weight,
        "body": model.base_model.layers[3].mlp.down_proj.weight,
    }[part]
    with torch.no_grad():
        weights.mul_(1 + 0.3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    return FrozenTarget(model, target.tokenizer)


CONTROLS = {
    "wrong norm": ({"part": "norm"}, "log-probabilities of a text differ"),
    "wrong head": ({"part": "head"}, "log-probabilities of a text differ"),
    "last state of another layer": ({"numbers": [2, 5, 7, 6]}, "log-probabilities of a text differ"),
    "layer off by one": ({"numbers": [2, 6, 7, 8]}, "state 1 is the output of layer 5 .* and not of layer 4"),
    "all layers off by one": ({"numbers": [1, 4, 6, 8]}, "state 0 is the output of layer 0 .* and not of layer 1"),
    "swapped layers": ({"order": [0, 2, 1, 3]}, "state 1 is the output of layer 6 .* and not of layer 4"),
    "other layers below": ({"part": "body"}, "state 1 (is the output|differs from the output)"),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_the_probe_catches_a_server_of_other_states(control: str, folder: Path):
    target = make_target("llama")
    settings, reason = dict(CONTROLS[control][0]), CONTROLS[control][1]
    served = _changed(target, settings.pop("part")) if "part" in settings else target
    with serving(served, LAYERS, folder, **settings) as server:
        with pytest.raises(ValueError, match=f"(?s){reason}.*is started by:\nvllm serve TARGET .*2, 5, 7, 8"):
            connect(target, server.url, folder)
    assert list(folder.iterdir()) == []


# ---- without a body -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen3", "llama", "moe"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / request.param
    made = make_target(request.param)
    made.causal_lm.save_pretrained(path)
    assert made.tokenizer is not None
    made.tokenizer.save_pretrained(path)
    return path


def test_layers_read_from_the_disk_are_those_of_the_body(saved: Path):
    whole, bodiless = FrozenTarget.load(saved), FrozenTarget.load(saved, body=False)
    texts = probe_texts(whole, None)
    assert [len(text) for text in texts] == [48, 31]
    assert texts == probe_texts(bodiless, None)
    for ours, theirs in zip(read_all_layers(bodiless, texts), read_all_layers(whole, texts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not bodiless.has_body


def test_a_target_without_its_body_reads_the_same_and_its_probe_tells_layers_apart(saved: Path, folder: Path):
    whole, bodiless = FrozenTarget.load(saved), FrozenTarget.load(saved, body=False)
    with serving(whole, LAYERS, folder) as server:
        readings = connect(bodiless, server.url, folder)
        text = TEXTS[2]
        ours, theirs = in_process(whole, text, LAYERS), readings.fetch(text, LAYERS)
        assert torch.equal(theirs.features, ours.features)
        assert torch.equal(bodiless.norm(theirs.last_hidden), ours.last_hidden)
        readings.close()
    for settings, reason in (
        ({"numbers": [2, 6, 7, 8]}, "layer 5 .* and not of layer 4"),
        ({"order": [1, 0, 2, 3]}, "layer 4 .* and not of layer 1"),
    ):
        with serving(whole, LAYERS, folder, **settings) as server:
            with pytest.raises(ValueError, match=reason):
                connect(bodiless, server.url, folder)
            # Switched off, which the setting says.
            connect(bodiless, server.url, folder, check_layers=False).close()


def test_where_layers_cannot_be_run_one_at_a_time_a_warning_says_what_is_not_proven(folder: Path, saved: Path):
    whole, bodiless = FrozenTarget.load(saved), FrozenTarget.load(saved, body=False)
    bodiless.causal_lm.config.quantization_config = {"quant_method": "awq"}
    with serving(whole, LAYERS, folder) as server:
        with pytest.warns(UserWarning, match="Which layers the servers deliver is not proven.*last state are"):
            connect(bodiless, server.url, folder).close()
