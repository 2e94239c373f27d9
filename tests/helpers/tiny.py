# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tiny random targets, drafters and a tokenizer, built on the spot: eight layers, so that three taps are distinct.
"""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_draft_opd import DFlash2DraftModel, DFlashDraftModel, DSparkDraftModel, Eagle3DraftModel, FrozenTarget
from trl_draft_opd.drafters.base import Drafter


VOCAB, PAD, EOS, MASK = 64, 0, 2, 3
# Settings of every training run of a test: on the CPU, in float32, in silence.
TINY_RUN = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "initializer_range": 0.4,
}
TARGETS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SHAPE, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    ),
    # Embedding scale, attention and final soft caps; full attention in every layer.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_SHAPE, layer_types=["full_attention"] * 8, final_logit_softcapping=5.0, query_pre_attn_scalar=8
        )
    ),
}


def make_causal_lm(kind: str = "qwen3", seed: int = 0) -> PreTrainedModel:
    """Return a random target whose outputs vary with its input."""
    torch.manual_seed(seed)
    return TARGETS[kind]().eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer over words `w4`, `w5`, ... with a small chat template."""
    words = {"<pad>": PAD, "<s>": 1, "</s>": EOS, "<|mask|>": MASK, "user": 4, "assistant": 5, "<unk>": 6}
    words |= {f"w{i}": i for i in range(7, VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def make_target(kind: str = "qwen3", seed: int = 0) -> FrozenTarget:
    """Return a frozen random target with its tokenizer."""
    return FrozenTarget(make_causal_lm(kind, seed), make_tokenizer())


_BLOCKS = {"mask_token_id": MASK, "num_hidden_layers": 2, "block_size": 5}
# The class of each family, and settings of its tiny drafters: four drafts per block.
_DRAFTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dflash": (DFlashDraftModel, _BLOCKS),
    "dflash2": (DFlash2DraftModel, _BLOCKS | {"conv_group_size": 8, "selector_rank": 6, "selector_top_k": 32}),
    "dspark": (DSparkDraftModel, _BLOCKS | {"sample_from_anchor": False, "markov_rank": 8}),
    "eagle3": (Eagle3DraftModel, {"ttt_steps": 4}),
}
FAMILIES = list(_DRAFTERS)


def make_drafter(family: str, target: FrozenTarget, seed: int = 1, **options) -> Drafter:
    """Return a random drafter of a family, with four drafts per block unless told otherwise."""
    torch.manual_seed(seed)
    family_class, settings = _DRAFTERS[family]
    # EAGLE-3 alone makes its head by it.
    vocabulary = None if family == "eagle3" else options.pop("draft_vocabulary", None)
    drafter = family_class.from_target(target, **settings | options).eval()
    if vocabulary is not None:
        drafter.reduce_vocabulary(vocabulary, target)
    if family == "dspark":
        # A bias as large as the target's logits, so that few drafts survive a wrong token before their slot.
        for factor in drafter.markov_head.parameters():
            torch.nn.init.normal_(factor)
    if family == "dflash2":
        # Likewise a selector whose scores are as large, and convolutions that mix.
        for name, parameter in drafter.named_parameters():
            if "candidate_selector" in name:
                torch.nn.init.normal_(parameter, std=1.0 if "codebook" in name else 0.2)
            elif "_conv" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return drafter


def state_width(drafter: Drafter) -> int:
    """Return the columns of a state that is ready for the head."""
    own = drafter.candidates.rows.shape[1] if drafter.candidates is not None else 0
    return sum(part.width for part in drafter.head_parts) + own


def make_prompts(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    """Return random prompts of different lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(7, VOCAB, (length,), generator=generator).tolist() for length in lengths]
