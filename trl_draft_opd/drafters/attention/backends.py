# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Which backend computes the attention, in one place. CUDA's fused kernel is compiled on the machine it runs on, so it is
tried before it is trusted.

Shape letters:  A = blocks, S = queries per block, h = query heads, g = key/value heads, d = head dimension
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .flex import TILE, attend_by_flex
from .plan import AttentionPlan, Sight
from .tiles import attend_in_tiles


def choose_backend(query: Tensor, num_groups: int, is_causal: bool = False, has_sinks: bool = False) -> str:
    """
    Return the fastest backend for the attention of `query`, `(B, h, A, S, d)`, on keys of `num_groups` heads, with
    causal blocks or not, and with sinks or not.

    On the CPU that is its fused kernel; on CUDA `flex_attention`, but for float64, unusual heads, and fewer queries
    than one of its tiles, as live decoding has. Everywhere else it is products.
    """
    if query.device.type == "cpu":
        return "flash"
    _, num_heads, num_blocks, num_queries, head_dim = query.shape
    if query.is_cuda and num_blocks * num_queries >= TILE and 16 <= head_dim <= 256 and query.dtype != torch.float64:
        if _flex_works(query.device, query.dtype, num_heads, num_groups, head_dim, is_causal, has_sinks):
            return "flex"
    return "products"


@cache
def _flex_works(*case: Any) -> bool:
    """Return whether the fused kernel compiles and is right for a case of [`_try_flex`]; warn if not."""
    # This is asked under any mode of autograd and autocast, and inside of checkpointed layers. Threads begin without.
    with ThreadPoolExecutor(1) as thread:
        failure = thread.submit(_try_flex, *case).result()
    if failure is not None:
        warnings.warn(
            f"torch's flex_attention does not work here ({failure}). The drafter's attention is computed by matrix "
            "products in its place: the same values, slower, the more so the longer the text."
        )
    return failure is None


def _try_flex(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_groups: int,
    head_dim: int,
    is_causal: bool,
    has_sinks: bool,
) -> str | None:
    """Hold values and gradients of the fused kernel to products; return what is wrong, or `None`."""
    generator = torch.Generator().manual_seed(0)
    # Seven tiles of queries on eleven of keys: sizes that equal a number of heads would be compiled in as that number.
    num_blocks, num_queries, length = 115, 7, 500

    def draw(heads: int, *shape: int) -> Tensor:
        # Heads side by side in each row, as projections give them: other strides would be compiled for anew.
        drawn = torch.randn(1, *shape, heads, head_dim, generator=generator).to(device, dtype)
        return drawn.movedim(-2, 1).requires_grad_()

    query, key, value = draw(num_heads, num_blocks, num_queries), draw(num_groups, length), draw(num_groups, length)
    pieces = [draw(num_groups, num_blocks, num_queries) for _ in range(2)]
    # Two texts, blocks at every fourth token.
    anchors = torch.arange(4, 4 * num_blocks + 1, 4, device=device)[None]
    plan = AttentionPlan(anchors, (anchors > length // 2).long() * (length // 2))
    sinks = torch.zeros(num_heads, device=device, dtype=dtype, requires_grad=True) if has_sinks else None
    leaves = [query, key, value, *pieces] + ([] if sinks is None else [sinks])
    results: list[list[Tensor]] = []
    try:
        for attend, options in ((attend_by_flex, ()), (attend_in_tiles, ("products",))):
            # A window is another number in the mask's tensors, the same code.
            sight = Sight(window=100, is_causal=is_causal)
            out = attend(query, key, value, pieces, plan, head_dim**-0.5, *options, sight=sight, sinks=sinks)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out) + out.detach())])
    except Exception as error:  # noqa: BLE001  a compiler raises anything
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    # Of bfloat16, 2 ** -8 per value; a kernel that shows a query the wrong keys is off by the size of the values.
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(*results, strict=True)]
    return None if max(errors) < 0.05 else f"its values differ by {max(errors):.2g} of their size"
