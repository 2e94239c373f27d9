# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The circle with a real vLLM on the CPU: serve with a drafter, log by the middleware of docs/do/traffic.md, train by
examples/nightly.sh, serve again. Its log is what `import` expects, and its rounds are those of the replay.

Runs with `-m conformance --shared PATH`, in the environment that `make conformance` builds.
"""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.real.serve import find_port
from helpers.vllm_process import FLAGS, SURROUNDINGS, require_vllm, serve
from trl_draft_opd.cli import main


pytestmark = pytest.mark.conformance

LENGTH, NUM_DRAFTS = 64, 3
NUM_STEPS, NUM_NIGHTLY_STEPS = 60, 40
# Asked of the server: to train on, and to measure with.
NUM_TRAINED, NUM_HELD_OUT = 48, 16
ROOT = Path(__file__).resolve().parents[2]
PAGE, NIGHTLY = ROOT / "docs" / "do" / "traffic.md", ROOT / "examples" / "nightly.sh"
SMALL = "--use-cpu --bf16 false --report-to none --save-strategy no --disable-tqdm true --learning-rate 1e-3".split()
EXACT = ["--target-dtype", "float32", "--max-completion-length", str(LENGTH)]


def ask(url: str, question: str, **more: object) -> bytes:
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0.0, "max_tokens": LENGTH} | more
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read()


def serve_and_log(target: Path, drafter: Path, place: Path, questions: Sequence[str]) -> list[str]:
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
        # Neither of these is of the distribution of the others.
        ask(url, questions[0], temperature=0.7)
        ask(url, questions[0], repetition_penalty=1.2)
        for number, question in enumerate(questions):
            streamed = {"stream": True, "stream_options": {"include_usage": True}} if number % 2 else {}
            ask(url, question, **streamed)
    logs = sorted((place / "logs").rglob("*.jsonl"))
    return [line for log in logs for line in log.read_text("utf-8").splitlines(keepends=True)]


def run(*words: object) -> int:
    return main([str(word) for word in words])


def import_all(target: Path, drafter: Path, lines: Sequence[str], place: Path) -> tuple[int, dict]:
    """Return exit code and numbers of `import` of a whole log, every row of it looked at."""
    place.mkdir()
    (place / "log.jsonl").write_text("".join(lines), "utf-8")
    words = ["import", "--log", place / "log.jsonl", "--target", target, "--drafter", drafter, *EXACT]
    code = run(*words, "--output", place / "store", "--json", place / "n.json", "--check-rows", len(lines))
    return code, json.loads((place / "n.json").read_text())


def test_a_drafter_follows_its_traffic_from_a_served_log_to_the_next_server(shared_dir: Path, tmp_path: Path):
    require_vllm()
    target, rows = shared_dir / "targets" / "gsm8k-qwen3-7m", tmp_path / "rows.jsonl"
    with (shared_dir / "data" / "gsm8k_train.jsonl").open(encoding="utf-8") as lines:
        chosen = [next(lines) for _ in range(2 * NUM_TRAINED + NUM_HELD_OUT)]
    rows.write_text("".join(chosen[:NUM_TRAINED]), "utf-8")
    questions = [json.loads(line)["question"] for line in chosen[NUM_TRAINED:]]
    sft, served = tmp_path / "sft", tmp_path / "served-eagle3"
    words = ["--family", "eagle3", "--ttt-steps", NUM_DRAFTS, "--dataset", rows, "--regenerate", "--output-dir", sft]
    assert run("sft", "--target", target, *words, "--max-steps", NUM_STEPS, *EXACT, *SMALL) == 0
    assert run("export", "--drafter", sft, "--target", target, "--output", served) == 0

    log = serve_and_log(target, served, tmp_path / "first", questions)
    code, first = import_all(target, served, log, tmp_path / "first-numbers")
    assert code == 0 and first["num_written"] == len(questions) and list(first["others"].values()) == [1], first
    assert list(first["skipped"].values()) == [1] and "`repetition_penalty`" in next(iter(first["skipped"]))
    # In float32 the two compute the same but for rounding.
    assert first["check"]["num_mismatches"] == 0 and first["served"]["num_unclear"] == 0, first
    assert abs(first["served"]["gap"]) < 0.01 and first["served"]["num_other"] <= 1, first

    logs, work, script = tmp_path / "logs", tmp_path / "work", tmp_path / "nightly.sh"
    logs.mkdir()
    for name, part in (("00.jsonl", log[:-NUM_HELD_OUT]), ("01.jsonl", log[-NUM_HELD_OUT:])):
        (logs / name).write_text("".join(part), "utf-8")
    settings = NIGHTLY.read_text("utf-8").replace("--max-completion-length 2048", " ".join(EXACT))
    script.write_text(settings.replace("--num-prompts 16", "--num-prompts 4"), "utf-8")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", script, target, served, logs, work, "", "--max-steps", NUM_NIGHTLY_STEPS, *SMALL]
    night = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
    assert night.returncode == 0 and "Nothing is pushed" in night.stdout, night.stdout[-3000:] + night.stderr[-3000:]
    assert json.loads((work / "train.json").read_text())["num_written"] == NUM_TRAINED
    # Seen: 1.617 to 1.693 over 16 prompts, +4.7 % [+0.8 %, +8.8 %].
    assert json.loads((work / "after.json").read_text())["gain_in_tau"]["gain"] > 0.01

    _, before = import_all(target, served, log[-NUM_HELD_OUT:], tmp_path / "held-out-numbers")
    log = serve_and_log(target, work / "export", tmp_path / "second", questions[-NUM_HELD_OUT:])
    code, second = import_all(target, work / "export", log, tmp_path / "second-numbers")
    assert code == 0 and abs(second["served"]["gap"]) < 0.01 and second["served"]["num_other"] <= 1, second
    assert second["served"]["served_tau"] > before["served"]["served_tau"]
    # The old drafter did not make these rounds.
    _, other = import_all(target, served, log, tmp_path / "other-numbers")
    assert other["served"]["num_other"] > NUM_HELD_OUT // 2, other
