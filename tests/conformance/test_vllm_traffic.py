# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The circle with a real vLLM on the CPU: serve with a drafter, log by the middleware of docs/do/traffic.md, import,
train, verify, serve again. Its log is what `import` expects, and its rounds are those of the replay.

Runs with `-m conformance --shared PATH`, in the environment that `make conformance` builds.
"""

import json
import os
import re
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from helpers.vllm_process import FLAGS, SURROUNDINGS, find_port, require_vllm, serve
from trl_draft_opd import Eagle3DraftModel, FrozenTarget, ResponseStore
from trl_draft_opd.cli import main
from trl_draft_opd.export import export_drafter, read_target


pytestmark = pytest.mark.conformance

LENGTH, NUM_CHATS, NUM_DRAFTS = 64, 24, 3
PAGE = Path(__file__).resolve().parents[2] / "docs" / "do" / "traffic.md"
SMALL = "--use-cpu true --bf16 false --report-to none --save-strategy no --disable-tqdm true --learning-rate 1e-3"


def ask(url: str, question: str, **more: object) -> bytes:
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0.0, "max_tokens": LENGTH} | more
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read()


def serve_and_log(target: Path, drafter: Path, place: Path, questions: Sequence[str]) -> Path:
    """Return the log of a server with a drafter, every other reply of which was streamed."""
    place.mkdir()
    (place / "traffic_log.py").write_text(re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)[1], "utf-8")
    speculative = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": NUM_DRAFTS}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target), *FLAGS]
    command += ["--max-model-len", "512", "--speculative-config", json.dumps(speculative)]
    command += ["--middleware", "traffic_log.TrafficLog", "--per-request-spec-decode-metrics", "detailed"]
    port = find_port()
    path = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    env = os.environ | SURROUNDINGS | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": path}
    with serve([*command, "--port", str(port)], port, place / "server.log", env, cwd=place) as url:
        for number, question in enumerate(questions):
            streamed = {"stream": True, "stream_options": {"include_usage": True}} if number % 2 else {}
            ask(url, question, **streamed)
        ask(url, questions[0], temperature=0.7)
        ask(url, questions[0], repetition_penalty=1.2)
    return place / "logs"


def run(command: str, **flags: object) -> int:
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return main([command, *words])


def test_a_drafter_follows_its_traffic_from_a_served_log_to_the_next_server(shared_dir: Path, tmp_path: Path):
    require_vllm()
    folder = shared_dir / "targets" / "gsm8k-qwen3-7m"
    with (shared_dir / "data" / "gsm8k_train.jsonl").open(encoding="utf-8") as rows:
        questions = [json.loads(next(rows))["question"] for _ in range(NUM_CHATS)]
    torch.manual_seed(0)
    target = FrozenTarget.load(folder, dtype=torch.float32)
    facts = read_target(folder, target_id="local/gsm8k-qwen3-7m")
    before = tmp_path / "before-eagle3"
    export_drafter(Eagle3DraftModel.from_target(target, ttt_steps=NUM_DRAFTS), before, to="flat", target=facts)

    pair = {"target": folder, "target_dtype": "float32"}
    common = {**pair, "max_completion_length": LENGTH}
    log = serve_and_log(folder, before, tmp_path / "first", questions)
    imported, numbers = tmp_path / "traffic", tmp_path / "first.json"
    assert run("import", log=log, drafter=before, output=imported, json=numbers, **common) == 0
    first = json.loads(numbers.read_text())
    assert first["num_written"] == NUM_CHATS and list(first["others"].values()) == [1], first
    assert list(first["skipped"].values()) == [1] and "`repetition_penalty`" in next(iter(first["skipped"]))
    assert first["check"]["num_mismatches"] == 0
    assert first["served"]["num_responses"] >= NUM_CHATS - 2 and first["served"]["num_unclear"] == 0, first
    assert abs(first["served"]["gap"]) < 0.01
    assert len(ResponseStore.read_only(imported)) == NUM_CHATS

    rows = {"dataset": imported, "responses": imported, **common}
    small = dict(zip(*[iter(word.removeprefix("--") for word in SMALL.split())] * 2, strict=True))
    sft, opd = tmp_path / "sft", tmp_path / "opd"
    assert run("sft", drafter=before, output_dir=sft, max_steps=80, **rows, **small) == 0
    assert run("opd", drafter=sft, output_dir=opd, max_steps=4, **rows, **small) == 0
    after = tmp_path / "after-eagle3"
    assert run("export", drafter=opd, target=folder, target_id="local/gsm8k-qwen3-7m", to="flat", output=after) == 0
    held = {"dataset": imported, "num_prompts": 4, "max_completion_length": 24, "num_drafts": NUM_DRAFTS}
    assert run("verify", drafter=after, target=folder, checkpoint=opd, **held) == 0

    log = serve_and_log(folder, after, tmp_path / "second", questions)
    again, numbers = tmp_path / "traffic-2", tmp_path / "second.json"
    assert run("import", log=log, drafter=after, output=again, json=numbers, **common) == 0
    second = json.loads(numbers.read_text())
    assert second["served"]["num_other"] <= 1 and abs(second["served"]["gap"]) < 0.01, second
    # On the same prompts, which it was trained on: what is tested is that the circle closes.
    assert second["served"]["served_tau"] > first["served"]["served_tau"] + 0.1
    # The old drafter did not make these rounds.
    assert run("import", log=log, drafter=before, output=again, **common) == 1
