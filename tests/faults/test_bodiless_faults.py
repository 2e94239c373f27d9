# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Faults in the files of a target that is loaded without its body: a sentence each, with what is wrong and the fix.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.tiny import make_causal_lm, make_drafter, make_target, make_tokenizer
from trl_draft_opd import FrozenTarget


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("target")
    make_causal_lm("llama").save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def rewrite(path, change):
    tensors = change(load_file(path / WEIGHTS))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path / WEIGHTS)


def only_pickle(path):
    tensors = load_file(path / WEIGHTS)
    torch.save(tensors, path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()


def no_weights(path):
    (path / WEIGHTS).unlink()


def in_shards(path):
    (path / WEIGHTS).unlink()
    make_causal_lm("llama").save_pretrained(path, max_shard_size="40KB")


def shard_missing(path):
    in_shards(path)
    sorted(path.glob("*-00002-of-*.safetensors"))[0].unlink()


def name_in_no_shard(path):
    in_shards(path)
    index = json.loads((path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    place = index["weight_map"]["lm_head.weight"]
    index["weight_map"]["lm_head.weight"] = next(file for file in files if file != place)
    (path / INDEX).write_text(json.dumps(index))


def cut(path):
    whole = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def other_config(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 65}))


def without(name):
    return lambda path: rewrite(path, lambda tensors: {n: t for n, t in tensors.items() if n != name})


def with_nan(name):
    def change(tensors):
        tensors[name].view(-1)[-1] = float("nan")
        return tensors

    return lambda path: rewrite(path, change)


def with_more(path):
    rewrite(path, lambda tensors: tensors | {"model.vision.weight": torch.ones(2)})


def cut_generation_config(path):
    (path / "generation_config.json").write_text("{")


FAULTS = {
    "pickles alone": (only_pickle, r"no safetensors: its weights are in pytorch_model.bin.*save it again"),
    "no weights": (no_weights, r"no safetensors. Load it with its body and save it again"),
    "a shard is missing": (shard_missing, r"-00002-of-.*, which is missing. Download it again"),
    "a name in no shard": (name_in_no_shard, r"should have 'lm_head.weight' in .*where it is not. Save or download"),
    "a file cut short": (cut, r"is no whole safetensors file.*Download or save it again"),
    "another shape": (other_config, r"'lm_head.weight' .*has shape \(64, 32\), but.*have \(65, 32\)"),
    "no head": (without("lm_head.weight"), r"has no 'lm_head.weight', which by its config.json it should have"),
    "no norm": (without("model.norm.weight"), r"has no 'model.norm.weight'"),
    "no layer": (without("model.layers.3.mlp.up_proj.weight"), r"has no 'model.layers.3.mlp.up_proj.weight'"),
    "NaN in the embedding": (with_nan("model.embed_tokens.weight"), r"'model.embed_tokens.weight' holds NaN"),
    "NaN in the head": (with_nan("lm_head.weight"), r"'lm_head.weight' holds NaN"),
    "an unknown tensor": (with_more, r"holds 'model.vision.weight', which LlamaForCausalLM.*does not have"),
    "a damaged generation config": (cut_generation_config, r"generation_config.json.*not a valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_with_its_fix(folder, tmp_path, fault):
    damage, message = FAULTS[fault]
    path = copied(folder, tmp_path)
    damage(path)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        FrozenTarget.load(path, body=False)
    assert "\n" not in str(caught.value)


def test_another_shape_in_a_layer_is_named_where_the_fingerprint_is_taken(folder, tmp_path):
    path = copied(folder, tmp_path)
    name = "model.layers.3.mlp.up_proj.weight"
    rewrite(path, lambda tensors: tensors | {name: torch.ones(3, 32)})
    with pytest.raises(ValueError, match=rf"'{name}' .*has shape \(3, 32\), but by its config.json.*\(48, 32\)"):
        _ = FrozenTarget.load(path, body=False).weights_fingerprint


def test_an_adapter_is_refused_with_the_line_that_merges_it(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="makes the adapter")
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is a PEFT adapter.*python -c .*save_pretrained.*give the merged folder"):
        FrozenTarget.load(tmp_path / "adapter", body=False)


def test_a_drafter_and_a_folder_of_nothing_are_refused_as_with_a_body(tmp_path):
    make_drafter("dflash", make_target("llama")).save_pretrained(tmp_path / "drafter")
    (tmp_path / "empty").mkdir()
    for body in (True, False):
        with pytest.raises(ValueError, match="is a drafter, not a target"):
            FrozenTarget.load(tmp_path / "drafter", body=body)
        with pytest.raises(OSError, match=r"has no config.json"):
            FrozenTarget.load(tmp_path / "empty", body=body)
