# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Whether two targets have the same weights, wherever and in whatever precision they lie."""

import hashlib
import os
from multiprocessing.pool import ThreadPool
from typing import Any

import torch
from transformers import PreTrainedModel


# Hashing releases the GIL, and pieces of one size make a single large tensor parallel too.
_MAX_THREADS = 16
_ELEMENTS_PER_PIECE = 2**24


@torch.no_grad()
def fingerprint_weights(model: PreTrainedModel) -> str:
    """
    Hash names, shapes and every element of every stored tensor, in the order of their names.

    Elements are rounded to bfloat16 first, so that a checkpoint gives one fingerprint in float32 and in bfloat16: a
    change goes unseen where it rounds every element that it touches to the same value. A tied head counts once. Of
    tensors that a `device_map` keeps on disk or in host memory, names and shapes alone count.

    About 1 GB of bfloat16 per second and CPU core.
    """
    digest, seen = hashlib.sha256(), set()
    pieces = []
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, torch.Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        if not tensor.is_meta:
            pieces += tensor.detach().reshape(-1).split(_ELEMENTS_PER_PIECE)
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    with ThreadPool(threads) as pool:
        for start in range(0, len(pieces), threads):
            # Torch stays in this thread: its own threads do not survive a fork, and fail in those of a pool.
            data = [_bytes_of(piece) for piece in pieces[start : start + threads]]
            for hashed in pool.map(lambda held: hashlib.sha256(held).digest(), data):
                digest.update(hashed)
    return digest.hexdigest()


def _bytes_of(piece: torch.Tensor) -> Any:
    """Return the bytes of a piece, rounded, as an array."""
    if piece.is_floating_point():
        piece = piece.to(torch.bfloat16)
    return piece.contiguous().cpu().view(torch.uint8).numpy()
