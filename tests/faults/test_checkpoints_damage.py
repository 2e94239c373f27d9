# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Faults 36 to 38: checkpoints that are damaged, foreign or in the way are passed over or refused by name, and never
touched.
"""

import errno
import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerCallback

from helpers.oracle import greedy_rows
from helpers.tiny import TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.runs import checkpoints
from trl_draft_opd.runs.checkpoints import (
    DamagedCheckpoint,
    check_output_dir,
    keep_newest,
    newest_valid,
    read_checkpoint,
    writing_checkpoint,
)
from trl_draft_opd.utils.hashing import hash_json


FILES = ["config.json", "model.safetensors", "state.json", "optimizer.safetensors", "trainer_state.json", "README.md"]


def write(output_dir, step, run_id="run", is_resumable=True):
    with writing_checkpoint(output_dir, step, is_resumable=is_resumable, run_id=run_id) as folder:
        for name in FILES:
            (folder / name).write_bytes(f"{name} of step {step}".encode() * 20)
    return output_dir / f"checkpoint-{step}"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit flip": (flip, r"the content of .*{} has changed"),
    "truncation": (
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        r"{} (has \d+ bytes|cannot be read|has changed)",
    ),
    "emptied": (lambda path: path.write_bytes(b""), r"{} (has 0 bytes|cannot be read)"),
    "deletion": (lambda path: path.unlink(), r"({} is missing|it has no {})"),
    "replaced by a link": (
        lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
        r"({} is a link|{} cannot be read)",
    ),
}


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_file_sends_the_run_back_to_the_checkpoint_before(tmp_path, caplog, damage, name):
    earlier, newest = write(tmp_path, 10), write(tmp_path, 20)
    before = contents(earlier)
    spoil, message = DAMAGE[damage]
    spoil(newest / name)
    with pytest.raises(DamagedCheckpoint, match=message.replace("{}", name)):
        read_checkpoint(newest)
    assert newest_valid(tmp_path).folder == earlier
    assert "Resuming from checkpoint-10. Passed over checkpoint-20" in caplog.text and name in caplog.text
    assert contents(earlier) == before


def test_a_manifest_cannot_name_files_outside_of_its_folder(tmp_path):
    folder = write(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    for name in ("../secret", str(tmp_path / "secret")):
        content = json.loads((folder / "manifest.json").read_text())
        content.pop("sha256")
        content["files"][name] = {"bytes": 1, "sha256": "0"}
        (folder / "manifest.json").write_text(json.dumps(content | {"sha256": hash_json(content)}))
        with pytest.raises(DamagedCheckpoint, match="lies outside of the folder"):
            read_checkpoint(folder)
        folder = write(tmp_path, 1)


def test_a_checkpoint_of_a_later_layout_is_refused_by_its_version(tmp_path):
    folder = write(tmp_path, 1)
    content = json.loads((folder / "manifest.json").read_text()) | {"version": 99}
    content.pop("sha256")
    (folder / "manifest.json").write_text(json.dumps(content | {"sha256": hash_json(content)}))
    with pytest.raises(DamagedCheckpoint, match="version 99, this release reads version 1"):
        read_checkpoint(folder)


def test_nothing_valid_is_an_error_that_lists_what_was_found(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found in .*there is no folder called checkpoint-N"):
        newest_valid(tmp_path)
    (write(tmp_path, 3) / "model.safetensors").unlink()
    write(tmp_path, 4, is_resumable=False)
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(
        ValueError,
        match=r"checkpoint-9: it has no manifest.json.*checkpoint-4: it holds the drafter alone.*checkpoint-3: model",
    ):
        newest_valid(tmp_path)


def test_the_limit_deletes_the_oldest_and_never_the_last_valid_one(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoint-4" / "state.json").unlink()
    foreign = tmp_path / "checkpoint-7"
    foreign.mkdir()
    (foreign / "pytorch_model.bin").write_bytes(b"somebody's work")
    keep_newest(tmp_path, 1, protected=None)
    # Neither the damaged nor the foreign one took the place of the only one that can be gone on from.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4", "checkpoint-7"]
    assert newest_valid(tmp_path).step == 3
    keep_newest(tmp_path, 1, protected=None)
    assert newest_valid(tmp_path).step == 3


def test_the_limit_keeps_the_best_beside_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    keep_newest(tmp_path, 2, protected=tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]
    keep_newest(tmp_path, 1, protected=tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]
    keep_newest(tmp_path, None, protected=None)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_link_called_checkpoint_is_neither_read_nor_deleted(tmp_path):
    real = write(tmp_path / "elsewhere", 5)
    out = tmp_path / "out"
    for step in (6, 7):
        write(out, step)
    (out / "checkpoint-5").symlink_to(real)
    keep_newest(out, 1, protected=None)
    assert real.is_dir() and contents(real) and newest_valid(out).step == 7


def test_a_new_run_does_not_write_among_anothers_checkpoints(tmp_path):
    folder = write(tmp_path, 20, run_id="theirs")
    before = contents(folder)
    for run_id in (None, "ours"):
        with pytest.raises(
            ValueError,
            match=r"holds checkpoint-20 of another run.*resume_from_checkpoint=True.*nothing there was touched",
        ):
            check_output_dir(tmp_path, run_id)
    check_output_dir(tmp_path, "theirs")
    assert contents(folder) == before


# ---- through the trainer --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def rows(target):
    return greedy_rows(target, 6, 8)


def make_trainer(output_dir, target, rows, kind="sft", family="dflash", **changes):
    options = {
        "output_dir": str(output_dir),
        **TINY_RUN,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 8,
    }
    trainer_class, config = (DraftSFTTrainer, DraftSFTConfig) if kind == "sft" else (DraftOPDTrainer, DraftOPDConfig)
    return trainer_class(make_drafter(family, target), target, config(**options | changes), rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, target, rows):
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, target, rows).train()
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path / "out"


class SeesRates(TrainerCallback):
    """Notes the learning rate of every update."""

    def __init__(self, rates):
        self.rates = rates

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def refuses(match):
    return pytest.raises(ValueError, match=match)


def test_starting_anew_in_the_folder_of_a_finished_run_is_refused(copy, target, rows):
    before = contents(copy)
    with refuses("holds checkpoint-1, checkpoint-2 of another run"):
        make_trainer(copy, target, rows).train()
    assert contents(copy) == before
    make_trainer(copy, target, rows, save_strategy="no").train()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "opd"}, r"the trainer's kind \('sft' there, 'opd' here\)"),
        ({"family": "eagle3"}, "the drafter's architecture or adapter"),
        (
            {"target": make_target(seed=5)},
            r"the target's weights, architecture or tokenizer \(weights: [0-9a-f]{8} there, [0-9a-f]{8} here\)",
        ),
        ({"rows": "fewer"}, "the training data .*`ignore_data_skip=True` continues"),
        ({"per_device_train_batch_size": 1}, r"rows per update .*\(2 there, 1 here\)"),
    ],
)
def test_another_runs_checkpoint_is_refused_by_what_differs(trained, tmp_path, target, rows, changes, match):
    changes = {"target": target, "rows": rows} | changes
    if isinstance(changes["rows"], str):
        changes["rows"] = rows.select(range(5))
    trainer = make_trainer(tmp_path / "other", **changes)
    with refuses(f"This run cannot resume from that checkpoint, because these differ: .*{match}"):
        trainer.train(resume_from_checkpoint=trained / "checkpoint-1")


def test_a_drafter_of_another_shape_is_named_by_what_differs_in_it(trained, tmp_path, target, rows):
    trainer = make_trainer(tmp_path / "other", target, rows)
    trainer.drafter.config.block_size = 9
    with refuses(r"these differ: the drafter's architecture or adapter \(block_size: 5 there, 9 here\)\. "):
        trainer.train(resume_from_checkpoint=trained / "checkpoint-1")


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_a_resume_that_is_refused_costs_no_responses(tmp_path, family):
    rows = Dataset.from_list([{"prompt_ids": [8 + row, 9]} for row in range(4)])
    options = {"family": family, "regenerate": True, "max_steps": 1, "responses": str(tmp_path / "responses")}
    make_trainer(tmp_path / "out", make_target(), rows, **options).train()
    options |= {"resume_from_checkpoint": "auto", "max_steps": 2}
    with refuses("these differ: the target's weights"):
        make_trainer(tmp_path / "out", make_target(seed=5), rows, **options | {"responses": str(tmp_path / "further")})
    assert not (tmp_path / "further").exists()
    trainer = make_trainer(tmp_path / "out", make_target(), rows, **options)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_first_update_of_a_run_made_longer_has_the_rate_of_the_longer_schedule(copy, target, rows):
    trainer = make_trainer(copy, target, rows, max_steps=4, lr_scheduler_type="linear", logging_steps=1)
    rates = []
    trainer.add_callback(SeesRates(rates))
    trainer.train(resume_from_checkpoint=True)
    # One step of warmup and three of decay, of which these are the last two.
    assert rates == pytest.approx([trainer.args.learning_rate * share for share in (2 / 3, 1 / 3)])


def test_other_batches_may_be_gone_on_with_from_the_start_of_the_data(trained, tmp_path, target, rows):
    trainer = make_trainer(tmp_path, target, rows, per_device_train_batch_size=1, ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=trained / "checkpoint-1")
    assert trainer.state.global_step == 2


def test_changed_settings_are_told_and_the_run_goes_on(trained, tmp_path, caplog, target, rows):
    trainer = make_trainer(tmp_path, target, rows, max_steps=3, learning_rate=1e-3)
    trainer.train(resume_from_checkpoint=trained / "checkpoint-2")
    assert "Resuming from checkpoint-2 under other settings" in caplog.text
    assert "learning_rate: 0.0003 there, 0.001 here" in caplog.text and "max_steps: 2 there, 3 here" in caplog.text


def test_a_path_that_is_no_checkpoint_is_refused_with_the_reason(copy, tmp_path, target, rows):
    trainer = make_trainer(tmp_path / "other", target, rows)
    with refuses("There is no checkpoint '.*nowhere' to resume from"):
        trainer.train(resume_from_checkpoint=tmp_path / "nowhere")
    flip(copy / "checkpoint-2" / "optimizer.safetensors")
    with refuses("is not a checkpoint to resume from: the content of optimizer.safetensors has changed"):
        trainer.train(resume_from_checkpoint=copy / "checkpoint-2")


def test_a_checkpoint_of_the_drafter_alone_says_how_to_use_it(tmp_path, target, rows):
    make_trainer(tmp_path / "a", target, rows, save_only_model=True).train()
    trainer = make_trainer(tmp_path / "b", target, rows)
    with refuses(
        "holds the drafter alone .*start a new run from its drafter: give the folder as `--drafter` .`model`"
    ):
        trainer.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")


def test_transformers_own_checkpoint_is_refused_and_not_executed(tmp_path, target, rows):
    folder = tmp_path / "out" / "checkpoint-1"
    folder.mkdir(parents=True)
    save_file(make_drafter("dflash", target).state_dict(), folder / "model.safetensors")
    torch.save({"state": {}}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    with refuses("No valid checkpoint found in .*checkpoint-1: it has no manifest.json"):
        make_trainer(tmp_path / "out", target, rows).train(resume_from_checkpoint=True)
    with refuses("is not a checkpoint to resume from: it has no manifest.json"):
        make_trainer(tmp_path / "new", target, rows).train(resume_from_checkpoint=folder)


def test_a_best_checkpoint_that_was_damaged_is_an_error_and_not_another_drafter(monkeypatch, tmp_path, target, rows):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "eval_loss",
        "load_best_model_at_end": True,
    }
    trainer = make_trainer(
        tmp_path, target, rows, **options | {"eval_strategy": "no", "load_best_model_at_end": False}
    )
    trainer.train()
    flip(tmp_path / "checkpoint-1" / "model.safetensors")
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    with refuses("The best checkpoint .* cannot be loaded: the content of model.safetensors has changed"):
        trainer._load_best_model()


def test_saving_on_each_machine_is_refused_with_the_fix(tmp_path):
    with refuses("`save_on_each_node=True` is not supported.*storage that all machines share"):
        DraftSFTConfig(str(tmp_path), use_cpu=True, bf16=False, save_on_each_node=True)


def test_no_file_of_a_run_needs_pickle_to_be_read(copy):
    assert {path.suffix for path in copy.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".md", ".png"}


def test_a_folder_that_cannot_be_written_to_is_said_before_training(monkeypatch, tmp_path, target, rows):
    trainer = make_trainer(tmp_path / "out", target, rows)

    def refuse(path, data):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoints, "write_file", refuse)
    with pytest.raises(
        PermissionError, match="No checkpoint can be written .Permission denied., so training was not started"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    assert list((tmp_path / "out").glob(".*")) == []


def test_what_a_stopped_save_or_start_left_is_cleared_and_nothing_else_is(tmp_path):
    left = [".making-checkpoint-3-0123456789ab", ".deleting-checkpoint-1-0123456789ab", ".making-probe-0123456789ab"]
    kept = [".making-thesis-0123456789ab", ".making-checkpoint-3-mine", ".git"]
    for name in left + kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".replaced-checkpoint-2-0123456789ab").mkdir()
    (tmp_path / ".replaced-checkpoint-2-0123456789ab" / "file").write_text("the only copy")
    check_output_dir(tmp_path / "new", None)
    with pytest.raises(ValueError, match="holds checkpoint-2 of another run"):
        check_output_dir(tmp_path, None)
    # What was being replaced is back in its place.
    assert (tmp_path / "checkpoint-2" / "file").read_text() == "the only copy"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "checkpoint-2", "new"])
