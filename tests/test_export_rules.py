# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The rules of exported files: an export keeps all of them, and each is seen to be broken when it is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import VARIANTS, export, make_variant

from helpers.tiny import make_target
from trl_draft_opd.export import TargetOfExport
from trl_draft_opd.export.rules import check_folder


IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def target():
    return make_target()


@pytest.fixture(scope="module")
def exports(tmp_path_factory, target):
    """One export of each kind; tests work on copies of its files."""
    folder = tmp_path_factory.mktemp("exports")
    return {variant: export(make_variant(variant, target), target, folder / variant).layouts for variant in VARIANTS}


def changed(source, folder, config=None, tensors=None):
    """Write a copy of one layout with its config and tensors changed by two functions."""
    raw, held = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    if config is not None:
        config(raw)
    if tensors is not None:
        tensors(held)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "model.safetensors")
    return folder


def problems(folder, target):
    model = target.causal_lm
    return check_folder(folder, TargetOfExport(None, model.config, model.get_input_embeddings().weight))


def put(**entries):
    return lambda raw: raw.update(entries)


def drop(*names):
    return lambda raw: [raw.pop(name) for name in names]


def inside(section, **entries):
    return lambda raw: raw[section].update(entries)


def cast(dtype):
    def change(tensors):
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bfloat16:
                tensors[name] = tensor.to(dtype)

    return change


def stale_map(tensors):
    tensors["d2t"] = torch.zeros_like(tensors["d2t"])


def other_embedding(tensors):
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"] + 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_of_an_export_keeps_every_rule(exports, target, variant):
    for folder in exports[variant].values():
        assert problems(folder, target) == []


CONFIG_OFFENCES = [
    ("C1", "eagle3", "flat", put(architectures=["LlamaForCausalLM"])),
    ("C1", "eagle3", "flat", put(model_type="qwen3")),
    ("C1", "eagle3", "flat", drop("norm_output")),
    ("C1", "eagle3", "speculators", put(model_type="llama")),
    ("C1", "dflash", "speculators", inside("transformer_layer_config", num_key_value_heads=4)),
    ("C2", "eagle3", "flat", drop("eagle_config")),
    ("C2", "eagle3", "flat", drop(IDS)),
    ("C2", "dflash", "flat", drop("target_layer_ids")),
    ("C2", "eagle3", "flat", put(**{IDS: [2, 4, 8]}, eagle_config={IDS: [1, 3, 7]})),
    ("C2", "eagle3", "speculators", put(**{IDS: [2, 5, 4]})),
    ("C2", "dflash", "transformers", put(num_target_layers=12)),
    ("C3", "eagle3", "flat", drop("rope_theta", "rope_scaling")),
    ("C3", "dflash", "speculators", lambda raw: raw["transformer_layer_config"].pop("rope_parameters")),
    ("C4", "eagle3", "flat", put(tie_word_embeddings=True)),
    ("C5", "dflash", "flat", put(max_position_embeddings=128)),
    ("C6", "dflash", "flat", put(dtype="float16", torch_dtype="float16")),
    ("C7", "eagle3", "flat", put(num_experts=4)),
    ("C7", "dflash", "flat", put(auto_map={"AutoModel": "dflash.DFlashDraftModel"})),
    ("C8", "dflash", "flat", drop("is_causal")),
    ("C8", "dflash", "flat", drop("block_size")),
    ("C8", "dflash", "flat", drop("layer_types")),
    ("C8", "dflash", "flat", put(**{IDS: [2, 3, 4, 5, 6]})),
    ("C8", "dflash", "transformers", put(mask_token_id=64)),
    ("C1", "dspark", "flat", put(architectures=["DSparkDraftModel"])),
    ("C1", "dflash2", "speculators", put(model_type="qwen3")),
    ("C2", "dspark", "flat", put(target_layer_ids=[1, 2, 3, 4, 6], dflash_config=None)),
    ("files", "dflash-windows", "flat", put(is_causal="no")),
    ("files", "dflash-windows", "flat", put(sliding_window=None)),
    ("C8", "dflash2", "flat", put(mask_token_id=None)),
    ("C9", "dflash", "speculators", put(sliding_window_non_causal=False)),
    ("C9", "dspark", "speculators", inside("speculators_config", proposal_methods=[{"speculative_tokens": 0}])),
    ("C11", "dflash-reduced", "flat", put(draft_vocab_size=64)),
    ("C13", "dspark", "flat", put(markov_rank=4)),
    ("C13", "dflash2", "flat", inside("dflash_config", selector_rank=4)),
    ("C9", "dflash", "speculators", inside("speculators_config", verifier={})),
    ("C9", "eagle3", "speculators", inside("speculators_config", proposal_methods=[])),
    ("C11", "eagle3", "flat", drop("draft_vocab_size")),
    ("files", "eagle3", "flat", put(rope_theta=5.0)),
    ("files", "eagle3", "flat", put(mlp_bias=True)),
    ("files", "dspark", "flat", put(markov_head_type="gated")),
    ("files", "dflash", "flat", inside("dflash_config", target_layer_ids=[1, 2, 3, 4, 6])),
    ("files", "eagle3-norms", "flat", put(norm_before_fc="yes")),
]


