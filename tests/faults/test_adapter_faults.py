# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Adapters of a drafter and of a target pass one strict loader, and so do whole drafters: whatever does not fit is a
sentence, and nothing is filled up, left out or waited for.
"""

import json
import shutil
from time import monotonic

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.tiny import make_causal_lm, make_drafter, make_target, make_tokenizer
from trl_draft_opd import AutoDrafter, FrozenTarget


KINDS = ("drafter", "target")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Adapters of both kinds, as PEFT saves them, each with its base beside it."""
    place = tmp_path_factory.mktemp("made")
    bases = {"drafter": make_drafter("dflash", make_target()), "target": make_causal_lm("llama")}
    for kind, base in bases.items():
        base.save_pretrained(place / kind / "base")
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        adapted.peft_config["default"].base_model_name_or_path = str(place / kind / "base")
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1
        adapted.save_pretrained(place / kind / "adapter")
    return place


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def adapter(made, kind, tmp_path):
    return shutil.copytree(made / kind / "adapter", tmp_path / "adapter")


def load(kind, folder):
    if kind == "drafter":
        return AutoDrafter.from_pretrained(folder).state_dict()
    return FrozenTarget.load(folder, tokenizer=make_tokenizer()).causal_lm.state_dict()


def state(folder, **changes):
    """Change the config of an adapter."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | changes))


def refuses(kind, folder, pattern, error=ValueError):
    with pytest.raises(error, match=pattern):
        load(kind, folder)


def test_an_adapter_as_it_was_saved_loads_as_its_sum(made, adapter, kind):
    tensors, base = load_file(adapter / WEIGHTS), load_file(made / kind / "base" / "model.safetensors")
    name = next(name for name in base if name.endswith(f"0.{QUERY}.weight"))
    down, up = (
        next(tensor for key, tensor in tensors.items() if key.endswith(f"0.{QUERY}.lora_{part}.weight"))
        for part in "AB"
    )
    assert torch.allclose(load(kind, adapter)[name], base[name] + 4 * up @ down, atol=1e-6)


# -- its weights ------------------------------------------------------------------------------------------------------


def change(tensors, fault):
    name = next(name for name in sorted(tensors) if f"{QUERY}.lora_B" in name)
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors[name.replace("q_proj", "z_proj")] = tensors[name] + 1
    elif fault == "of another shape":
        tensors[name] = tensors[name][:-1].clone()
    elif fault == "of another type":
        tensors[name] = tensors[name].long()
    elif fault in ("nan", "inf"):
        tensors[name][-1, -1] = float(fault)
    else:
        tensors.clear()


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("missing", r"lora_B.weight' is missing\. Check that the base"),
        ("unexpected", r"z_proj.lora_B.weight' is unexpected\. Check"),
        ("of another shape", r"lora_B.weight' has shape \(\d+, 2\), not \(\d+, 2\)"),
        ("of another type", "lora_B.weight' has type torch.int64, which is no floating-point weight"),
        ("nan", "lora_B.weight' holds NaN or infinite values; the checkpoint is damaged"),
        ("inf", "lora_B.weight' holds NaN or infinite values; the checkpoint is damaged"),
        ("none at all", "is the rank of no tensor beside it"),
    ],
)
def test_a_weight_of_an_adapter_that_does_not_fit_is_named(adapter, kind, fault, pattern):
    tensors = load_file(adapter / WEIGHTS)
    change(tensors, fault)
    save_file(tensors, adapter / WEIGHTS)
    refuses(kind, adapter, pattern)


def test_an_adapter_of_another_model_is_refused(made, adapter, kind):
    other = {"drafter": "target", "target": "drafter"}[kind]
    shutil.copy(made / other / "adapter" / WEIGHTS, adapter / WEIGHTS)
    refuses(kind, adapter, "do not fit its config and the model under it: 'base_model.model")


def test_a_torn_file_of_weights_is_named(adapter, kind):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: len(content) // 2])
    refuses(kind, adapter, f"{WEIGHTS}' is no whole safetensors file")


def test_pickled_weights_of_an_adapter_are_not_read(adapter, kind):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refuses(kind, adapter, "Adapters are read from safetensors alone, because pickled ones", FileNotFoundError)


# -- its config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"peft_type": "MAGIC"}, "has peft_type='MAGIC'; LoRA adapters alone are read. Merge another kind"),
        ({"peft_type": "IA3"}, "has peft_type='IA3'; LoRA adapters alone"),
        ({"peft_type": None}, "has peft_type=None; LoRA adapters alone"),
        ({"peft_type": ["LORA"]}, r"has peft_type=\['LORA'\]"),
        ({"lora_alpha": float("nan")}, "has lora_alpha=nan; every number must be finite"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "has alpha_pattern.q_proj=inf; every number must be finite"),
        ({"lora_alpha": "8"}, "has lora_alpha='8'; it must be a number"),
        ({"r": 10**9}, "has r=1000000000, which is the rank of no tensor beside it"),
        ({"r": 0}, "has r=0, which is the rank of no tensor"),
        ({"r": -2}, "has r=-2, which is the rank of no tensor"),
        ({"r": 2.5}, "has r=2.5, which is the rank of no tensor"),
        ({"r": 3}, r"lora_A.weight' has shape \(2, 32\), not \(3, 32\)"),
        ({"rank_pattern": {"q_proj": 10**9}}, "has rank_pattern.q_proj=1000000000, which is the rank of no"),
        ({"rank_pattern": 5}, "has rank_pattern=5; it must be an object"),
        ({"modules_to_save": 5}, "has modules_to_save=5; it must name layers"),
        ({"target_modules": ["z_proj"]}, "does not fit a .*z_proj"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "k_proj.lora_A.weight' is missing; '"),
        ({"target_modules": ["q_proj"]}, r"v_proj.lora_A.weight' is unexpected"),
        ({"target_modules": "(q_proj"}, r"has target_modules='\(q_proj', which is no regular expression"),
        ({"target_modules": 5}, "does not fit a"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa', which rewrites the model's own weights"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, r"sets \['megatron_config'\], which is not"),
        ({"layer_replication": [[0, 2]]}, r"sets \['layer_replication'\], which is not respected here"),
        ({"a_later_setting": 3}, r"sets \['a_later_setting'\], which is not respected here"),
        ({"base_model_name_or_path": 5}, "has base_model_name_or_path=5; it must be a string or null"),
        ({"revision": ["x"]}, r"has revision=\['x'\]; it must be a string or null"),
        ({"base_model_name_or_path": None}, "names no `base_model_name_or_path`"),
        ({"base_model_name_or_path": ""}, "names no `base_model_name_or_path`"),
    ],
    ids=str,
)
def test_a_setting_of_an_adapter_that_does_not_fit_is_named(adapter, kind, changes, pattern):
    state(adapter, **changes)
    refuses(kind, adapter, pattern)


@pytest.mark.parametrize("content", ["[]", "{", "null", '{"r": 1e999, "peft_type": "LORA"}', "[" * 100_000])
def test_an_adapters_config_that_is_no_object_of_finite_numbers_is_named(adapter, kind, content):
    (adapter / CONFIG).write_text(content)
    refuses(kind, adapter, rf"{CONFIG} of .* (holds no JSON object|is not valid JSON|has r=inf)")


# The first two take Python's own matcher years, the last one the other too.
HOSTILE = (r"(([a-z_.0-9]+)+)+!", r"(a|a|[a-z._0-9])*!", r"(?:[a-z_.0-9]|[a-z_.0-9]{2})*[!?]")


@pytest.mark.parametrize("pattern", HOSTILE)
def test_an_expression_that_takes_years_to_match_is_refused_in_seconds(adapter, kind, pattern, monkeypatch):
    monkeypatch.setattr("trl_draft_opd.drafters.published.adapter._MATCHING_TIME", 0.2)
    start = monotonic()
    state(adapter, target_modules=pattern)
    refuses(kind, adapter, "has target_modules=.*which (takes too long to match. List|no layer of a .* matches)")
    state(adapter, target_modules=["q_proj", "v_proj"], exclude_modules=pattern)
    if pattern == HOSTILE[-1]:
        refuses(kind, adapter, "has exclude_modules=.*which takes too long to match. List the names of the layers")
    else:
        load(kind, adapter)
    assert monotonic() - start < 30


@pytest.mark.parametrize("setting", ["modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern"])
def test_a_name_that_peft_would_match_as_an_expression_is_plain(adapter, kind, setting):
    pattern = "(([a-z.]+)+)+!"
    state(adapter, **{setting: {pattern: 2} if setting.endswith("k_pattern") or "alpha" in setting else [pattern]})
    refuses(kind, adapter, rf"has {setting}='\(\(.*which is no name of a layer. Write names in full")


# -- its base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["{0}", "{0}/.", "{0}/../adapter"])
def test_an_adapter_that_names_itself_as_its_base_is_refused(adapter, kind, spelling):
    state(adapter, base_model_name_or_path=spelling.format(adapter))
    refuses(kind, adapter, "An adapter's base leads back to it: '.*adapter' -> '.*adapter")


def test_adapters_that_name_each_other_as_their_base_are_refused(adapter, kind, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    state(adapter, base_model_name_or_path=str(other))
    state(other, base_model_name_or_path=str(adapter))
    refuses(kind, adapter, "leads back to it: '.*adapter' -> '.*other' -> '.*adapter'")


def test_a_base_without_weights_is_said_with_whose_base_it_is(adapter, kind, tmp_path):
    (tmp_path / "empty").mkdir()
    state(adapter, base_model_name_or_path=str(tmp_path / "empty"))
    refuses(kind, adapter, "adapter' was trained on '.*empty', which cannot be loaded", FileNotFoundError)


# -- whole drafters ---------------------------------------------------------------------------------------------------


@pytest.fixture
def drafter(tmp_path):
    make_drafter("eagle3", make_target()).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["rms_norm_eps", "hidden_size", "an_unread_key"])
@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_a_number_of_a_drafters_config_that_is_not_finite_is_named(drafter, name, value):
    config = json.loads((drafter / "config.json").read_text("utf-8")) | {name: "HERE"}
    (drafter / "config.json").write_text(json.dumps(config).replace('"HERE"', value))
    with pytest.raises(ValueError, match=f"config.json of .* has {name}=-?(nan|inf); every number must be finite"):
        AutoDrafter.from_pretrained(drafter)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("rms_norm_eps", value) for value in ("1e-6", -1.0, 0, [], True)],
        *[("rope_theta", value) for value in ("1e6", -1.0, 0, [1], True)],
        *[("initializer_range", value) for value in ("0.02", -0.1, [])],
        *[("hidden_act", value) for value in ("no_such_act", 5, ["silu"])],
        *[
            ("rope_scaling", value)
            for value in ({"rope_type": "no_such_type"}, {"rope_type": "linear", "factor": "x"})
        ],
        *[("max_position_embeddings", value) for value in (0, -1, 1.5, "256")],
        *[("target_model_name_or_path", value) for value in (5, ["org/target"])],
        *[("architectures", value) for value in (5, "DFlashDraftModel", [["DFlashDraftModel"]], [])],
        *[(name, value) for name in ("eos_token_id", "bos_token_id", "pad_token_id") for value in ("2", 1.5, {})],
    ],
    ids=str,
)
def test_a_value_of_a_drafters_config_of_the_wrong_kind_is_a_sentence(drafter, name, value):
    config = json.loads((drafter / "config.json").read_text("utf-8")) | {name: value}
    if name in ("rope_theta", "rope_scaling"):
        config.pop("rope_parameters")
        config.pop({"rope_theta": "rope_scaling", "rope_scaling": "rope_theta"}[name])
    (drafter / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"config.json has .*(must be|does not know)|Unknown drafter architecture None"
    ):
        AutoDrafter.from_pretrained(drafter)
