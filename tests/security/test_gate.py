# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The security gate: no file that anybody opens runs code, no repository's code runs unasked, no token is in a byte that
is written, and no name leads out of its folder. Every trap is shown to work.
"""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from helpers.fake_hub import serve_hub
from helpers.tiny import make_causal_lm, make_drafter, make_target, make_tokenizer
from trl_draft_opd import (
    AutoDrafter,
    DraftOPDConfig,
    DraftSFTConfig,
    DraftSFTTrainer,
    Eagle3DraftModel,
    FrozenTarget,
)
from trl_draft_opd.cli import main
from trl_draft_opd.cli.rows import load_rows
from trl_draft_opd.export import TargetOfExport, export_drafter, hub_id_of, read_target
from trl_draft_opd.export.hub import push_folder, resumable_files, validate_repo_id
from trl_draft_opd.export.record import read_record
from trl_draft_opd.export.rules import check_folder
from trl_draft_opd.parity import verify_drafter
from trl_draft_opd.responses import Origin, ResponseStore
from trl_draft_opd.rollout.acceptance import SamplingSettings


CANARY = "hf_CanaryCanaryCanaryCanaryCanary0042"
# What trainers, adapters and other packages pickle into.
PICKLES = (
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"),
    *("pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "cache.pt", "data.pkl", "state.pt", "model.pt"),
)
NAMES = ("../x", "/etc/x", "a/b/c", "org/--x", "org/a--b", "org/x/../y", "org/.x", "org/x y", "~/x")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.fixture
def proof(tmp_path):
    """The folder a trap makes; no test may end with it."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "code out of a file was run"


def set_trap(path: Path, proof: Path, by_torch: bool) -> None:
    if by_torch:
        torch.save({"fc.weight": Trap(proof)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(proof)))


def set_traps(folder: Path, proof: Path, names=PICKLES) -> None:
    for number, name in enumerate(names):
        set_trap(folder / name, proof, by_torch=number % 2 == 0)


def attempt(action) -> None:
    """Do what may be refused in whatever words: what is asked here is that nothing was run."""
    try:
        action()
    except Exception:
        pass


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def made(target, tmp_path_factory):
    """Folders that tests copy: the target, a drafter of each family, an export, an adapter."""
    home = tmp_path_factory.mktemp("made")
    make_causal_lm().save_pretrained(home / "target")
    make_tokenizer().save_pretrained(home / "target")
    for family in ("dflash", "eagle3"):
        make_drafter(family, target).save_pretrained(home / family)
    embedding = target.causal_lm.get_input_embeddings().weight
    drafter = make_drafter("eagle3", target)
    export_drafter(drafter, home / "export", target=TargetOfExport("org/target", target.config, embedding))
    return home


@pytest.fixture
def copy(made, tmp_path):
    return lambda name: shutil.copytree(made / name, tmp_path / name)


# -- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_torch", [True, False])
def test_the_traps_are_real(tmp_path, by_torch):
    proof = tmp_path / "it-ran"
    set_trap(tmp_path / "file", proof, by_torch)
    if by_torch:
        torch.load(tmp_path / "file", weights_only=False)
    else:
        pickle.loads((tmp_path / "file").read_bytes())
    assert proof.is_dir()


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
def test_pickles_beside_a_drafter_are_not_opened_by_anything_that_reads_it(copy, proof, target, tmp_path, family):
    folder = copy(family)
    set_traps(folder, proof)
    assert AutoDrafter.from_pretrained(folder).config.family == family
    assert AutoDrafter.from_pretrained(folder, allow_pickle_weights=True).config.family == family
    assert DraftSFTTrainer(str(folder), target, settings(tmp_path / "out"), rows()).model.config.family == family
    check_folder(folder)
    read_record(folder)


def test_pickles_beside_an_export_are_neither_opened_nor_uploaded(copy, proof, target, hub):
    folder = copy("export")
    set_traps(folder, proof)
    push_folder(folder, "someone/tiny-eagle3", token=CANARY)
    assert not {name.split("/")[-1] for name in hub.repositories["someone/tiny-eagle3"].branches["main"]} & set(
        PICKLES
    )
    report = verify_drafter(folder, target, [[9, 10]], max_completion_length=4, consumers=["transformers"])
    assert report.rows


@pytest.mark.parametrize("by_torch", [True, False])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "training_record.json", "speculative_config.json"]
)
def test_a_pickle_in_the_place_of_a_file_of_ours_is_refused_by_name(copy, proof, target, name, by_torch):
    folder = copy("export")
    set_trap(folder / name, proof, by_torch)
    for action in (
        lambda: AutoDrafter.from_pretrained(folder),
        lambda: read_record(folder),
        lambda: check_folder(folder),
        lambda: verify_drafter(folder, target, [[9, 10]], max_completion_length=1, consumers=["transformers"]),
        lambda: push_folder(folder, "someone/tiny-eagle3", token=None),
    ):
        attempt(action)
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(ValueError, match=name):
            AutoDrafter.from_pretrained(folder)
    if name == "training_record.json":
        with pytest.raises(ValueError, match=name):
            read_record(folder)


