# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The line that starts a server of readings, as a shell and vLLM's parser take it apart."""

import json
import shlex
from typing import Any

import pytest

from trl_draft_opd.readings.launch import serve_line, served_states


def _taken_apart(line: str) -> tuple[list[str], dict[str, str]]:
    words = shlex.split(line)
    return words[:3], dict(zip(words[3::2], words[4::2], strict=True))


def _states(line: str) -> Any:
    config = json.loads(_taken_apart(line)[1]["--speculative-config"])
    return config["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]


def test_the_line_asks_for_ascending_states_once_each_and_for_the_last_one():
    line = serve_line("org/model", [17, 1, 32, 17], 36, shared_folder="/dev/shm/states", dtype="bfloat16")
    assert _states(line) == [2, 18, 33, 36]
    start, options = _taken_apart(line)
    assert start == ["vllm", "serve", "org/model"]
    assert (options["--host"], options["--port"], options["--dtype"]) == ("127.0.0.1", "8000", "bfloat16")
    assert json.loads(options["--speculative-config"])["method"] == "extract_hidden_states"
    assert json.loads(options["--speculative-config"])["num_speculative_tokens"] == 1
    transfer = json.loads(options["--kv-transfer-config"])
    assert transfer["kv_connector_extra_config"] == {"shared_storage_path": "/dev/shm/states"}
    assert (transfer["kv_connector"], transfer["kv_role"]) == ("ExampleHiddenStatesConnector", "kv_producer")


def test_a_tapped_last_layer_is_the_input_of_the_final_norm_and_asked_for_once():
    assert served_states([0, 3], 4) == [1, 4]
    assert served_states([], 4) == [4]


def test_names_with_spaces_and_quotes_survive_the_shell():
    line = serve_line("/a b/it's", [0], 2, shared_folder="/my 'states'")
    start, options = _taken_apart(line)
    assert start[2] == "/a b/it's"
    assert json.loads(options["--kv-transfer-config"])["kv_connector_extra_config"] == {
        "shared_storage_path": "/my 'states'"
    }


def test_only_what_is_asked_for_is_added():
    bare = serve_line("m", [0], 2, shared_folder="/s")
    assert not any(flag in bare for flag in ("max-model-len", "trust-remote"))
    line = serve_line("m", [0], 2, shared_folder="/s", max_model_len=4097, port=8001, trust_remote_code=True)
    assert "--port 8001" in line and "--max-model-len 4097 --trust-remote-code " in line


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_the_target_does_not_have_is_refused(layer: int):
    with pytest.raises(ValueError, match=rf"The target's layers are 0 to 3, and \[{layer}\] are not among them."):
        served_states([0, layer], 4)
