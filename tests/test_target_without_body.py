# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tests of a target without its body against the whole one, saved and loaded, over families.
"""

import pytest
import torch
import transformers

from helpers.tiny import EOS, PAD, VOCAB, make_tokenizer
from trl_draft_opd import FrozenTarget


SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "initializer_range": 0.4,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
# Class and settings of its config.
FAMILIES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", EXPERTS),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3", {"query_pre_attn_scalar": 8}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {"logit_scale": 0.25}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {}),
    "glm4": ("Glm4", {}),
    "gpt2": ("GPT2", {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", {}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def make_model(family, seed=0):
    name, settings = FAMILIES[family]
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    model = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM"))
    shape = {key: SHAPE[key] for key in ("vocab_size", "eos_token_id", "bos_token_id")} if name == "GPT2" else SHAPE
    torch.manual_seed(seed)
    made = model(config(**shape | settings))
    # Norms of their own, so that a wrong one shows.
    for name, parameter in made.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made.eval()


def save(family, path, **options):
    make_model(family).save_pretrained(path, **options)
    make_tokenizer().save_pretrained(path)
    return path


def held_bytes(target):
    tensors = [*target.causal_lm.parameters(), *target.causal_lm.buffers()]
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)


@pytest.mark.filterwarnings("ignore:Target of type")
@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_norm_head_and_fingerprint_are_the_whole_targets(tmp_path, family):
    save(family, tmp_path)
    whole, target = FrozenTarget.load(tmp_path), FrozenTarget.load(tmp_path, body=False)
    assert whole.has_body and not target.has_body
    ids = torch.randint(4, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(target.embed(ids), whole.embed(ids))
    hidden = torch.randn(2, 7, 32)
    assert torch.equal(target.norm(hidden), whole.norm(hidden))
    assert torch.equal(target.project(hidden), whole.project(hidden))
    before = []
    handle = whole.layers[-1].register_forward_hook(
        lambda module, args, output: before.append(output[0] if isinstance(output, tuple) else output)
    )
    reading = whole.read_text(ids, torch.ones_like(ids), []).padded()
    handle.remove()
    states = torch.cat([states.reshape(-1, 32) for states in before])
    assert torch.equal(target.norm(states), reading.last_hidden.reshape(-1, 32))
    assert (
        target.weights_fingerprint == whole.weights_fingerprint == FrozenTarget(make_model(family)).weights_fingerprint
    )
    assert target.num_parameters == whole.num_parameters and target.num_layers == 3
