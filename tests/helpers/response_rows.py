# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Origins and rows of response stores, made by hand: no model is loaded."""

import random

from trl_draft_opd import Origin
from trl_draft_opd.responses import StoredResponse


VOCAB, EOS = 64, 2


def make_origin(**changes) -> Origin:
    """Return an origin of a target with 32 positions whose responses have up to 8 tokens, greedy."""
    values = {
        "target": "tiny",
        "revision": None,
        "config_hash": "c1",
        "weights_fingerprint": "w1",
        "vocab_size": VOCAB,
        "max_positions": 32,
        "tokenizer_hash": "t1",
        "chat_template_hash": "p1",
        "chat_template_kwargs": {},
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_completion_length": 8,
        "eos_token_ids": (EOS,),
    }
    return Origin(**values | changes)


def make_rows(count: int, seed: int = 0) -> list[StoredResponse]:
    """Return rows with prompts that differ, half of them complete."""
    draw = random.Random(seed)
    prompts: dict[tuple[int, ...], None] = {}
    while len(prompts) < count:
        prompts[tuple(draw.randrange(7, VOCAB) for _ in range(draw.randrange(3, 9)))] = None
    rows = []
    for number, prompt in enumerate(prompts):
        response = [draw.randrange(7, VOCAB) for _ in range(draw.randrange(1, 8))]
        is_whole = number % 2 == 0
        logprobs = [-draw.random() for _ in range(len(response) + is_whole)]
        rows.append(
            StoredResponse(list(prompt), response + [EOS] * is_whole, logprobs, "stop" if is_whole else "length")
        )
    return rows
