# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Exported folders: every layout holds the drafter bit for bit, or is refused before anything is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_published_checkpoints import LAYOUTS, H, V, eagle3, randomise, write

from helpers.tiny import make_causal_lm, make_drafter, make_target
from trl_draft_opd import AutoDrafter, build_draft_vocabulary
from trl_draft_opd.export import TargetOfExport, export_drafter, read_target
from trl_draft_opd.export import write as write_module
from trl_draft_opd.export.rules import check_folder


IDS = "eagle_aux_hidden_state_layer_ids"
_SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
# By name: the family, the settings that differ from `make_drafter`'s, and the layouts that cannot hold it.
VARIANTS = {
    "eagle3": ("eagle3", {}, {"transformers"}),
    "eagle3-reduced": ("eagle3", {}, {"transformers"}),
    "eagle3-norms": ("eagle3", {"fc_norm": True, "norm_output": True}, {"transformers"}),
    "eagle3-four": ("eagle3", {"target_layer_ids": [1, 2, 3, 4]}, {"transformers"}),
    "dflash": ("dflash", {}, set()),
    "dflash-reduced": ("dflash", {}, {"transformers"}),
    "dflash-windows": ("dflash", _SLIDING, {"transformers"}),
    "dflash-mixed": ("dflash", _MIXED, {"transformers"}),
    "dflash-causal": ("dflash", {"is_causal": True}, {"transformers", "speculators"}),
    "dflash-causal-windows": ("dflash", _SLIDING | {"is_causal": None}, {"transformers"}),
    "dflash-causal-mixed": ("dflash", _MIXED | {"is_causal": None}, {"transformers", "speculators"}),
    "dflash-sinks": ("dflash", {"attention_sinks": True}, {"transformers", "speculators"}),
    "dflash-scaled": ("dflash", {"attention_value_scale": 0.5}, {"transformers", "speculators"}),
    "dflash-anchor": ("dflash", {"sample_from_anchor": True, "block_size": 4}, {"transformers"}),
    "dspark": ("dspark", {}, {"transformers"}),
    "dspark-anchor": ("dspark", {"sample_from_anchor": True, "block_size": 4}, {"transformers"}),
    "dspark-reduced": ("dspark", {}, {"transformers"}),
    "dspark-bare": ("dspark", {"markov_rank": 0, "enable_confidence_head": False}, {"transformers"}),
    "dspark-sliding": ("dspark", _MIXED | {"confidence_head_with_markov": False}, {"transformers"}),
    "dflash2": ("dflash2", {}, {"transformers"}),
    "dflash2-anchor": ("dflash2", {"sample_from_anchor": True, "block_size": 4}, {"transformers"}),
    "dflash2-sliding": ("dflash2", _SLIDING, {"transformers"}),
}


