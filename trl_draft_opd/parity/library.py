# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The speculators library's own model classes along the target's own text. They do not decode: from their logits at every anchor of
the text follows what they would have kept there, hence the rounds they would have run.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..drafters.published.checkpoint import CONFIG_FILE, SAFETENSORS_FILE
from .counting import anchors_of
from .report import Outcome
from .scene import Scene


# The library's attention works in blocks of so many positions.
_BLOCK = 128


def run_speculators(scene: Scene, folder: Path, responses: list[list[int]], chains: list[list[int]]) -> Outcome:
    """
    Load a speculators layout with the library, and count what it keeps along the target's responses.

    Args:
        scene ([`Scene`]): Its `target_name` must be a local folder, where the library reads embedding and head.
        folder (`Path`): The layout.
        responses (`list[list[int]]`): The target's own.
        chains (`list[list[int]]`): The reference's; blocks that the library's class takes anchor by anchor are looked at there.
    """
    from speculators import SpeculatorModel

    with TemporaryDirectory() as scratch:
        # The library looks for the target where the config says, which is the Hub.
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        config["speculators_config"]["verifier"]["name_or_path"] = str(Path(scene.target_name).resolve())
        (Path(scratch) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        shutil.copy(folder / SAFETENSORS_FILE, Path(scratch) / SAFETENSORS_FILE)
        model = SpeculatorModel.from_pretrained(scratch).float().eval().to(scene.target.device)
    find = _eagle3_drafts if scene.drafter.config.family == "eagle3" else _dflash_drafts
    found = [
        _chain(scene, model, find, prompt, response, chain)
        for prompt, response, chain in zip(scene.prompts, responses, chains, strict=True)
    ]
    return Outcome("speculators", None, found, None, "its model class along the target's text")


def _chain(
    scene: Scene,
    model: Any,
    find: Callable,
    prompt: list[int],
    response: list[int],
    chain: list[int],
) -> list[int]:
    """Return what the library's class keeps at the anchors of the reference's chain, as far as both agree on them."""
    anchors = torch.tensor(anchors_of(chain), device=scene.target.device) + len(prompt)
    ids = torch.tensor([[*prompt, *response]], device=scene.target.device)
    drafts = find(scene, model, ids, anchors)
    slots = torch.arange(1, scene.num_drafts + 1, device=ids.device)
    is_kept = drafts == ids[0, anchors[:, None] + slots]
    kept = is_kept.long().cumprod(dim=1).sum(dim=1).tolist()
    for index, (own, other) in enumerate(zip(chain, kept, strict=True)):
        if own != other:
            # Behind a block that ends elsewhere, its anchors are others.
            return kept[: index + 1]
    return kept


def _padded(scene: Scene, ids: torch.Tensor, extra: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text and its document marks, padded to whole blocks of pairs; padding is a document of its own."""
    width = -(-ids.shape[1] // _BLOCK) * _BLOCK + extra
    padded = ids.new_full((1, width), scene.target.pad_token_id)
    padded[:, : ids.shape[1]] = ids
    document = torch.full_like(padded, -1)
    document[:, : ids.shape[1]] = 0
    return padded, document


@torch.no_grad()
def _eagle3_drafts(scene: Scene, model: Any, ids: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the argmax drafts of EAGLE-3's class at every anchor, `(A, K)`, each slot reading the text before it."""
    padded, document = _padded(scene, ids, extra=1)
    features = scene.target.read_text(padded, torch.ones_like(padded), scene.drafter.config.target_layer_ids).features
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        # A pair is a feature and the token behind it.
        model(
            hidden_states=features[:, :-1],
            input_ids=padded[:, 1:],
            document_ids=document[:, 1:],
            ttt_steps=scene.num_drafts,
        )
    finally:
        handle.remove()
    best = torch.stack([logits[0, anchors - 1].argmax(dim=-1) for logits in seen[: scene.num_drafts]], dim=1)
    return best if getattr(model, "d2t", None) is None else best + model.d2t[best]


@torch.no_grad()
def _dflash_drafts(scene: Scene, model: Any, ids: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the argmax drafts of DFlash's class at every anchor, `(A, K)`."""
    padded, document = _padded(scene, ids, extra=0)
    reading = scene.target.read_text(padded, torch.ones_like(padded), scene.drafter.config.target_layer_ids)
    marks = torch.zeros_like(padded, dtype=torch.bool).index_fill(1, anchors, True)
    _, logits, *_, positions = model._backbone_forward(
        reading.features, padded, marks, reading.last_hidden, document, max_anchors=len(anchors)
    )
    size = scene.drafter.config.block_size
    blocks = positions.view(-1, size)[:, 0].tolist()
    if blocks != anchors.tolist():
        raise ValueError(
            f"speculators drafted at {blocks[:5]}, not at the anchors {anchors[:5].tolist()} it was given."
        )
    return logits[0].view(len(anchors), size, -1)[:, 1 : 1 + scene.num_drafts].argmax(dim=-1)
