# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
vLLM's own config classes and functions read out of our exports what the drafter was trained with. No engine is
started.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from test_export import VARIANTS, export, make_variant
from transformers import AutoConfig

from helpers.tiny import make_target


pytestmark = pytest.mark.conformance


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    target, folder = make_target(), tmp_path_factory.mktemp("exports")
    return {variant: export(make_variant(variant, target), target, folder / variant).layouts for variant in VARIANTS}


def flat(exports, variant):
    """Return the flat config as vLLM holds it for a method that was named."""
    from vllm.transformers_utils.configs.eagle import EAGLEConfig

    method = variant.split("-")[0]
    config = AutoConfig.from_pretrained(exports[variant]["flat"])
    return EAGLEConfig(config, method=method, model_type="eagle")


def speculators(exports, variant):
    """Return the speculators config as vLLM holds it, and what it makes of it for speculative decoding."""
    from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

    raw = json.loads((exports[variant]["speculators"] / "config.json").read_text())
    settings = SpeculatorsConfig.extract_vllm_speculative_config(json.loads(json.dumps(raw)))
    return SpeculatorsConfig.from_pretrained(exports[variant]["speculators"]), settings


def tapped(config):
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config

    return get_eagle3_aux_layers_from_config(SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=config)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_vllm_reads_architecture_and_layers_from_the_flat_layout(exports, variant):
    config = flat(exports, variant)
    if variant == "dflash":
        assert config.architectures == ["DFlashDraftModel"]
        assert tapped(config) == (2, 3, 4, 5, 6)
        assert config.dflash_config["mask_token_id"] == 3
        return
    assert config.architectures == ["LlamaForCausalLMEagle3"]
    assert tapped(config) == (2, 4, 5)
    is_normed = variant == "eagle3-norms"
    flags = (config.norm_before_residual, config.norm_before_fc, config.fc_norm, config.norm_output)
    assert flags == (False, False, is_normed, is_normed)
    assert config.draft_vocab_size == (24 if variant == "eagle3-reduced" else 64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vllm_reads_method_drafts_and_layers_from_the_speculators_layout(exports, variant):
    config, settings = speculators(exports, variant)
    assert settings == {"method": variant.split("-")[0], "num_speculative_tokens": 4}
    if variant == "dflash":
        assert config.architectures == ["DFlashDraftModel"]
        assert tapped(config) == (2, 3, 4, 5, 6)
        assert config.dflash_config["target_layer_ids"] == [1, 2, 3, 4, 5]
        return
    assert config.architectures == ["Eagle3LlamaForCausalLM"]
    assert tapped(config) == (2, 4, 5)
    is_normed = variant == "eagle3-norms"
    assert (config.norm_before_residual, config.fc_norm, config.norm_output) == (False, is_normed, is_normed)


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_vllm_hides_no_slot_of_a_block_from_another(exports, layout):
    from vllm.model_executor.models.qwen3_dflash import _dflash_layer_causal

    config = flat(exports, "dflash") if layout == "flat" else speculators(exports, "dflash")[0]
    assert [_dflash_layer_causal(config, layer) for layer in range(config.num_hidden_layers)] == [False, False]


def test_every_layout_names_the_precision_engines_expect(exports):
    for layouts in exports.values():
        for folder in layouts.values():
            assert json.loads((folder / "config.json").read_text())["dtype"] == str(torch.bfloat16).split(".")[1]