def make_variant(variant, target):
    """Return a drafter with four drafts whose weights bfloat16 holds exactly, each tensor with values of its own."""
    family, changes, _ = VARIANTS[variant]
    drafter = make_drafter(family, target)
    settings = {name: getattr(drafter.config, name) for name in drafter.config.own_settings()} | changes
    if not settings.get("enable_confidence_head", True):
        settings["confidence_head_with_markov"] = False
    drafter = type(drafter)(type(drafter.config)(**settings)).eval()
    if variant.endswith("-reduced"):
        drafter.reduce_vocabulary(build_draft_vocabulary(torch.arange(1, 65), 24, target.eos_token_ids), target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(parameter.normal_().bfloat16())
    return drafter


def shape_of(drafter):
    """Return the settings that decide what a drafter computes."""
    not_written = {"bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "target_model_name_or_path"}
    return {name: getattr(drafter.config, name) for name in drafter.config.own_settings() if name not in not_written}


def export(drafter, target, folder, **options):
    return export_drafter(
        drafter,
        folder,
        target=TargetOfExport("org/target", target.causal_lm.config, target.causal_lm.get_input_embeddings().weight),
        **options,
    )


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_of_an_export_gives_the_drafter_back_bit_for_bit(tmp_path, target, variant):
    drafter = make_variant(variant, target)
    result = export(drafter, target, tmp_path / "out", repo_id="org/tiny-" + drafter.config.exported.word)
    assert set(result.refused) == VARIANTS[variant][2]
    assert set(result.layouts) == {"flat", "speculators", "transformers"} - set(result.refused)
    own = drafter.state_dict()
    for folder in result.layouts.values():
        loaded = AutoDrafter.from_pretrained(folder)
        assert loaded.state_dict().keys() == own.keys()
        assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())
        assert shape_of(loaded) == shape_of(drafter)
        assert loaded.default_num_drafts == drafter.default_num_drafts
        assert loaded.config.target_model_name_or_path == "org/target"
        assert check_folder(folder, TargetOfExport(config=target.causal_lm.config)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_public_drafter_comes_through_import_and_export_unchanged(tmp_path, layout):
    build, publish = LAYOUTS[layout]
    drafter = build()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(parameter.bfloat16())
    public = write(tmp_path / "public", *publish(drafter))
    embedding = torch.randn(V, H).bfloat16()
    options = {"target": TargetOfExport("org/target", embedding=embedding)}
    result = export_drafter(AutoDrafter.from_pretrained(public), tmp_path / "first", **options)
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    if drafter.config.family == "eagle3":
        assert torch.equal(tensors.pop("embed_tokens.weight"), embedding)
    assert tensors.keys() == drafter.state_dict().keys()
    assert all(torch.equal(tensor, drafter.state_dict()[name].to(tensor.dtype)) for name, tensor in tensors.items())
    for name, folder in result.layouts.items():
        export_drafter(AutoDrafter.from_pretrained(folder), tmp_path / f"again-{name}", **options)
        for file in ("config.json", "model.safetensors"):
            again = (tmp_path / f"again-{name}" / file).read_bytes()
            assert again == (tmp_path / "first" / file).read_bytes(), (name, file)


def test_weights_are_bfloat16_and_the_embedding_a_byte_copy(tmp_path, target):
    drafter = make_drafter("eagle3", target)
    embedding = target.causal_lm.get_input_embeddings().weight
    export(drafter, target, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["embed_tokens.weight"].dtype == embedding.dtype
    assert torch.equal(tensors.pop("embed_tokens.weight"), embedding)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors["fc.weight"], drafter.fc.weight.bfloat16())
    modes = {(tmp_path / "out" / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1
    # An export in another precision is possible, and does not keep the rules.
    export(drafter, target, tmp_path / "wide", to="flat", dtype=torch.float32)
    assert torch.equal(load_file(tmp_path / "wide" / "model.safetensors")["fc.weight"], drafter.fc.weight)
    assert [problem[:2] for problem in check_folder(tmp_path / "wide")] == ["C6", "C6"]


@pytest.mark.parametrize("to", ["flat", "speculators", "transformers"])
def test_one_layout_alone_stands_at_the_root(tmp_path, target, to):
    result = export(make_variant("dflash", target), target, tmp_path / "out", to=to)
    assert result.layouts == {to: tmp_path / "out"} and result.refused == {}
    assert check_folder(tmp_path / "out") == []
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "README.md"} <= held and not held & {"speculators", "transformers"}


@pytest.mark.parametrize(
    "variant, to, changes, message",
    [
        ("eagle3", "transformers", {}, "transformers has no class for EAGLE-3"),
        ("eagle3", "speculators", {"hub_id": None}, "only a Hub id says where"),
        ("eagle3", "flat", {"embedding": None}, "copy of its target's embedding"),
        ("eagle3", "all", {"embedding": torch.zeros(64, 31)}, "this drafter's target has"),
        ("dflash", "onnx", {}, "`to` must be one of"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_with_the_reason(tmp_path, target, variant, to, changes, message):
    facts = {"hub_id": "org/target", "embedding": target.causal_lm.get_input_embeddings().weight} | changes
    with pytest.raises(ValueError, match=message):
        export_drafter(make_variant(variant, target), tmp_path / "out", to=to, target=TargetOfExport(**facts))
    assert list(tmp_path.iterdir()) == []


def test_a_target_with_scaled_embeddings_is_refused_for_engines(tmp_path):
    target = make_target("gemma2")
    with pytest.raises(ValueError, match="scales its embeddings"):
        export(make_drafter("dflash", target), target, tmp_path / "out", to="flat")
    # transformers hands the drafter what it was trained on.
    export(make_drafter("dflash", target), target, tmp_path / "native", to="transformers")


def test_another_target_than_the_drafters_own_is_refused(tmp_path, target):
    drafter = make_drafter("dflash", target)
    config = make_causal_lm().config
    config.num_hidden_layers = 9
    with pytest.raises(ValueError, match="made for another target.*num_hidden_layers"):
        export_drafter(drafter, tmp_path / "out", target=TargetOfExport(config=config))


def test_weights_that_are_not_finite_are_never_written(tmp_path, target):
    drafter = make_drafter("dflash", target)
    with torch.no_grad():
        drafter.fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'fc.weight' holds values that are not finite"):
        export(drafter, target, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path, target):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds \['thesis.tex'\], which no export wrote"):
        export(make_drafter("dflash", target), target, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_checkpoint_is_not_taken_for_an_earlier_export(tmp_path, target):
    drafter = make_drafter("dflash", target)
    drafter.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="which no export wrote"):
        export(drafter, target, tmp_path / "out")


def test_an_export_that_fails_midway_leaves_the_earlier_one_as_it_was(tmp_path, target, monkeypatch):
    drafter = make_variant("dflash", target)
    export(drafter, target, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def fail(*arguments, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(write_module, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        export(drafter, target, tmp_path / "out")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path, target):
    export(make_variant("dflash", target), target, tmp_path / "out")
    export(make_variant("eagle3", target), target, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())[IDS] == [2, 4, 5]
    # DFlash's native layout went with its drafter.
    assert not (tmp_path / "out" / "transformers").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- where an export starts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_embedding_of_a_target_is_read_without_building_it(tmp_path, kind, is_sharded):
    model = make_causal_lm(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if is_sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() is is_sharded
    found = read_target(tmp_path, target_id="org/target")
    assert torch.equal(found.embedding, model.get_input_embeddings().weight)
    assert found.config.num_hidden_layers == 8 and found.hub_id == "org/target"
    # A path of this machine is no id.
    assert read_target(tmp_path).hub_id is None


def test_a_pickled_target_is_refused_before_it_is_opened(tmp_path):
    model = make_causal_lm()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors files alone"):
        read_target(tmp_path)


def test_two_tensors_that_could_be_the_embedding_are_named(tmp_path):
    model = make_causal_lm()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"vision.embed_tokens.weight": torch.zeros(64, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'model.embed_tokens.weight', 'vision.embed_tokens.weight'"):
        read_target(tmp_path)


def test_an_adapter_is_merged_before_it_is_exported(tmp_path, target):
    from peft import LoraConfig, PeftModel, get_peft_model

    drafter = make_drafter("eagle3", target)
    drafter.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(drafter, LoraConfig(target_modules=["q_proj", "fc"], r=2, init_lora_weights=False))
    assert isinstance(adapted, PeftModel)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    merged = AutoDrafter.from_pretrained(tmp_path / "adapter")
    base = AutoDrafter.from_pretrained(tmp_path / "base")
    layer = adapted.base_model.model.fc
    wanted = base.fc.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(merged.fc.weight, wanted)
    assert not torch.equal(merged.fc.weight, base.fc.weight)
    assert torch.equal(merged.midlayer.mlp.up_proj.weight, base.midlayer.mlp.up_proj.weight)
    assert merged.state_dict().keys() == base.state_dict().keys()


def test_an_adapter_that_names_no_drafter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no `base_model_name_or_path`"):
        AutoDrafter.from_pretrained(tmp_path)


def test_unknown_tensors_of_an_imported_drafter_are_listed(tmp_path):
    drafter = randomise(eagle3())
    config, tensors = LAYOUTS["specforge"][1](drafter)
    write(tmp_path, config, tensors | {"midlayer.gate.weight": torch.zeros(3), "mystery": torch.zeros(2)})
    with pytest.raises(ValueError, match="'midlayer.gate.weight' is unexpected; 'mystery' is unexpected"):
        AutoDrafter.from_pretrained(tmp_path)
