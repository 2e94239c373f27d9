# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Counters that give the same value on every run: peak bytes, FLOPs, rows sent through a head, forwards of the target.

They watch torch's dispatcher, not the clock, and know nothing of drafters. What a kernel allocates and frees inside of
itself is not seen; neither are views, nor storages that exist before the count begins.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


_aten = torch.ops.aten


def _visible_pairs(query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> int:
    """Return (query, key) pairs the CPU kernel computes: all of them, unless it is told that they are causal."""
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    pairs = num_queries * num_keys
    if is_causal:
        pairs = sum(min(row + 1, num_keys) for row in range(num_queries))
    return batch * heads * pairs


def _cpu_flash_flops(query, key, value, dropout_p=0.0, is_causal=False, *, out_val=None, **kwargs) -> int:
    """Return two products per pair: scores and output."""
    return 2 * _visible_pairs(query, key, is_causal) * (query.shape[-1] + value.shape[-1])


def _cpu_flash_backward_flops(
    grad_out, query, key, value, out, logsumexp, dropout_p=0.0, is_causal=False, *, out_val=None, **kwargs
) -> int:
    """Return five products per pair: scores once more, and the gradients of weights, query, key and value."""
    return 2 * _visible_pairs(query, key, is_causal) * (3 * query.shape[-1] + 2 * value.shape[-1])


# torch counts these as 0.
CPU_FLASH_FLOPS: dict[object, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_flash_backward_flops,
}


class FlopCount(TorchDispatchMode):
    """
    Counts FLOPs of matrix products, convolutions and attention, the CPU's fused attention included.

    torch's `FlopCounterMode` hooks modules, which gradients taken in a forward do not bear.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in CPU_FLASH_FLOPS:
            self.total += CPU_FLASH_FLOPS[packet](*args, **(kwargs or {}))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


class PeakBytes(TorchDispatchMode):
    """
    Follows every storage from its first appearance in an output to its end.

    Attributes:
        alive (`int`): Bytes of followed storages that exist now.
        peak (`int`): Largest value of `alive` so far.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._finalizers: list[weakref.finalize] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            # What comes in unknown was there before: its views and in-place results cost nothing.
            self._meet(tensor, cost=0)
        out = func(*args, **kwargs)
        for tensor in _tensors(out):
            self._meet(tensor, cost=tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def __exit__(self, *exc_info):
        for finalizer in self._finalizers:
            finalizer.detach()
        return super().__exit__(*exc_info)

    def _meet(self, tensor: torch.Tensor, cost: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = cost
        self.alive += cost
        self._finalizers.append(weakref.finalize(storage, self._part, key))

    def _part(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


class HeadRows(TorchDispatchMode):
    """
    Counts rows that are multiplied with given head weights, forward (to logits) and back (to hidden states).

    Args:
        weights (`dict[str, torch.Tensor]`):
            Weights `(V, H)` by name; two names of one storage are counted under the first.

    Attributes:
        forward (`Counter`): Rows turned into logits, by name.
        backward (`Counter`): Rows whose gradient went back through the weight, by name; only a drafter's rows do.
        chunks (`dict[str, list[int]]`): Rows of each product to logits, in order.
    """

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.chunks: dict[str, list[int]] = {name: [] for name in weights}
        self._names: dict[int, tuple[str, int]] = {}
        for name, weight in weights.items():
            self._names.setdefault(weight.untyped_storage()._cdata, (name, weight.shape[0]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.matmul, _aten.linear):
            operands = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() >= 2]
            for operand in operands:
                name, vocab_size = self._names.get(operand.untyped_storage()._cdata, (None, 0))
                if name is None or vocab_size not in operand.shape:
                    continue
                is_forward = out.shape[-1] == vocab_size
                rows = out.numel() // out.shape[-1]
                (self.forward if is_forward else self.backward)[name] += rows
                if is_forward:
                    self.chunks[name].append(rows)
        return out


@dataclass
class ForwardCount:
    """
    Forwards of a module while it was watched.

    Attributes:
        calls (`int`): Number of forwards.
        tokens (`list[int]`): Tokens (rows times length) of each.
    """

    calls: int = 0
    tokens: list[int] = field(default_factory=list)


@contextmanager
def count_forwards(module: nn.Module) -> Iterator[ForwardCount]:
    """Count the forwards of a language model's backbone, given `input_ids` or `inputs_embeds`."""
    count = ForwardCount()

    def note(_module, args, kwargs):
        tokens = kwargs.get("input_ids")
        tokens = tokens if tokens is not None else kwargs.get("inputs_embeds", args[0] if args else None)
        count.calls += 1
        count.tokens.append(0 if tokens is None else tokens.shape[0] * tokens.shape[1])

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes `run` had allocated at once; what it returns is alive until the end of the count."""
    with PeakBytes() as counter:
        result = run()
    del result
    return counter.peak


def flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of `run`."""
    with FlopCount() as counter:
        run()
    return counter.total


def _status_kilobytes(path: Path, name: str) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