def test_an_index_and_its_shards_that_are_pickles_are_refused(copy, proof):
    folder = copy("dflash")
    (folder / "model.safetensors").unlink()
    set_trap(folder / "model.safetensors.index.json", proof, True)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json of .* is not valid JSON"):
        AutoDrafter.from_pretrained(folder)
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": shard}}))
    set_trap(folder / shard, proof, False)
    with pytest.raises(ValueError, match=f"{shard}' is no whole safetensors file"):
        AutoDrafter.from_pretrained(folder)


def test_a_pickled_adapter_is_refused_before_it_is_opened(made, tmp_path, proof):
    (tmp_path / "adapter").mkdir()
    config = {"base_model_name_or_path": str(made / "eagle3"), "peft_type": "LORA", "target_modules": ["fc"], "r": 2}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    set_traps(tmp_path / "adapter", proof)
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors.*pickled ones can carry code"):
        AutoDrafter.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("keeps_weights", [True, False])
def test_a_targets_folder_with_pickles_runs_none(copy, proof, keeps_weights):
    folder = copy("target")
    set_traps(folder, proof)
    if not keeps_weights:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="pickled ones can carry code"):
            read_target(folder)
        attempt(lambda: FrozenTarget.load(folder))
        return
    assert read_target(folder).embedding.shape == (64, 32)
    assert FrozenTarget.load(folder).num_layers == 8


def test_a_pickle_in_the_place_of_any_file_of_a_store_is_refused(target, tmp_path, proof):
    sampling = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
    origin = Origin.of(target, sampling=sampling, max_completion_length=8)
    store = ResponseStore.open(tmp_path / "store", origin)
    store.add([([9, 10], [11, 12], None, "length")])
    set_traps(store.path, proof)
    assert len(ResponseStore.open(store.path, origin)) == 1
    for path in sorted(store.path.glob("*[nt]")):
        if path.name not in PICKLES:
            whole = path.read_bytes()
            for by_torch in (True, False):
                set_trap(path, proof, by_torch)
                with pytest.raises(ValueError, match=f"{path.stem}.* is not usable"):
                    ResponseStore.open(store.path, origin)
            path.write_bytes(whole)


@pytest.mark.parametrize("by_torch", [True, False])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_dataset_file_that_is_a_pickle_is_refused(tmp_path, proof, name, by_torch):
    set_trap(tmp_path / name, proof, by_torch)
    with pytest.raises(ValueError, match=f"{name}' cannot be read"):
        load_rows(str(tmp_path / name), None, "train")


def test_a_dataset_folder_with_pickles_runs_none(tmp_path, proof):
    rows().save_to_disk(tmp_path / "rows")
    set_traps(tmp_path / "rows", proof)
    assert len(load_rows(str(tmp_path / "rows"), None, "train")) == len(rows())
    for path in sorted((tmp_path / "rows").iterdir()):
        set_trap(path, proof, False)
    attempt(lambda: load_rows(str(tmp_path / "rows"), None, "train"))


@pytest.mark.parametrize("resume", ["named", "newest"])
@pytest.mark.parametrize("what", ["all of it", "beside it", "in place of it"])
def test_a_checkpoint_of_pickles_runs_none_when_a_run_goes_on(tmp_path, proof, target, resume, what):
    out = tmp_path / "out"
    trainer = make_trainer(target, out, save_strategy="steps", save_steps=1)
    if what == "all of it":
        (out / "checkpoint-1").mkdir(parents=True)
        set_traps(out / "checkpoint-1", proof)
    else:
        trainer.train()
        names = PICKLES if what == "beside it" else [path.name for path in (out / "checkpoint-1").iterdir()]
        set_traps(out / "checkpoint-1", proof, names)
    again = make_trainer(target, out, save_strategy="steps", save_steps=1, max_steps=2)
    attempt(lambda: again.train(resume_from_checkpoint=str(out / "checkpoint-1") if resume == "named" else True))


# -- code of repositories ---------------------------------------------------------------------------------------------


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Where transformers puts code of repositories; imports of it are forgotten afterwards."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def _no_class_remembers_code(monkeypatch):
    """Loading by `auto_map` marks the class it finds, here transformers' own, for every later save in this process."""
    monkeypatch.setattr(Qwen3ForCausalLM, "_auto_class", None)
    monkeypatch.setattr(Qwen3Config, "_auto_class", None)


