# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
When a drafter pays: an estimate from shapes of what drafting and verifying cost. Pure functions of a drafter's config.
"""

from collections.abc import Sequence
from typing import Any

from ..costs.shapes import DrafterShape
from ..drafters.portable_config import PortableConfig


BATCH_SIZES = (1, 8, 32, 64, 128, 256)
# Tokens per forward at which a bfloat16 matrix product stops being bound by reading weights: 989 TFLOP/s over 3.35
# TB/s of an H100, at one FLOP per byte and token.
RIDGE_TOKENS = 295


def drafter_parameters(config: PortableConfig) -> int:
    """Return how many parameters are trained: the target's embedding is not, nor its head where it is used."""
    return DrafterShape.of(config).parameters


def drafter_reads(config: PortableConfig, num_drafts: int) -> int:
    """
    Return how many parameters are read to draft one block.

    EAGLE-3 runs its layer and head once per draft; who drafts whole blocks its layers once and the head on all slots
    at once, and then what only follows the drafts, such as DSpark's Markov head, once per draft. Tables of which a
    row is read count as nothing.
    """
    shape = DrafterShape.of(config)
    blocks = 1 if config.drafts_whole_blocks else num_drafts
    once = shape.fusion + blocks * (shape.layers * shape.layer_matrices + shape.head)
    # All slots of a block pass these at once; a head that reads the token before a slot is passed slot by slot.
    return once + shape.own.slot_matrices + num_drafts * shape.vocab * shape.own.head_rank


def break_even(
    config: PortableConfig,
    num_drafts: int,
    num_target_parameters: int,
    *,
    taus: Sequence[float] = (),
    acceptance: Sequence[float] = (),
) -> dict[str, Any]:
    """
    Estimate from which accepted length on a drafter pays.

    A forward on `n` tokens costs the time to read the weights, times `max(1, n / RIDGE_TOKENS)`: bound by memory below
    the ridge, by arithmetic above. A round verifies `batch * (K + 1)` tokens and drafts `batch * K`; plain decoding
    reads `batch` tokens per pass. Attention over the text, sampling and launches are left out, and the target counts
    as reading all its parameters, so real engines, mixtures of experts and large untied embeddings need more.

    Args:
        config ([`PortableConfig`]): The drafter's.
        num_drafts (`int`): Drafts per block, K.
        num_target_parameters (`int`): Parameters of the target.
        taus (`Sequence[float]`, *optional*): Accepted lengths to give the speed-up at.
        acceptance (`Sequence[float]` of length `K`, *optional*):
            Share of blocks that keep at least `k` drafts. With it, EAGLE-3 is also tried with fewer drafts, whose
            accepted length is `1 + acceptance[0] + ... + acceptance[k - 1]`. Blocks drafted whole are not: their slots
            see each other.

    Returns:
        `dict` with `draft_cost` (drafting one block at batch 1, in target passes), `ridge_tokens`, and `rows`: per
        batch size, the break-even tau, by tau the expected speed-up, and `best_drafts` with its speed-up, or `None`
        where it cannot be told.
    """

    def round_cost(batch: int, drafts: int) -> float:
        """Return what drafting and verifying a block costs, in plain decoding passes of the same batch."""
        # Tokens a drafter's forward reads per row: one at a time, or the whole block.
        width = DrafterShape.of(config).width if config.drafts_whole_blocks else 1
        verify = max(1.0, batch * (drafts + 1) / RIDGE_TOKENS)
        draft = drafter_reads(config, drafts) / num_target_parameters * max(1.0, batch * width / RIDGE_TOKENS)
        return (verify + draft) / max(1.0, batch / RIDGE_TOKENS)

    rows = []
    for batch in BATCH_SIZES:
        needed = round_cost(batch, num_drafts)
        best = None
        if not config.drafts_whole_blocks and len(acceptance) == num_drafts:
            found = {k: (1 + sum(acceptance[:k])) / round_cost(batch, k) for k in range(1, num_drafts + 1)}
            k = max(found, key=found.__getitem__)
            best = {"num_drafts": k, "speedup": round(found[k], 2)}
        speedups = {f"{tau:.2f}": round(tau / needed, 2) for tau in taus}
        rows.append({"batch": batch, "break_even_tau": round(needed, 2), "speedup": speedups, "best_drafts": best})
    share = drafter_reads(config, num_drafts) / num_target_parameters
    return {"draft_cost": round(share, 4), "ridge_tokens": RIDGE_TOKENS, "rows": rows}


def cost_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of [`break_even`], one row per batch size."""
    head = ["requests at a time", "tau to break even", *(f"speed-up at tau {tau}" for tau in rows[0]["speedup"])]
    has_best = rows[0]["best_drafts"] is not None
    cells = [
        [str(row["batch"]), f"{row['break_even_tau']:.2f}", *(f"{each:.2f}x" for each in row["speedup"].values())]
        + (["{num_drafts} ({speedup:.2f}x)".format(**row["best_drafts"])] if has_best else [])
        for row in rows
    ]
    return [*head, "best number of drafts"] if has_best else head, cells
