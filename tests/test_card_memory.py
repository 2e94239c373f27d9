# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Memory that is computed beforehand: a card too small is told with sizes and settings, long rows fit where the pages say
so, and layers are computed again where that is what makes a step fit.
"""

import warnings
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import roofline
from benchmarks.scaling import FAMILIES, shape_of
from helpers.oracle import greedy_rows
from helpers.tiny import TINY_RUN, make_drafter, make_target, make_tokenizer
from trl_draft_opd import DraftOPDConfig, DraftSFTConfig, DraftSFTTrainer, FrozenTarget
from trl_draft_opd.costs.gpus import GPUS
from trl_draft_opd.costs.memory import (
    GIB,
    SLOTS_PER_PASS,
    Workload,
    activation_bytes,
    checkpointing_pays,
    count_stages,
    describe_shortage,
    launch_bytes,
    refuse_small_card,
)
from trl_draft_opd.costs.shapes import TARGETS, TargetShape
from trl_draft_opd.drafters import base
from trl_draft_opd.target.texts import tokens_at_once
from trl_draft_opd.trainer import card_memory


QWEN3_8B = TARGETS["qwen3-8b"]
DFLASH = shape_of("dflash", QWEN3_8B)
H100 = GPUS["h100"].memory
# 8 rows of 2,048 tokens with 512 anchors each.
LARGE = Workload(8, 2048, 512, 1, False)


def pays(work, card):
    """Tell whether Qwen3-8B's DFlash drafter is computed again on a card."""
    return checkpointing_pays(launch_bytes(count_stages(QWEN3_8B, DFLASH, work), "one GPU", 1), card)


# -- pure arithmetic --------------------------------------------------------------------------------------------------


def test_eight_rows_of_512_dflash_anchors_are_computed_again_on_80_gb():
    # 70 GiB while norms and residuals were kept in float32.
    assert activation_bytes(DFLASH, LARGE)[0] / GIB == pytest.approx(36.5, rel=0.01)
    assert pays(LARGE, H100)
    again = activation_bytes(DFLASH, replace(LARGE, checkpointing=True))[1]
    assert again < activation_bytes(DFLASH, LARGE)[1] / 3


def test_layers_are_not_computed_again_where_a_step_fits_anyway():
    assert not pays(Workload(4, 2048, 64, 1, False), H100)
    assert pays(Workload(4, 2048, 64, 1, False), 40 * GIB)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_32k_tokens_of_an_8b_target_fits_on_80_gb(family):
    work = roofline.long_row("qwen3-8b", family, H100)
    stages = count_stages(QWEN3_8B, shape_of(family, QWEN3_8B), work)
    assert work.length == 32_768 and launch_bytes(stages, "one GPU", 1) < H100


def test_a_row_longer_than_a_pass_takes_its_cache_and_the_layers_of_one_pass():
    works = [Workload(1, length, 100, 1, False) for length in (2**12, 2**13, 2**15, 2**16)]
    half, whole, long, longer = (count_stages(QWEN3_8B, DFLASH, work).forward for work in works)
    assert whole == 2 * half
    # Keys and values of 36 layers.
    per_token = 2 * 2 * 1024 * 36
    assert long == whole + 2**15 * per_token and longer - long == 2**15 * per_token
    # Many short rows are read pass by pass.
    assert count_stages(QWEN3_8B, DFLASH, Workload(8, 2048, 100, 1, False)).forward == whole


def test_rows_end_to_end_take_what_they_take_side_by_side():
    side_by_side = Workload(8, 2048, 100, 1, False)
    joined = Workload(1, 8 * 2048, 8 * 100, 1, False, longest=2048)
    assert count_stages(QWEN3_8B, DFLASH, joined) == count_stages(QWEN3_8B, DFLASH, side_by_side)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_bound_what_a_step_keeps_by_that_of_one(checkpointing):
    work = Workload(1, 8192, 1000, 1, checkpointing)
    one, four = (count_stages(QWEN3_8B, DFLASH, replace(work, blocks_per_pass=n)) for n in (1000, 250))
    states = 1000 * 16 * 2 * 2 * 4096
    assert four.activations < states + (0.3 if not checkpointing else 0.7) * one.activations
    assert four.readings == one.readings and four.loss == one.loss


