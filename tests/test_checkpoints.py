# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A saved drafter is the same drafter: same outputs bit for bit, published names, float32, and nothing of the target.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import VOCAB, make_drafter, make_target
from trl_draft_opd import AutoDrafter, DFlashDraftModel, Eagle3DraftModel
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.drafters.draft_vocabulary import build_draft_vocabulary


TARGET = make_target("llama")
VOCABULARY = build_draft_vocabulary(torch.arange(VOCAB), 20, always_include=(2,))
CASES = {
    "eagle3": ("eagle3", {}),
    "eagle3 reduced": ("eagle3", {"draft_vocabulary": VOCABULARY}),
    "eagle3.1": ("eagle3", {"fc_norm": True, "norm_output": True, "target_layer_ids": [0, 2, 6]}),
    "dflash": ("dflash", {}),
    "dflash one layer": ("dflash", {"num_hidden_layers": 1, "block_size": 3, "target_layer_ids": [2, 5]}),
}
ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
EAGLE3_NAMES = {
    "fc.weight",
    "lm_head.weight",
    "norm.weight",
    *[f"midlayer.{name}" for name in ATTENTION + MLP],
    *[f"midlayer.{name}.weight" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")],
}
DFLASH_LAYER = [
    *ATTENTION,
    *MLP,
    *[
        f"{name}.weight"
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm")
    ],
]
NAMES = {
    "eagle3": EAGLE3_NAMES,
    "eagle3 reduced": EAGLE3_NAMES | {"d2t", "t2d"},
    "eagle3.1": EAGLE3_NAMES | {f"fc_norm.{i}.weight" for i in range(3)},
    "dflash": {
        "fc.weight",
        "hidden_norm.weight",
        "norm.weight",
        *[f"layers.{i}.{n}" for i in range(2) for n in DFLASH_LAYER],
    },
    "dflash one layer": {"fc.weight", "hidden_norm.weight", "norm.weight", *[f"layers.0.{n}" for n in DFLASH_LAYER]},
}


def make(case):
    """A drafter whose weights, norms included, are no constants."""
    family, options = CASES[case]
    drafter = make_drafter(family, TARGET, **options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return drafter


def run(drafter):
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(4, VOCAB, (2, 9), generator=generator)
    features = (
        TARGET.read_text(input_ids, torch.ones_like(input_ids), drafter.config.target_layer_ids).padded().features
    )
    drafts = torch.randint(4, VOCAB, (2, 3, drafter.default_num_drafts), generator=generator)
    anchors = torch.tensor([[1, 5, 8], [2, 3, 7]])
    with torch.no_grad():
        return run_blocks(drafter, features, input_ids, anchors, drafts, TARGET.embed)


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_drafter_gives_the_same_outputs_bit_for_bit(case, tmp_path):
    drafter = make(case)
    expected = run(drafter)
    drafter.save_pretrained(tmp_path)
    for cls in (type(drafter), AutoDrafter):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is type(drafter) and not loaded.training
        assert torch.equal(run(loaded), expected)
        own, other = drafter.state_dict(), loaded.state_dict()
        assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
        assert loaded.config.to_diff_dict() == drafter.config.to_diff_dict()


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_float32_under_the_published_names_and_no_embedding(case, tmp_path):
    make(case).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == NAMES[case]
    maps = {"d2t": torch.int64, "t2d": torch.bool}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        name: maps.get(name, torch.float32) for name in NAMES[case]
    }
    # DFlash drafts through the target's head, EAGLE-3 through its own.
    largest = max(tensor.shape[0] for name, tensor in tensors.items() if name not in ("lm_head.weight", "d2t", "t2d"))
    assert largest < VOCAB


@pytest.mark.parametrize("case", CASES)
def test_saving_again_writes_the_same_bytes(case, tmp_path):
    make(case).save_pretrained(tmp_path / "first")
    AutoDrafter.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize(
    ("case", "architecture"), [("eagle3", "LlamaForCausalLMEagle3"), ("dflash", "DFlashDraftModel")]
)
def test_the_config_names_the_class_and_layers_that_engines_look_for(case, architecture, tmp_path):
    drafter = make(case)
    drafter.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [architecture] and config["torch_dtype"] == "float32"
    ids = drafter.config.target_layer_ids
    if case == "eagle3":
        assert config["eagle_aux_hidden_state_layer_ids"] == [i + 1 for i in ids]
    else:
        assert config["target_layer_ids"] == config["dflash_config"]["target_layer_ids"] == ids


@pytest.mark.parametrize("case", ["eagle3", "dflash"])
def test_a_lower_precision_is_asked_for_and_leaves_the_rotary_frequencies_alone(case, tmp_path):
    drafter = make(case)
    drafter.save_pretrained(tmp_path)
    loaded = AutoDrafter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.fc.weight, drafter.fc.weight.bfloat16())
    assert torch.equal(loaded.rotary_emb.inv_freq, drafter.rotary_emb.inv_freq)
    assert loaded.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(("case", "cls"), [("eagle3", DFlashDraftModel), ("dflash", Eagle3DraftModel)])
def test_the_other_familys_class_refuses(case, cls, tmp_path):
    make(case).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"holds a {case} drafter.*AutoDrafter\.from_pretrained"):
        cls.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_all_listed(tmp_path):
    make("dflash").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["extra.weight"] = tensors.pop("norm.weight")
    tensors["fc.weight"] = tensors["fc.weight"][:, 1:].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"'norm.weight' is missing; 'extra.weight' is unexpected; 'fc.weight' has shape .* Check that",
    ):
        DFlashDraftModel.from_pretrained(tmp_path)
