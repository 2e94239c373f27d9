# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Uploading a folder, against a stand-in for the Hub: what goes up, what goes away, what is tried again, what every error
says, and that nothing local changes.
"""

import json
import struct
import traceback

import pytest
from huggingface_hub import HfApi, constants

from helpers.fake_hub import serve_hub
from helpers.tiny import make_drafter, make_target
from trl_draft_opd.export import export_drafter
from trl_draft_opd.export import hub as hub_module
from trl_draft_opd.export.hub import (
    create_repository,
    published_files,
    push_folder,
    resumable_files,
    validate_repo_id,
)


TOKEN = "hf_CanaryCanaryCanaryCanaryCanary0042"
REPO = "someone/tiny-eagle3"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# Card\n",
    "config.json": b"{}",
    "custom_generate/generate.py": b"def generate(model, **kwargs): ...\n",
    "speculative_config.json": json.dumps({"repository": REPO}).encode(),
    "speculators/config.json": b"{}",
    "training_record.json": b"{}",
}
WEIGHTS = ("model.safetensors", "speculators/model.safetensors")


def weights_file(header, numbers=b"\1" * 64):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


@pytest.fixture
def folder(tmp_path):
    """What an export writes, by name; the content does not matter here."""
    files = FILES | {name: weights_file({"__metadata__": {"format": name}}) for name in WEIGHTS}
    for name, content in files.items():
        path = tmp_path / "export" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "export"


@pytest.fixture
def hub(monkeypatch):
    with serve_hub(TOKEN) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # Both this package and the library pause between attempts.
        monkeypatch.setattr(hub_module, "sleep", lambda seconds: None)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


@pytest.fixture
def forbid_pauses(monkeypatch):
    monkeypatch.setattr(hub_module, "sleep", lambda seconds: pytest.fail("tried again"))


def push(folder, **options):
    return push_folder(folder, REPO, **{"token": TOKEN} | options)


def content_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- what goes up ---------------------------------------------------------------------------------------------------


def test_an_export_goes_up_byte_for_byte_in_one_commit(hub, folder):
    url = push(folder, commit_message="First one")
    (commit,) = hub.repositories[REPO].commits
    assert commit["files"] == content_of(folder) and commit["deleted"] == []
    assert commit["summary"] == "First one" and url == f"{hub.endpoint}/{REPO}/commit/{1:040d}"


def test_only_files_by_known_names_go_up(hub, folder):
    wanted = set(content_of(folder))
    strangers = ("training_args.bin", "notes.txt", "completions/a.parquet", "speculators/extra.txt", ".env")
    for name in (*strangers, "custom_generate/__pycache__/generate.pyc", "custom_generate/prompts.jsonl"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("nobody's business")
    (folder / "training_curve.png").symlink_to("/etc/hostname")
    push(folder)
    assert set(hub.repositories[REPO].commits[0]["files"]) == wanted
    assert b"nobody's business" not in hub.received()


def test_private_branch_and_token_reach_the_hub(hub, folder):
    push(folder, private=True, revision="dev")
    repository = hub.repositories[REPO]
    assert repository.private is True
    assert repository.branches["main"] == {} and set(repository.branches["dev"]) == set(content_of(folder))
    asked = {headers["authorization"] for _, path, headers, _ in hub.requests if not path.startswith("/lfs/")}
    assert asked == {f"Bearer {TOKEN}"}


def test_a_public_repository_is_not_taken_for_a_private_one(hub, folder):
    push(folder)
    for call in (lambda: push(folder, private=True), lambda: create(private=True)):
        with pytest.raises(ValueError, match="exists and is public, but a private repository was asked for"):
            call()
    assert len(hub.repositories[REPO].commits) == 1


def create(**options):
    return create_repository(REPO, token=TOKEN, **options)


def test_a_bare_name_gets_the_accounts_own(hub):
    name = create_repository("tiny-eagle3", token=TOKEN)
    assert name == REPO and hub.repositories[REPO].commits == []


# ---- what goes away -------------------------------------------------------------------------------------------------


def test_what_readers_would_take_for_the_drafter_gives_way_and_the_rest_stays(hub, folder):
    push(folder)
    stale = {
        "transformers/config.json",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "training_args.bin",
        "custom_generate/old.py",
    }
    kept = {"LICENSE", ".gitattributes", "eval/results.json", "checkpoint-3/optimizer.pt", "drafter.gguf"}
    repository = hub.repositories[REPO]
    repository.branches["main"] |= dict.fromkeys(stale | kept, b"earlier")
    push(folder)
    assert set(repository.commits[1]["deleted"]) == stale
    assert set(repository.branches["main"]) == set(content_of(folder)) | kept


def test_a_commit_made_meanwhile_is_seen_before_the_next_attempt(hub, folder, monkeypatch):
    push(folder)
    repository, commit = hub.repositories[REPO], HfApi.create_commit

    def commit_second(api, *arguments, **options):
        if len(repository.commits) == 1:
            others = {"branch": "main", "files": {"transformers/config.json": b"another push"}}
            repository.commits.append(others | {"deleted": []})
            repository.branches["main"] |= others["files"]
        return commit(api, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", commit_second)
    push(folder)
    assert len(repository.commits) == 3 and set(repository.branches["main"]) == set(content_of(folder))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_goes_up_without_arguments_texts_or_paths(hub, folder, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "completions").mkdir(parents=True)
    home = str(tmp_path)
    (checkpoint / "config.json").write_text(json.dumps({"hidden_size": 8, "target_model_name_or_path": home}))
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "best_model_checkpoint": home}))
    (checkpoint / "optimizer.pt").write_bytes(b"moments")
    (checkpoint / "training_args.bin").write_text(home)
    (checkpoint / "completions" / "1.parquet").write_text(home)
    push(folder, extra_folders={"last-checkpoint": resumable_files(checkpoint)})
    repository = hub.repositories[REPO]
    sent = {name: data for name, data in repository.commits[0]["files"].items() if name.startswith("last-")}
    assert set(sent) == {f"last-checkpoint/{n}" for n in ("config.json", "trainer_state.json", "optimizer.pt")}
    assert json.loads(sent["last-checkpoint/config.json"]) == {"hidden_size": 8, "target_model_name_or_path": None}
    assert home.encode() not in hub.received()
    assert home in (checkpoint / "config.json").read_text()
    # The next one takes its place.
    (checkpoint / "optimizer.pt").rename(checkpoint / "scheduler.pt")
    push(folder, extra_folders={"last-checkpoint": resumable_files(checkpoint)})
    assert repository.commits[1]["deleted"] == ["last-checkpoint/optimizer.pt"]


def test_a_hub_id_in_a_checkpoint_is_no_path(hub, folder, tmp_path):
    (tmp_path / "c").mkdir()
    text = json.dumps({"target_model_name_or_path": "org/target"})
    (tmp_path / "c" / "config.json").write_text(text)
    push(folder, extra_folders={"checkpoint-1": resumable_files(tmp_path / "c")})
    assert hub.repositories[REPO].commits[0]["files"]["checkpoint-1/config.json"] == text.encode()


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "training_record.json", "speculators/model.safetensors"])
def test_a_file_that_holds_the_token_stops_the_push(hub, folder, name):
    # Far behind the first bytes, where a short look would miss it.
    header = {"__metadata__": {"pad": "x" * 2**21, "author": TOKEN}}
    (folder / name).write_bytes(weights_file(header) if name.endswith("safetensors") else TOKEN.encode())
    with pytest.raises(ValueError, match=f"'{name}' holds the Hub token. Nothing was uploaded") as caught:
        push(folder)
    assert hub.requests == [] and TOKEN not in str(caught.value)


def test_a_stored_token_is_looked_for_too(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (folder / "README.md").write_text(TOKEN)
    with pytest.raises(ValueError, match="'README.md' holds the Hub token"):
        push(folder, token=None)


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_part", "failure"),
    [
        ("POST /api/repos/create", 429),
        ("/preupload/", 500),
        ("/objects/batch", "drop"),
        ("PUT /lfs/", 500),
        ("/commit/", 503),
        ("/commit/", "drop"),
    ],
)
def test_a_failure_that_passes_is_tried_again(hub, folder, request_part, failure):
    hub.fail(request_part, failure, times=1)
    push(folder)
    (commit,) = hub.repositories[REPO].commits
    assert set(commit["files"]) == set(content_of(folder))


def test_pauses_grow_and_respect_what_the_server_asks(hub, folder, monkeypatch):
    pauses = []
    monkeypatch.setattr(hub_module, "sleep", pauses.append)
    hub.fail("/api/repos/create", 503, times=2)
    hub.fail("/api/repos/create", 429, times=1)
    push(folder)
    # Four seconds would have been next, but the answer said seven.
    assert pauses == [1, 2, 7]


@pytest.mark.parametrize(
    ("request_part", "failure", "reason"),
    [
        ("/commit/", 500, "status 500"),
        ("PUT /lfs/", "drop", "Error while uploading"),
        ("/objects/batch", "drop", "Error"),
    ],
)
def test_a_server_that_stays_down_leaves_everything_as_it_was(hub, folder, monkeypatch, request_part, failure, reason):
    before = content_of(folder)
    hub.fail(request_part, failure, times=10_000)
    monkeypatch.setattr(hub_module, "NUM_RETRIES", 2)
    with pytest.raises(ConnectionError, match=f"failed 3 times, the last time with: .*{reason}") as caught:
        push(folder)
    assert f"'{folder}' is complete. Try again with `trl-draft-opd push --drafter {folder} --repo-id {REPO}`" in str(
        caught.value
    )
    assert content_of(folder) == before
    repository = hub.repositories[REPO]
    assert repository.commits == [] and repository.branches["main"] == {}
    hub.failures.clear()
    push(folder)
    assert set(repository.branches["main"]) == set(before)


@pytest.mark.parametrize(("part", "status"), [("/repos/create", 401), ("/commit/", 403), ("/preupload/", 401)])
def test_a_refused_token_is_explained_and_not_tried_again(hub, forbid_pauses, folder, part, status):
    hub.fail(part, status, times=10_000)
    # The library asks a second time, whether a repository it may not make is there.
    hub.fail(f"GET /api/models/{REPO}", status, times=10_000 if part == "/repos/create" else 0)
    with pytest.raises(PermissionError, match="missing, expired or may not write there.*hf auth login") as caught:
        push(folder)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("part", ["push", "the repository"])
def test_a_push_without_a_token_says_so_before_the_network(hub, folder, monkeypatch, part):
    monkeypatch.setattr(hub_module, "get_token", lambda: None)
    with pytest.raises(PermissionError, match=r"no Hub token on this machine.*`hf auth login`"):
        push(folder, token=None) if part == "push" else create_repository(REPO)
    assert hub.requests == []


def test_a_wrong_token_is_explained(hub, folder):
    with pytest.raises(PermissionError, match="missing, expired or may not write there") as caught:
        push(folder, token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)


def test_another_refusal_is_told_once_in_the_hubs_words(hub, forbid_pauses, folder):
    hub.fail("/commit/", 413, times=10_000)
    with pytest.raises(OSError, match=r"refused \(status 413\): as asked\. .*is complete"):
        push(folder)


@pytest.mark.parametrize("status", [403, 413, 500])
def test_a_token_that_the_server_echoes_is_in_no_message_and_no_traceback(hub, folder, caplog, status):
    hub.reason = f"headers: {{'authorization': 'Bearer {TOKEN}'}}"
    hub.fail("/commit/", status, times=10_000)
    with pytest.raises(OSError, match="refused|failed") as caught:
        push(folder)
    assert TOKEN not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_the_password_of_a_mirror_is_in_no_message_and_no_traceback(hub, folder, caplog, monkeypatch):
    # The library sends it in place of the token, so nothing comes of it; the address is in its errors.
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint.replace("://", "://me:canary@"))
    with pytest.raises(PermissionError, match="The Hub refused the token") as caught:
        push(folder)
    assert "canary" not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_a_process_that_is_offline_says_so_at_once(hub, forbid_pauses, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE=1.*is complete"):
        push(folder)


def test_a_folder_without_an_export_is_refused(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "speculative_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no export: \['model.safetensors'\] missing.*trl-draft-opd export"):
        push(tmp_path)
    # A checkpoint has weights, but not in the form that engines read.
    (tmp_path / "model.safetensors").write_bytes(weights_file({}))
    (tmp_path / "speculative_config.json").unlink()
    with pytest.raises(ValueError, match=r"\['speculative_config.json'\] missing"):
        push(tmp_path)
    assert hub.requests == []


def test_published_files_come_sorted_and_relative(folder):
    assert published_files(folder) == sorted(content_of(folder))


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../drafter-eagle3", "org/my eagle3", "org/a..b-eagle3", "a/b/eagle3", "", "org/--eagle3"]
)
def test_what_cannot_be_a_repository_is_refused_by_name(name):
    with pytest.raises(ValueError, match="cannot be the name of a repository.*ORG/NAME"):
        validate_repo_id(name)


@pytest.mark.parametrize("name", ["org/EAGLE-3-Qwen3-4B", "org/qwen3-eagle-dflash", "eagle-labs/drafter-eagle3"])
def test_the_name_that_vllm_takes_for_another_method_is_refused(hub, folder, name):
    with pytest.raises(ValueError, match="by which vLLM takes a drafter for EAGLE-1"):
        validate_repo_id(name)
    with pytest.raises(ValueError, match="EAGLE-1"):
        push_folder(folder, name, token=TOKEN)
    assert hub.requests == []


def test_a_name_of_the_other_family_is_refused_and_one_without_any_is_warned_about_once(hub, tmp_path, caplog):
    folder = export_drafter(make_drafter("dflash", make_target()), tmp_path / "export", to="flat").folder
    for _ in range(2):
        push_folder(folder, "someone/gsm", token=TOKEN)
    (warning,) = [record.getMessage() for record in caplog.records if "method" in record.getMessage()]
    assert warning.startswith("'someone/gsm' does not contain 'dflash'") and '`"method": "dflash"`' in warning
    hub.requests.clear()
    for name in ("someone/gsm-EAGLE3", "eagle3-lab/gsm-DFlash"):
        with pytest.raises(ValueError, match=f"'{name}' contains 'eagle3', .* Name it after 'dflash'"):
            push_folder(folder, name, token=TOKEN)
    assert hub.requests == []
    push_folder(folder, "someone/gsm-DFlash", token=TOKEN)
