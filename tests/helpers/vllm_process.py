# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""A vLLM server on the CPU, as a process that ends with the block that needs it."""

import importlib.util
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.real.serve import comes_up


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


def start(
    command: Sequence[str], port: int, log: Path, env: Mapping[str, str], cwd: Path | None = None
) -> subprocess.Popen:
    """Start a server and return its process once it is up; what it prints is added to `log`."""
    with log.open("ab") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd, start_new_session=True
        )
    try:
        if not comes_up(server, f"http://127.0.0.1:{port}", START_SECONDS):
            pytest.fail(f"the server did not start:\n{log.read_text('utf-8', 'replace')[-4000:]}")
    except BaseException:
        stop(server)
        raise
    return server


def stop(server: subprocess.Popen, sign: signal.Signals = signal.SIGTERM) -> None:
    """End a server and the processes of its engine."""
    if server.poll() is None:
        os.killpg(server.pid, sign)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def serve(
    command: Sequence[str], port: int, log: Path, env: Mapping[str, str], cwd: Path | None = None
) -> Iterator[str]:
    """Run a server while the block runs, and yield its address once it is up."""
    server = start(command, port, log, env, cwd)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(server)