def add_code(folder: Path, proof: Path, model_type: str | None) -> None:
    """Give a folder code that leaves a proof, named by `auto_map` and as `custom_generate`."""
    code = f"import os\nos.makedirs({str(proof)!r}, exist_ok=True)\nfrom transformers import Qwen3Config as Config\n"
    code += "from transformers import Qwen3ForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer\n"
    for name in ("code.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code + "def generate(model, **kwargs):\n    raise RuntimeError\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoModel": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | ({"model_type": model_type} if model_type else {})))
    path = folder / "tokenizer_config.json"
    if path.is_file():
        words = json.loads(path.read_text())
        path.write_text(json.dumps(words | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}}))


def test_the_code_would_run_if_it_were_asked_for(copy, tmp_path, modules_cache):
    folder = copy("target")
    add_code(folder, tmp_path / "it-ran", "unheard_of")
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "it-ran").is_dir()


def test_a_known_targets_own_code_stays_unused(copy, proof, modules_cache):
    folder = copy("target")
    add_code(folder, proof, None)
    target = FrozenTarget.load(folder)
    assert type(target.causal_lm).__module__.startswith("transformers.models.qwen3")
    assert Eagle3DraftModel.from_target(str(folder)).config.vocab_size == 64
    read_target(folder)
    trainer = make_trainer(target, folder.parent / "out", rows=[{"prompt": "w9 w10", "completion": "w11 w12"}] * 2)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)


def test_an_unknown_targets_code_is_refused_and_nobody_is_asked(copy, proof, modules_cache, monkeypatch):
    folder = copy("target")
    add_code(folder, proof, "unheard_of")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    actions = (FrozenTarget.load, Eagle3DraftModel.from_target, read_target)
    for action in actions:
        with pytest.raises(ValueError, match="trust_remote_code"):
            action(str(folder))
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_trainer(str(folder), folder.parent / "out")
    flags = ["--target", str(folder), "--output", str(folder.parent / "d"), "--family", "dflash"]
    assert main(["init", *flags]) == 2


@pytest.mark.parametrize("family", ["dflash", "eagle3"])
@pytest.mark.parametrize("model_type", [None, "unheard_of"])
def test_a_drafters_own_code_stays_unused(copy, proof, modules_cache, target, family, model_type):
    folder = copy(family)
    add_code(folder, proof, model_type)
    drafter = AutoDrafter.from_pretrained(folder)
    assert type(drafter).__module__.startswith("trl_draft_opd.drafters")
    check_folder(folder)
    verify_drafter(folder, target, [[9, 10]], max_completion_length=4)


def test_the_tokenizers_code_stays_unused_where_one_is_passed_in(copy, proof, modules_cache):
    folder = copy("target")
    add_code(folder, proof, None)
    make_trainer(str(folder), folder.parent / "out", processing_class=make_tokenizer())
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=False).eos_token_id == 2


@pytest.mark.parametrize("config_class", [DraftSFTConfig, DraftOPDConfig])
def test_remote_code_is_off_unless_it_is_turned_on(tmp_path, config_class):
    assert config_class(str(tmp_path)).trust_remote_code is False


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    with serve_hub(CANARY) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def test_no_token_is_in_a_byte_that_a_run_from_the_shell_prints_writes_or_sends(
    made, hub, tmp_path, monkeypatch, capfd, caplog
):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("HF_TOKEN", CANARY)
    Dataset.from_list([{"prompt": f"w{i} w9", "completion": "w20 w21 w22"} for i in range(8, 12)]).to_json(
        tmp_path / "rows.jsonl"
    )
    flags = {
        "target": made / "target",
        "drafter": made / "dflash",
        "dataset": tmp_path / "rows.jsonl",
        "eval_split": "train",
        "target_init_kwargs": json.dumps({"token": CANARY}),
        "hub_token": CANARY,
        "hub_model_id": "someone/tiny-dflash",
        "hub_target_id": "org/target",
        "hub_strategy": "checkpoint",
        "push_to_hub": "true",
        "output_dir": tmp_path / "out",
        "report_to": "tensorboard",
        "save_strategy": "steps",
        "eval_strategy": "steps",
        **dict.fromkeys(("save_steps", "eval_steps", "logging_steps", "max_steps"), 1),
        **dict.fromkeys(("max_completion_length", "per_device_train_batch_size"), 4),
    }
    assert (
        main(["sft", "--use_cpu", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]) == 0
    )
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in written) and len(hub.repositories) == 1
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    printed = capfd.readouterr()
    assert "loss" in printed.out and CANARY not in printed.out + printed.err + caplog.text
    assert hub.repositories["someone/tiny-dflash"].commits and CANARY.encode() not in hub.received()


