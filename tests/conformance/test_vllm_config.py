# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
vLLM's own config classes and functions read out of our exports what the drafter was trained with. No engine is
started.
"""

import json
from types import SimpleNamespace

import pytest
from test_dflash_attention import VARIANTS as ATTENTION_VARIANTS
from test_dflash_attention import make_variant as make_attention_variant
from test_export import VARIANTS, export, make_variant
from transformers import AutoConfig

from helpers.tiny import make_target


pytestmark = pytest.mark.conformance

BLOCKS = [variant for variant in VARIANTS if not variant.startswith("eagle3")]
# Which slots of a block see no slot behind them, by layer, where not none.
CAUSAL = {
    "dflash-causal": [True, True],
    "dflash-causal-windows": [True, True],
    "dflash-causal-mixed": [True, False],
}


@pytest.fixture(scope="module")
def made():
    target = make_target()
    return {variant: make_variant(variant, target) for variant in VARIANTS}


@pytest.fixture(scope="module")
def exports(tmp_path_factory, made):
    target, folder = make_target(), tmp_path_factory.mktemp("exports")
    return {variant: export(drafter, target, folder / variant).layouts for variant, drafter in made.items()}


def flat(exports, made, variant):
    """Return the flat config as vLLM holds it for a method that was named."""
    from vllm.transformers_utils.configs.eagle import EAGLEConfig

    config = AutoConfig.from_pretrained(exports[variant]["flat"])
    method = made[variant].config.exported.method
    # As `vllm.config.SpeculativeConfig` does; DSpark's config stays as it is.
    return config if method == "dspark" else EAGLEConfig(config, method=method, model_type="eagle")


def speculators(exports, variant):
    """Return the speculators config as vLLM holds it, and what it makes of it for speculative decoding."""
    from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

    raw = json.loads((exports[variant]["speculators"] / "config.json").read_text())
    settings = SpeculatorsConfig.extract_vllm_speculative_config(json.loads(json.dumps(raw)))
    return SpeculatorsConfig.from_pretrained(exports[variant]["speculators"]), settings


def both(exports, made, variant):
    """Return the configs of both layouts, as far as there are two."""
    found = [flat(exports, made, variant)]
    return found + ([speculators(exports, variant)[0]] if "speculators" in exports[variant] else [])


def tapped(config):
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config

    return get_eagle3_aux_layers_from_config(SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=config)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_vllm_reads_class_layers_and_vocabulary(exports, made, variant):
    drafter = made[variant]
    own = drafter.config
    for config in both(exports, made, variant):
        assert tapped(config) == tuple(i + 1 for i in own.target_layer_ids)
        assert (getattr(config, "draft_vocab_size", None) or config.vocab_size) == own.draft_vocab_size
    wanted = own.exported.flat_architecture
    assert flat(exports, made, variant).architectures == [wanted]
    if "speculators" in exports[variant]:
        config, settings = speculators(exports, variant)
        assert config.architectures == ["Eagle3LlamaForCausalLM" if variant.startswith("eagle3") else wanted]
        assert settings == {"method": own.exported.method, "num_speculative_tokens": 4}


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant.startswith("eagle3")])
def test_vllm_reads_the_norms_of_eagle3(exports, made, variant):
    names = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    for config in both(exports, made, variant):
        assert [getattr(config, name) for name in names] == [getattr(made[variant].config, name) for name in names]


@pytest.mark.parametrize("variant", BLOCKS)
def test_vllm_reads_blocks_windows_and_causality(exports, made, variant):
    from vllm.model_executor.models.qwen3_dflash import _dflash_layer_causal
    from vllm.v1.worker.gpu.spec_decode.utils import get_parallel_drafting_token_id

    own = made[variant].config
    for config in both(exports, made, variant):
        assert get_parallel_drafting_token_id(config) == own.mask_token_id
        layers = range(config.num_hidden_layers)
        assert [_dflash_layer_causal(config, layer) for layer in layers] == CAUSAL.get(variant, [False, False])
        assert config.layer_types == own.layer_types
        assert config.sliding_window == own.sliding_window
        anchor = getattr(
            config, "sample_from_anchor", (getattr(config, "dflash_config", None) or {}).get("sample_from_anchor")
        )
        assert bool(anchor) is own.sample_from_anchor


def test_every_layout_names_the_precision_engines_expect(exports):
    for layouts in exports.values():
        for folder in layouts.values():
            assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ATTENTION_VARIANTS)
def test_vllm_resolves_windows_causality_sinks_and_scale_per_layer_as_we_do(name, tmp_path, monkeypatch):
    from vllm.model_executor.models import qwen3_dflash

    drafter = make_attention_variant(name)
    drafter.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    # What it asks of its own run: whether windows and full attention may be mixed.
    monkeypatch.setattr(qwen3_dflash, "get_current_vllm_config", lambda: SimpleNamespace(use_v2_model_runner=True))
    for index, layer in enumerate(drafter.layers):
        resolved = qwen3_dflash._resolve_layer_attention(config, index)
        assert resolved == tuple(layer.self_attn.sight) == tuple(drafter.config.sight_of(index))
    # As its layers look for them.
    assert config.dflash_config.get("attention_sink_bias", False) is drafter.config.attention_sinks
    assert config.dflash_config.get("attention_value_scale", 1.0) == drafter.config.attention_value_scale