def test_passes_are_of_one_size_and_no_more_than_needed():
    assert Workload(1, 8192, 1000, 1, False, blocks_per_pass=400).blocks_at_once(15) == 334
    assert Workload(1, 8192, 1000, 1, False).blocks_at_once(15) == 1000
    assert Workload(1, 32768, 7680, 1, False).blocks_at_once(15) == 3840
    assert Workload(1, 8192, 0, 1, False).blocks_at_once(15) == 0


def test_the_workload_has_the_defaults_of_training():
    assert LARGE.reading_bytes == DraftOPDConfig.__dataclass_fields__["reading_bytes"].default
    assert SLOTS_PER_PASS == base.SLOTS_PER_PASS
    assert LARGE.read_tokens == tokens_at_once(torch.device("cuda"))


def test_shapes_are_read_off_configs():
    target = make_target()
    shape = TargetShape.of(target.config)
    assert shape.parameters == sum(p.numel() for p in target.causal_lm.parameters())


# -- a card that is too small -----------------------------------------------------------------------------------------


def test_a_card_that_cannot_hold_the_weights_is_refused_with_sizes_and_what_helps():
    target, trained = 2 * QWEN3_8B.parameters, 4 * DFLASH.parameters
    refuse_small_card(target, trained, 2 * trained, 40 * GIB)
    with pytest.raises(ValueError, match=r"has 24\.0 GiB.* 15\.3 for the target, 15\.6 .*shard_target"):
        refuse_small_card(target, trained, 2 * trained, 24 * GIB)
    # Without an optimizer's moments it is not certain.
    refuse_small_card(target, trained, 0, 24 * GIB)


def test_a_step_that_does_not_fit_is_described_with_its_parts_and_settings():
    stages = count_stages(QWEN3_8B, DFLASH, LARGE)
    fixed = stages.target + stages.masters + stages.gradients + stages.adamw
    assert describe_shortage(stages, fixed, 200 * GIB, ("lower `num_anchors`",)) is None
    message = describe_shortage(stages, fixed, 70 * GIB, ("lower `num_anchors`",))
    assert message is not None and "the card has 70.0 GiB" in message and "lower `num_anchors`" in message
    assert "36.5 for the drafter's activations" in message


def make_trainer(tmp_path, optimizer=None, **changes):
    target = make_target()
    drafter = make_drafter("dflash", target)
    given = None if optimizer is None else optimizer(drafter.parameters())
    options = {**TINY_RUN, "save_strategy": "no", "max_steps": 2, "max_completion_length": 12} | changes
    args = DraftSFTConfig(output_dir=str(tmp_path), **options)
    rows = greedy_rows(target, 4, 12)
    return DraftSFTTrainer(drafter, target, args, rows, None, make_tokenizer(), optimizers=(given, None))


def test_training_refuses_a_card_that_cannot_hold_the_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(card_memory, "card_bytes", lambda device: 2**10)
    with pytest.raises(ValueError, match="weights and optimizer alone need"):
        make_trainer(tmp_path)


MUON = {"muon_learning_rate": 2e-2}


@pytest.mark.parametrize(
    ("settings", "is_known"),
    [
        ({"optim": "adamw_torch"}, True),
        ({"optim": "adamw_torch_fused"}, True),
        ({"optim": "adamw_torch"} | MUON, True),
        ({"optim": "adafactor"}, False),
        ({"optim": "adamw_torch_8bit"}, False),
    ],
)
def test_what_the_optimizer_keeps_is_what_its_state_holds_or_unknown(tmp_path, settings, is_known):
    needs_torchao = settings["optim"] == "adamw_torch_8bit"
    trainer = make_trainer(tmp_path, **settings)
    computed = card_memory.optimizer_bytes(trainer.args, trainer.drafter, is_given=False)
    if not is_known:
        assert computed == 0
    if not needs_torchao:
        trainer.train()
        states = trainer.optimizer.state.values()
        kept = sum(each.nbytes for state in states for each in state.values() if torch.is_tensor(each) and each.dim())
        assert kept > 0 and (kept == computed) is is_known


