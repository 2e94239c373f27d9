# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tiny drafters that are often right: overfitted in seconds to a few texts of their tiny target, so that acceptance is
really tested.
"""

import torch

from trl_draft_opd import FrozenTarget
from trl_draft_opd.drafters.base import Drafter, run_blocks
from trl_draft_opd.rollout.blocks import sample_anchors


def own_text(target: FrozenTarget, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the prompt and the target's greedy answer to it, the end of sequence ignored."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": num_tokens, "eos_token_id": None}
    return target.causal_lm.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


def overfit(
    target: FrozenTarget, drafter: Drafter, prompts: list[list[int]], *, num_tokens: int = 40, steps: int = 100
) -> Drafter:
    """
    Train a drafter on the target's own texts, with the same forward that the trainers use; weights end as bfloat16
    holds them.
    """
    texts = [own_text(target, prompt, num_tokens) for prompt in prompts]
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    index = torch.arange(input_ids.shape[1])
    mask = (index < torch.tensor([len(text) for text in texts])[:, None]).long()
    written = mask.bool() & (index >= torch.tensor([len(prompt) for prompt in prompts])[:, None])
    features = target.read_text(input_ids, mask, drafter.config.target_layer_ids).padded().features
    drafts = drafter.default_num_drafts
    anchors = sample_anchors(
        input_ids, written, range(len(texts)), num_anchors=None, num_drafts=drafts, seed=0, epoch=0
    )
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3)
    drafter.train()
    for _ in range(steps):
        hidden = run_blocks(drafter, features, input_ids, anchors.anchors, anchors.drafts, target.embed)
        logits = drafter.draft_logits(hidden[anchors.is_accepted], target.project)
        loss = torch.nn.functional.cross_entropy(logits, anchors.labels[anchors.is_accepted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(parameter.bfloat16())
    return drafter.eval()
