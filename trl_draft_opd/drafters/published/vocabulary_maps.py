# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The two maps of a checkpoint over a part of the target's vocabulary: `d2t` and `t2d`.

Shape letters:  V = the target's vocabulary, DV = draft vocabulary
"""

from typing import Any

import torch


def complete_vocabulary_maps(tensors: dict[str, torch.Tensor], arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """
    Return a checkpoint's tensors with checked maps; a missing `t2d` is derived, maps of a full vocabulary are dropped.

    `arguments` are those of the config class, see [`ParsedConfig`].
    """
    maps = {name: tensors[name] for name in ("d2t", "t2d") if name in tensors}
    weights = {name: tensor for name, tensor in tensors.items() if name not in maps}
    vocab_size = arguments["vocab_size"]
    for name, values in maps.items():
        if values.is_floating_point() or values.ndim != 1:
            raise ValueError(
                f"{name!r} has type {values.dtype} and shape {tuple(values.shape)}; it must be a vector of "
                f"{'integers' if name == 'd2t' else 'booleans'}."
            )
    if arguments.get("draft_vocab_size", vocab_size) == vocab_size:
        identity = {"d2t": torch.zeros(vocab_size, dtype=torch.long), "t2d": torch.ones(vocab_size, dtype=torch.bool)}
        for name, values in maps.items():
            if not torch.equal(values.to(identity[name].dtype), identity[name]):
                raise ValueError(
                    f"{name!r} is not the identity, but config.json gives the drafter the full vocabulary of "
                    f"{vocab_size}. Set `draft_vocab_size` to the number of rows of the head."
                )
        return weights
    if "d2t" not in maps:
        return tensors
    d2t = maps["d2t"].long()
    token_ids = torch.arange(d2t.numel()) + d2t
    if "t2d" in maps:
        t2d = maps["t2d"] != 0
    elif token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise ValueError(
            f"'d2t' maps to token ids {token_ids.min()}..{token_ids.max()}, outside of the target's "
            f"0..{vocab_size - 1}."
        )
    else:
        t2d = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, token_ids, True)
    check_draft_vocabulary(d2t, t2d, vocab_size)
    return weights | {"d2t": d2t, "t2d": t2d}


def check_draft_vocabulary(d2t: torch.Tensor, t2d: torch.Tensor, vocab_size: int) -> None:
    """
    Raise `ValueError` with all faults unless offsets `d2t` (`(DV,)`) and marks `t2d` (`(V,)`) describe one vocabulary.
    """
    faults = []
    if d2t.dtype != torch.int64 or d2t.dim() != 1:
        faults.append(f"`d2t` must be 1-D int64, is {d2t.dim()}-D {d2t.dtype}")
    if t2d.dtype != torch.bool or t2d.shape != (vocab_size,):
        faults.append(f"`t2d` must be bool of shape ({vocab_size},), is {t2d.dtype} of shape {tuple(t2d.shape)}")
    if not faults:
        faults = _find_disagreements(d2t.cpu(), t2d.cpu(), vocab_size)
    if faults:
        raise ValueError(
            f"The draft vocabulary is inconsistent: {'; '.join(faults)}. `d2t` holds offsets (target id = draft id + "
            "d2t[draft id]), not ids. Rebuild it with `build_draft_vocabulary`."
        )


def _find_disagreements(d2t_DV: torch.Tensor, t2d_V: torch.Tensor, vocab_size: int) -> list[str]:
    faults = []
    token_ids_DV = d2t_DV + torch.arange(len(d2t_DV))
    if not (token_ids_DV.diff() > 0).all():
        faults.append("the target ids of `d2t` do not increase strictly")
    if t2d_V.sum() != len(d2t_DV):
        faults.append(f"`t2d` marks {int(t2d_V.sum())} tokens, `d2t` has {len(d2t_DV)}")
    is_outside_DV = (token_ids_DV < 0) | (token_ids_DV >= vocab_size)
    if is_outside_DV.any():
        faults.append(f"`d2t` leads to id {int(token_ids_DV[is_outside_DV][0])}, outside 0..{vocab_size - 1}")
    elif not t2d_V[token_ids_DV].all():
        faults.append(f"`t2d` does not mark id {int(token_ids_DV[~t2d_V[token_ids_DV]][0])}, which `d2t` leads to")
    return faults
