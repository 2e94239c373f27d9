# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Trainers and the Hub, against a stand-in on this machine: one commit of what belongs there, every strategy, no token in any byte,
and a local folder that no failure touches.
"""

import json

import pytest
from datasets import Dataset
from fake_hub import serve_hub
from huggingface_hub import constants
from tiny import make_drafter, make_target

from trl_draft_opd import AutoDrafter, DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.export.hub import push_folder, validate_repo_id
from trl_draft_opd.export.record import read_record
from trl_draft_opd.export.rules import check_folder


CANARY = "hf_CanaryCanaryCanaryCanaryCanary0042"
TRAINERS = {"sft": (DraftSFTTrainer, DraftSFTConfig), "opd": (DraftOPDTrainer, DraftOPDConfig)}
EXPORT = {
    "README.md",
    "config.json",
    "custom_generate/generate.py",
    "model.safetensors",
    "speculative_config.json",
    "speculators/config.json",
    "speculators/model.safetensors",
    "training_curve.png",
    "training_record.json",
}
NATIVE = {"transformers/config.json", "transformers/model.safetensors"}


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, made the Hub of this process; nothing else can be reached."""
    with serve_hub(CANARY) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("trl_draft_opd.export.hub._FIRST_PAUSE", 0.0)
        yield hub


def rows(count=4):
    return Dataset.from_list(
        [
            {"prompt": f"w{8 + i} w9 w10", "completion": " ".join(f"w{10 + i + j}" for j in range(12))}
            for i in range(count)
        ]
    )


def make_trainer(tmp_path, method="sft", family="dflash", drafter=None, **settings):
    trainer_class, config_class = TRAINERS[method]
    target = make_target()
    settings = {
        "max_steps": 2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_completion_length": 16,
        "per_device_train_batch_size": 2,
        "hub_target_id": "org/target",
        "hub_model_id": f"someone/tiny-{family}",
        "hub_token": CANARY,
    } | settings
    args = config_class(str(tmp_path / "out"), **settings)
    drafter = drafter or make_drafter(family, target)
    return trainer_class(drafter, target, args, rows(), eval_dataset=rows(2))


@pytest.mark.parametrize("method, family", [("sft", "dflash"), ("opd", "eagle3")])
def test_a_push_is_one_commit_of_an_export_that_loads(tmp_path, hub, method, family):
    trainer = make_trainer(tmp_path, method, family)
    trainer.train()
    trainer.evaluate()
    url = trainer.push_to_hub(dataset_name="org/data", license="mit")
    (commit,) = hub.repositories[f"someone/tiny-{family}"].commits
    assert url.endswith("/commit/" + "1".rjust(40, "0")) and commit["summary"] == "End of training"
    assert set(commit["files"]) == EXPORT | (NATIVE if family == "dflash" else set())
    published = tmp_path / "published"
    for name, content in commit["files"].items():
        (published / name).parent.mkdir(parents=True, exist_ok=True)
        (published / name).write_bytes(content)
    assert check_folder(published, target_config=trainer.target.config) == []
    loaded = AutoDrafter.from_pretrained(published)
    assert all(
        (loaded.state_dict()[name] - tensor).abs().max() <= 2**-8 * tensor.abs().max()
        for name, tensor in trainer.model.state_dict().items()
    )
    card = commit["files"]["README.md"].decode()
    assert "base_model: org/target" in card and "- org/data" in card and "license: mit" in card
    record = read_record(published)
    (stage,) = record.stages
    assert (stage.method, stage.steps, stage.settings["learning_rate"]) == (method, 2, 3e-4)
    assert [point["step"] for point in stage.curve if "loss" in point] == [1, 2]
    (measured,) = record.measurements
    assert measured.num_prompts == 2 and measured.tau_low <= measured.tau <= measured.tau_high
    assert f"{measured.tau:.3f} [{measured.tau_low:.3f}, {measured.tau_high:.3f}]" in card


