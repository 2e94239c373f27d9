# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Responses cut into what became of their tokens: accepted drafts, rejected drafts, tokens of the target's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from ..rollout.types import Rollout
from .preferences import Preference


# Blanks that a reader could not see.
_SHOWN = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Piece:
    """
    A stretch of a response.

    Attributes:
        kind (`str`): `"accepted"` drafts, a `"rejected"` draft, which is not in the text, or the target's `"bonus"`.
        text (`str`): As the tokenizer decodes it.
        note (`str`): What a reader is told who points at it; empty where there is nothing to tell.
    """

    kind: Literal["accepted", "rejected", "bonus"]
    text: str
    note: str = ""

    @property
    def shown(self) -> str:
        """
        The text, with blanks made visible where a single token is nothing else: a struck-out blank could not be seen.
        """
        if self.kind == "accepted" or self.text.strip():
            return self.text
        # A line of the response ends where the target ends it.
        return visible(self.text) + ("" if self.kind == "rejected" else "\n" * self.text.count("\n"))


@dataclass(frozen=True)
class Completion:
    """A response: the number of its prompt (`int`, from 1), its tau (`float` or `None`) and `list[Piece]`."""

    number: int
    tau: float | None
    pieces: list[Piece]


@dataclass
class CompletionCollector:
    """
    Keeps the first responses of an evaluation, as its `on_rollout`. Prompts are not kept.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        num_wanted (`int`): Responses to keep.
        read (`Callable[[Rollout], Mapping[int, Preference]]`, *optional*):
            Tells the preferences at the rejected drafts of one row, see [`read_preferences`].
    """

    tokenizer: PreTrainedTokenizerBase
    num_wanted: int
    read: Callable[[Rollout], Mapping[int, Preference]] | None = None
    kept: list[Completion] = field(default_factory=list)

    def __call__(self, rollout: Rollout) -> None:
        for row in range(min(len(rollout.input_ids), self.num_wanted - len(self.kept))):
            one = rollout.rows(row, row + 1)
            preferences = {} if self.read is None else self.read(one)
            self.kept.append(completion_of(one, self.tokenizer, number=len(self.kept) + 1, preferences=preferences))


def completion_of(
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    *,
    number: int,
    preferences: Mapping[int, Preference] | None = None,
) -> Completion:
    """
    Return a rollout of one row in pieces; what stands before its first block is the target's own. Where `preferences`
    has the place of a rejected draft, its note holds them.
    """
    start, end = int(rollout.prompt_lengths[0]), int(rollout.lengths[0])
    ids, is_written = rollout.input_ids[0].tolist(), rollout.completion_mask[0].tolist()
    accepted_places, rejected_at, notes = set(), {}, {}
    num_tokens = num_blocks = 0
    for block in range(int(rollout.num_rounds[0])):
        anchor, accepted = int(rollout.anchors[0, block]), int(rollout.accepted[0, block])
        num_verified = rollout.drafts.shape[-1] if rollout.verified is None else int(rollout.verified[0, block])
        accepted_places.update(range(anchor + 1, anchor + accepted + 1))
        place = anchor + accepted + 1
        if bool(rollout.is_counted[0, block]):
            num_tokens, num_blocks = num_tokens + accepted + 1, num_blocks + 1
        if accepted < num_verified and not bool(rollout.is_censored[0, block]) and place < end:
            draft = _decode(tokenizer, [int(rollout.drafts[0, block, accepted])])
            rejected_at[place] = draft
            target_token = _decode(tokenizer, [ids[place]])
            notes[place] = _note(accepted + 1, draft, target_token, (preferences or {}).get(place))
    pieces: list[Piece] = []
    run: list[int] = []

    def finish_run() -> None:
        if run:
            pieces.append(Piece("accepted", _decode(tokenizer, run)))
            run.clear()

    for place in range(start, end):
        if not is_written[place]:
            # Of a chat, what others said between two responses.
            finish_run()
        elif place in accepted_places:
            run.append(ids[place])
        else:
            finish_run()
            if place in rejected_at:
                pieces.append(Piece("rejected", rejected_at[place], notes[place]))
            pieces.append(Piece("bonus", _decode(tokenizer, [ids[place]])))
    finish_run()
    return Completion(number, num_tokens / num_blocks if num_blocks else None, pieces)


def _note(slot: int, draft: str, token: str, preference: Preference | None) -> str:
    """Return what a reader is told of a rejected draft and of the token in its place."""
    drafted, wanted = f"“{visible(draft)}”", f"“{visible(token)}”"
    if preference is None:
        return f"slot {slot}: drafted {drafted}, the target preferred {wanted}"
    of_draft, own_of_draft, of_token, own_of_token = map(_percent, preference)
    return (
        f"slot {slot}: drafted {drafted} (drafter {own_of_draft}, target {of_draft}), the target preferred {wanted} "
        f"(target {of_token}, drafter {own_of_token})"
    )


def _percent(share: float) -> str:
    """Return a probability as a reader takes it in."""
    return "under 0.1 %" if share < 0.001 else f"{share:.1%}".replace("%", " %")


def visible(text: str) -> str:
    """Return a token with its blanks made visible."""
    return text.translate(_SHOWN)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids)
    assert isinstance(text, str), "ids of one row are one text"
    return text
