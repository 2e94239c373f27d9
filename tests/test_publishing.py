# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Trainers and the Hub, against a stand-in on this machine: one commit of what belongs there, every strategy, no token in
any byte, and a local folder that no failure touches.
"""

import json
import threading
from concurrent.futures import Future

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from transformers import TrainerCallback

from helpers.fake_hub import serve_hub
from helpers.tiny import make_causal_lm, make_drafter, make_target, make_tokenizer
from trl_draft_opd import (
    AutoDrafter,
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    evaluate_drafter,
)
from trl_draft_opd.export import TargetOfExport, export_drafter
from trl_draft_opd.export.hub import push_folder
from trl_draft_opd.export.record import prompts_digest, read_record
from trl_draft_opd.export.rules import check_folder
from trl_draft_opd.runs.checkpoints import read_checkpoint
from trl_draft_opd.trainer import publishing
from trl_draft_opd.trainer.texts import PRIVATE_FOLDER


CANARY = "hf_CanaryCanaryCanaryCanaryCanary0042"
TRAINERS = {"sft": (DraftSFTTrainer, DraftSFTConfig), "opd": (DraftOPDTrainer, DraftOPDConfig)}
EXPORT = {
    "README.md",
    "config.json",
    "custom_generate/drafters.py",
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
        # Both this package and the library pause between attempts.
        monkeypatch.setattr("trl_draft_opd.export.hub._LONGEST_PAUSE", 0.0)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


def rows(count=4):
    return Dataset.from_list(
        [
            {"prompt": f"w{8 + i} w9 w10", "completion": " ".join(f"w{10 + i + j}" for j in range(12))}
            for i in range(count)
        ]
    )


EVERY_SAVE = {
    "push_to_hub": True,
    "hub_strategy": "every_save",
    "hub_always_push": True,
    "save_strategy": "steps",
    "save_steps": 1,
}


def make_trainer(
    tmp_path,
    method="sft",
    family="dflash",
    drafter=None,
    target=None,
    eval_rows=None,
    callbacks=None,
    peft_config=None,
    **settings,
):
    trainer_class, config_class = TRAINERS[method]
    target = target or make_target()
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
    drafter = drafter or make_drafter(family, make_target())
    return trainer_class(
        *(drafter, target, args, rows()),
        eval_dataset=eval_rows or rows(2),
        callbacks=callbacks,
        peft_config=peft_config,
    )


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


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
    assert check_folder(published, TargetOfExport(config=trainer.target.config)) == []
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


def test_stages_of_one_process_are_both_in_the_record(tmp_path):
    first = make_trainer(tmp_path / "a", "sft")
    first.train()
    second = make_trainer(tmp_path / "b", "opd", drafter=first.model, max_steps=1)
    second.train()
    stages = [(stage.method, stage.steps) for stage in second.training_record().stages]
    assert stages == [("sft", 2), ("opd", 1)]


@pytest.mark.parametrize("setting", ["hub_target_id", "dataset_id"])
def test_a_path_is_no_id_for_target_or_data(tmp_path, setting):
    with pytest.raises(ValueError, match=f"`{setting}` must be a Hub id, ORG/NAME, got '{tmp_path}/model'"):
        DraftSFTConfig(str(tmp_path), **{setting: f"{tmp_path}/model"})


def test_credentials_inside_of_settings_are_masked_in_logs(tmp_path):
    options = {"token": CANARY, "revision": "main", "headers": {"Authorization": CANARY}}
    args = DraftSFTConfig(str(tmp_path), target_init_kwargs=options, hub_token=CANARY, report_to="none")
    assert CANARY not in args.to_json_string()
    assert args.to_dict()["target_init_kwargs"]["revision"] == "main"
    assert args.target_init_kwargs["token"] == CANARY


@pytest.mark.parametrize("method", TRAINERS)
def test_no_canary_token_and_no_path_is_in_a_byte_that_leaves(tmp_path, hub, monkeypatch, method):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    home = tmp_path / "home"
    make_causal_lm().save_pretrained(home / "target")
    make_tokenizer().save_pretrained(home / "target")
    make_drafter("dflash", make_target()).save_pretrained(home / "drafter")
    drafter = AutoDrafter.from_pretrained(home / "drafter")
    drafter.config.token = CANARY
    saved, save = [], torch.save
    monkeypatch.setattr(
        "torch.save", lambda content, *to, **options: (saved.append(content), save(content, *to, **options))
    )
    settings = EVERY_SAVE | {"hub_strategy": "checkpoint", "report_to": "tensorboard"}
    settings["target_init_kwargs"] = {"token": CANARY}
    if method == "opd":
        settings |= {"log_completions": True}
    trainer = make_trainer(tmp_path, method, drafter=drafter, target=str(home / "target"), **settings)
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"events", "optimizer", "config", "README"} <= {path.name.split(".")[0] for path in written}
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    assert saved == []  # nothing of a run is pickled
    assert len(hub.repositories["someone/tiny-dflash"].commits) == 3
    sent = hub.received()
    assert b"base_model: org/target" in sent and b'"global_step": 2' in sent
    assert [word for word in (CANARY, str(tmp_path), "w8 w9", PRIVATE_FOLDER + "/") if word.encode() in sent] == []
    assert any(CANARY in headers.get("authorization", "") for _, _, headers, _ in hub.requests)


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_server_that_dies_midway_leaves_a_complete_folder_and_a_second_push_succeeds(tmp_path, hub):
    trainer = make_trainer(tmp_path)
    trainer.train()
    hub.fail("PUT /lfs/", "drop", times=10_000)
    with pytest.raises(ConnectionError, match="_publication' is complete. Try again with `trl-draft-opd push"):
        trainer.push_to_hub()
    repository = hub.repositories["someone/tiny-dflash"]
    assert repository.commits == [] and repository.branches["main"] == {}
    folder = tmp_path / "out" / "_publication"
    assert files_of(folder) == EXPORT | NATIVE
    AutoDrafter.from_pretrained(tmp_path / "out")
    hub.failures.clear()
    push_folder(folder, "someone/tiny-dflash", token=CANARY)
    assert set(repository.branches["main"]) == EXPORT | NATIVE


def test_a_refused_token_leaves_drafter_and_export_and_a_good_one_pushes_them(tmp_path, hub):
    trainer = make_trainer(tmp_path, hub_private_repo=True, hub_revision="dev", hub_token="hf_expired")
    with pytest.raises(PermissionError, match=r"missing, expired.*hf auth login"):
        trainer.push_to_hub()
    assert AutoDrafter.from_pretrained(tmp_path / "out" / "_publication")
    trainer.push_to_hub(token=CANARY)
    repository = hub.repositories["someone/tiny-dflash"]
    assert repository.private is True
    assert repository.branches["main"] == {} and "config.json" in repository.branches["dev"]


@pytest.mark.parametrize("exported_as", [None, "elsewhere/older"])
@pytest.mark.parametrize("family", ["eagle3", "dflash"])
def test_a_push_fills_its_repositorys_name_in_wherever_the_export_has_another(
    tmp_path, hub, caplog, family, exported_as
):
    target, repo_id = make_target(), f"someone/tiny-{family}"
    record = make_trainer(tmp_path, family=family).training_record()
    embedding = target.causal_lm.get_input_embeddings().weight
    # A target of which `readers` has something to say.
    target.causal_lm.config.architectures = ["Qwen2ForCausalLM"]
    options = {"target": TargetOfExport("org/target", target.causal_lm.config, embedding), "record": record}
    options |= {"license": "my-own-1.0"}
    drafter = make_drafter(family, target)
    for name in (exported_as, repo_id):
        export_drafter(drafter, tmp_path / str(name), repo_id=name, **options)
    before = {path: path.read_bytes() for path in (tmp_path / str(exported_as)).rglob("*") if path.is_file()}
    push_folder(tmp_path / str(exported_as), repo_id, token=CANARY)
    uploaded, right = hub.repositories[repo_id].branches["main"], tmp_path / repo_id
    assert {name: right.joinpath(name).read_bytes() for name in files_of(right)} == uploaded
    assert f"DRAFTER = {repo_id!r}" in uploaded["custom_generate/generate.py"].decode()
    assert "is uploaded with that name (README.md, custom_generate/generate.py, speculative" in caplog.text
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"hub_model_id": "../secrets"}, ValueError, "cannot be the name"),
        ({"hub_model_id": "org/my drafter-dflash"}, ValueError, "cannot be the name"),
        ({"hub_model_id": "org/Qwen3-4B-EAGLE-3"}, ValueError, "by which vLLM takes a drafter for EAGLE-1"),
        ({"hub_target_id": None}, ValueError, "names its target by its Hub id.*hub_target_id='ORG/NAME'"),
        ({"hub_token": None}, PermissionError, "no Hub token on this machine.*hf auth login"),
        ({"hub_token": "hf_expired"}, PermissionError, "missing, expired or may not write there.*hf auth login"),
    ],
)
def test_what_cannot_be_published_is_refused_before_the_target_responds(
    tmp_path, hub, monkeypatch, settings, error, message
):
    monkeypatch.setattr("trl_draft_opd.trainer.draft_sft_trainer.respond_to_all", lambda *_: pytest.fail("responded"))
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, push_to_hub=True, regenerate=True, **settings)
    assert hub.repositories == {}


def test_a_push_that_was_not_planned_asks_for_the_target_id_before_the_hub(tmp_path, hub):
    trainer = make_trainer(tmp_path, hub_target_id=None)
    with pytest.raises(ValueError, match="names its target by its Hub id.*hub_target_id='ORG/NAME'"):
        trainer.push_to_hub()
    assert hub.repositories == {} and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("setting, value", [("dataset_license", "see /home/me/terms"), ("target_revision", "../x")])
def test_what_the_record_would_refuse_is_refused_before_training(tmp_path, setting, value):
    with pytest.raises(ValueError, match="training_record.json"):
        make_trainer(tmp_path, **{setting: value})


# ---- strategies -----------------------------------------------------------------------------------------------------


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
    # The limit deletes a checkpoint as soon as the next one is there, uploaded or not.
    trainer = make_trainer(tmp_path, **EVERY_SAVE | {"hub_strategy": strategy, "save_total_limit": 1})
    trainer.train()
    trainer.push_to_hub()
    repository = hub.repositories["someone/tiny-dflash"]
    summaries = ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
    assert [commit["summary"] for commit in repository.commits] == summaries[-commits:]
    held = repository.branches["main"]
    assert {name.split("/")[0] for name in held} == {name.split("/")[0] for name in EXPORT | NATIVE} | folders
    assert not [name for name in held if name.endswith("training_args.bin") or PRIVATE_FOLDER in name]
    for folder in folders:
        assert {
            f"{folder}/optimizer.safetensors",
            f"{folder}/trainer_state.json",
            f"{folder}/model.safetensors",
        } <= set(held)


@pytest.mark.parametrize(
    "strategy, place, is_adapted",
    [("checkpoint", "last-checkpoint", False), ("all_checkpoints", "checkpoint-2", True)],
)
def test_a_checkpoint_that_was_pushed_resumes_after_a_download(tmp_path, hub, caplog, strategy, place, is_adapted):
    from peft import LoraConfig

    home = tmp_path / "home"
    make_causal_lm().save_pretrained(home / "target")
    make_tokenizer().save_pretrained(home / "target")
    make_drafter("dflash", make_target()).save_pretrained(home / "drafter")

    def run(side, **settings):
        drafter, peft = AutoDrafter.from_pretrained(home / "drafter"), LoraConfig(r=2) if is_adapted else None
        target = str(home / "target")
        return make_trainer(tmp_path / side, drafter=drafter, target=target, peft_config=peft, **best | settings)

    # Paths of this machine in every file that may hold one, the best checkpoint's among them.
    best = {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True}
    best |= {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "eval_rollouts": False}
    run("a", **EVERY_SAVE | {"hub_strategy": strategy}).train()
    files = hub.repositories["someone/tiny-dflash"].branches["main"]
    if strategy == "checkpoint":
        # As it was before the last push.
        files = hub.repositories["someone/tiny-dflash"].commits[1]["files"]
    downloaded = tmp_path / "b" / "downloaded"
    for name, content in files.items():
        if name.startswith(f"{place}/"):
            downloaded.mkdir(parents=True, exist_ok=True)
            (downloaded / name.split("/")[1]).write_bytes(content)
    held = b"".join(path.read_bytes() for path in downloaded.iterdir() if path.suffix in (".json", ".md"))
    assert str(tmp_path).encode() not in held
    assert read_checkpoint(downloaded).step == 2
    resumed = run("b", save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=downloaded)
    assert resumed.state.global_step == 3
    weights = "adapter_model.safetensors" if is_adapted else "model.safetensors"
    ends = [tmp_path / side / "out" / "checkpoint-3" for side in ("a", "b")]
    for name in (weights, "optimizer.safetensors"):
        assert ends[0].joinpath(name).read_bytes() == ends[1].joinpath(name).read_bytes()


def test_a_failing_push_between_saves_does_not_stop_training(tmp_path, hub, caplog):
    trainer = make_trainer(tmp_path, **EVERY_SAVE)
    hub.fail("/commit/", 413, times=10_000)
    trainer.train()
    assert trainer.state.global_step == 2
    assert caplog.text.count("A push failed, training goes on") == 2 and "status 413" in caplog.text
    assert AutoDrafter.from_pretrained(tmp_path / "out" / "checkpoint-2")
    hub.failures.clear()
    trainer.push_to_hub()
    assert len(hub.repositories["someone/tiny-dflash"].commits) == 1


def test_an_export_that_fails_between_saves_does_not_stop_training(tmp_path, hub, caplog, monkeypatch):
    trainer = make_trainer(tmp_path, **EVERY_SAVE)
    (tmp_path / "out" / "_publication").mkdir(parents=True)
    (tmp_path / "out" / "_publication" / "thesis.tex").write_text("mine")
    trainer.train()
    assert trainer.state.global_step == 2
    assert caplog.text.count("Nothing was pushed, training goes on") == 2 and "thesis.tex" in caplog.text


@pytest.mark.parametrize("always, pushed", [(False, 1), (True, 2)])
def test_one_push_is_in_flight_and_saves_skip_it_or_wait(tmp_path, hub, monkeypatch, always, pushed):
    started, is_over = [], threading.Event()

    class AfterSaves(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            # A save that waits for the push before it would wait for ever.
            if always and state.global_step == 2:
                is_over.set()

        def on_save(self, args, state, control, **others):
            if state.global_step == 2:
                is_over.set()

    def push(*arguments, commit_message, **options):
        started.append(commit_message)
        assert is_over.wait(20)

    monkeypatch.setattr(publishing, "push_folder", push)
    make_trainer(tmp_path, callbacks=[AfterSaves()], **EVERY_SAVE | {"hub_always_push": always}).train()
    assert len(started) == pushed


def test_a_checkpoint_is_not_deleted_while_it_is_uploaded(tmp_path, hub, monkeypatch):
    was_there, is_deleted = [], threading.Event()

    class AfterDeletion(TrainerCallback):
        def on_save(self, args, state, control, **others):
            if state.global_step == 2:
                is_deleted.set()

    def push(*arguments, extra_folders, **options):
        # As long as an upload may take; training waits for it.
        is_deleted.wait(0.3)
        was_there.append(extra_folders["last-checkpoint"]["optimizer.safetensors"].is_file())

    monkeypatch.setattr(publishing, "push_folder", push)
    settings = EVERY_SAVE | {"hub_strategy": "checkpoint", "hub_always_push": False, "save_total_limit": 1}
    make_trainer(tmp_path, callbacks=[AfterDeletion()], **settings).train()
    assert was_there == [True, True] and not (tmp_path / "out" / "checkpoint-1").exists()


def test_a_push_in_the_background_hands_back_its_future(tmp_path, hub, caplog):
    trainer = make_trainer(tmp_path)
    future = trainer.push_to_hub(blocking=False)
    assert isinstance(future, Future) and future.result(20).endswith("/commit/" + "1".rjust(40, "0"))
    assert "Call `evaluate()` before a push" in caplog.text


# ---- names, cards, records ------------------------------------------------------------------------------------------


def test_a_push_that_was_not_announced_still_names_itself_in_full(tmp_path, hub):
    make_trainer(tmp_path, "opd", "eagle3", hub_model_id="tiny-eagle3").push_to_hub()
    (commit,) = hub.repositories["someone/tiny-eagle3"].commits
    assert b"DRAFTER = 'someone/tiny-eagle3'" in commit["files"]["custom_generate/generate.py"]


def test_a_name_from_the_output_folder_says_the_family(tmp_path, hub):
    trainer = make_trainer(tmp_path, push_to_hub=True, hub_model_id=None)
    assert trainer.hub_model_id == "someone/out-DFlash"


@pytest.mark.parametrize("method", TRAINERS)
def test_saves_hold_record_and_card_and_no_pickled_arguments(tmp_path, method):
    trainer = make_trainer(tmp_path, method, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    for name, steps in (("", 2), ("checkpoint-1", 1), ("checkpoint-2", 2)):
        folder = tmp_path / "out" / name
        assert read_record(folder).stages[0].steps == steps
        assert not (folder / "training_args.bin").exists()
        assert "base_model: org/target" in (folder / "README.md").read_text()
    trainer.create_model_card(model_name="x", dataset_name="org/data", tags=["y"])
    assert "- org/data" in (tmp_path / "out" / "README.md").read_text()


def test_prompts_count_once_though_ranks_decode_them_again(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, eval_rows=rows(3))
    plain = trainer.evaluate()
    (alone,) = trainer.training_record().measurements
    monkeypatch.setattr(publishing, "gather_object", lambda found: found[::-1] + found[:2])
    metrics = trainer.evaluate()
    (gathered,) = trainer.training_record().measurements
    assert gathered == alone and gathered.num_prompts == 3
    prompts = [row["input_ids"][: row["completion_mask"].index(1)] for row in trainer.eval_dataset]
    assert gathered.prompts_sha256 == prompts_digest(prompts)
    assert metrics["eval_tau"] == plain["eval_tau"] == gathered.tau
    assert metrics["eval_tau_low"] <= metrics["eval_tau"] <= metrics["eval_tau_high"]


def test_an_evaluation_logs_where_drafts_are_rejected_as_evaluate_counts_it(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.evaluate()
    report = evaluate_drafter(
        trainer.target,
        trainer.drafter,
        [row["input_ids"][: row["completion_mask"].index(1)] for row in trainer.eval_dataset],
        num_drafts=trainer.num_drafts,
        max_completion_length=trainer.args.longest_response,
        compare_with_target=False,
        show_progress=False,
    )
    shares = {f"eval_{name}": rejected / decided for name, (rejected, decided) in report.rejections.items()}
    logged = trainer.state.log_history[-1]
    assert "eval_rejection/from_token_0" in shares and shares.items() <= logged.items()
    assert {name for name in logged if name.startswith("eval_rejection/")} == set(shares)


def test_prompt_sets_are_named_by_one_word_whatever_users_call_them(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows={"data/gsm8k.jsonl": rows(2), "retrieval": rows(1), "../": rows(1)})
    trainer.evaluate()
    trainer.save_model()
    measured = read_record(tmp_path / "out").measurements
    assert [m.prompt_set for m in measured] == ["data-gsm8k-jsonl", "retrieval", "evaluation"]


def test_measurements_are_those_of_the_weights_that_were_loaded_again(tmp_path):
    trainer = make_trainer(
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        # The loss falls, so the first step's weights win.
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.global_step == 2
    record = trainer.training_record()
    (stage,), (measured,) = record.stages, record.measurements
    assert stage.steps == measured.after_steps == 1
    assert {point["step"] for point in stage.curve} == {1}


def test_a_measurement_before_the_last_updates_is_not_published(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.evaluate()
    assert len(trainer.training_record().measurements) == 1
    trainer.train()
    assert trainer.training_record().measurements == []
    trainer.evaluate()
    assert trainer.training_record().measurements[0].after_steps == 2
