# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
What every consumer is asked to decode, and what it is checked against: the target's plain decoding, our reference
loop, and the estimate that training uses. One prompt at a time, in float32, to a fixed number of tokens, end of
sequence ignored.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from ..drafters.auto import AutoDrafter
from ..drafters.base import Drafter
from ..rollout.acceptance import SamplingSettings
from ..rollout.drafting import DraftingSettings
from ..rollout.keyed_random import DrawKeys
from ..rollout.live import rollout_live
from ..rollout.replay import TargetText, rollout_replay
from ..rollout.types import Rollout
from ..target.frozen import FrozenTarget
from ..utils.settings import check_settings
from .counting import started_within


GREEDY = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
# Rows per forward of the replay, and its logits alive at a time: what a small machine holds.
_REPLAY_ROWS, _SEGMENT_LENGTH, _CHUNK_BYTES = 8, 16, 1 << 26


@dataclass(frozen=True)
class EngineSettings:
    """
    How engines are started.

    Attributes:
        python (`str`): Interpreter of the environment that holds the engine; this one's by default.
        dtype (`str`): Precision the engine computes in. Outputs must be equal in float32 only.
        batch_size (`int`): Requests decoded together. Other batches round otherwise, so 1 compares best.
        timeout (`float`): Seconds an engine may take in all.
    """

    python: str = sys.executable
    dtype: str = "float32"
    batch_size: int = 1
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Scene:
    """
    One verification: of the drafter read afresh from the published `folder`.

    Attributes:
        target_name (`str` or `None`): Folder or Hub id of the target, for engines and libraries that load it.
        max_completion_length (`int`): Tokens whose rounds are counted, N.
        layouts (`dict[str, Path]`): Folder of each published layout, the one at the root first.
        trust_remote_code (`bool`): Whether code in the published folder may be run.
    """

    target: FrozenTarget
    target_name: str | None
    folder: Path
    drafter: Drafter
    prompts: list[list[int]]
    num_drafts: int
    max_completion_length: int
    layouts: dict[str, Path] = field(default_factory=dict)
    engines: EngineSettings = field(default_factory=EngineSettings)
    trust_remote_code: bool = False

    @property
    def num_decoded(self) -> int:
        """Tokens to decode so that every round that starts within N tokens is seen as a whole."""
        return self.max_completion_length + self.num_drafts + 1

    def load(self, folder: str | Path) -> Drafter:
        """Load another drafter of this target."""
        return load_drafter(folder, self.target)


def load_drafter(folder: str | Path, target: FrozenTarget) -> Drafter:
    """Load a drafter of a target onto the target's device."""
    drafter = AutoDrafter.from_pretrained(folder, num_target_layers=target.num_layers)
    return drafter.to(target.device)  # pyright: ignore[reportArgumentType]  its type takes the device for `self`


@contextmanager
def _decoding_greedily(target: FrozenTarget) -> Iterator[None]:
    """Have the target decode greedily past every end of sequence, whatever its generation config states."""
    own = target.causal_lm.generation_config
    target.causal_lm.generation_config = GenerationConfig(do_sample=False, pad_token_id=target.pad_token_id)
    try:
        yield
    finally:
        target.causal_lm.generation_config = own


@torch.no_grad()
def generate(scene: Scene, prompt: list[int], **options: Any) -> list[int]:
    """Return `scene.num_decoded` tokens that the target's own `generate` writes after a prompt."""
    ids = torch.tensor([prompt], device=scene.target.device)
    # Its class has no type for `generate`.
    model: Any = scene.target.causal_lm
    with _decoding_greedily(scene.target):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=scene.num_decoded, **options)
    return output[0, len(prompt) :].tolist()


def _drafting(scene: Scene) -> DraftingSettings:
    return DraftingSettings(scene.num_drafts, GREEDY, "greedy", keep_branch_hidden=False)


def decode_plainly(scene: Scene) -> list[list[int]]:
    """Return the target's own responses: the truth."""
    return [generate(scene, prompt) for prompt in scene.prompts]


def decode_with_us(scene: Scene) -> tuple[list[list[int]], list[list[int]]]:
    """Return responses and chains of our reference loop with the published drafter."""
    responses, chains = [], []
    for prompt in scene.prompts:
        rollout = rollout_live(
            scene.target,
            scene.drafter,
            [prompt],
            _drafting(scene),
            DrawKeys(0, 0, [0]),
            max_completion_length=scene.num_decoded,
            eos_token_ids=[],
        )
        responses += rollout.responses()
        chains += _chains(rollout, scene.max_completion_length)
    return responses, chains


def replay(scene: Scene, drafter: Drafter, responses: list[list[int]]) -> list[list[int]]:
    """
    Return the chains a drafter makes along the target's own responses: the estimate that training uses, without
    generation.
    """
    chains: list[list[int]] = []
    pairs = list(zip(scene.prompts, responses, strict=True))
    for start in range(0, len(pairs), _REPLAY_ROWS):
        text = _as_text(scene.target, pairs[start : start + _REPLAY_ROWS])
        rollout = rollout_replay(
            scene.target,
            drafter,
            text,
            _drafting(scene),
            DrawKeys(0, 0, text.sample_ids),
            segment_length=_SEGMENT_LENGTH,
            chunk_bytes=_CHUNK_BYTES,
        )
        chains += _chains(rollout, scene.max_completion_length)
    return chains


def _as_text(target: FrozenTarget, pairs: list[tuple[list[int], list[int]]]) -> TargetText:
    rows = [torch.tensor([*prompt, *response]) for prompt, response in pairs]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=target.pad_token_id)
    index = torch.arange(input_ids.shape[1])
    starts = torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]
    is_text = index < torch.tensor([len(row) for row in rows])[:, None]
    return TargetText(
        input_ids=input_ids.to(target.device),
        attention_mask=is_text.long().to(target.device),
        completion_mask=(is_text & (index >= starts)).to(target.device),
        sample_ids=range(len(rows)),
    )


def _chains(rollout: Rollout, max_completion_length: int) -> list[list[int]]:
    rows = zip(rollout.accepted.tolist(), rollout.num_rounds.tolist(), strict=True)
    return [started_within(accepted[:num_rounds], max_completion_length) for accepted, num_rounds in rows]
