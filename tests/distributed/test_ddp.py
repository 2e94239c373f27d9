# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Two processes compute what one computes, though their rows weigh differently: the streams' denominators span all ranks.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import RUNS, train_all


TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(tmp_path):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(Path(__file__).with_name("ddp_worker.py")), str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    alone = train_all(tmp_path, num_processes=1)
    assert ranks[0].keys() == ranks[1].keys() == alone.keys() and len(alone) > 4 * len(RUNS)
    for name, expected in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        tolerance = 1e-4 if name.endswith("losses") else 1e-6 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(ranks[0][name], expected, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
