# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Consumers that decode inside this process, through the target's own `generate`: transformers' DFlash, and the function that a
repository carries. Neither says how many drafts a round kept; the target's forward passes do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import AutoModel

from .counting import started_within
from .report import Outcome
from .scene import Scene, generate


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Note, for every forward pass of the target, the tokens in its cache before and the tokens it is given."""
    passes: list[tuple[int, int]] = []

    def note(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        input_ids = options["input_ids"] if "input_ids" in options else arguments[0]
        cache = options.get("past_key_values")
        passes.append((0 if cache is None else cache.get_seq_length(), input_ids.shape[1]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def rounds_of(passes: list[tuple[int, int]], prompt_length: int, max_new_tokens: int) -> list[int]:
    """
    Return the chain behind the target's forward passes over one response.

    A round reads the anchor and its drafts on top of all text before the anchor, so the cached length of a pass is its
    anchor's position, and the next pass tells how many drafts were kept.

    Raises:
        ValueError: If the first pass does not read the prompt as a whole, so that the passes mean something else.
    """
    if not passes or passes[0] != (0, prompt_length):
        raise ValueError(f"The first pass of the target was {passes[:1]}, not one over the prompt of {prompt_length}.")
    anchors = [cached for cached, _ in passes[1:]]
    chain = [after - before - 1 for before, after in zip(anchors, anchors[1:], strict=False)]
    return started_within(chain, max_new_tokens)


def _decode(scene: Scene, name: str, options: dict[str, Any]) -> Outcome:
    responses, chains, widest = [], [], 0
    for prompt in scene.prompts:
        with _watched(scene.target.causal_lm) as passes:
            responses.append(generate(scene, prompt, **options))
        chains.append(rounds_of(passes, len(prompt), scene.max_new_tokens))
        widest = max([widest, *(width - 1 for _, width in passes[1:])])
    remark = "" if widest == scene.num_drafts else f"drafts {widest} tokens per block, not {scene.num_drafts}"
    return Outcome(name, responses, chains, None, remark)


def run_transformers(scene: Scene, folder: Path) -> Outcome:
    """Decode with `assistant_model`, from the folder of the native layout."""
    dtype = scene.target.causal_lm.dtype
    drafter = AutoModel.from_pretrained(folder, dtype=dtype, trust_remote_code=False).to(scene.target.device).eval()
    return _decode(scene, "transformers", {"assistant_model": drafter, "speculation_type": "dflash"})


def run_custom_generate(scene: Scene) -> Outcome:
    """Decode with the function that the export carries: this runs its code."""
    with TemporaryDirectory() as scratch:
        # transformers keeps modules by the folder's name, and the function keeps drafters by theirs: a new name reads afresh.
        folder = Path(scratch).resolve() / Path(scratch).name
        folder.symlink_to(scene.folder.resolve(), target_is_directory=True)
        options: dict[str, Any] = {"custom_generate": str(folder), "trust_remote_code": True, "drafter": str(folder)}
        if scene.drafter.config.family == "eagle3":
            options["num_drafts"] = scene.num_drafts
        return _decode(scene, "custom_generate", options)
