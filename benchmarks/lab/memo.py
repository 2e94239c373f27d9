# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
A target that remembers what it read. Saves a small laboratory the same forward pass in every epoch and arm; what an
update costs is counted on a target that forgets.
"""

from collections.abc import Sequence

import torch

from trl_draft_opd import FrozenTarget
from trl_draft_opd.drafters.packing import RowPacking
from trl_draft_opd.target.reading import TextReading


class RememberingTarget(FrozenTarget):
    """
    A [`FrozenTarget`] whose `read_text` keeps features and hidden states of every row in memory, up to a budget.

    Readings with a cache of keys and values are made anew: the cache is what they are asked for.

    Attributes:
        budget_bytes (`int`): Bytes to keep at most; 0, the default, remembers nothing. Set it after loading.
    """

    budget_bytes = 0

    def __init__(self, *args):
        super().__init__(*args)
        self._rows: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        self._num_bytes = 0

    @torch.no_grad()
    def read_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        layer_ids: Sequence[int],
        keep_cache: bool = False,
    ) -> TextReading:
        """Return the reading, from memory for the rows that were read before; see [`FrozenTarget.read_text`]."""
        if keep_cache or self.budget_bytes == 0:
            return super().read_text(input_ids, attention_mask, layer_ids, keep_cache)
        packing = RowPacking.of(attention_mask)
        lengths = packing.lengths
        keys = [(*layer_ids, *ids[:length]) for ids, length in zip(input_ids.tolist(), lengths, strict=True)]
        new = [row for row, key in enumerate(keys) if key not in self._rows]
        found = {row: self._rows[key] for row, key in enumerate(keys) if key in self._rows}
        if new:
            width = max(lengths[row] for row in new)
            part = super().read_text(input_ids[new, :width], attention_mask[new, :width], layer_ids)
            states = (tensor.split(part.packing.lengths) for tensor in (part.features, part.last_hidden))
            for row, tensors in zip(new, zip(*states, strict=True), strict=True):
                # Clones: a slice would keep the whole reading alive.
                found[row] = tuple(tensor.clone() for tensor in tensors)
                self._remember(keys[row], found[row])
        rows = [found[row] for row in range(len(keys))]
        return TextReading(*(torch.cat(tensors) for tensors in zip(*rows, strict=True)), packing)

    def _remember(self, key: tuple, tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._num_bytes + size <= self.budget_bytes:
            self._rows[key] = tensors
            self._num_bytes += size
