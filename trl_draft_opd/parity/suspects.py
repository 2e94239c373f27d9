# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What gives a wrong export away when no checkpoint is at hand: other layers that suit the drafter better than those it names, and
a head whose rows are those of other tokens than its vocabulary says. Both errors leave text right and only slow it down.
"""

import torch

from ..drafters.base import Drafter
from ..rollout.counts import Counts
from .scene import Scene, replay


# Other layers must be better by so much: a drafter trained little cares little which layers it reads.
_GAIN, _NUM_PROMPTS = 0.1, 8
# Rows of the head compared with all of the target's.
_NUM_ROWS, _CHUNK = 256, 16384


def suspect_layer_ids(scene: Scene, responses: list[list[int]]) -> str | None:
    """
    Replay the first prompts with each layer id one off, and with all of them one off.

    Args:
        scene ([`Scene`]): Prompts and drafter.
        responses (`list[list[int]]`): The target's own.

    Returns:
        `str`: which ids suit better, or `None` if none do.
    """
    config = scene.drafter.config
    named = list(config.target_layer_ids)
    own = _tau_with(scene, responses, named)
    taus = {tuple(ids): _tau_with(scene, responses, ids) for ids in _neighbours(named, scene.target.num_layers)}
    best = max(taus, key=taus.get, default=None)
    if best is None or taus[best] - 1 <= (1 + _GAIN) * (own - 1) + 0.02:
        return None
    return (
        f"the layer ids {named} look wrong: with {list(best)} tau is {taus[best]:.3f} instead of {own:.3f} on the first "
        f"{min(_NUM_PROMPTS, len(scene.prompts))} prompts"
    )


def _tau_with(scene: Scene, responses: list[list[int]], ids: list[int]) -> float:
    config = scene.drafter.config
    named = config.target_layer_ids
    config.target_layer_ids = ids
    try:
        chains = replay(scene, scene.drafter, responses, _NUM_PROMPTS)
    finally:
        config.target_layer_ids = named
    return Counts.of_chains(chains, scene.num_drafts).tau


def _neighbours(ids: list[int], num_layers: int) -> list[list[int]]:
    moves = [
        [step if place == index else 0 for place in range(len(ids))] for index in range(len(ids)) for step in (-1, 1)
    ]
    moves += [[-1] * len(ids), [1] * len(ids)]
    tried = [[i + step for i, step in zip(ids, move, strict=True)] for move in moves]
    return [each for each in tried if each == sorted(set(each)) and each[0] >= 0 and each[-1] < num_layers - 1]


@torch.no_grad()
def suspect_vocabulary(scene: Scene) -> str | None:
    """
    Compare rows of an EAGLE-3 head with the target's, where training starts them: each should resemble its own token's.

    Returns:
        `str` if many rows resemble another token's clearly more than their own; `None` otherwise, and for heads that resemble none.
    """
    drafter: Drafter = scene.drafter
    token_ids = drafter.draft_token_ids
    head = scene.target.causal_lm.get_output_embeddings().weight
    if token_ids is None or head.shape[1] != drafter.lm_head.weight.shape[1]:
        return None
    picks = torch.linspace(0, len(token_ids) - 1, min(_NUM_ROWS, len(token_ids))).long().unique().to(token_ids.device)
    rows = torch.nn.functional.normalize(drafter.lm_head.weight[picks].float(), dim=-1)
    best = torch.full((len(picks),), -1.0, device=rows.device)
    nearest = torch.zeros_like(picks)
    for start in range(0, len(head), _CHUNK):
        part = torch.nn.functional.normalize(head[start : start + _CHUNK].to(rows), dim=-1)
        likeness, index = (rows @ part.T).max(dim=-1)
        nearest = torch.where(likeness > best, index + start, nearest)
        best = torch.maximum(best, likeness)
    own = (rows * torch.nn.functional.normalize(head[token_ids[picks].to(head.device)].to(rows), dim=-1)).sum(dim=-1)
    is_other = (nearest != token_ids[picks]) & (best > own + 0.2) & (best > 0.5)
    if is_other.float().mean() <= 0.1:
        return None
    return (
        f"d2t looks stale: of {len(picks)} rows of the head, {int(is_other.sum())} resemble the target's row of another token than the one d2t "
        "names. Export again with the vocabulary the drafter was trained with"
    )
