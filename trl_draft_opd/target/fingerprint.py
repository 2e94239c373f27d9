# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Whether two targets have the same weights, wherever and in whatever precision they lie."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from multiprocessing.pool import ThreadPool
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


# Hashing releases the GIL, and pieces of one size make a single large tensor parallel too.
_MAX_THREADS = 16
_ELEMENTS_PER_PIECE = 2**24
# A layer's part of a name: no conversion mixes tensors of two layers.
_LAYER = re.compile(r".*?\.\d+\.")


@torch.no_grad()
def fingerprint_weights(model: PreTrainedModel) -> str:
    """
    Hash names, shapes and every element of every tensor that a saved copy of a model has, in the order of their names.

    Elements are rounded to bfloat16 first, so that a checkpoint gives one fingerprint in float32 and in bfloat16: a
    change goes unseen where it rounds every element that it touches to the same value. A tied head counts once. Of
    tensors that a `device_map` keeps on disk or in host memory, names and shapes alone count.

    About 1 GB of bfloat16 per second and CPU core.
    """
    tensors = own_tensors(model)
    tied, parts = tied_names(tensors), defaultdict[str, dict[str, torch.Tensor]](dict)
    for name, tensor in tensors.items():
        if name not in tied:
            parts[layer_of(name)][name] = tensor
    shapes, places = {}, {}
    for part, held in parts.items():
        for name, saved in as_saved(model, outlines(held)).items():
            shapes[name], places[name] = list(saved.shape), part

    def walk() -> Iterator[torch.Tensor]:
        # One layer at a time: experts that lie in one tensor are taken apart.
        for part, names in groupby(sorted(shapes), places.__getitem__):
            saved = as_saved(model, parts[part])
            yield from (saved[name].detach() for name in names)

    return hash_tensors(sorted(shapes.items()), walk())


def hash_tensors(shapes: Sequence[tuple[str, Sequence[int]]], tensors: Iterable[torch.Tensor]) -> str:
    """Return the fingerprint of `tensors`, whose names and shapes, in the order of the names, are `shapes`."""
    digest = hashlib.sha256()
    for name, shape in shapes:
        digest.update(f"{name} {list(shape)}\n".encode())
    pieces = (
        piece for tensor in tensors if not tensor.is_meta for piece in tensor.reshape(-1).split(_ELEMENTS_PER_PIECE)
    )
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    with ThreadPool(threads) as pool:
        # Torch stays in this thread: its own threads do not survive a fork, and fail in those of a pool.
        while data := [_bytes_of(piece) for piece in islice(pieces, threads)]:
            for hashed in pool.map(lambda held: hashlib.sha256(held).digest(), data):
                digest.update(hashed)
    return digest.hexdigest()


def own_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return a model's parameters and persistent buffers under their names in memory; tied ones under each of them."""
    held = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, torch.Tensor)}


def tied_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the names of tensors that have another name, which comes first, and that name."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensors[name]), name) for name in sorted(tensors)}
    return {name: other for name, other in names.items() if name != other}


def outlines(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of the same shapes without elements."""
    # Not by `to`, which would take the state of quantised weights along.
    return {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in tensors.items()}


def as_saved(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return tensors of a model, whole layers of it, under the names and in the form in which its family is saved: some
    families of transformers hold experts together that lie in the file one by one.
    """
    # What was read from a file of an older form counts as what it would be in today's. Of quantised weights only the
    # model itself knows.
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    own: Any = None if is_quantized else model.__dict__.pop("_weight_conversions", None)
    try:
        return revert_weight_conversion(model, dict(tensors))
    except NotImplementedError:
        # A quantiser whose weights are saved as they lie in memory.
        return dict(tensors)
    finally:
        if own is not None:
            model.__dict__["_weight_conversions"] = own


def layer_of(name: str) -> str:
    """Return the beginning of a name that tells the layer, or an empty string."""
    layer = _LAYER.match(name)
    return layer[0] if layer else ""


def _bytes_of(piece: torch.Tensor) -> Any:
    """Return the bytes of a piece, rounded, as an array."""
    if piece.is_floating_point():
        piece = piece.to(torch.bfloat16)
    return piece.contiguous().cpu().view(torch.uint8).numpy()
