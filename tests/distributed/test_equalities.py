# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
How the rows of an optimiser step are cut into micro-batches changes nothing: rows read and trained together, or one by
one.
"""

import pytest

from helpers.distributed.cases import largest_difference, prepare, run_case


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder, and the runs of whole batches made so far."""
    folder = tmp_path_factory.mktemp("equalities")
    prepare(folder)
    return folder, {}


def _run(runs, name, rows_per_batch):
    folder, done = runs
    if (name, rows_per_batch) not in done:
        split = {"per_device_train_batch_size": rows_per_batch, "gradient_accumulation_steps": 4 // rows_per_batch}
        output = folder / f"{name}_{rows_per_batch}"
        done[name, rows_per_batch] = run_case(name, folder, output, {"use_cpu": True} | split, 1)
    return done[name, rows_per_batch]


@pytest.mark.parametrize("rows_per_batch", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["sft_dflash", "sft_eagle3", "replay_dflash", "replay_eagle3", "replay_dspark"])
def test_rows_trained_one_by_one_train_as_rows_trained_together(runs, name, rows_per_batch):
    together, apart = _run(runs, name, 4), _run(runs, name, rows_per_batch)
    assert apart["loss"] == pytest.approx(together["loss"], rel=1e-6)
    assert apart["grad_norm"] == pytest.approx(together["grad_norm"], rel=1e-6)
    assert largest_difference(apart["weights"], together["weights"]) < 1e-6


def test_another_way_of_training_ends_with_other_weights(runs):
    # What the tolerance above is held against.
    supervised, on_policy = _run(runs, "sft_dflash", 4), _run(runs, "replay_dflash", 4)
    assert largest_difference(on_policy["weights"], supervised["weights"]) > 1e-3
