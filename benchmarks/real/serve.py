# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Served speed in short: vLLM on this machine with a drafter and without one, loaded in turns. vLLM may lie in another
environment, because it pins other versions than training does.
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_draft_opd import FrozenTarget, ServerSettings
from trl_draft_opd.export.record import prompts_digest
from trl_draft_opd.served_speed.comparison import Comparison, compare
from trl_draft_opd.served_speed.measure import measure_servers
from trl_draft_opd.served_speed.report import LoadSettings, SpeedReport


START_SECONDS = 600.0


def measure_served(
    python: str,
    target: FrozenTarget,
    drafter: dict[str, Any],
    prompts: list[list[int]],
    settings: LoadSettings,
    logs: Path,
) -> tuple[SpeedReport, SpeedReport, Comparison]:
    """
    Serve a target with a drafter and without, and measure both in turns.

    Args:
        python (`str`): Interpreter of an environment with vLLM.
        target ([`FrozenTarget`]): The target, loaded from a folder.
        drafter (`dict`): vLLM's `speculative_config`.
        prompts (`list[list[int]]`): What is asked, in every run.
        settings ([`LoadSettings`]): How.
        logs (`Path`): Folder for what the servers print.

    Raises:
        SystemExit: If a server does not come up.
    """
    folder = target.config.name_or_path
    with (
        serving(python, folder, drafter, logs / "drafter.log") as drafted,
        serving(python, folder, None, logs / "plain.log") as plain,
    ):
        served, baseline = measure_servers(
            [drafted, plain],
            prompts,
            settings,
            prompts_sha256=prompts_digest(prompts),
            eos_token_ids=target.eos_token_ids,
            keep=lambda reports: None,
        )
    return served, baseline, compare(served, baseline)


@contextmanager
def serving(python: str, target: str, drafter: dict[str, Any] | None, log: Path) -> Iterator[ServerSettings]:
    """Run a server while the block runs, and yield its address once it is up."""
    port = find_port()
    url = f"http://127.0.0.1:{port}"
    # By its module, because the command `vllm` looks for a distribution of that name; -P, so that the folder at hand
    # shadows nothing of it.
    command = ["env", "VLLM_CPU_KVCACHE_SPACE=1", "VLLM_NO_USAGE_STATS=1", python, "-P", "-m"]
    command += ["vllm.entrypoints.openai.api_server", "--model", target, "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024", "--max-num-seqs", "8"]
    command += [] if drafter is None else ["--speculative-config", json.dumps(drafter)]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        if not comes_up(server, url, START_SECONDS):
            raise SystemExit(f"vLLM did not come up; what it printed stands in {str(log)!r}.")
        yield ServerSettings(url, max_retries=0)
    finally:
        _end(server)


def find_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def comes_up(server: subprocess.Popen, url: str, seconds: float) -> bool:
    """Wait until a server is healthy; return false once it has ended or the time is over."""
    begun = time.monotonic()
    while not _is_up(url):
        if server.poll() is not None or time.monotonic() - begun > seconds:
            return False
        time.sleep(1.0)
    return True


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _end(server: subprocess.Popen) -> None:
    """End a server and the processes of its engine."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
            server.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
