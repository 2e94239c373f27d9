# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Two processes compute what one computes, under every backend, though ranks hold unequal rows: the streams' denominators
span all ranks.

One launch of two processes trains the cases under all backends; the same cases run here in one process. Every case
under every backend is for the slow tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.distributed.backends import BACKENDS, CONFIGS
from helpers.distributed.cases import (
    CASES,
    CHOSEN,
    MUON,
    POISONED,
    largest_difference,
    make_case_drafter,
    names_under,
    prepare,
    run_case,
)
from helpers.tiny import make_target
from trl_draft_opd.runs.checkpoints import newest_valid


TESTS = Path(__file__).parents[1]
ALONE = {"use_cpu": True}
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPEagle3DraftModel",
    "zero2": "DeepSpeedEngine",
    "zero3": "DeepSpeedEngine",
}
backends = pytest.mark.parametrize("backend", BACKENDS)


def each_under_its_backends(names):
    """Parametrize `backend` and `name`; what is not chosen is slow."""
    pairs = [(backend, name) for backend in BACKENDS for name in names if name in names_under(backend, is_whole=True)]
    slow = pytest.mark.slow
    chosen = [pytest.param(*pair, marks=() if pair[1] in CHOSEN[pair[0]] else slow) for pair in pairs]
    return pytest.mark.parametrize(("backend", "name"), chosen)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """What both ranks found under each backend that came to its end, and what one process finds."""
    is_whole = any(item.get_closest_marker("slow") for item in request.session.items if item.path == request.path)
    folder = tmp_path_factory.mktemp("backends")
    prepare(folder)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "multi_cpu.yaml")]
    command += ["--main_process_port", "0", "-m", "helpers.distributed.worker", str(folder)]
    command += ["--all"] if is_whole else []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launch:
        names = [name for name in CASES | MUON if any(name in names_under(each, is_whole) for each in BACKENDS)]
        alone = {name: run_case(name, folder, folder / "alone" / name, ALONE, 1) for name in names}
        try:
            output, _ = launch.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            launch.kill()
            output, _ = launch.communicate()
    found = {}
    for backend in BACKENDS:
        files = [folder / f"{backend}_{rank}.pt" for rank in range(2)]
        if all(file.exists() for file in files):
            found[backend] = [torch.load(file, weights_only=False) for file in files]
    return folder, found, alone, output


def _found(runs, backend):
    _, found, _, output = runs
    assert backend in found, output[-6000:]
    return found[backend]


@each_under_its_backends([name for name in CASES if name != "adamw"])
def test_two_processes_end_with_the_weights_and_losses_of_one(runs, backend, name):
    main, other = (results[name] for results in _found(runs, backend))
    alone = runs[2][name]
    assert largest_difference(main["weights"], alone["weights"]) < 1e-6
    assert other["weights"] == {}, "only the main process holds whole weights"
    assert main["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert main["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-6)
    for key in ("tau", "first_tau"):
        assert main.get(key) == other.get(key) == alone.get(key)


@backends
def test_adamw_under_two_processes_drifts_less_than_its_own_rounding(runs, backend):
    # A gradient near zero decides the sign of AdamW's first steps, so rounding shows as a share of the learning rate.
    main = _found(runs, backend)[0]["adamw"]
    alone = runs[2]["adamw"]
    assert main["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert largest_difference(main["weights"], alone["weights"]) < 1e-4


@each_under_its_backends(MUON)
def test_muon_under_two_processes_takes_the_steps_of_one(runs, backend, name):
    # It works in bfloat16 and gives every direction of a matrix the same size, those of rounding too.
    main, other = (results[name] for results in _found(runs, backend))
    alone = runs[2][name]
    assert main["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    start = make_case_drafter(MUON[name], make_target(), seed=1).state_dict()
    moved = [
        torch.cat([(found["weights"][key] - start[key]).flatten() for key in start if "proj" in key])
        for found in (main, alone)
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.99
    assert main["state"].tensors.keys() == alone["state"].tensors.keys()
    assert any(key.startswith("momentum_buffer/") for key in main["state"].tensors)


@backends
def test_the_launch_wraps_the_drafter_as_asked(runs, backend):
    assert all(results["adamw"]["wrapper"] == WRAPPERS[backend] for results in _found(runs, backend))


@backends
def test_ranks_wait_for_each_other_at_a_sharded_target_alone(runs, backend):
    main, other = _found(runs, backend)
    idle = {name: main[name]["num_idle"] + other[name]["num_idle"] for name in CASES if name in main}
    is_sharded = {name: case.is_sharded for name, case in CASES.items() if name in main}
    assert set(is_sharded.values()) == {True, False}
    assert {name: count > 0 for name, count in idle.items()} == is_sharded


@backends
def test_a_checkpoint_of_two_processes_is_complete_and_is_gone_on_from_in_one(runs, backend):
    folder, _, alone, _ = runs
    saved = _found(runs, backend)[0]["adamw"]
    trained = {name for name in saved["weights"] if "up_proj" not in name and name not in ("d2t", "t2d")}
    paths = {f"{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in trained}
    assert saved["state"].tensors.keys() == paths == alone["adamw"]["state"].tensors.keys()
    assert saved["state"].values == alone["adamw"]["state"].values
    assert largest_difference(saved["state"].tensors, alone["adamw"]["state"].tensors) < 1e-4
    checkpoint = folder / backend / "adamw" / "checkpoint-2"
    resumed = run_case("adamw", folder, folder / f"alone_{backend}", ALONE, 1, resume=checkpoint)
    # Two steps further in both worlds, from one checkpoint.
    again = _found(runs, backend)[0]["resumed"]
    assert again["state"].values == resumed["state"].values
    assert again["state"].tensors["step/norm.weight"] == resumed["state"].tensors["step/norm.weight"] == 4
    assert largest_difference(again["weights"], resumed["weights"]) < 1e-4
    assert largest_difference(again["weights"], saved["weights"]) > 1e-3, "training went on"


@each_under_its_backends(POISONED)
def test_what_is_not_finite_on_one_rank_is_skipped_on_all_and_leaves_no_trace(runs, backend, name):
    main, other = (results[name] for results in _found(runs, backend))
    assert main["num_skipped"] == other["num_skipped"] == 1
    start = make_case_drafter(POISONED[name], make_target(), seed=1).state_dict()
    assert main["weights"].keys() == start.keys()
    assert all(torch.equal(tensor, start[key]) for key, tensor in main["weights"].items())


@backends
def test_weights_that_leave_the_range_end_the_run_on_every_rank(runs, backend):
    ranks = [results["too_large"] for results in _found(runs, backend)]
    assert all("The update of step 0 left weights that are not finite" in rank["refused"] for rank in ranks)
    # The first rank alone has all weights.
    assert not all(tensor.isfinite().all() for tensor in ranks[0]["weights"].values())


@backends
def test_sigterm_to_one_rank_stops_all_at_one_step_with_one_checkpoint(runs, backend):
    ranks = [results["stopped"] for results in _found(runs, backend)]
    assert [(rank["exit_code"], rank["step"]) for rank in ranks] == [(143, 2), (143, 2)]
    found = newest_valid(runs[0] / backend / "stopped")
    assert found.step == 2
    saved = load_file(found.folder / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in ranks[0]["weights"].items())
