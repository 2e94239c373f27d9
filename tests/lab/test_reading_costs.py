# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""What readings from elsewhere cost, against models that are built and figures worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.roofline import DELIVERED, reading_tables
from benchmarks.scaling import DRAFT_VOCABULARY, FAMILIES, make_target_of, shape_of, workload_of
from trl_draft_opd.costs.counted import NOW
from trl_draft_opd.costs.gpus import GPUS
from trl_draft_opd.costs.jobs import JOBS
from trl_draft_opd.costs.memory import BF16, count_stages, launch_bytes
from trl_draft_opd.costs.readings import (
    Flow,
    bodiless_bytes,
    bytes_per_token,
    cache_bytes_per_token,
    served_tokens_per_second,
    shared_folder_bytes,
)
from trl_draft_opd.costs.roofline import predict
from trl_draft_opd.costs.shapes import SERVED, TARGETS
from trl_draft_opd.drafters.target_shape import middle_layer_ids
from trl_draft_opd.readings.launch import serve_line


pytestmark = pytest.mark.lab


H100 = GPUS["h100"]
PAGE = Path(__file__).parents[2] / "docs" / "do" / "scaling.md"


def flow_of(name, job_name):
    job, target = next(job for job in JOBS if job.name == job_name), SERVED[name]
    drafter = shape_of(job.family, target, job.draft_vocab)
    prediction = predict(job, target, drafter, H100, NOW)
    return Flow.of(prediction, bytes_per_token(target.hidden, drafter.features // target.hidden)), prediction


@pytest.mark.parametrize(
    ("hidden_size", "three", "five"),
    [(2560, 20_480, 30_720), (4096, 32_768, 49_152), (5120, 40_960, 61_440), (8192, 65_536, 98_304)],
)
def test_a_token_takes_two_bytes_a_number_of_each_tapped_layer_and_of_the_heads_input(hidden_size, three, five):
    assert (bytes_per_token(hidden_size, 3), bytes_per_token(hidden_size, 5)) == (three, five)
    assert bytes_per_token(hidden_size, 3, itemsize=4) == 2 * three


@pytest.mark.parametrize("name", ["qwen3-7m", "qwen3-4b", "qwen3-8b", "llama3-70b"])
def test_without_its_body_a_target_holds_what_is_outside_of_its_layers(name):
    model = make_target_of(TARGETS[name], "meta", torch.bfloat16)
    body = {id(parameter) for parameter in model.base_model.layers.parameters()}
    kept = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in body)
    assert bodiless_bytes(TARGETS[name]) == kept


def test_a_mixture_of_experts_has_its_published_weights_and_passes_eight_of_128_experts():
    shape = SERVED["qwen3-235b-a22b"]
    config = Qwen3MoeConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        moe_intermediate_size=shape.expert_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.active_experts,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    # As published: 235 B, 22 B of them active.
    active = shape.parameters - shape.layers * (shape.layer_matrices - shape.active_matrices)
    assert round(shape.parameters / 1e9) == 235 and round(active / 1e9) == 22


def test_the_cards_of_a_server_share_keys_and_values_but_each_keeps_all_states():
    target = SERVED["llama3-70b"]
    assert cache_bytes_per_token(target, 3) == (2 * 8 * 128 * 80 * 2, 65_536)
    assert cache_bytes_per_token(target, 3, tensor_parallel=8) == (2 * 1 * 128 * 80 * 2, 65_536)
    # There are no more heads to share.
    assert cache_bytes_per_token(target, 3, tensor_parallel=16) == cache_bytes_per_token(target, 3, tensor_parallel=8)


@pytest.mark.parametrize("job", ["eagle3-opd", "dflash-opd", "eagle3-sft-32k"])
def test_a_trainer_takes_in_what_its_step_without_the_reading_works_on(job):
    flow, prediction = flow_of("qwen3-8b", job)
    seconds = prediction.total * (1 - flow.reading_share)
    assert flow.tokens_per_second * seconds == pytest.approx(prediction.volume.tokens)
    assert flow.bytes_per_second == flow.tokens_per_second * flow.token_bytes
    assert prediction.stages[0].name == "target's read"
    assert flow.reading_share == pytest.approx(prediction.seconds[0] / prediction.total)


def test_servers_are_as_many_as_give_what_all_trainers_take():
    flow = Flow(tokens_per_second=1000.0, token_bytes=10, reading_share=0.5)
    assert [flow.servers(speed) for speed in (2000, 1000, 999, 400)] == [1, 1, 2, 3]
    assert flow.servers(1000, num_trainers=4) == 4


def test_what_a_card_reads_at_most_is_what_the_same_card_reads_in_process_without_its_small_kernels():
    for name in ("qwen3-8b", "qwen3-235b-a22b"):
        _, prediction = flow_of(name, "eagle3-sft-32k")
        stage = prediction.stages[0]
        seconds = (stage.flops + stage.attention_flops) / H100.flops
        served = served_tokens_per_second(SERVED[name], prediction.job.length, H100)
        assert prediction.volume.tokens / seconds == pytest.approx(served, rel=1e-3)
        assert served_tokens_per_second(SERVED[name], prediction.job.length, H100, num_gpus=8) == 8 * served


def test_the_shared_folder_holds_the_texts_under_way():
    assert shared_folder_bytes(64, 4096, bytes_per_token(4096, 3)) == 64 * 4096 * 32_768


def test_the_page_quotes_the_tables_of_readings_as_they_are_printed():
    page = PAGE.read_text(encoding="utf-8")
    assert [table.splitlines()[0] for table in reading_tables(H100) if table not in page] == []


@pytest.mark.parametrize(
    ("served", "name"), [("Qwen/Qwen3-32B-FP8", "qwen3-32b"), ("Qwen/Qwen3-235B-A22B", "qwen3-235b-a22b")]
)
def test_the_page_starts_servers_with_the_lines_that_are_printed(served, name):
    num_layers, options = SERVED[name].layers, {"dtype": "bfloat16", "max_model_len": 2049}
    line = serve_line(
        served, middle_layer_ids(num_layers), num_layers, shared_folder=Path("/dev/shm") / "readings", **options
    )
    assert line in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trainer_of_delivered_readings_holds_neither_body_nor_cache_nor_forward(family):
    target, drafter = TARGETS["qwen3-8b"], shape_of(family, TARGETS["qwen3-8b"], DRAFT_VOCABULARY)
    stages = count_stages(target, drafter, workload_of(family))
    delivered, whole = (launch_bytes(stages, launch, 1) for launch in (DELIVERED, "one GPU"))
    assert delivered <= whole - BF16 * target.parameters + bodiless_bytes(target)
    longest = replace(stages, forward=10**12, cache=10**12)
    assert launch_bytes(longest, DELIVERED, 1) == delivered
