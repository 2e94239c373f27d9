# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Memory of logits: how many bytes a device is given by default, and how many rows fit into them. Knows no losses."""

import torch


CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_BYTES_CUDA = 4 * 2**30
SHARE_OF_CARD = 1 / 20


def default_chunk_bytes(device: torch.device | str) -> int:
    """
    Return the bytes of logits that may be alive at a time on a device, where the settings leave it open.

    A chunk costs one pass over the head's weight whatever its rows, and a fixed number of kernel launches: a GPU needs
    some thousand rows to be bound by neither. A CPU pays for no launches, and small chunks stay near its caches.

    Returns:
        `int`: 64 MiB; on CUDA 5 % of the card's memory, at most 4 GiB.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return CHUNK_BYTES_CPU
    return chunk_bytes_of_card(torch.cuda.get_device_properties(device).total_memory)


def chunk_bytes_of_card(card_bytes: int) -> int:
    """Return [`default_chunk_bytes`] of a CUDA card with `card_bytes` of memory."""
    return min(CHUNK_BYTES_CUDA, int(card_bytes * SHARE_OF_CARD))
