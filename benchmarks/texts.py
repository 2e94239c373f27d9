# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The pairs and texts that the suites on whole models share: the small real target with GSM8K, or random ones of any
shape.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.arms import Report
from trl_draft_opd import AutoDrafter, FrozenTarget
from trl_draft_opd.drafters.auto import DRAFTER_CLASSES
from trl_draft_opd.drafters.base import Drafter


TARGET = "gsm8k-qwen3-7m"
FAMILIES = ("eagle3", "dflash")


def real_target(args: argparse.Namespace) -> FrozenTarget:
    """Load the small real target of `--shared`."""
    if args.shared is None:
        raise SystemExit(
            "This part needs real text: give the folder that holds targets/ and data/ with --shared PATH."
        )
    target = FrozenTarget.load(args.shared / "targets" / TARGET, dtype=getattr(torch, args.dtype))
    target.place(torch.device(args.device))
    return target


def random_target(args: argparse.Namespace, hidden_size: int, vocab_size: int, num_layers: int) -> FrozenTarget:
    """Make a random Qwen3 of a shape."""
    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(hidden_size // 128, 1),
        head_dim=64,
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=2,
    )
    return FrozenTarget(Qwen3ForCausalLM(config).to(args.device, getattr(torch, args.dtype)))


def make_drafter(
    args: argparse.Namespace, report: Report, family: str, target: FrozenTarget, folder: Path | None = None, **options
) -> Drafter:
    """Load a trained drafter, or make a random one where no folder is given."""
    if folder is not None:
        return AutoDrafter.from_pretrained(folder, dtype=target.causal_lm.dtype).to(target.device)
    torch.manual_seed(args.seed + 1)
    kind = DRAFTER_CLASSES[family]
    if kind.config_class.drafts_whole_blocks:
        options["mask_token_id"] = target.vocab_size - 1 if target.tokenizer is None else target.find_mask_token_id()
    drafter = kind.from_target(target, **options)
    report.say(f"  {family}: no trained drafter given, a random one is used")
    return drafter.to(target.device, target.causal_lm.dtype)


def questions(args: argparse.Namespace, target: FrozenTarget, count: int) -> list[list[int]]:
    """Return chat prompts of GSM8K test questions as token ids."""
    rows = _rows(args.shared / "data" / "gsm8k_test.jsonl", count)
    chats = [[{"role": "user", "content": row["question"]}] for row in rows]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return [target.tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]


def worked_answers(args: argparse.Namespace, target: FrozenTarget, num_tokens: int) -> tuple[list, list]:
    """Return GSM8K questions with their answers, about `num_tokens` in all: token ids, and which belong to answers."""
    texts, marks, total = [], [], 0
    prompts = questions(args, target, 64)
    rows = _rows(args.shared / "data" / "gsm8k_test.jsonl", 64)
    for prompt, row in zip(prompts, rows, strict=True):
        answer = target.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([*prompt, *answer, target.eos_token_ids[0]])
        texts.append(ids)
        marks.append(torch.arange(len(ids)) >= len(prompt))
        total += len(ids)
        if total >= num_tokens:
            break
    return texts, marks


def one_long_text(texts: list[torch.Tensor], num_tokens: int, num_prompt: int) -> tuple[list, list]:
    """Join texts to one of `num_tokens`, supervised behind its first `num_prompt`."""
    joined = torch.cat(texts)[:num_tokens]
    return [joined], [torch.arange(len(joined)) >= num_prompt]


def random_texts(args: argparse.Namespace, vocab_size: int, num_tokens: int, num_prompt: int) -> tuple[list, list]:
    """Return one random text, supervised behind its first `num_prompt` tokens."""
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(3, vocab_size - 1, (num_tokens,), generator=generator)
    return one_long_text([ids], num_tokens, num_prompt)


def _rows(path: Path, count: int) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
