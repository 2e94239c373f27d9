# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Rounds of speculative decoding as plain integers, so that every consumer's can be compared with ours.

A chain is the accepted drafts of each round of one response, in order. The prefill commits the first token, which is
the first anchor, index 0 of the response; the next anchor is `r + 1` further. Knows no model.
"""

from collections.abc import Sequence


def anchors_of(chain: Sequence[int]) -> list[int]:
    """Return the anchor of each round, as an index into the response."""
    anchors, place = [], 0
    for accepted in chain:
        anchors.append(place)
        place += accepted + 1
    return anchors


def started_within(chain: Sequence[int], max_completion_length: int) -> list[int]:
    """
    Return the rounds that an engine runs to write `max_completion_length` tokens, each with all the drafts it kept.

    An engine verifies the last block as a whole and then cuts the text, so its counters hold drafts past the limit.
    Decoding a block further and keeping the rounds that started before the limit counts the same.
    """
    return [
        accepted
        for accepted, anchor in zip(chain, anchors_of(chain), strict=True)
        if anchor < max_completion_length - 1
    ]


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the first index at which two sequences differ or one has ended; `None` if they are equal."""
    for index, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if own != other:
            return index
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))
