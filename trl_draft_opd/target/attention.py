# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Attention of texts that lie end to end in one sequence: each text attends within itself, without a mask over all of
them. Registered with transformers under a name of its own; a model is switched to it for single forward passes.

Shape letters:  n = new tokens, S = keys (cached and new), D = size of a head
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedConfig


NAME = "within_texts"
# What transformers hands to every attention function and changes nothing here.
_HARMLESS = ("position_ids", "cache_position", "use_cache", "dropout", "is_causal", "output_hidden_states")
# Queries that share one mask where a device has no kernel for causal attention behind a cache.
_TILE = 256


class UnknownAttentionError(ValueError):
    """A model's attention does something that its texts would lose when they are read end to end."""


@dataclass(frozen=True)
class Span:
    """
    Consecutive new tokens, and the keys that they see.

    Attributes:
        queries (`slice`): The new tokens.
        keys (`tuple[slice, ...]`): Runs of keys, cached ones first, in the order in which they are seen.
        mask (`torch.Tensor` of shape `(n, S)`, *optional*):
            Added to the scores. Without one, the last query sees every key, and each one before it one key less.
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor | None = None


class Spans:
    """
    Which keys each new token of one forward pass sees.

    Attributes:
        num_uses (`int`): Layers that have attended by it.
    """

    def __init__(self, spans: Sequence[Span]):
        self.spans, self.num_uses = tuple(spans), 0

    @property
    def has_no_mask(self) -> bool:
        """Whether every token sees its text up to itself, as kernels know it without a mask."""
        return all(span.mask is None for span in self.spans)


def text_spans(lengths: Sequence[int]) -> Spans:
    """Return the spans of whole texts that lie end to end, without a cache."""
    spans, start = [], 0
    for length in lengths:
        if length > 0:
            text = slice(start, start + length)
            spans.append(Span(text, (text,)))
        start += length
    return Spans(spans)


def chunk_spans(start: int, stop: int, mask: torch.Tensor | None) -> Spans:
    """Return the spans of the tokens `start..stop` of one text behind those before, with [`chunk_mask`]'s mask."""
    if mask is None or start == 0:
        return Spans([Span(slice(0, stop - start), (slice(0, stop),))])
    spans = []
    for first in range(start, stop, _TILE):
        last = min(first + _TILE, stop)
        width = mask.shape[1] - _TILE
        seen = mask[: last - first, width - first : width + last - first]
        spans.append(Span(slice(first - start, last - start), (slice(0, last),), seen))
    return Spans(spans)


def chunk_mask(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """
    Return the mask of which every tile of a text of `length` tokens sees a part, `(tile, length)`; `None` on CUDA,
    whose kernels need none.
    """
    if device.type == "cuda":
        return None
    behind = torch.full((_TILE, _TILE), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)
    return torch.cat([behind.new_zeros(_TILE, length), behind], dim=1)


@contextmanager
def attending_within_texts(config: PreTrainedConfig) -> Iterator[None]:
    """Switch a model of this config to [`attend_within_texts`] for a forward pass that is given `text_spans`."""
    own = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own


def attend_within_texts(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    text_spans: Spans,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attend as `text_spans` says.

    Args:
        query (`torch.Tensor` of shape `(1, heads, n, D)`): Of the new tokens.
        key, value (`torch.Tensor` of shape `(1, key heads, S, D)`): Of cached and new tokens.

    Returns:
        Tensor of shape `(1, n, heads, D)`, and no weights.

    Raises:
        UnknownAttentionError: If the model asks for anything beyond scaled products with a causal softmax.
    """
    unknown = [name for name, given in others.items() if name not in _HARMLESS and given not in (None, False)]
    unknown += ["a mask"] if attention_mask is not None else []
    is_causal = others.get("is_causal", getattr(module, "is_causal", True))
    unknown += ["no causal order"] if is_causal is False else []
    if unknown:
        raise UnknownAttentionError(f"its attention is given {', '.join(sorted(unknown))}")
    text_spans.num_uses += 1
    parts = []
    for span in text_spans.spans:
        keys, values = (_runs(states, span.keys) for states in (key, value))
        parts.append(_attend(query[:, :, span.queries], keys, values, span.mask, scaling))
    states = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return states.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend_within_texts)


def _runs(states: torch.Tensor, runs: tuple[slice, ...]) -> torch.Tensor:
    parts = [states[:, :, run] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Return attention of one text's queries, `(1, heads, n, D)`, by a kernel with memory linear in `n` and `S`."""
    heads, key_heads = query.shape[1], key.shape[1]
    options: dict[str, Any] = {"scale": scaling}
    shape = query.shape[:-1]
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if mask is None and (is_half or query.device.type == "cpu"):
        options["enable_gqa"] = heads != key_heads
    elif heads != key_heads:
        # Other kernels know no groups: a key head is a row of the batch, which its queries' heads read without a copy.
        query = query[0].unflatten(0, (key_heads, -1))
        key, value = (states[0][:, None].expand(-1, query.shape[1], -1, -1) for states in (key, value))
    if mask is not None:
        options["attn_mask"] = mask.to(query.device)
    elif query.shape[2] == key.shape[2]:
        options["is_causal"] = True
    else:
        options["attn_mask"] = causal_lower_right(query.shape[2], key.shape[2])
    states = F.scaled_dot_product_attention(query, key, value, **options)
    return states.reshape(*shape, states.shape[-1])
