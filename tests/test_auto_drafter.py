# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""`AutoDrafter` finds the family by itself and hands every argument on."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trl_draft_opd import (
    AutoDrafter,
    DFlashDraftConfig,
    DFlashDraftModel,
    Eagle3DraftConfig,
    Eagle3DraftModel,
)


SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "target_layer_ids": [1, 3, 4],
    "num_target_layers": 8,
}


def save(family, folder):
    if family == "eagle3":
        drafter = Eagle3DraftModel(Eagle3DraftConfig(**SHAPE))
    else:
        drafter = DFlashDraftModel(DFlashDraftConfig(**SHAPE, num_hidden_layers=2, block_size=4, mask_token_id=31))
    drafter.save_pretrained(folder)
    return drafter


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("family", "cls"), [("eagle3", Eagle3DraftModel), ("dflash", DFlashDraftModel)])
def test_the_class_follows_from_the_checkpoint(tmp_path, family, cls):
    drafter = save(family, tmp_path)
    loaded = AutoDrafter.from_pretrained(tmp_path)
    assert type(loaded) is cls
    own, other = drafter.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert loaded.config.to_diff_dict() == drafter.config.to_diff_dict()


def test_every_argument_reaches_the_class(tmp_path):
    drafter = save("eagle3", tmp_path / "inner")
    edit_config(
        tmp_path / "inner",
        architectures=["LlamaForCausalLM"],
        eagle_config=None,
        eagle_aux_hidden_state_layer_ids=None,
        num_target_layers=None,
    )
    weights = tmp_path / "inner" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "inner" / "pytorch_model.bin")
    weights.unlink()
    loaded = AutoDrafter.from_pretrained(
        tmp_path, subfolder="inner", num_target_layers=24, allow_pickle_weights=True, dtype=torch.bfloat16
    )
    assert loaded.config.target_layer_ids == [1, 11, 20] and loaded.config.num_target_layers == 24
    assert torch.equal(loaded.fc.weight, drafter.fc.weight.bfloat16())
    with pytest.raises(ValueError, match="num_target_layers=N"):
        AutoDrafter.from_pretrained(tmp_path, subfolder="inner", allow_pickle_weights=True)
    with pytest.raises(ValueError, match="allow_pickle_weights=True"):
        AutoDrafter.from_pretrained(tmp_path, subfolder="inner", num_target_layers=24)


def test_arguments_for_the_hub_reach_the_class(tmp_path, monkeypatch):
    save("dflash", tmp_path)
    received = {}
    monkeypatch.setattr(DFlashDraftModel, "from_pretrained", lambda name, **options: received.update(options))
    hub = {"revision": "v1", "token": "t", "cache_dir": "c", "local_files_only": True}
    AutoDrafter.from_pretrained(tmp_path, **hub)
    assert {key: received[key] for key in hub} == hub


def test_the_signature_is_that_of_the_classes_and_the_drafter_under_an_adapter():
    parameters = dict(inspect.signature(AutoDrafter.from_pretrained).parameters)
    del parameters["base"]
    assert parameters == dict(inspect.signature(DFlashDraftModel.from_pretrained).parameters)


def test_a_variant_that_is_not_supported_is_named(tmp_path):
    save("dflash", tmp_path)
    edit_config(tmp_path, architectures=["DominoDraftModel"])
    with pytest.raises(ValueError, match="'DominoDraftModel' is not supported: Domino"):
        AutoDrafter.from_pretrained(tmp_path)


def test_a_head_tied_to_an_embedding_is_not_made_up(tmp_path):
    save("eagle3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["embed_tokens.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="'lm_head.weight' is missing"):
        AutoDrafter.from_pretrained(tmp_path)


def test_auto_drafter_itself_cannot_be_made():
    with pytest.raises(TypeError, match=r"AutoDrafter\.from_pretrained"):
        AutoDrafter()
