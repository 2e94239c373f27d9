# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Activation checkpointing: the same numbers to the last bit, from less memory, and only where a gradient is asked for.
"""

import pytest
import torch
from datasets import Dataset
from trl import TrlParser

from benchmarks.counters import PeakBytes
from helpers.oracle import greedy_text
from helpers.tiny import FAMILIES, TINY_RUN, VOCAB, make_drafter, make_prompts, make_target
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.trainer.pair import compile_drafter
from trl_draft_opd.utils.versions import switch_checkpointing


CONFIGS = {"sft": DraftSFTConfig, "opd": DraftOPDConfig}
TRAINERS = {"sft": DraftSFTTrainer, "opd": DraftOPDTrainer}


@pytest.fixture(scope="module")
def target():
    return make_target()


def make_args(kind, output_dir, **changes):
    options = {
        "output_dir": str(output_dir),
        **TINY_RUN,
        "save_strategy": "no",
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_completion_length": 12,
    }
    return CONFIGS[kind](**options | changes)


def run_some_blocks(drafter, target):
    """Return the hidden states of 49 blocks per row, one row shorter than the others."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, VOCAB, (3, 60), generator=generator)
    anchors = torch.arange(1, 50).repeat(3, 1)
    anchors[1, 40:] = -1
    drafts = torch.randint(7, VOCAB, (3, 49, 4), generator=generator)
    reading = target.read_text(ids, torch.ones_like(ids), drafter.config.target_layer_ids).padded()
    return run_blocks(drafter, reading.features, ids, anchors, drafts, target.embed)


def count_steps(monkeypatch, drafter, family):
    """Count the layers or steps that are run, again or for the first time."""
    calls, name = [], "_step" if family == "eagle3" else "_run_layer"
    run = getattr(drafter, name)
    monkeypatch.setattr(drafter, name, lambda *args: (calls.append(torch.is_grad_enabled()), run(*args))[1])
    return calls


def gradients(drafter, target, bf16=False):
    """Return states, gradients, and the most bytes alive in forward and backward."""
    with PeakBytes() as counter:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = run_some_blocks(drafter, target)
        hidden.float().pow(2).sum().backward()
    found = {name: p.grad for name, p in drafter.named_parameters() if p.grad is not None}
    return hidden.detach(), found, counter.peak


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_bits_from_less_memory(target, tmp_path, family, bf16, compiled):
    results = []
    for is_on in (False, True):
        drafter = make_drafter(family, target, **{"norm_output": True} if family == "eagle3" else {}).train()
        compile_drafter(drafter, make_args("sft", tmp_path, torch_compile=compiled, torch_compile_backend="aot_eager"))
        if is_on:
            switch_checkpointing(drafter, "enable")
        results.append(gradients(drafter, target, bf16))
    (plain, plain_grads, plain_peak), (again, grads, peak) = results
    assert torch.equal(plain, again)
    assert len(grads) == len(plain_grads) >= 12
    assert [name for name in grads if not torch.equal(grads[name], plain_grads[name])] == []
    # Of the peak, 55 to 68 % are left at this size; more of it goes with longer texts and more layers.
    assert peak < 0.75 * plain_peak


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_run_again_for_a_gradient_alone(monkeypatch, target, family):
    drafter = make_drafter(family, target)
    switch_checkpointing(drafter, "enable")
    calls = count_steps(monkeypatch, drafter, family)
    num_steps = 4 if family == "eagle3" else 2
    run_some_blocks(drafter.eval(), target).sum().backward()
    assert len(calls) == num_steps
    with torch.no_grad():
        run_some_blocks(drafter.train(), target)
    assert len(calls) == 2 * num_steps
    run_some_blocks(drafter, target).sum().backward()
    assert len(calls) == 4 * num_steps
    switch_checkpointing(drafter, "disable")
    run_some_blocks(drafter, target).sum().backward()
    assert len(calls) == 5 * num_steps


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_of_an_adapter_is_drawn_once(target, family):
    from peft import LoraConfig, get_peft_model

    results = []
    for is_on in (False, True):
        drafter = make_drafter(family, target)
        config = LoraConfig(target_modules=["q_proj", "up_proj"], r=2, lora_dropout=0.5, init_lora_weights=False)
        get_peft_model(drafter, config)
        if is_on:
            switch_checkpointing(drafter, "enable")
        torch.manual_seed(3)
        results.append(gradients(drafter.train(), target)[1])
    assert results[0].keys() == results[1].keys() and any("lora_A" in name for name in results[0])
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []


@pytest.mark.parametrize(
    ("kind", "family", "name"),
    [("sft", "dflash", "activation_checkpointing"), ("opd", "eagle3", "gradient_checkpointing")],
)
def test_trainers_switch_it_on_under_both_names(monkeypatch, tmp_path, target, kind, family, name):
    texts = [(len(prompt), greedy_text(target, prompt, 12)) for prompt in make_prompts(4)]
    columns = {"prompt_ids": [t[:n] for n, t in texts], "completion_ids": [t[n:] for n, t in texts]}
    final, counts = [], []
    for is_on in (False, True):
        drafter = make_drafter(family, target, **{"norm_output": True} if family == "eagle3" else {})
        calls = count_steps(monkeypatch, drafter, family)
        args = make_args(
            kind, tmp_path, bf16=True, torch_compile=True, torch_compile_backend="aot_eager", **{name: is_on}
        )
        TRAINERS[kind](drafter, target, args, Dataset.from_dict(columns)).train()
        assert drafter.gradient_checkpointing is is_on
        counts.append(sum(calls))
        final.append([parameter.detach().clone() for parameter in drafter.parameters()])
    # Every layer or step is run twice with gradient instead of once.
    assert counts[1] == 2 * counts[0] > 0
    assert all(torch.equal(first, second) for first, second in zip(*final, strict=True))


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_the_command_line_takes_it_with_and_without_a_value(tmp_path, name):
    for flags, is_on in (
        ([], False),
        ([f"--{name}"], True),
        ([f"--{name}", "true"], True),
        ([f"--{name}", "0"], False),
    ):
        (args,) = TrlParser((DraftOPDConfig,)).parse_args_and_config(
            ["--output_dir", str(tmp_path), "--use_cpu", "true", *flags]
        )
        assert args.gradient_checkpointing is is_on and bool(args.activation_checkpointing) is is_on


def test_it_is_off_unless_asked_for(tmp_path):
    args = make_args("opd", tmp_path)
    assert args.activation_checkpointing is None and args.gradient_checkpointing is False
    options = make_args("sft", tmp_path, gradient_checkpointing_kwargs={"preserve_rng_state": False})
    assert options.gradient_checkpointing_kwargs == {"preserve_rng_state": False, "use_reentrant": False}
