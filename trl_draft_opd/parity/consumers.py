# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Whoever decodes with a published drafter: in this process transformers' DFlash, the function that a repository carries
and the speculators library's model classes; in processes of their own the engines of `engines.py`.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from ..drafters.published.checkpoint import CONFIG_FILE, SAFETENSORS_FILE
from ..utils.versions import cache_in
from .compare import Outcome, Reference
from .counting import anchors_of, first_difference, started_within
from .engines import find_reason_to_skip, run_engine
from .scene import Scene, generate


# The speculators library's attention works in blocks of so many positions.
_BLOCK = 128


# ---- through the target's own `generate` ----------------------------------------------------------------------------
# Neither of these two reports how many drafts a round kept; the target's forward passes do.


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Note, for every forward pass of the target, the tokens in its cache before and the tokens it is given."""
    passes: list[tuple[int, int]] = []

    def note(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        input_ids = options["input_ids"] if "input_ids" in options else arguments[0]
        cache = cache_in(options)
        passes.append((0 if cache is None else cache.get_seq_length(), input_ids.shape[1]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def rounds_of(passes: list[tuple[int, int]], prompt_length: int, max_completion_length: int) -> list[int]:
    """
    Return the chain behind the target's forward passes over one response.

    A round reads the anchor and its drafts on top of all text before the anchor, so the cached length of a pass is its
    anchor's position, and the next pass tells how many drafts were kept.

    Raises:
        ValueError: If the first pass does not read the prompt as a whole, or the passes behind it do not go on from
            there, so that they mean something else.
    """
    if not passes or passes[0] != (0, prompt_length):
        raise ValueError(f"The first pass of the target was {passes[:1]}, not one over the prompt of {prompt_length}.")
    anchors = [cached for cached, _ in passes[1:]]
    # A cache that is not seen reads as empty: a chain of rounds that never were.
    if any(after <= before for before, after in zip([prompt_length - 1, *anchors], anchors, strict=False)):
        raise ValueError(
            f"The target's passes behind the prompt of {prompt_length} began at {anchors[:5]}, which must rise from "
            "there, so its rounds cannot be counted. Install a version of transformers that this package names."
        )
    chain = [after - before - 1 for before, after in zip(anchors, anchors[1:], strict=False)]
    return started_within(chain, max_completion_length)


def _decode(scene: Scene, name: str, options: dict[str, Any]) -> Outcome:
    responses, chains, widest = [], [], 0
    for prompt in scene.prompts:
        with _watched(scene.target.causal_lm) as passes:
            responses.append(generate(scene, prompt, **options))
        chains.append(rounds_of(passes, len(prompt), scene.max_completion_length))
        widest = max([widest, *(width - 1 for _, width in passes[1:])])
    remark = "" if widest == scene.num_drafts else f"drafts {widest} tokens per block, not {scene.num_drafts}"
    return Outcome(name, responses, chains, None, remark)


def _run_transformers(scene: Scene, reference: Reference) -> Outcome:
    """Decode with `assistant_model`, from the folder of transformers' own layout."""
    dtype = scene.target.causal_lm.dtype
    drafter = AutoModel.from_pretrained(scene.layouts["transformers"], dtype=dtype, trust_remote_code=False)
    options = {"assistant_model": drafter.to(scene.target.device).eval(), "speculation_type": "dflash"}
    return _decode(scene, "transformers", options)


def _run_custom_generate(scene: Scene, reference: Reference) -> Outcome:
    """Decode with the function that the export carries: this runs its code."""
    with TemporaryDirectory() as scratch:
        # transformers keeps modules by the folder's name, and the function keeps drafters by theirs: a new name reads
        # afresh.
        folder = Path(scratch).resolve() / Path(scratch).name
        folder.symlink_to(scene.folder.resolve(), target_is_directory=True)
        options = {"custom_generate": str(folder), "trust_remote_code": True, "num_drafts": scene.num_drafts}
        return _decode(scene, "custom_generate", options)


