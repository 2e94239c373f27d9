# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Trains the demo's own target: a tokenizer and a tiny Qwen3 that learn the demo's chats. Knows no drafter."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..utils.atomic_files import writing_files
from ..utils.settings import check_settings
from .corpus import Chat


PAD, START, END, MASK = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyTargetSettings:
    """Sizes of the tiny target and its training; the learning rate is the peak."""

    num_chats: int = 7000
    vocab_size: int = 768
    hidden_size: int = 96
    num_steps: int = 400
    batch_size: int = 16
    learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        check_settings(self)


def train_tokenizer(chats: Sequence[Chat], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a ChatML template; every digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((message["content"] for chat in chats for message in chat), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        mask_token=MASK,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def make_target(tokenizer: PreTrainedTokenizerFast, hidden_size: int) -> Qwen3ForCausalLM:
    """Return an untrained Qwen3 of eight layers, so that both drafter families find their default layers."""
    ids = tokenizer.get_vocab()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=None,
        eos_token_id=ids[END],
    )
    return Qwen3ForCausalLM(config)


def train_target(chats: Sequence[Chat], folder: Path, settings: TinyTargetSettings, seed: int) -> float:
    """Train tokenizer and target on chats, save both, and return the mean loss of the last twentieth of the steps."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(chats, settings.vocab_size)
    model = make_target(tokenizer, settings.hidden_size).train()
    encode: Any = tokenizer.apply_chat_template
    texts = [encode(chat, tokenize=True, return_dict=True)["input_ids"] for chat in chats]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    num_steps = settings.num_steps
    warmup = min(50, num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1 - max(step - warmup, 0) / max(num_steps - warmup, 1))
    )
    pad_id = tokenizer.get_vocab()[PAD]
    losses = []
    batches, is_watched = _batches(texts, settings.batch_size, num_steps, seed), Console().is_terminal
    for batch in track(batches, "Training the target", total=num_steps, disable=not is_watched):
        rows = [torch.tensor(ids) for ids in batch]
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
        labels = pad_sequence(rows, batch_first=True, padding_value=-100)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with writing_files(folder, "target") as staged:
        model.eval().save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    last = losses[-max(num_steps // 20, 1) :]
    return sum(last) / len(last)


def _batches(texts: list[list[int]], batch_size: int, num_steps: int, seed: int) -> Iterator[list[list[int]]]:
    """Yield batches of texts of similar length, in random order."""
    rng = random.Random(seed)
    batches: list[list[list[int]]] = []
    for _ in range(num_steps):
        if not batches:
            # A little noise on the lengths gives every epoch other batches.
            order = sorted(texts, key=lambda ids: len(ids) + rng.uniform(-8, 8))
            batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            rng.shuffle(batches)
        yield batches.pop()
