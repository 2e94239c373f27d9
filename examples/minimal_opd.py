# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Draft-OPD in one flat loop, without a Trainer: roll out, replay the errors, distil, step.

    python examples/minimal_opd.py TARGET DRAFTER PROMPTS.jsonl [STEPS]

The library does the same in `DraftOPDTrainer`, with data handling, distribution, evaluation and checkpoints around it.
"""

import json
import sys

import torch

from trl_draft_opd import AutoDrafter, FrozenTarget, SamplingSettings
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.losses import Head, chunked_divergence
from trl_draft_opd.rollout.blocks import mark_slots
from trl_draft_opd.rollout.counts import Counts
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.live import rollout_live


GAMMA, PROMPTS_PER_STEP, MAX_NEW_TOKENS = 0.8, 8, 128


def main(target_path: str, drafter_path: str, prompts_path: str, num_steps: int) -> list[float]:
    """Run the loop and return tau of each step's rollout."""
    target = FrozenTarget.load(target_path)
    drafter = AutoDrafter.from_pretrained(drafter_path, num_target_layers=target.num_layers)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-4)
    chats = [json.loads(line)["prompt"] for line in open(prompts_path, encoding="utf-8")]
    settings = DraftingSettings(
        num_drafts=drafter.default_num_drafts,
        sampling=SamplingSettings(temperature=0.0, top_k=0, top_p=1.0),
        draft_sampling="greedy",
        keep_branch_hidden=True,
    )
    target_head = Head(target.project, (), target.vocab_size)
    draft_head = Head.linear(drafter.lm_head.weight) if drafter.owns_head else target_head
    taus = []
    for step in range(num_steps):
        start = step * PROMPTS_PER_STEP % len(chats)
        prompts = [
            target.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)[
                "input_ids"
            ]
            for chat in chats[start : start + PROMPTS_PER_STEP]
        ]

        # 1. The pair decodes together; the text is the target's own, the blocks are the drafter's.
        keys = DrawKeys(seed=0, epoch=step, sample_ids=range(len(prompts)))
        rollout = rollout_live(
            target,
            drafter,
            prompts,
            settings,
            keys,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_ids=target.eos_token_ids,
        )

        # 2. Every block of the chain is replayed: accepted slots, and those the target rejected.
        blocks = mark_slots(rollout, rejected_scope="suffix", eos_token_ids=target.eos_token_ids)

        # 3. The drafter drafts again from every anchor, now with gradient, on the recorded drafts.
        reading = target.read_text(rollout.input_ids, rollout.attention_mask, drafter.config.target_layer_ids)
        hidden = run_blocks(drafter, reading.features, rollout.input_ids, blocks.anchors, blocks.drafts, target.embed)

        # 4. The target's states: verification has already seen every draft-induced state.
        slot_decay = GAMMA ** torch.arange(hidden.shape[2], dtype=torch.float32)
        loss = torch.zeros(())
        for slots, loss_type, weights in (
            (blocks.is_accepted, "forward_kl", torch.ones_like(slot_decay)),
            (blocks.is_rejected, "reverse_kl", slot_decay),
        ):
            row_weights = (slots * weights)[slots]
            if not len(row_weights):
                continue
            stream = chunked_divergence(
                hidden[slots],
                draft_head,
                rollout.branch_hidden[slots],
                target_head,
                target_rows_N=None,  # one target state per slot
                labels_N=blocks.labels[slots],
                weights_N=row_weights,
                loss_type=loss_type,
                draft_token_ids=drafter.draft_token_ids,
                chunk_bytes=2**26,
            )
            # 5. Each stream is a mean of its own; the two means weigh alike.
            loss = loss + stream.total / row_weights.sum() / 2

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tau = Counts.of_rollout(rollout).tau
        taus.append(tau)
        print(f"step {step}: loss {loss.item():.4f}, tau {tau:.3f}")
    return taus


if __name__ == "__main__":
    main(*sys.argv[1:4], num_steps=int(sys.argv[4]) if len(sys.argv) > 4 else 100)
