# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""A name under which there is no model is said at once, with the folder and the repository that it could be."""

import re
from time import monotonic

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from helpers.fake_hub import serve_hub
from helpers.tiny import TINY_RUN, make_causal_lm, make_drafter, make_target, make_tokenizer
from trl_draft_opd import AutoDrafter, DraftSFTConfig, DraftSFTTrainer, Eagle3DraftModel, FrozenTarget
from trl_draft_opd.cli import main
from trl_draft_opd.export import read_target
from trl_draft_opd.parity import verify_drafter
from trl_draft_opd.trainer.pair import load_target
from trl_draft_opd.utils import loading


TOKEN = "hf_CanaryCanaryCanaryCanaryCanary0042"


def verify(name):
    return verify_drafter(name, make_target(), [[7, 8]])


LOADERS = {
    "drafter": AutoDrafter.from_pretrained,
    "one family": Eagle3DraftModel.from_pretrained,
    "target": FrozenTarget.load,
    "target of a fresh drafter": Eagle3DraftModel.from_target,
    "target of a trainer": lambda name: load_target(name, DraftSFTConfig("out", **TINY_RUN), None),
    "target of an export": read_target,
    "export": verify,
}
LOCAL = ("/no/such/folder", "./no-such", "~/no-such", "a/b/c", "runs\\drafter", "", "runs/drafter/")


@pytest.fixture(params=LOADERS)
def load(request):
    return LOADERS[request.param]


@pytest.fixture(scope="module")
def server():
    with serve_hub(TOKEN) as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    loading._require_repository.cache_clear()
    server.requests.clear()
    server.repositories.clear()
    return server


def test_what_only_a_path_can_be_is_never_asked_for_on_the_hub(load, hub):
    for name in LOCAL:
        with pytest.raises(FileNotFoundError, match=re.escape(f"There is no folder {name!r}")):
            load(name)
    assert hub.requests == []


def test_a_file_in_the_place_of_a_folder_is_named(load, hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="model.safetensors' is a file. Give the folder it lies in"):
        load(str(tmp_path / "model.safetensors"))
    assert hub.requests == []


@pytest.mark.parametrize("name", ["my-drafter", "org/no-such"])
def test_a_name_that_could_be_an_id_is_asked_for_once(load, hub, name):
    with pytest.raises(
        FileNotFoundError, match=f"no folder '{name}' here, and no model of that name on the Hub that you"
    ):
        load(name)
    assert [(method, path) for method, path, *_ in hub.requests] == [("GET", f"/api/models/{name}")]


def test_a_hub_out_of_reach_is_said_at_once_with_both_possibilities(load, hub, monkeypatch):
    name = "my-drafter"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = monotonic()
    with pytest.raises(
        FileNotFoundError, match=f"no folder '{name}' here, and the Hub could not be asked.*Check the path"
    ):
        load(name)
    assert monotonic() - start < 10


def test_offline_the_error_names_folder_and_cache(load):
    with pytest.raises(FileNotFoundError, match="no folder 'my-drafter' here, and no model of that name in the cache"):
        load("my-drafter")


def test_what_is_on_the_hub_is_loaded_after_one_question(hub, tmp_path):
    made = {"org/drafter": make_drafter("eagle3", make_target()), "org/target": make_causal_lm()}
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        hub.add(name, {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert AutoDrafter.from_pretrained("org/drafter").config.family == "eagle3"
    target = FrozenTarget.load("org/target")
    assert target.config.name_or_path == "org/target" and not target.is_merged
    assert AutoConfig.from_pretrained("org/target").vocab_size == target.vocab_size
    asked = [path for _, path, *_ in hub.requests if path.startswith("/api/models/") and path.count("/") == 4]
    # transformers asks about a target as well, for its tokenizer.
    assert asked.count("/api/models/org/drafter") == 1 and "/api/models/org/target" in asked


def test_a_server_that_fails_once_refuses_no_name(hub, tmp_path):
    make_drafter("eagle3", make_target()).save_pretrained(tmp_path / "drafter")
    hub.add("org/drafter", {path.name: path.read_bytes() for path in (tmp_path / "drafter").iterdir()})
    hub.fail("GET /api/models/org/drafter", 503)
    assert AutoDrafter.from_pretrained("org/drafter").config.family == "eagle3"


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json. Give the folder of a model, or a Hub id"):
        FrozenTarget.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        AutoDrafter.from_pretrained(tmp_path)


def test_a_mistyped_path_is_one_line_of_every_command(tmp_path, capsys):
    make_causal_lm().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w8", "completion": "w9"}\n')
    rows, target, gone = (
        ["--dataset", str(tmp_path / "rows.jsonl")],
        str(tmp_path / "target"),
        str(tmp_path / "tagret"),
    )
    run = ["--output-dir", str(tmp_path / "run"), "--use-cpu", "--report-to", "none"]
    for command in (
        ["init", "--target", gone, "--family", "eagle3", "--output", str(tmp_path / "fresh")],
        ["generate", "--target", gone, *rows, "--output", str(tmp_path / "responses")],
        ["sft", "--target", gone, *rows, *run, "--family", "eagle3"],
        ["opd", "--target", target, *rows, *run, "--drafter", gone],
        ["evaluate", "--target", target, *rows, "--drafter", gone],
        ["export", "--drafter", gone, "--output", str(tmp_path / "export")],
        ["verify", "--target", target, *rows, "--drafter", gone],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"trl-draft-opd {command[0]}: There is no folder {gone!r}. Give the one that holds")


def test_an_export_says_that_the_target_its_drafter_names_is_gone(tmp_path, capsys):
    drafter = make_drafter("eagle3", make_target())
    drafter.config.target_model_name_or_path = str(tmp_path / "gone")
    drafter.save_pretrained(tmp_path / "drafter")
    flags = ["--drafter", str(tmp_path / "drafter"), "--output", str(tmp_path / "export")]
    assert main(["export", *flags]) == 2
    error = capsys.readouterr().err
    assert f"was trained for {str(tmp_path / 'gone')!r}, which cannot be read" in error and "as `--target`" in error


@pytest.mark.parametrize("content", ["{", '{"rms_norm_eps": NaN}', "[]"])
def test_an_export_whose_config_is_damaged_is_named_by_verify(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"config.json of .* (is not valid JSON|holds no JSON object|has rms_norm_eps)"
    ):
        verify(tmp_path)


def test_a_trainer_says_which_of_the_two_is_gone(tmp_path):
    target = make_target()
    with pytest.raises(FileNotFoundError, match="no folder '/no/drafter'"):
        DraftSFTTrainer("/no/drafter", target, DraftSFTConfig(str(tmp_path), **TINY_RUN))
    with pytest.raises(FileNotFoundError, match="no folder '/no/target'"):
        DraftSFTTrainer(make_drafter("eagle3", target), "/no/target", DraftSFTConfig(str(tmp_path), **TINY_RUN))
