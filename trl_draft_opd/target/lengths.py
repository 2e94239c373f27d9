# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The one rule for lengths: a prompt, its response and one block of drafts fit into the target's positions.

Lengths that were given are kept or refused; those that were not are the defaults, lowered to what the target has.
"""

import logging
from dataclasses import dataclass


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lengths:
    """The longest prompt and the longest response, in tokens."""

    prompt: int
    completion: int


# Longer prompts are skipped, and few chats have them; 2048 is the paper's non-thinking setting.
TRAINING_LENGTHS = Lengths(prompt=1024, completion=2048)


def fit_lengths(
    num_positions: int | None, *, prompt: int | None, completion: int | None, num_drafts: int, defaults: Lengths
) -> Lengths:
    """
    Return the lengths to use; unset, a response gets at most half of the positions, a prompt what is left of them.

    A drafter's block takes no part in the response's length, so that commands without a drafter arrive at the same.

    Args:
        num_positions (`int` or `None`): Positions of the target; `None` for one without a limit.
        prompt (`int` or `None`), completion (`int` or `None`): The lengths that were given.
        num_drafts (`int`): Positions behind the response that a block may take.
        defaults (`Lengths`): What a length is where it was not given.

    Raises:
        ValueError: If the lengths that were given do not fit.
    """
    fitted = Lengths(
        defaults.prompt if prompt is None else prompt, defaults.completion if completion is None else completion
    )
    if num_positions is None:
        return fitted
    if completion is None:
        half = (num_positions - (0 if prompt is None else prompt)) // 2
        fitted = Lengths(fitted.prompt, max(min(fitted.completion, half), 1))
    if prompt is None:
        fitted = Lengths(max(min(fitted.prompt, num_positions - fitted.completion - num_drafts), 1), fitted.completion)
    check_lengths(num_positions, fitted, num_drafts)
    lowered = []
    if prompt is None and fitted.prompt < defaults.prompt:
        lowered.append(f"`max_prompt_length` to {fitted.prompt}")
    if completion is None and fitted.completion < defaults.completion:
        lowered.append(f"`max_completion_length` to {fitted.completion}")
    if lowered:
        logger.warning(
            "The target has %d positions for a prompt, its response and a block, so this lowers %s.",
            num_positions,
            " and ".join(lowered),
        )
    return fitted


def check_lengths(num_positions: int | None, lengths: Lengths, num_drafts: int) -> None:
    """Raise `ValueError` unless a prompt, its response and a block of these lengths fit into the positions."""
    needed = lengths.prompt + lengths.completion + num_drafts
    if num_positions is not None and needed > num_positions:
        raise ValueError(
            f"A prompt of {lengths.prompt} tokens (`max_prompt_length`), a response of {lengths.completion} "
            f"(`max_completion_length`) and a block of {num_drafts} drafts take {needed} positions, but the target "
            f"has {num_positions}. Lower one of them, or leave both lengths out."
        )


def fit_text_length(num_positions: int | None, length: int | None, *, num_drafts: int, default: int) -> int:
    """
    Return the length at which whole texts are cut: as given, or the default, lowered to leave a block its positions.

    Raises:
        ValueError: If the length that was given does not fit.
    """
    if num_positions is None:
        return default if length is None else length
    room = num_positions - num_drafts
    if room < 2 or (length is not None and length > room):
        raise ValueError(
            f"Texts of {default if length is None else length} tokens (`max_length`) and a block of {num_drafts} "
            f"drafts exceed the target's {num_positions} positions. Lower `max_length` to {room}, or leave it out."
        )
    return min(default, room) if length is None else length
