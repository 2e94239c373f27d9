# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Heads: hidden states to logits, and the gradient of logits back to hidden states and to what the head trains.

Linear heads, and sums of them, are products without a graph; any other head goes through autograd. Knows no losses.

Shape letters:  C = rows of one chunk, H = hidden size (of all parts of a head, side by side), D = logits per row
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergences import accumulation_dtype


@dataclass(frozen=True)
class Head:
    """
    Project hidden states to logits, and name the parameters that this projection trains.

    Args:
        project (`Callable`):
            Maps hidden states `(n, H)` to finite logits `(n, vocab_size)`, each row on its own, called once per chunk.
            These logits are overwritten by their gradient, so its backward pass must not need them: it may end in a
            product, a scale or a soft cap, not in `log_softmax` (autograd then raises a `RuntimeError`).
        parameters (`tuple[torch.Tensor, ...]`):
            All trainable parameters that `project` reads (one left out gets no gradient); empty for a frozen head.
        vocab_size (`int`): Logits per row.
        num_buffers (`int`, defaults to `1`):
            Tensors of logits that `project` and its backward pass hold at once, the result included: 1 for a product,
            2 if it is scaled, 4 if it is soft-capped. Too small a number only exceeds `chunk_bytes`.
    """

    project: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    vocab_size: int
    num_buffers: int = 1
    # Set by `linear` and `joined`: `project` is their sum. `replace` drops them with the projection.
    products: "tuple[_Product, ...]" = field(default=(), init=False, repr=False, compare=False)

    @classmethod
    def linear(cls, weight: Tensor, bias: Tensor | None = None, *, keeps_dtype: bool = False) -> "Head":
        """
        Build a linear head of a weight `(vocab_size, H)`.

        It multiplies in the dtype of autocast, to which a loss casts the weight once per call; without autocast, or
        with `keeps_dtype`, in the weight's own.
        """
        parameters = tuple(tensor for tensor in (weight, bias) if tensor is not None and tensor.requires_grad)
        head = cls(lambda hidden_CH: F.linear(hidden_CH.to(weight.dtype), weight, bias), parameters, weight.shape[0])
        object.__setattr__(head, "products", (_Product(weight, bias, keeps_dtype),))
        return head

    @classmethod
    def joined(cls, parts: "Sequence[Head]") -> "Head":
        """
        Build the sum of linear heads that read columns of a hidden state side by side, in this order. Each multiplies
        in its own dtype, as in [`Head.linear`]; the sum is of the widest of them.
        """
        products = tuple(product for part in parts for product in part.products)
        widths = [product.weight.shape[1] for product in products]

        def project(hidden_CH: Tensor) -> Tensor:
            first, *others = (
                part.project(own) for part, own in zip(parts, hidden_CH.split(widths, dim=-1), strict=True)
            )
            return sum(others, start=first)

        parameters = tuple(dict.fromkeys(parameter for part in parts for parameter in part.parameters))
        head = cls(project, parameters, parts[0].vocab_size)
        object.__setattr__(head, "products", products)
        return head


@dataclass(frozen=True)
class _Product:
    weight: Tensor
    bias: Tensor | None
    keeps_dtype: bool

    @property
    def dtype(self) -> torch.dtype:
        """What autocast would multiply in, at the time of asking; it leaves float64 alone."""
        if self.keeps_dtype or self.weight.dtype == torch.float64 or not _is_autocast_on(self.weight.device):
            return self.weight.dtype
        return torch.get_autocast_dtype(self.weight.device.type)


class LinearPass:
    """
    One call of a loss through a linear head or a sum of them: each weight is cast once, and nothing is recorded for
    autograd.

    Args:
        head ([`Head`]): Made by [`Head.linear`] or [`Head.joined`].
        parameters (`Sequence[torch.Tensor]`): Those of its parameters that want a gradient.
        wants_hidden_grad (`bool`): Whether the hidden states do.

    Attributes:
        sums (`list[torch.Tensor]`): The gradient of each parameter, summed over chunks in float32 (or float64).
    """

    def __init__(self, head: Head, parameters: Sequence[Tensor], wants_hidden_grad: bool):
        assert head.products
        self._products = head.products
        self._weights = [product.weight.detach().to(product.dtype) for product in head.products]
        self._biases = [
            None if product.bias is None else product.bias.detach().to(product.dtype) for product in head.products
        ]
        self._widths = [weight.shape[1] for weight in self._weights]
        self._dtype = reduce(torch.promote_types, (weight.dtype for weight in self._weights))
        self._parameters, self._wants_hidden_grad = parameters, wants_hidden_grad
        self._parts: list[Tensor] = []
        self.sums = _zero_sums(parameters)

    def project(self, hidden_CH: Tensor) -> Tensor:
        """Return the logits of a chunk, which may be overwritten."""
        columns = hidden_CH.detach().split(self._widths, dim=-1)
        self._parts = [own.to(weight.dtype) for own, weight in zip(columns, self._weights, strict=True)]
        with outside_autocast(hidden_CH.device):
            first, *others = zip(self._parts, self._weights, self._biases, strict=True)
            logits_CD = F.linear(*first).to(self._dtype)
            for own, weight, bias in others:
                if weight.dtype == self._dtype:
                    logits_CD.addmm_(own, weight.T)
                else:
                    logits_CD.add_(own @ weight.T)
                if bias is not None:
                    logits_CD.add_(bias)
            return logits_CD

    def pull_back(self, grad_CD: Tensor) -> Tensor | None:
        """Send the gradient of the chunk's logits back; return that of its hidden states, where it is wanted."""
        assert self._parts, "the chunk was projected"
        grads: list[Tensor] = []
        with outside_autocast(grad_CD.device):
            for product, weight, own in zip(self._products, self._weights, self._parts, strict=True):
                own_grad_CD = grad_CD.to(weight.dtype)
                for parameter, summed in zip(self._parameters, self.sums, strict=True):
                    if parameter is product.weight:
                        _add_product(summed, own_grad_CD.T, own)
                    elif parameter is product.bias:
                        summed.add_(own_grad_CD.sum(dim=0))
                if self._wants_hidden_grad:
                    grads.append(own_grad_CD @ weight)
        if not grads:
            return None
        return grads[0] if len(grads) == 1 else torch.cat(grads, dim=-1)


