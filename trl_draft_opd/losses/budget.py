# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Memory of logits: how many bytes a device is given by default, how many rows fit into them, and which rows make a
chunk. Knows no losses.

Shape letters:  N = rows, S = target states of one chunk, H = hidden size
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .divergences import accumulation_dtype
from .heads import Head


CHUNK_BYTES_CPU = 64 * 2**20
CHUNK_BYTES_CUDA = 4 * 2**30
SHARE_OF_CARD = 1 / 20
NUM_TEMPORARIES = 5  # rows of logits in the accumulation dtype that comparing one row takes, at most
# What part of the budget is for them: small blocks of rows stay in the cache of a CPU, few blocks suit a GPU.
BLOCK_SHARE, BLOCK_SHARE_CPU = 1 / 4, 1 / 16

# The target states to project (`None`: those of the chunk before), the rows, and the place of each row's state.
Chunk = tuple[Tensor | None, Tensor, Tensor]


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


@dataclass(frozen=True)
class Budget:
    """Rows, and as many target states, of a chunk, and rows of a block that is compared at a time."""

    rows_per_chunk: int
    rows_per_block: int


def fit_budget(
    chunk_bytes: int,
    hidden_NH: Tensor,
    head: Head,
    target_head: Head | None,
    *,
    is_reduced: bool,
    is_fused: bool,
    holds_probs: bool = False,
    values_per_row: int = 0,
) -> Budget:
    """
    Return how many rows fit into `chunk_bytes`; the fused kernels take no temporaries. `holds_probs` is whether the
    target's probabilities of the drafter's tokens lie beside its logits, `values_per_row` what else a row has there.
    """
    num_logits = chunk_bytes // accumulation_dtype(hidden_NH).itemsize
    block_share = BLOCK_SHARE_CPU if hidden_NH.device.type == "cpu" else BLOCK_SHARE
    draft_vocab, target_vocab = head.vocab_size, target_head.vocab_size if target_head else 0
    temporaries = NUM_TEMPORARIES * max(draft_vocab, target_vocab)
    rows_per_block = max(1, int(num_logits * block_share) // temporaries)
    while_reading = target_vocab * target_head.num_buffers if target_head else 0
    if target_head and (is_reduced or holds_probs):
        while_reading = max(while_reading, target_vocab + draft_vocab * (is_reduced + holds_probs))
    while_comparing = draft_vocab * (head.num_buffers + (target_head is not None) + holds_probs) + values_per_row
    if not is_fused:
        num_logits -= rows_per_block * temporaries
    return Budget(max(1, num_logits // max(while_reading, while_comparing)), rows_per_block)


def cut_chunks(weights_N: Tensor, target_rows_N: Tensor | None, num_states: int, size: int) -> list[Chunk]:
    """
    Order the rows of nonzero weight by their target state, and cut them into even chunks of at most `size` rows and as
    many states. Everything is laid out on the device, and read from it once.

    Raises:
        ValueError: If a row of nonzero weight names a state that is not there.
    """
    rows_N = torch.arange(len(weights_N), device=weights_N.device)
    states_N = rows_N if target_rows_N is None else target_rows_N
    counts_N = weights_N != 0
    # Rows without weight come last, behind all states.
    behind = torch.iinfo(torch.long).max
    ordered_N, order_N = torch.where(counts_N, states_N, behind).sort(stable=True)
    is_first_N = torch.ones_like(counts_N)
    torch.ne(ordered_N[1:], ordered_N[:-1], out=is_first_N[1:])
    places_N = is_first_N.cumsum(dim=0) - 1
    is_wrong_N = counts_N & ((states_N < 0) | (states_N >= num_states))
    num_used = (is_first_N & (ordered_N != behind)).sum()
    parts = torch.arange(-(-len(weights_N) // size) + 1, device=weights_N.device)
    num_parts = (num_used + size - 1) // size
    cuts = num_used * torch.minimum(parts, num_parts) // num_parts.clamp(min=1)
    row_cuts = torch.searchsorted(places_N, cuts)
    found = torch.cat([torch.stack([is_wrong_N.sum(), num_parts]), cuts, row_cuts]).tolist()
    num_wrong, num_parts = found[:2]
    if num_wrong:
        wrong = f"names state {int(states_N[is_wrong_N][0])}, but there are {num_states}"
        raise ValueError(f"`target_rows_N` {wrong}. Count the rows of `target_hidden_MH` from 0.")
    cuts, row_cuts = found[2 : 3 + num_parts], found[2 + len(parts) : 3 + len(parts) + num_parts]
    # The first row of each state names it.
    first_rows = torch.searchsorted(places_N, torch.arange(cuts[-1], device=places_N.device))
    states = ordered_N[first_rows]
    chunks: list[Chunk] = []
    for (first, end), (first_row, end_row) in zip(pairwise(cuts), pairwise(row_cuts), strict=True):
        states_S: Tensor | None = states[first:end]
        for start, stop in pairwise(_even_cuts(end_row - first_row, size)):
            rows = slice(first_row + start, first_row + stop)
            chunks.append((states_S, order_N[rows], places_N[rows] - first))
            states_S = None
    return chunks


def _even_cuts(length: int, size: int) -> list[int]:
    num_parts = -(-length // size)
    return [length * part // num_parts for part in range(num_parts + 1)] if num_parts else [0]