def test_sft_then_opd_are_both_in_the_record(tmp_path, hub):
    first = make_trainer(tmp_path / "a", "sft")
    first.train()
    first.save_model()
    second = make_trainer(
        tmp_path / "b", "opd", drafter=AutoDrafter.from_pretrained(tmp_path / "a" / "out"), max_steps=1
    )
    second.train()
    second.push_to_hub()
    record = json.loads(hub.repositories["someone/tiny-dflash"].commits[0]["files"]["training_record.json"])
    assert [(stage["method"], stage["steps"]) for stage in record["stages"]] == [("sft", 2), ("opd", 1)]


def test_private_revision_and_token_are_passed_on(tmp_path, hub):
    trainer = make_trainer(tmp_path, hub_private_repo=True, hub_revision="dev", hub_token=None)
    with pytest.raises(PermissionError, match=r"missing, expired.*hf auth login"):
        trainer.push_to_hub()
    trainer.push_to_hub(token=CANARY)
    repository = hub.repositories["someone/tiny-dflash"]
    assert repository.private is True
    assert repository.branches["main"] == {} and "config.json" in repository.branches["dev"]


@pytest.mark.parametrize("token", [None, "hf_expired"])
def test_a_missing_or_expired_token_is_explained_before_training(tmp_path, hub, token):
    with pytest.raises(PermissionError, match="missing, expired or may not write there.*hf auth login"):
        make_trainer(tmp_path, push_to_hub=True, hub_token=token)


@pytest.mark.parametrize("method", TRAINERS)
def test_a_canary_token_is_in_no_byte_that_is_written_or_sent(tmp_path, hub, monkeypatch, method):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    drafter = make_drafter("dflash", make_target())
    drafter.config.token = CANARY
    settings = {"hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard"}
    trainer = make_trainer(tmp_path, method, drafter=drafter, push_to_hub=True, **settings)
    trainer.train()
    trainer.push_to_hub()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name.split(".")[0] for path in written}
    assert {"events", "optimizer", "config", "README"} <= names
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    assert CANARY.encode() not in hub.received()
    assert any(CANARY in headers.get("authorization", "") for _, _, headers, _ in hub.requests)


def test_credentials_inside_of_settings_are_masked_in_logs(tmp_path):
    options = {"token": CANARY, "revision": "main", "headers": {"Authorization": CANARY}}
    args = DraftSFTConfig(str(tmp_path), target_model_init_kwargs=options, hub_token=CANARY, report_to="none")
    assert CANARY not in args.to_json_string()
    assert args.to_dict()["target_model_init_kwargs"]["revision"] == "main"
    assert args.target_model_init_kwargs["token"] == CANARY


def test_a_file_that_holds_the_token_stops_a_push(tmp_path, hub):
    trainer = make_trainer(tmp_path)
    folder = trainer.export()
    (folder / "README.md").write_text(f"my token is {CANARY}")
    with pytest.raises(ValueError, match="'README.md' holds the Hub token. Nothing was uploaded"):
        push_folder(folder, "someone/tiny-dflash", token=CANARY)
    assert hub.requests == []


def test_only_what_an_export_wrote_is_uploaded(tmp_path, hub):
    trainer = make_trainer(tmp_path, "opd", log_completions=True)
    trainer.train()
    # The target's answers lie in the output folder, and stay there.
    assert list((tmp_path / "out" / "_trajectories").glob("shard-*"))
    folder = trainer.export()
    (folder / "completions.parquet").write_text("what the target said")
    (folder / "training_args.bin").write_text("pickle")
    push_folder(folder, "someone/tiny-dflash", token=CANARY)
    (commit,) = hub.repositories["someone/tiny-dflash"].commits
    assert set(commit["files"]) == EXPORT | NATIVE


@pytest.mark.parametrize(
    "part, status", [("/preupload/", 500), ("/lfs/", "drop"), ("/commit/", 503), ("/repos/create", 429)]
)
def test_a_passing_failure_is_tried_again(tmp_path, hub, part, status):
    folder = make_trainer(tmp_path).export()
    hub.fail(part, status, times=1)
    push_folder(folder, "someone/tiny-dflash", token=CANARY)
    assert len(hub.repositories["someone/tiny-dflash"].commits) == 1