class AutogradPass:
    """One call of a loss through any head, as [`LinearPass`]; autograd differentiates it chunk by chunk."""

    def __init__(self, head: Head, parameters: Sequence[Tensor], wants_hidden_grad: bool):
        self._project, self._parameters, self._wants_hidden_grad = head.project, parameters, wants_hidden_grad
        self._chunk: tuple[Tensor, Tensor] | None = None
        self.sums = _zero_sums(parameters)

    def project(self, hidden_CH: Tensor) -> Tensor:
        """Return the logits of a chunk, which may be overwritten."""
        hidden_CH = hidden_CH.detach().requires_grad_(self._wants_hidden_grad)
        wants_grad = self._wants_hidden_grad or len(self._parameters) > 0
        with torch.set_grad_enabled(wants_grad):
            logits_CD = self._project(hidden_CH)
        self._chunk = (hidden_CH, logits_CD) if wants_grad else None
        return logits_CD.detach()

    def pull_back(self, grad_CD: Tensor) -> Tensor | None:
        """Send the gradient of the chunk's logits back; return that of its hidden states, where it is wanted."""
        assert self._chunk is not None, "the chunk was projected with a gradient"
        hidden_CH, logits_CD = self._chunk
        self._chunk = None  # its logits are freed with the caller's
        wanted = [hidden_CH, *self._parameters] if self._wants_hidden_grad else list(self._parameters)
        # What is called under autocast would be cast again, of a head that left it too.
        with outside_autocast(grad_CD.device):
            grads = list(torch.autograd.grad(logits_CD, wanted, grad_CD))
        grad_CH = grads.pop(0) if self._wants_hidden_grad else None
        for summed, grad in zip(self.sums, grads, strict=True):
            summed.add_(grad)
        return grad_CH


def open_head(
    head: Head, parameters: Sequence[Tensor] = (), wants_hidden_grad: bool = False
) -> LinearPass | AutogradPass:
    """Return the pass of one call of a loss through a head."""
    kind = LinearPass if head.products else AutogradPass
    return kind(head, parameters, wants_hidden_grad)


def _zero_sums(parameters: Sequence[Tensor]) -> list[Tensor]:
    # A sum over many chunks would lose its small terms in bfloat16.
    return [torch.zeros_like(parameter, dtype=accumulation_dtype(parameter)) for parameter in parameters]


def _add_product(summed_DH: Tensor, grad_DC: Tensor, hidden_CH: Tensor) -> None:
    """Add `grad_DC @ hidden_CH` to a sum of the same or a higher precision, in place where the device can."""
    if grad_DC.dtype == summed_DH.dtype:
        summed_DH.addmm_(grad_DC, hidden_CH)
    elif _adds_to_float32(grad_DC.device.type, grad_DC.dtype):
        torch.addmm(summed_DH, grad_DC, hidden_CH, out_dtype=summed_DH.dtype, out=summed_DH)
    else:
        # Rounded once per chunk, as autograd would. A product in float32 would be exact, and several times slower.
        summed_DH.add_(grad_DC @ hidden_CH)


@cache
def _adds_to_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this torch multiplies matrices of `dtype` and adds to a float32 one, tried once per kind of device."""
    part = torch.ones(16, 16, dtype=dtype, device=device_type)
    total = torch.ones(16, 16, device=device_type)
    try:
        torch.addmm(total, part, part, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # no kernel for this device, no such argument in this torch
        if device_type == "cuda":
            warnings.warn(
                f"This torch adds no product of {dtype} to a float32 sum. The gradient of a trained head is made in "
                f"{dtype} chunk by chunk in its place, and added: slower, and rounded once per chunk."
            )
        return False
    return bool((total == 17).all())


def _is_autocast_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@contextmanager
def outside_autocast(device: torch.device) -> Iterator[None]:
    """Multiply in the dtype of the operands, which was chosen already."""
    if not _is_autocast_on(device):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield
