# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""A vLLM server on the CPU, as a process that ends with the block that needs it."""

import importlib.util
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


START_SECONDS = 400
# Small, exact, and without compilation: the weights are a few megabytes, and outputs are compared to the last token.
FLAGS = ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4"]
SURROUNDINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}


def require_vllm() -> None:
    """
    Fail where vLLM is missing: whoever asks for these tests asks for the engine, and a skip would pass for agreement.
    """
    if importlib.util.find_spec("vllm") is None:
        pytest.fail("vLLM is not installed here. Run `make conformance`, which prepares an environment with it.")


def find_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@contextmanager
def serve(
    command: Sequence[str], port: int, log: Path, env: Mapping[str, str], cwd: Path | None = None
) -> Iterator[str]:
    """Run a server while the block runs, and yield its address once it is up."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd, start_new_session=True
        )
        try:
            url, start = f"http://127.0.0.1:{port}", time.monotonic()
            while not _is_up(url):
                if server.poll() is not None or time.monotonic() - start > START_SECONDS:
                    pytest.fail(f"the server did not start:\n{log.read_text('utf-8', 'replace')[-4000:]}")
                time.sleep(1.0)
            yield url
        finally:
            # Its engine is a process of its own.
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
