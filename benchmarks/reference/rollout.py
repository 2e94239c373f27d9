# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Greedy speculative decoding, replay and branch states of one text at a time, one block at a time, one forward per
branch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .drafting import draft_states, read_text


@dataclass(frozen=True)
class Block:
    """
    One drafted block.

    Attributes:
        anchor (`int`): Index of the last committed token.
        drafts (`list[int]`): Proposed tokens.
        accepted (`int`): Leading drafts that were kept, inside the text.
        is_censored (`bool`): Whether the text ended before the block's first refusal.
    """

    anchor: int
    drafts: list[int]
    accepted: int
    is_censored: bool


@torch.no_grad()
def draft_block(
    drafter: PreTrainedModel,
    target: PreTrainedModel,
    features: Tensor,
    text: Sequence[int],
    anchor: int,
    num_drafts: int,
) -> list[int]:
    """Draft one block greedily; the drafter sees the text up to the anchor and features before it."""
    _, drafts = draft_states(
        drafter, target, features[:anchor], text[: anchor + 1], [anchor], num_drafts, recorded=None
    )
    return drafts[0].tolist()


@torch.no_grad()
def decode(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompt: Sequence[int],
    *,
    num_drafts: int,
    max_completion_length: int,
    eos_token_ids: Collection[int],
) -> tuple[list[int], list[Block]]:
    """
    Decode one prompt speculatively until an end of sequence or the limit.

    Returns:
        `tuple`: prompt and response, and the blocks with their accepted drafts.
    """
    cache, layer_ids = DynamicCache(config=target.config), drafter.config.target_layer_ids
    head = target.get_output_embeddings()
    reading = read_text(target, prompt, layer_ids, cache)
    features = reading.features
    text, chain = [*prompt, int(head(reading.hidden[-1]).argmax())], []
    limit = len(prompt) + max_completion_length
    while text[-1] not in eos_token_ids and len(text) < limit:
        anchor = len(text) - 1
        drafts = draft_block(drafter, target, features, text, anchor, num_drafts)
        reading = read_text(target, [text[anchor], *drafts], layer_ids, cache)
        choices = head(reading.hidden).argmax(dim=-1).tolist()
        accepted = count_matches(drafts, choices)
        for token in [*drafts[:accepted], choices[accepted]]:
            text.append(token)
            if token in eos_token_ids or len(text) == limit:
                break
        chain.append((anchor, drafts))
        features = torch.cat([features, reading.features[: accepted + 1]])
        cache.crop(-(num_drafts - accepted))
    return text, [settle(text, anchor, drafts) for anchor, drafts in chain]


@torch.no_grad()
def replay(
    target: PreTrainedModel, drafter: PreTrainedModel, text: Sequence[int], prompt_length: int, num_drafts: int
) -> list[Block]:
    """Draft along a text the target wrote, block by block, each from where the last one ended."""
    features = read_text(target, text, drafter.config.target_layer_ids).features
    anchor, blocks = prompt_length, []
    while anchor < len(text) - 1:
        drafts = draft_block(drafter, target, features, text, anchor, num_drafts)
        blocks.append(settle(text, anchor, drafts))
        anchor += blocks[-1].accepted + 1
    return blocks


def branch_states(target: PreTrainedModel, text: Sequence[int], block: Block) -> Tensor:
    """
    Return what the target's head reads at each slot's draft-induced state, `(K, H)`, by one forward over the branch.
    """
    branch = [*text[: block.anchor + 1], *block.drafts[:-1]]
    return read_text(target, branch, [0]).hidden[block.anchor :]


def count_matches(drafts: Sequence[int], choices: Sequence[int]) -> int:
    """Count the leading drafts that equal the choices."""
    count = 0
    while count < min(len(drafts), len(choices)) and drafts[count] == choices[count]:
        count += 1
    return count


def settle(text: Sequence[int], anchor: int, drafts: list[int]) -> Block:
    """Compare a block with the text; it is censored if every slot inside the text matched and the text then ended."""
    accepted = count_matches(drafts, text[anchor + 1 :])
    is_censored = accepted < len(drafts) and anchor + accepted == len(text) - 1
    return Block(anchor, list(drafts), accepted, is_censored)
