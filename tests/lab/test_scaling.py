# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The memory of docs/do/scaling.md is what a step takes: a 7 M pair is counted on the CPU, and the page quotes the
program's tables.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from benchmarks.scaling import FAMILIES
from helpers.tiny import make_tokenizer
from trl_draft_opd import FrozenTarget
from trl_draft_opd.costs.memory import LAUNCHES, launch_bytes, quantised_bytes
from trl_draft_opd.costs.shapes import TARGETS, DrafterShape
from trl_draft_opd.drafters.auto import DRAFTER_CLASSES


pytestmark = pytest.mark.lab


EXACT = {
    "target",
    "target's gradients and optimizer state",
    "drafter's masters",
    "drafter's gradients",
    "AdamW's moments",
    "target's reading",
    "live caches",
}
# Computed over counted, least and most. A whole step is bounded: not all its parts are alive at once.
WITHIN = {
    "activations and casts": (0.97, 1.03),
    "target's forward and reading": (0.97, 1.05),
    "loss and backward": (0.95, 1.05),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_computed_memory_is_what_a_small_pair_takes(family, checkpointing):
    work = replace(scaling.CHECKED, checkpointing=checkpointing)
    rows = {stage: (computed, counted) for stage, computed, counted in scaling.count_on_cpu("qwen3-7m", family, work)}
    assert rows.keys() == EXACT | WITHIN.keys()
    for stage in EXACT:
        computed, counted = rows[stage]
        assert computed == counted, stage
    for stage, (least, most) in WITHIN.items():
        computed, counted = rows[stage]
        assert least <= computed / counted <= most, (stage, computed, counted)


def test_the_target_costs_two_bytes_a_weight_and_the_drafter_sixteen():
    stages = scaling.stages_of("qwen3-8b", "eagle3")
    trained = scaling.pair_of("qwen3-8b", "eagle3")[1].parameters
    assert stages.masters + stages.gradients + stages.adamw == 16 * trained
    # As published: 8.19 B weights; a drafter of 0.40 B with a draft vocabulary of 32k.
    assert round(stages.target / 2e9, 2) == 8.19 and round(trained / 1e9, 2) == 0.40


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TARGETS)
def test_a_shape_has_the_weights_of_the_model_it_stands_for(name, family):
    model = scaling.make_target(name, "meta", torch.bfloat16)
    drafter = scaling.make_drafter(family, model, "meta")
    target, shape = scaling.pair_of(name, family)
    assert target.parameters == sum(p.numel() for p in model.parameters())
    assert target.layer_parameters == sum(p.numel() for p in model.base_model.layers[0].parameters())
    assert shape.parameters == sum(p.numel() for p in drafter.parameters())
    assert shape.matrices == sum(m.weight.numel() for m in drafter.modules() if isinstance(m, torch.nn.Linear))
    assert DrafterShape.of(drafter.config) == shape


VARIANTS = [
    ("eagle3", {"fc_norm": True, "attention_bias": True}),
    ("eagle3", {"norm_before_fc": True, "mlp_bias": True, "draft_vocab_size": 100}),
    ("dflash", {"attention_bias": True, "attention_sinks": True, "draft_vocab_size": 100}),
    ("dspark", {"markov_rank": 0, "confidence_head_with_markov": False}),
    ("dspark", {"markov_rank": 24, "draft_vocab_size": 100, "enable_confidence_head": False}),
    ("dflash2", {"conv_kernel_size": 3, "conv_group_size": 8, "selector_rank": 24, "attention_bias": True}),
]


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=str)
def test_whatever_a_config_adds_the_weights_that_are_trained_are_counted(family, options):
    kind = DRAFTER_CLASSES[family]
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "target_layer_ids": [1, 2, 3], "num_target_layers": 8}
    if kind.config_class.drafts_whole_blocks:
        options = options | {"mask_token_id": 511}
    drafter = kind(kind.config_class(**shape, **options))
    trained = [parameter for parameter in drafter.parameters() if parameter.requires_grad]
    assert DrafterShape.of(drafter.config).parameters == sum(parameter.numel() for parameter in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_more_sharding_never_takes_more_memory(family):
    for name in ("qwen3-0.6b", "llama3-70b"):
        stages = scaling.stages_of(name, family)
        ddp, zero2, _, fsdp2, sharded = (launch_bytes(stages, launch, 8) for launch in LAUNCHES[1:6])
        assert ddp > zero2 >= fsdp2 > sharded
        # What is sharded is the decoder layers: on one rank nothing is gained.
        assert launch_bytes(stages, LAUNCHES[5], 1) > launch_bytes(stages, LAUNCHES[4], 1)
        assert fsdp2 - sharded == stages.target_layers - stages.target_layers // 8 - 2 * stages.target_layer


def test_four_bits_take_what_the_library_allocates(tmp_path):
    pytest.importorskip("bitsandbytes", reason="quantises the target; has a build for the CPU")
    scaling.make_target("qwen3-7m", "cpu", torch.bfloat16).save_pretrained(tmp_path)
    options = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    target = FrozenTarget.load(tmp_path, tokenizer=make_tokenizer(), init_kwargs=options)
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in target.causal_lm.state_dict().values()
    }
    computed = quantised_bytes(TARGETS["qwen3-7m"])
    assert 1.0 <= computed / sum(storages.values()) <= 1.05


def test_the_page_quotes_the_tables_as_they_are_printed():
    page = (Path(__file__).parents[2] / "docs" / "do" / "scaling.md").read_text(encoding="utf-8")
    assert [table.splitlines()[0] for table in scaling.tables() if table not in page] == []