def test_a_server_that_dies_midway_leaves_a_complete_folder_and_a_second_push_succeeds(tmp_path, hub, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.train()
    # The library pauses between attempts of its own, too.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("/lfs/", "drop", times=10_000)
    with pytest.raises(ConnectionError, match="_publication' is complete. Try again with `trl-draft-opd push`"):
        trainer.push_to_hub()
    repository = hub.repositories["someone/tiny-dflash"]
    assert repository.commits == [] and repository.branches["main"] == {}
    folder = tmp_path / "out" / "_publication"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == EXPORT | NATIVE
    AutoDrafter.from_pretrained(tmp_path / "out")
    hub.failures.clear()
    push_folder(folder, "someone/tiny-dflash", token=CANARY)
    assert set(repository.branches["main"]) == EXPORT | NATIVE


def test_files_of_an_earlier_export_go_and_others_stay(tmp_path, hub):
    trainer = make_trainer(tmp_path)
    folder = trainer.export()
    push_folder(folder, "someone/tiny-dflash", token=CANARY)
    repository = hub.repositories["someone/tiny-dflash"]
    repository.branches["main"] |= {"speculators/old.safetensors": b"old", "LICENSE": b"mine"}
    push_folder(folder, "someone/tiny-dflash", token=CANARY)
    assert repository.commits[1]["deleted"] == ["speculators/old.safetensors"]
    assert "LICENSE" in repository.branches["main"]


@pytest.mark.parametrize(
    "strategy, commits, folders",
    [
        ("end", 1, set()),
        ("every_save", 3, set()),
        ("checkpoint", 3, {"last-checkpoint"}),
        ("all_checkpoints", 3, {"checkpoint-1", "checkpoint-2"}),
    ],
)
def test_hub_strategies_push_when_and_what_they_say(tmp_path, hub, strategy, commits, folders):
    trainer = make_trainer(
        tmp_path,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.push_to_hub()
    repository = hub.repositories["someone/tiny-dflash"]
    assert len(repository.commits) == commits
    held = repository.branches["main"]
    assert {name.split("/")[0] for name in held} == {name.split("/")[0] for name in EXPORT | NATIVE} | folders
    assert not [name for name in held if name.endswith("training_args.bin") or "trajector" in name]
    for folder in folders:
        assert {f"{folder}/optimizer.pt", f"{folder}/trainer_state.json", f"{folder}/model.safetensors"} <= set(held)


def test_a_failing_push_between_saves_does_not_stop_training(tmp_path, hub, caplog):
    trainer = make_trainer(
        tmp_path,
        push_to_hub=True,
        hub_strategy="every_save",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=1,
    )
    hub.fail("/commit/", 500, times=10_000)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "A push failed, training goes on" in caplog.text
    assert AutoDrafter.from_pretrained(tmp_path / "out" / "checkpoint-2")


@pytest.mark.parametrize(
    "name, message",
    [
        ("../secrets", "cannot be the name"),
        ("org/my drafter-dflash", "cannot be the name"),
        ("org/a/b-dflash", "cannot be the name"),
        ("org/Qwen3-4B-EAGLE-3", "contains 'eagle-', by which vLLM takes a drafter for EAGLE-1"),
    ],
)
def test_bad_repository_names_are_refused_before_training(tmp_path, hub, name, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, push_to_hub=True, hub_model_id=name)
    with pytest.raises(ValueError, match=message):
        validate_repo_id(name)
    assert hub.requests == []


def test_a_target_without_an_id_is_refused_before_training(tmp_path, hub):
    with pytest.raises(ValueError, match="names its target by its Hub id.*hub_target_id='ORG/NAME'"):
        make_trainer(tmp_path, push_to_hub=True, hub_target_id=None)


def test_a_name_from_the_output_folder_says_the_family(tmp_path, hub):
    trainer = make_trainer(tmp_path, push_to_hub=True, hub_model_id=None)
    assert trainer.hub_model_id == "someone/out-DFlash"


def test_saves_hold_record_and_no_pickled_arguments(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset_name="org/data")
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        assert read_record(folder).stages[0].steps == (1 if folder.name == "checkpoint-1" else 2)
        assert not (folder / "training_args.bin").exists()
    assert "base_model: org/target" in (tmp_path / "out" / "README.md").read_text()
