# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The cache of a text that is read in chunks: its length is known, so that keys and values are written where they stay.
"""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class TextLayer(DynamicLayer):
    """
    A layer that makes room for `num_tokens` at once, and grows as others do behind them. A layer that grows from the
    start copies the whole text with every chunk.
    """

    def __init__(self, num_tokens: int):
        super().__init__()
        self._num_tokens = num_tokens
        self._stores: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of new tokens; return those of all."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._stores = (self._make_store(key_states), self._make_store(value_states))
            self.keys, self.values = (store[:, :, :0] for store in self._stores)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._stores is None or stop > self._num_tokens:
            self._stores = None
            return super().update(key_states, value_states, *args, **kwargs)
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start:stop] = states
        self.keys, self.values = (store[:, :, :stop] for store in self._stores)
        return self.keys, self.values

    def _make_store(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_empty(*states.shape[:2], self._num_tokens, states.shape[-1])


def text_cache(config: PreTrainedConfig, num_tokens: int) -> DynamicCache:
    """Return an empty cache for a text of `num_tokens`; layers of a special kind stay what the model needs."""
    cache = DynamicCache(config=config)
    cache.layers = [TextLayer(num_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