@pytest.mark.parametrize("settings", [MUON, {"optim": "adafactor"}, {"optimizer": torch.optim.SGD}])
def test_a_card_with_room_for_less_than_adamw_is_refused_to_adamw_alone(tmp_path, monkeypatch, settings):
    target = make_target()
    trained = card_memory.trained_bytes(make_drafter("dflash", target))
    # Weights, gradients, and 1.99 numbers of each weight in place of two.
    monkeypatch.setattr(
        card_memory, "card_bytes", lambda device: card_memory.target_bytes(target) + 399 * trained // 100
    )
    with pytest.raises(ValueError, match="weights and optimizer alone need"):
        make_trainer(tmp_path)
    make_trainer(tmp_path, **settings)


@pytest.mark.parametrize("asked", [None, False, True])
def test_training_warns_once_before_a_first_step_that_may_not_fit(tmp_path, monkeypatch, asked):
    trainer = make_trainer(tmp_path, activation_checkpointing=asked)
    pair = trainer.target, trainer.drafter
    fixed = card_memory.target_bytes(pair[0]) + 4 * card_memory.trained_bytes(pair[1])
    monkeypatch.setattr(card_memory, "card_bytes", lambda device: fixed + 2**10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(w.message) for w in caught if "computed to need" in str(w.message)]
    assert len(messages) == 1 and "per_device_train_batch_size" in messages[0]
    # It had been turned on before that.
    assert trainer.drafter.gradient_checkpointing is (asked is not False)
    assert ("activation_checkpointing" in messages[0]) is (asked is False)