# ---- the speculators library ----------------------------------------------------------------------------------------
# It does not decode: from its logits at every anchor of the text follows what it would have kept, hence its rounds.


def _run_speculators(scene: Scene, reference: Reference) -> Outcome:
    """
    Load a speculators layout with the library, and count what it keeps along the target's responses, at the anchors of
    the reference's rounds. It reads embedding and head where `target_name` leads, a folder or the Hub.
    """
    from speculators import SpeculatorModel  # pyright: ignore[reportMissingImports]  an optional package

    assert scene.target_name is not None, "_why_not_speculators"
    folder = scene.layouts["speculators"]
    with TemporaryDirectory() as scratch:
        # The library looks for the target where the config names it, which may not be where this one came from.
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        place = Path(scene.target_name)
        source = str(place.resolve()) if place.is_dir() else scene.target_name
        config["speculators_config"]["verifier"]["name_or_path"] = source
        (Path(scratch) / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        shutil.copy(folder / SAFETENSORS_FILE, Path(scratch) / SAFETENSORS_FILE)
        model = SpeculatorModel.from_pretrained(scratch).float().eval().to(scene.target.device)
    find = _block_drafts if scene.drafter.config.drafts_whole_blocks else _step_drafts
    found = [
        _chain(scene, model, find, prompt, response, chain)
        for prompt, response, chain in zip(scene.prompts, reference.responses, reference.chains, strict=True)
    ]
    return Outcome("speculators", None, found, None, "its model class along the target's text")


def _chain(
    scene: Scene, model: Any, find: Callable, prompt: list[int], response: list[int], chain: list[int]
) -> list[int]:
    """Return what the library's class keeps at the anchors of the reference's chain, as far as both agree on them."""
    anchors = torch.tensor(anchors_of(chain), device=scene.target.device) + len(prompt)
    ids = torch.tensor([[*prompt, *response]], device=scene.target.device)
    drafts = find(scene, model, ids, anchors)
    slots = torch.arange(1, scene.num_drafts + 1, device=ids.device)
    is_kept = drafts == ids[0, anchors[:, None] + slots]
    kept = is_kept.long().cumprod(dim=1).sum(dim=1).tolist()
    # Behind a block that ends elsewhere, its anchors are others.
    index = first_difference(chain, kept)
    return kept if index is None else kept[: index + 1]


def _padded(scene: Scene, ids: torch.Tensor, extra: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text and its document marks, padded to whole blocks of pairs; padding is a document of its own."""
    width = -(-ids.shape[1] // _BLOCK) * _BLOCK + extra
    padded = ids.new_full((1, width), scene.target.pad_token_id)
    padded[:, : ids.shape[1]] = ids
    document = torch.full_like(padded, -1)
    document[:, : ids.shape[1]] = 0
    return padded, document


@torch.no_grad()
def _step_drafts(scene: Scene, model: Any, ids: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the argmax drafts at every anchor, `(A, K)`, of a class that runs a step per slot, on the text before."""
    padded, document = _padded(scene, ids, extra=1)
    features = (
        scene.target.read_text(padded, torch.ones_like(padded), scene.drafter.config.target_layer_ids)
        .padded()
        .features
    )
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        # A pair is a feature and the token after it.
        model(
            hidden_states=features[:, :-1],
            input_ids=padded[:, 1:],
            document_ids=document[:, 1:],
            ttt_steps=scene.num_drafts,
        )
    finally:
        handle.remove()
    best = torch.stack([logits[0, anchors - 1].argmax(dim=-1) for logits in seen[: scene.num_drafts]], dim=1)
    return _to_target(model, best)


def _to_target(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return ids if getattr(model, "d2t", None) is None else ids + model.d2t[ids]


@torch.no_grad()
def _block_drafts(scene: Scene, model: Any, ids: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the argmax drafts at every anchor, `(A, K)`, of a class that drafts whole blocks."""
    padded, document = _padded(scene, ids, extra=0)
    config = scene.drafter.config
    reading = scene.target.read_text(padded, torch.ones_like(padded), config.target_layer_ids).padded()
    marks = torch.zeros_like(padded, dtype=torch.bool).index_fill(1, anchors, True)
    hidden, logits, *_, positions = model._backbone_forward(
        reading.features, padded, marks, reading.last_hidden, document, max_anchors=len(anchors)
    )
    size, first = config.block_size, config.block_size - config.drafts_per_block
    blocks = positions.view(-1, size)[:, 0].tolist()
    if blocks != anchors.tolist():
        raise ValueError(
            f"speculators drafted at {blocks[:5]}, not at the anchors {anchors[:5].tolist()} it was given."
        )
    # A slot that reads the token before it reads the text's: its own place, where it drafts the one behind.
    slots = torch.arange(first, size, device=ids.device)
    before = padded[0, (anchors[:, None] + slots - first).clamp(max=padded.shape[1] - 1)]
    hidden, logits = (states[0].view(len(anchors), size, -1)[:, first:] for states in (hidden, logits))
    return _to_target(model, _follow(model, hidden, logits, before))[:, : scene.num_drafts]


def _follow(model: Any, hidden: torch.Tensor, logits: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return the drafts of slots `(A, K)`, by the tokens `before` them where the class has a head that reads them."""
    if getattr(model, "markov_head", None) is not None:
        logits = logits + model.markov_head.block_bias(prev_token_ids=before, hidden_states=hidden)
    if hasattr(model, "candidate_selector"):
        candidates = logits.topk(model.candidate_selector.top_k, dim=-1).indices
        scores = model.candidate_selector.score_candidates(logits, hidden, before, candidates)
        return candidates.gather(-1, scores.argmax(dim=-1, keepdim=True))[..., 0]
    return logits.argmax(dim=-1)


# ---- all of them ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Consumer:
    """Somebody who decodes with the published files: why it cannot be run, if so, and how it is."""

    find_reason: Callable[[Scene], str | None]
    run: Callable[[Scene, Reference], Outcome]


def _other_width(scene: Scene) -> str | None:
    own = scene.drafter.default_num_drafts
    if scene.num_drafts == own:
        return None
    return f"it always drafts {own} tokens per block, not {scene.num_drafts}"


def _why_not_transformers(scene: Scene) -> str | None:
    if "transformers" not in scene.layouts:
        return "the export has no transformers layout, which is for plain DFlash alone"
    return _other_width(scene)


def _why_not_custom_generate(scene: Scene) -> str | None:
    if not (scene.folder / "custom_generate" / "generate.py").is_file():
        return "the export carries no custom_generate"
    if not scene.trust_remote_code:
        return "it is code from the folder, and is run with `--trust-remote-code` alone"
    return None


def _why_not_speculators(scene: Scene) -> str | None:
    if "speculators" not in scene.layouts:
        return "the export has no speculators layout"
    if importlib.util.find_spec("speculators") is None:
        return "speculators is not installed"
    if scene.target_name is None:
        return "the library reads the target itself, and no folder or id of a whole model was given (`target_name`)"
    config = scene.drafter.config
    refusals = config.exported.readers(config, set())["speculators"].refusals
    return refusals[0] if refusals else None


CONSUMERS = {
    "transformers": Consumer(_why_not_transformers, _run_transformers),
    "custom_generate": Consumer(_why_not_custom_generate, _run_custom_generate),
    "speculators": Consumer(_why_not_speculators, _run_speculators),
    "vllm": Consumer(partial(find_reason_to_skip, "vllm"), lambda scene, reference: run_engine("vllm", scene)),
    "sglang": Consumer(partial(find_reason_to_skip, "sglang"), lambda scene, reference: run_engine("sglang", scene)),
}