# -- names and links --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere_is_no_hub_id(tmp_path, capsys, made, name):
    with pytest.raises(ValueError, match="cannot be the name of a repository"):
        validate_repo_id(name)
    assert hub_id_of(name) is None
    for setting in ("hub_target_id", "dataset_id"):
        with pytest.raises(ValueError, match=f"`{setting}` must be a Hub id, ORG/NAME, got '{name}'"):
            DraftSFTConfig(str(tmp_path), **{setting: name})
    assert main(["export", "--drafter", str(made / "dflash"), "--output", str(tmp_path / "e"), "--repo-id", name]) == 2
    assert main(["push", "--drafter", str(made / "export"), "--repo-id", name]) == 2
    assert not (tmp_path / "e").exists()


SHARDS = (
    "../secret.safetensors",
    "/tmp/secret.safetensors",
    "a/b.safetensors",
    ".hidden.safetensors",
    "~x.safetensors",
    "x.bin",
)


@pytest.mark.parametrize("shard", SHARDS)
def test_an_index_that_names_a_file_elsewhere_is_refused_for_drafter_and_target(copy, shard):
    for name, tensor, read in (
        ("dflash", "fc.weight", AutoDrafter.from_pretrained),
        ("target", "model.embed_tokens.weight", read_target),
    ):
        folder = copy(name)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {tensor: shard}}))
        with pytest.raises(ValueError, match="which is not a plain .*file name"):
            read(folder)


@pytest.mark.parametrize(
    "kind, read, name",
    [
        ("dflash", AutoDrafter.from_pretrained, "config.json"),
        ("dflash", AutoDrafter.from_pretrained, "model.safetensors"),
        ("target", read_target, "model.safetensors"),
    ],
)
def test_a_link_out_of_a_folder_is_refused(copy, tmp_path, kind, read, name):
    folder = copy(kind)
    os.rename(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name}' is a link to '{tmp_path}/elsewhere', outside of its folder"):
        read(folder)


def test_links_of_the_hubs_cache_and_links_inside_a_folder_are_followed(copy, tmp_path):
    folder = copy("dflash")
    snapshot, blobs = tmp_path / "models--org--d" / "snapshots" / "abc", tmp_path / "models--org--d" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for path in list(folder.iterdir()):
        shutil.copy(path, blobs / f"{path.name}-blob")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{path.name}-blob")
    AutoDrafter.from_pretrained(snapshot)
    os.rename(folder / "model.safetensors", folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    AutoDrafter.from_pretrained(folder)


def test_a_link_out_of_a_store_is_refused(target, tmp_path):
    sampling = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
    origin = Origin.of(target, sampling=sampling, max_completion_length=8)
    store = ResponseStore.open(tmp_path / "store", origin)
    store.add([([9, 10], [11, 12], None, "length")])
    for path in sorted(store.path.iterdir()):
        os.rename(path, tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f"{path.name} is a link to .*elsewhere', outside of its folder"):
            ResponseStore.open(store.path, origin)
        path.unlink()
        os.rename(tmp_path / "elsewhere", path)
    assert len(ResponseStore.open(store.path, origin)) == 1


def test_links_are_not_uploaded_with_an_export_or_a_checkpoint(copy, tmp_path, hub):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "diary.json").write_text('{"dear": "diary"}')
    folder, checkpoint = copy("export"), copy("dflash")
    (folder / "training_curve.png").symlink_to(secret / "diary.json")
    (checkpoint / "state.json").symlink_to(secret / "diary.json")
    (checkpoint / "more").symlink_to(secret, target_is_directory=True)
    push_folder(
        folder, "someone/tiny-eagle3", token=CANARY, extra_folders={"last-checkpoint": resumable_files(checkpoint)}
    )
    assert b"diary" not in hub.received()
    assert "last-checkpoint/config.json" in hub.repositories["someone/tiny-eagle3"].branches["main"]


# -- helpers ----------------------------------------------------------------------------------------------------------


def rows():
    return Dataset.from_list([{"prompt": f"w{i} w9", "completion": "w20 w21 w22"} for i in range(8, 10)])


def settings(folder, **changes):
    options = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    options |= {"disable_tqdm": True, "max_completion_length": 8, "per_device_train_batch_size": 2}
    return DraftSFTConfig(str(folder), **options | changes)


def make_trainer(target, folder, rows=None, processing_class=None, **changes):
    drafter = make_drafter("dflash", make_target())
    data = Dataset.from_list(rows) if rows else globals()["rows"]()
    return DraftSFTTrainer(drafter, target, settings(folder, **changes), data, processing_class=processing_class)
