# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Draft-OPD as in the paper, in one flat loop without a Trainer: decode, mark the errors, draft again, distil, step.

    python examples/minimal_opd.py --target Qwen/Qwen3-0.6B --drafter drafter-sft --dataset prompts.jsonl

For reading more than for training: one process, no checkpoints. `DraftOPDTrainer` adds data handling, distribution,
evaluation and checkpoints. Expect a line per step with the loss, and with tau of the text that was just decoded.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from trl import TrlParser

from trl_draft_opd import AutoDrafter, FrozenTarget, SamplingSettings
from trl_draft_opd.drafters.base import run_blocks
from trl_draft_opd.losses import Head, chunked_divergence
from trl_draft_opd.rollout.blocks import mark_slots
from trl_draft_opd.rollout.counts import Counts
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.live import rollout_live


POSITION_DECAY, PROMPTS_PER_STEP, MAX_COMPLETION_LENGTH = 0.8, 8, 128


@dataclass
class ExampleArguments:
    """Flags of this script."""

    target: str = field(metadata={"help": "Hub id or path of the target."})
    drafter: str = field(metadata={"help": "Hub id or path of the drafter, in any published layout."})
    dataset: str = field(metadata={"help": "JSON lines with `prompt` or `messages`."})
    num_steps: int = field(default=100, metadata={"help": "Updates of the drafter."})


def main(args: ExampleArguments) -> list[float]:
    """Run the loop and return tau of each step's rollout."""
    target = FrozenTarget.load(args.target)
    drafter = AutoDrafter.from_pretrained(args.drafter, num_target_layers=target.num_layers)
    if drafter.candidates is not None:
        raise SystemExit("DFlash 2 is trained by a second loss, which `DraftOPDTrainer` has. Take another drafter.")
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-4)
    rows = load_dataset("json", data_files=args.dataset, split="train")
    all_prompts = list(target.text_reader().read_prompts(rows)["prompt_ids"])
    settings = DraftingSettings(
        num_drafts=drafter.default_num_drafts,
        sampling=SamplingSettings(temperature=0.0, top_k=0, top_p=1.0),
        draft_sampling="greedy",
        keep_branch_hidden=True,
    )
    target_head = Head(target.project, (), target.vocab_size)
    # What the drafter trains of a head of its own; the target's is frozen.
    own = [part.module.weight for part in drafter.head_parts if part.module is not None]
    draft_head = Head(
        lambda hidden: drafter.draft_logits(hidden, target.project),
        tuple(weight for weight in own if weight.requires_grad),
        drafter.config.draft_vocab_size,
    )
    taus = []
    for step in range(args.num_steps):
        start = step * PROMPTS_PER_STEP % len(all_prompts)
        prompts = all_prompts[start : start + PROMPTS_PER_STEP]

        # 1. Target and drafter decode together: the text is the target's own, the blocks are the drafter's.
        rollout = rollout_live(
            target,
            drafter,
            prompts,
            settings,
            DrawKeys(seed=0, epoch=step, sample_ids=range(len(prompts))),
            max_completion_length=MAX_COMPLETION_LENGTH,
            eos_token_ids=target.eos_token_ids,
        )

        # 2. Each block's slots are marked: those that the target accepted, and those that it rejected.
        blocks = mark_slots(rollout, rejected_scope="suffix", eos_token_ids=target.eos_token_ids)

        # 3. The drafter drafts the same blocks again from the same anchors, now with gradient.
        reading = target.read_text(rollout.input_ids, rollout.attention_mask, drafter.config.target_layer_ids)
        features = reading.padded().features
        hidden = run_blocks(drafter, features, rollout.input_ids, blocks.anchors, blocks.drafts, target.embed)

        # 4. Each slot learns from the target's state there, which verification has computed already: forward KL where
        #    the target accepted, reverse KL with a decay over the slots where it rejected.
        slot_decay = POSITION_DECAY ** torch.arange(hidden.shape[2], dtype=torch.float32)
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
            # 5. The loss is half the mean over accepted slots and half the mean over rejected ones.
            loss = loss + stream.total / row_weights.sum() / 2

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tau = Counts.of_rollout(rollout).tau
        taus.append(tau)
        print(f"step {step}: loss {loss.item():.4f}, tau {tau:.3f}")
    return taus


if __name__ == "__main__":
    main(*TrlParser((ExampleArguments,)).parse_args_and_config())
