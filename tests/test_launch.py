# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Launches that are refused, and where a target's weights may lie.
"""

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from accelerate.big_modeling import dispatch_model
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from helpers.distributed.backends import CONFIGS
from helpers.rollouts import Options, decode
from helpers.tiny import make_causal_lm, make_drafter, make_prompts, make_target, make_tokenizer
from trl_draft_opd import DraftSFTConfig, FrozenTarget
from trl_draft_opd.runs.distributed.launch import check_launch, check_processes
from trl_draft_opd.target.placement import check_placement
from trl_draft_opd.trainer.pair import load_target
from trl_draft_opd.utils.loading import loading_whole


def _launch(kind=DistributedType.NO, *, is_fsdp2=False, fsdp=None, stage=None, offload="none"):
    deepspeed = None
    if stage is not None:
        zero = {"stage": stage, "offload_optimizer": {"device": offload}}
        deepspeed = SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": zero})
    state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=is_fsdp2, state=state)


def _fsdp(**changes):
    return SimpleNamespace(**({"activation_checkpointing": False, "cpu_offload": None} | changes))


@pytest.mark.parametrize(
    ("launch", "num_visible_gpus", "message"),
    [
        (_launch(), 4, "4 GPUs are visible to one process"),
        (_launch(DistributedType.FSDP, fsdp=_fsdp()), 1, "fsdp_version: 2"),
        (
            _launch(DistributedType.FSDP, is_fsdp2=True, fsdp=_fsdp(activation_checkpointing=True)),
            1,
            "activation_chec",
        ),
        (
            _launch(
                DistributedType.FSDP, is_fsdp2=True, fsdp=_fsdp(cpu_offload=torch.distributed.fsdp.CPUOffloadPolicy())
            ),
            1,
            "fsdp_offload_params",
        ),
        (_launch(DistributedType.DEEPSPEED, stage=0), 1, "`zero_stage` 0"),
        (_launch(DistributedType.DEEPSPEED, stage=3, offload="nvme"), 1, "nvme"),
    ],
)
def test_a_launch_that_would_compute_something_else_is_refused(launch, num_visible_gpus, message):
    with pytest.raises(ValueError, match=message):
        check_launch(launch, num_visible_gpus)


@pytest.mark.parametrize("use_cpu", [False, True])
@pytest.mark.parametrize("further", [{}, {"RANK": "0"}, {"LOCAL_RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1"}])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_without_a_launcher_are_refused_in_one_sentence_whatever_else_is_set(
    tmp_path, monkeypatch, name, further, use_cpu
):
    for variable, value in further.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="states 2 processes .*MASTER_ADDR.* unset that variable. .*`torchrun`"):
        DraftSFTConfig(str(tmp_path), report_to="none", use_cpu=use_cpu)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_an_address_alone_joins_no_processes_and_waits_for_none(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=r"lacks a number \(RANK\), so"):
        DraftSFTConfig(str(tmp_path), report_to="none", use_cpu=True)
    monkeypatch.setenv(name, "1")
    DraftSFTConfig(str(tmp_path), report_to="none")


def test_processes_that_would_train_for_themselves_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    # Numbered and with an address, but accelerate takes them for single ones.
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="states 2 processes .* Start them with `accelerate launch` or `torchrun`"):
        DraftSFTConfig(str(tmp_path), report_to="none")


def test_processes_that_are_joined_but_would_not_share_gradients_are_refused():
    joined = SimpleNamespace(num_processes=2, distributed_type=DistributedType.NO, backend="gloo")
    with pytest.raises(ValueError, match="joined by gloo, but would not share gradients.*Set `use_cpu=True`"):
        check_processes(joined)


@pytest.mark.slow
def test_the_command_under_the_shipped_config_for_two_cpus_is_one_training_of_two(tmp_path):
    make_causal_lm().save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    rows = [{"prompt": f"w{i} w9", "completion": "w20 w21 w22"} for i in range(8, 16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "multi_cpu.yaml")]
    command += ["--main_process_port", "0", "-m", "trl_draft_opd", "sft", "--family", "dflash"]
    command += ["--target", str(tmp_path / "target"), "--dataset", str(tmp_path / "rows.jsonl"), "--block_size", "4"]
    command += ["--mask_token_id", "5", "--report_to", "none", "--per_device_train_batch_size", "2", "--regenerate"]
    command += ["--num_train_epochs", "1", "--max_completion_length", "8", "--output_dir", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    # Eight rows, two on each of two processes: two steps. One process alone makes four.
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "state.json").read_text())
    assert len(state["ranks"]) == 2
    assert done.stdout.count("The drafter is in") == 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_of_zero_is_accepted_with_states_on_the_cpu(stage):
    check_launch(_launch(DistributedType.DEEPSPEED, stage=stage, offload="cpu"), 1)


def test_a_target_spread_over_devices_needs_a_process_of_its_own():
    spread = make_causal_lm()
    spread.hf_device_map = {"model": 0, "lm_head": 1}
    check_placement(spread, shard=False, num_processes=1)
    with pytest.raises(ValueError, match="`device_map` spreads it over .* but 2 processes"):
        check_placement(spread, shard=False, num_processes=2)
    spread.hf_device_map = {"": 0}
    check_placement(spread, shard=False, num_processes=2)
    with pytest.raises(ValueError, match="Leave one of the two out"):
        check_placement(spread, shard=True, num_processes=2)


def test_a_quantised_target_is_not_sharded():
    quantised = make_causal_lm()
    quantised.config.quantization_config = {"bits": 4}
    check_placement(quantised, shard=False, num_processes=2)
    with pytest.raises(ValueError, match="quantised"):
        check_placement(quantised, shard=True, num_processes=2)


def test_sharding_a_target_in_one_process_is_said_to_do_nothing(tmp_path, caplog):
    args = DraftSFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", shard_target=True)
    with caplog.at_level(logging.WARNING):
        target = load_target(make_causal_lm(), args, make_tokenizer())
    assert not target.is_sharded and "has no effect with one process" in caplog.text
    target.finish_together()


def test_a_target_with_offloaded_layers_decodes_as_a_whole_one(tmp_path):
    whole = make_target()
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "cpu" if layer < 6 else "disk" for layer in range(8)}
    causal_lm = dispatch_model(make_causal_lm(), device_map, main_device="cpu", offload_dir=str(tmp_path))
    assert causal_lm.model.layers[7].mlp.up_proj.weight.is_meta
    spread = FrozenTarget(causal_lm, make_tokenizer())
    spread.place(torch.device("cpu"))
    drafter, prompts = make_drafter("dflash", whole), make_prompts(3)
    options = Options(max_completion_length=8, eos_token_ids=[2])
    texts = [decode(target, drafter, prompts, options).input_ids for target in (whole, spread)]
    assert torch.equal(*texts)


def test_a_target_whose_embedding_is_elsewhere_is_refused():
    causal_lm = make_causal_lm()
    causal_lm.hf_device_map = {"": "cpu"}
    with pytest.raises(ValueError, match="Map `embed_tokens` there"):
        FrozenTarget(causal_lm).place(torch.device("meta"))


def test_models_are_loaded_whole_under_zero3_and_the_config_comes_back():
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    with pytest.raises(KeyError), loading_whole():
        assert not is_deepspeed_zero3_enabled()
        raise KeyError
    assert is_deepspeed_zero3_enabled()
    del config
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize("family", ["eagle3", "dflash"])
def test_casting_a_drafter_as_deepspeed_does_spares_its_rotary_frequencies(family):
    drafter = make_drafter(family, make_target())
    before = {name: buffer.clone() for name, buffer in drafter.named_buffers() if buffer.is_floating_point()}
    drafter.bfloat16()
    assert {parameter.dtype for parameter in drafter.parameters()} == {torch.bfloat16}
    after = dict(drafter.named_buffers())
    assert before and all(torch.equal(after[name], buffer) for name, buffer in before.items())