def test_of_a_spread_target_what_lies_on_the_card_is_counted(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    target, device = trainer.target, trainer.args.device
    whole = card_memory.target_bytes(target, device)
    assert whole == card_memory.target_bytes(target)
    target.causal_lm.model.layers[3].to("meta")
    elsewhere = sum(each.nbytes for each in target.causal_lm.model.layers[3].parameters())
    assert card_memory.target_bytes(target, device) == whole - elsewhere
    # Before the first step, and before it is placed: what a `device_map` put elsewhere is not refused.
    monkeypatch.setattr(target.causal_lm, "hf_device_map", {"": "cpu"}, raising=False)
    trained = card_memory.trained_bytes(trainer.drafter)
    monkeypatch.setattr(card_memory, "card_bytes", lambda device: whole - elsewhere + 4 * trained)
    card_memory.check_weights_fit(trainer._pair, trainer.args, is_given=False)
    monkeypatch.setattr(card_memory, "card_bytes", lambda device: whole - elsewhere + 4 * trained - 1)
    with pytest.raises(ValueError, match="weights and optimizer alone need"):
        card_memory.check_weights_fit(trainer._pair, trainer.args, is_given=False)


def test_a_step_is_counted_by_its_text_blocks_and_settings_beside_all_weights(tmp_path, monkeypatch):
    works, weights = [], []

    def count(target, drafter, work):
        works.append(work)
        return count_stages(target, drafter, work)

    def describe(stages, fixed, card, settings):
        weights.append(fixed)

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = make_trainer(tmp_path, **options, blocks_per_pass=3, loss_chunk_bytes=2**16)
    target, drafter = trainer.target, trainer.drafter
    batches = []
    prepare = trainer._prepare
    monkeypatch.setattr(trainer, "_prepare", lambda *given: batches.extend(prepare(*given)) or batches)
    monkeypatch.setattr(card_memory, "card_bytes", lambda device: 80 * GIB)
    monkeypatch.setattr(card_memory, "count_stages", count)
    monkeypatch.setattr(card_memory, "describe_shortage", describe)
    whole = card_memory.target_bytes(target)
    elsewhere = target.causal_lm.model.layers[7].mlp.up_proj.weight.nbytes
    monkeypatch.setattr(card_memory, "target_bytes", lambda target, device: whole - elsewhere * (device.type == "cpu"))
    trainer.train()
    assert [work.longest for work in works] == [max(map(sum, b.text.attention_mask.tolist())) for b in batches]
    expected = [
        Workload(
            rows=1,
            length=int(batch.text.attention_mask.sum()),
            blocks=sum(anchor >= 0 for row in batch.blocks.anchors.tolist() for anchor in row),
            accumulation=2,
            checkpointing=False,
            chunk_bytes=2**16,
            blocks_per_pass=3,
            longest=work.longest,
        )
        for batch, work in zip(batches, works, strict=True)
    ]
    assert works == expected and len(works) == 2 and all(work.longest < work.length for work in works)
    # AdamW's two numbers of each trained weight, beside the weight and its gradient.
    assert weights == [whole - elsewhere + 4 * sum(p.nbytes for p in drafter.parameters() if p.requires_grad)]


@contextmanager
def one_rank_of(num_ranks):
    """Be the first of some ranks, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield init_device_mesh("cpu", (num_ranks,))
    finally:
        dist.destroy_process_group()


def test_of_a_sharded_target_the_local_shards_are_counted():
    target = make_target()
    whole = card_memory.target_bytes(target)
    weight = target.causal_lm.model.layers[0].mlp.up_proj.weight
    with one_rank_of(2) as mesh:
        shard = DTensor.from_local(weight[: len(weight) // 2].detach(), mesh, [Shard(0)], run_check=False)
        assert shard.shape == weight.shape
        target.causal_lm.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(shard, requires_grad=False)
        assert card_memory.target_bytes(target, torch.device("cpu")) == whole - weight.nbytes // 2


def test_under_zero_nothing_is_decided(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(card_memory, "card_bytes", lambda device: 2**10)
    batches = [iter(trainer.get_train_dataloader()) for _ in range(2)]
    for plugin, decided in ((SimpleNamespace(zero_stage=2), False), (None, True)):
        monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.get_batch_samples(batches.pop(), 1, trainer.args.device)
        assert bool(caught) is decided and trainer.drafter.gradient_checkpointing is decided


def test_a_head_that_may_still_be_reduced_is_no_reason_to_refuse_a_card(monkeypatch):
    target = FrozenTarget.load(make_target())
    pair = SimpleNamespace(target=target, drafter=make_drafter("eagle3", target))
    args = SimpleNamespace(
        device=torch.device("cpu"), world_size=1, shard_target=False, optim="adamw_torch", muon_learning_rate=None
    )
    monkeypatch.setattr(card_memory, "card_bytes", lambda device: card_memory.target_bytes(target) + 2**10)
    pair.drafter.vocabulary_is_open = True
    card_memory.check_weights_fit(pair, args, is_given=False)
    pair.drafter.vocabulary_is_open = False
    with pytest.raises(ValueError, match="weights and optimizer alone need"):
        card_memory.check_weights_fit(pair, args, is_given=False)


def test_a_cpu_is_no_card(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*computed to need.*")
        make_trainer(tmp_path).train()


@pytest.mark.parametrize("asked", [None, False])
def test_layers_are_computed_again_where_a_card_would_be_nearly_full_unless_refused(tmp_path, monkeypatch, asked):
    options = {"preserve_rng_state": False}
    trainer = make_trainer(tmp_path, activation_checkpointing=asked, gradient_checkpointing_kwargs=options)
    drafter = trainer.drafter
    needed = card_memory.target_bytes(trainer.target) + 4 * card_memory.trained_bytes(drafter)
    # Weights, optimizer and the loss fit; what the layers keep does not.
    monkeypatch.setattr(card_memory, "card_bytes", lambda device: needed + 2**14)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert drafter.gradient_checkpointing is (asked is None)
    if asked is None:
        used: Any = drafter._gradient_checkpointing_func
        assert used.keywords == {"use_reentrant": False, "preserve_rng_state": False}
    assert trainer.state.global_step == 2


def test_a_resumed_run_decides_again(tmp_path, monkeypatch):
    saved = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **saved, max_steps=1).train()
    trainer = make_trainer(tmp_path, **saved)
    needed = card_memory.target_bytes(trainer.target) + 4 * card_memory.trained_bytes(trainer.drafter)
    monkeypatch.setattr(card_memory, "card_bytes", lambda device: needed + 2**14)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2 and trainer.drafter.gradient_checkpointing
