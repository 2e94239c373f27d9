# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A target of 4 or 8 bits: its layers are quantised, embedding and head are read as they are, and the drafter stays
float32.
"""

import json

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from helpers.tiny import EOS, FAMILIES, MASK, PAD, VOCAB, make_drafter, make_prompts, make_tokenizer
from trl_draft_opd import (
    DraftOPDConfig,
    DraftOPDTrainer,
    DraftSFTConfig,
    DraftSFTTrainer,
    FrozenTarget,
    SamplingSettings,
    evaluate_drafter,
)


bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantises the target; has a build for the CPU")

QUANTIZATIONS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"},
    "8bit": {"load_in_8bit": True},
}
LAYERS = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved target whose rows are whole blocks of 64 weights, with a head of its own."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=PAD,
        eos_token_id=EOS,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("target")
    Qwen3ForCausalLM(config).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def load(folder, bits, **changes):
    return FrozenTarget.load(folder, init_kwargs={"quantization_config": QUANTIZATIONS[bits] | changes})


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_layers_are_quantised_and_the_head_is_read_as_it_is(folder, bits):
    plain, target = FrozenTarget.load(folder), load(folder, bits)
    quantised = [module for module in target.backbone.modules() if type(module).__name__ == LAYERS[bits]]
    assert len(quantised) == 8 * 7
    target.place(torch.device("cpu"))
    ids = torch.tensor([make_prompts(1, longest=9, seed=3)[0] * 3])
    assert torch.equal(target.embed(ids), plain.embed(ids))
    hidden = torch.randn(2, 64)
    assert torch.equal(target.project(hidden), plain.project(hidden))
    states, exact = (t.read_text(ids, torch.ones_like(ids), [1, 4]).padded().features for t in (target, plain))
    error = float((states - exact).norm() / exact.norm())
    assert 1e-3 < error < (0.7 if bits == "4bit" else 0.1)
    sizes = [t.causal_lm.model.layers[0].mlp.up_proj.weight.nbytes for t in (target, plain)]
    assert sizes[0] * (8 if bits == "4bit" else 4) == sizes[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_drafter_takes_shape_and_head_of_a_quantised_target(folder, family):
    target = load(folder, "4bit")
    drafter = make_drafter(family, target)
    assert {parameter.dtype for parameter in drafter.parameters()} == {torch.float32}
    if family == "eagle3":
        assert torch.equal(drafter.lm_head.weight, target.causal_lm.lm_head.weight)


@pytest.mark.parametrize(("bits", "bf16"), [("4bit", True), ("8bit", False)])
@pytest.mark.parametrize(("kind", "family"), [("sft", "dflash"), ("opd", "eagle3"), ("opd", "dflash")])
def test_both_trainers_take_a_quantised_target_by_its_config(tmp_path, folder, kind, family, bits, bf16):
    config_class, trainer_class = (
        (DraftSFTConfig, DraftSFTTrainer) if kind == "sft" else (DraftOPDConfig, DraftOPDTrainer)
    )
    args = config_class(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=bf16,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=1,
        per_device_train_batch_size=2,
        max_completion_length=10,
        learning_rate=1e-2,
        warmup_steps=0,
        # As the command line hands it over.
        target_init_kwargs=json.dumps({"quantization_config": QUANTIZATIONS[bits]}),
        # 8 bits: how activations are rounded depends on the other rows of a batch, and random weights have many near
        # ties.
        **({} if kind == "sft" else {"warn_mismatch_share": 1.0, "max_mismatch_share": 1.0}),
    )
    prompts = [prompt for prompt in make_prompts(6) if MASK not in prompt][:2]
    rows = Dataset.from_dict({"prompt_ids": prompts, "completion_ids": [[9, 10, 11, 12, 13]] * 2})
    drafter = make_drafter(family, FrozenTarget.load(folder))
    before = [parameter.detach().clone() for parameter in drafter.parameters()]
    trainer = trainer_class(drafter, str(folder), args, rows)
    quantised = trainer.target.layers[0].mlp.up_proj
    packed = quantised.weight.detach().clone()
    trainer.train()
    assert type(quantised).__name__ == LAYERS[bits] and torch.equal(packed, quantised.weight)
    assert not any(torch.equal(old, new) for old, new in zip(before, drafter.parameters(), strict=True))
    assert all(new.dtype == torch.float32 and new.isfinite().all() for new in drafter.parameters())


def test_live_decoding_is_lossless_for_the_quantised_target_itself(folder):
    target = load(folder, "4bit")
    report = evaluate_drafter(
        target,
        make_drafter("eagle3", target),
        make_prompts(3),
        max_completion_length=16,
        sampling=SamplingSettings(0.0, 0, 1.0),
        num_resamples=10,
        show_progress=False,
    )
    assert report.num_different == 0


def test_a_quantised_head_is_refused(folder):
    with pytest.raises(ValueError, match=r"has its head in torch.uint8.*llm_int8_skip_modules"):
        load(folder, "4bit", llm_int8_skip_modules=["embed_tokens"])


def test_quantised_weights_elsewhere_are_refused_and_not_moved(folder):
    with pytest.raises(ValueError, match="loaded to 'cpu' but training runs on 'cuda'.*`target_init_kwargs="):
        load(folder, "8bit").place(torch.device("cuda"))


@pytest.mark.parametrize("bits", QUANTIZATIONS)
def test_taking_the_fingerprint_changes_nothing_that_the_target_computes(folder, bits):
    target, ids = load(folder, bits), torch.tensor([[7, 8, 9]])
    before = target.read_text(ids, torch.ones_like(ids), [1]).last_hidden
    assert target.weights_fingerprint == load(folder, bits).weights_fingerprint
    assert torch.equal(target.read_text(ids, torch.ones_like(ids), [1]).last_hidden, before)