@pytest.mark.parametrize("rule, variant, layout, change", CONFIG_OFFENCES)
def test_a_config_that_breaks_a_rule_is_reported_under_it(tmp_path, exports, target, rule, variant, layout, change):
    folder = changed(exports[variant][layout], tmp_path, config=change)
    assert rule in {problem.split(":")[0] for problem in problems(folder, target)}


TENSOR_OFFENCES = [
    ("C6", "dflash", "flat", cast(torch.float16)),
    ("C6", "eagle3", "speculators", cast(torch.float32)),
    ("C11", "eagle3-reduced", "flat", stale_map),
    ("C11", "eagle3-reduced", "flat", drop("t2d")),
    ("C11", "eagle3-reduced", "speculators", drop("d2t", "t2d")),
    ("C11", "eagle3", "flat", put(d2t=torch.zeros(64, dtype=torch.long))),
    ("C12", "eagle3", "flat", drop("embed_tokens.weight")),
    ("C12", "eagle3", "speculators", other_embedding),
    ("C13", "eagle3", "flat", drop("midlayer.hidden_norm.weight")),
    ("C13", "dflash", "flat", put(**{"model.fc.weight": torch.zeros(2).bfloat16()})),
    ("C13", "dflash", "transformers", drop("encoder.fc.weight")),
    ("C13", "eagle3-norms", "flat", drop("fc_norm.1.weight")),
    ("C11", "dspark-reduced", "flat", drop("d2t")),
    ("C13", "dspark", "flat", drop("markov_head.markov_w2.weight")),
    ("C13", "dspark", "speculators", drop("confidence_head.proj.bias")),
    ("C13", "dflash2", "flat", drop("layers.1.mlp_conv.base_kernel")),
    ("C13", "dflash-sinks", "flat", drop("layers.0.self_attn.attention_sink_bias")),
    ("C13", "dflash", "speculators", put(**{"fc.weight": torch.zeros(32, 96).bfloat16()})),
]


@pytest.mark.parametrize("rule, variant, layout, change", TENSOR_OFFENCES)
def test_tensors_that_break_a_rule_are_reported_under_it(tmp_path, exports, target, rule, variant, layout, change):
    folder = changed(exports[variant][layout], tmp_path, tensors=change)
    assert rule in {problem.split(":")[0] for problem in problems(folder, target)}


def test_rules_about_the_target_are_skipped_without_it(tmp_path, exports):
    folder = changed(
        exports["eagle3"]["flat"], tmp_path, config=put(max_position_embeddings=128), tensors=other_embedding
    )
    assert check_folder(folder) == []


def test_a_folder_without_files_is_a_problem_and_no_crash(tmp_path):
    assert check_folder(tmp_path)[0].startswith("files: ")
    (tmp_path / "config.json").write_text("[]")
    assert check_folder(tmp_path)[0].startswith("files: ")
