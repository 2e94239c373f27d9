# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
`bench` against real vLLM servers on the CPU: with a drafter and without one they write the same, and tau is what the
engine's own rounds say.

Runs with `-m conformance --shared PATH`, in the environment that `make conformance` builds.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.real.serve import find_port
from helpers.vllm_process import FLAGS, SURROUNDINGS, require_vllm, serve
from trl_draft_opd import Eagle3DraftModel, FrozenTarget
from trl_draft_opd.cli import main
from trl_draft_opd.export import export_drafter, read_target


pytestmark = pytest.mark.conformance

LENGTH, NUM_PROMPTS, NUM_DRAFTS = 24, 4, 3


def test_two_vllm_servers_are_compared_and_their_texts_are_equal(shared_dir: Path, tmp_path: Path):
    require_vllm()
    folder, drafter = shared_dir / "targets" / "gsm8k-qwen3-7m", tmp_path / "drafter-eagle3"
    target = FrozenTarget.load(folder, dtype=torch.float32)
    torch.manual_seed(0)
    # Untrained: what is tested is the measuring.
    fresh = Eagle3DraftModel.from_target(target, ttt_steps=NUM_DRAFTS)
    export_drafter(fresh, drafter, to="flat", target=read_target(folder, target_id="local/gsm8k-qwen3-7m"))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--max-model-len", "512", "--served-model-name", "target", *FLAGS]
    speculative = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": NUM_DRAFTS}
    ports, env = [find_port(), find_port()], os.environ | SURROUNDINGS
    numbers = tmp_path / "speed.json"
    with (
        serve([*command, "--port", str(ports[0])], ports[0], tmp_path / "plain.log", env) as plain,
        serve(
            [*command, "--port", str(ports[1]), "--speculative-config", json.dumps(speculative)],
            ports[1],
            tmp_path / "drafter.log",
            env,
        ) as drafted,
    ):
        words = ["bench", "--base-url", drafted, "--baseline-url", plain, "--target", str(folder), "--ignore-eos"]
        words += ["--dataset", str(shared_dir / "data" / "gsm8k_test.jsonl"), "--num-prompts", str(NUM_PROMPTS)]
        words += ["--concurrency", "1", "2", "--repeats", "2", "--max-completion-length", str(LENGTH)]
        assert main([*words, "--json", str(numbers), "--figure", str(tmp_path / "speed.png")]) == 0
    content = json.loads(numbers.read_text())
    served, baseline = content["served"], content["baseline"]
    assert (served["engine"], baseline["engine"]) == ("vllm", "vllm")
    assert {run["num_foreign"] for run in served["runs"] + baseline["runs"]} == {0}
    assert all(level["num_equal"] == level["num_compared"] == NUM_PROMPTS for level in content["comparison"]["levels"])
    for run in served["runs"]:
        rounds, accepted = run["drafts"]["rounds"], run["drafts"]["accepted"]
        assert len(run["drafts"]["kept_at_slot"]) == NUM_DRAFTS and sum(run["drafts"]["kept_at_slot"]) == accepted
        # Behind its first token, a response has what its rounds kept and a bonus of each; the last may keep too many.
        written = NUM_PROMPTS * (LENGTH - 1)
        assert written <= rounds + accepted <= written + NUM_PROMPTS * NUM_DRAFTS
    assert {run["drafts"] and 1 for run in baseline["runs"]} == {None}
    assert [level["tau"] is None for level in baseline["levels"]] == [True, True]
