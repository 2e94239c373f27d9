# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
An accelerator that is not there: tensors hold their data on the CPU and report the device `pretend:0`.

Like CUDA it refuses operands of two devices and has CUDA's autocast lists. Kernels, waits for the device and copies to
it are counted by source line, so that devices, launches and syncs of a step can be tested without a GPU. One
dispatched operation counts as one kernel, views and bare allocations as none; some take several on a real card.

The device stays registered with torch for the rest of a process, which changes defaults of transformers and
accelerate. Tests therefore run in a process of its own what needs it:

    def measured() -> dict[str, int]:  # a function of the test module
        with pretend_accelerator() as counts:
            module = nn.Linear(2, 2).to(DEVICE)
            ...
        return counts.totals()

    with apart() as call:
        assert call(measured)["syncs"] <= 3

Private torch API: `_setup_privateuseone_for_python_backend`, in torch 2.13.
"""

import gc
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


NAME = "pretend"
DEVICE = f"{NAME}:0"
PACKAGE = str(Path(__file__).resolve().parents[2] / "trl_draft_opd") + os.sep
aten = torch.ops.aten


@dataclass
class Counts:
    """
    What happened, by source line: the package's innermost, or outside of it the caller's of torch.

    Attributes:
        launches: Kernels of the device, copies included.
        syncs: Waits of the host for a result of the device.
        uploads: Copies to the device for which the host waits (`non_blocking` is not given). Of a real card these end
            in a wait for its stream too.
    """

    launches: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)

    def totals(self) -> dict[str, int]:
        """Return the number of each."""
        return {name: counter.total() for name, counter in vars(self).items()}

    def clear(self) -> None:
        """Start anew."""
        for counter in vars(self).values():
            counter.clear()

    def table(self, name: str, most: int = 25) -> str:
        """Return the lines with the most `launches`, `syncs` or `uploads`, for messages."""
        counter: Counter[str] = getattr(self, name)
        rows = [f"{count:7d}  {line}" for line, count in counter.most_common(most)]
        return "\n".join([f"{counter.total()} {name}", *rows])


class PretendTensor(torch.Tensor):
    """A tensor of the device; `raw` is its data, a tensor of the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=torch.device(DEVICE),
        )
        made.raw = raw
        return cast(PretendTensor, made)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"PretendTensor({self.raw!r})"

    def tolist(self) -> Any:
        """One copy to the host, as torch makes of its own tensors."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, None)


def _get_data(tensor: PretendTensor) -> PretendTensor:
    return tensor.detach()


def _set_data(tensor: PretendTensor, value: PretendTensor) -> None:
    torch.Tensor.data.__set__(tensor, value)  # pyright: ignore[reportAttributeAccessIssue]
    tensor.raw = value.raw


# torch would exchange the shape and leave `raw` as it was.
PretendTensor.data = property(_get_data, _set_data)  # pyright: ignore[reportAttributeAccessIssue]


class _Mode(TorchDispatchMode):
    """Sees every operation, also those that make a tensor of the device out of nothing."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.counts)


@contextmanager
def pretend_accelerator() -> Iterator[Counts]:
    """Register the device, and count what happens on it. Only in a process of its own, see [`apart`]."""
    _register()
    with _Mode(Counts()) as mode, _whole_attention(mode.counts):
        yield mode.counts


@contextmanager
def apart() -> Iterator[Callable[..., Any]]:
    """
    Yield `call(function, *args)`, which runs functions of test modules one after another in one process of its own.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_begin) as pool:
        yield lambda function, *args: pool.submit(_run_and_freeze, function, *args).result()


def _run_and_freeze(function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    finally:
        # Every training run ends in a full garbage collection, which is to pass over what was imported.
        gc.collect()
        gc.freeze()


def _begin() -> None:
    torch.set_num_threads(1)
    # Before any backward pass: the first one starts autograd's threads, one per device there is.
    _register()


# -- operations -------------------------------------------------------------------------------------------------------

_WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten._unique,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.equal,
    aten.bincount,
}
_NO_KERNELS = {
    aten._local_scalar_dense,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.lift_fresh,
    aten._reshape_alias,
    aten._unsafe_view,
    aten.set_,
    aten.is_same_size,
}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
_COPIES = {aten._to_copy, aten.copy_, aten._copy_from, aten._copy_from_and_resize}


def _run(func: Any, args: Any, kwargs: dict[str, Any], counts: Counts | None) -> Any:
    """Run an operation on the data of its operands, and wrap what stays on the device."""
    operands = list(_tensors((args, kwargs)))
    wrapped = {id(tensor.raw): tensor for tensor in operands if isinstance(tensor, PretendTensor)}
    asked = kwargs.get("device")
    on_device = bool(wrapped) if asked is None else torch.device(asked).type == NAME
    packet = func.overloadpacket
    if packet is aten._pin_memory:
        return args[0].clone()
    if not wrapped and not on_device:
        return func(*args, **kwargs)
    if packet in _COPIES:
        if packet is aten.copy_:
            on_device = isinstance(args[0], PretendTensor)
    else:
        _check_devices(func, packet, args, operands)
    if counts is not None:
        _count(counts, func, packet, args, kwargs, operands, on_device)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu") if on_device else asked}
    kwargs.pop("pin_memory", None)
    args, kwargs = _map(PretendTensor, lambda tensor: tensor.raw, (args, kwargs))
    result = func(*args, **kwargs)
    if not on_device:
        return result
    # An operation in place returns its operand.
    return _map(Tensor, lambda raw: wrapped[id(raw)] if id(raw) in wrapped else PretendTensor(raw), result)


def _tensors(value: Any) -> Iterator[Tensor]:
    """
    Yield the tensors of nested lists, tuples and dicts; torch's own walks any type, and takes several times as long.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _map(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """Return nested lists, tuples and dicts with every tensor of a kind replaced."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(kind, function, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_map(kind, function, each) for each in value])
    return value


def _check_devices(func: Any, packet: Any, args: Any, operands: list[Tensor]) -> None:
    """Refuse what CUDA refuses: operands of the CPU, but for scalars, and indices of what is indexed."""
    others = [tensor for tensor in operands if not isinstance(tensor, PretendTensor)]
    if packet in _INDEXED and isinstance(args[0], PretendTensor):
        others = [tensor for tensor in others if not any(tensor is index for index in args[1])]
    is_written = bool(others) and func._schema.is_mutable and args and others[0] is args[0]
    if is_written or any(tensor.dim() > 0 for tensor in others):
        shapes = [(str(tensor.device), tuple(tensor.shape)) for tensor in operands]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {shapes} at {_line()}.")


def _count(
    counts: Counts, func: Any, packet: Any, args: Any, kwargs: Any, operands: list[Tensor], on_device: bool
) -> None:
    comes_from_device = any(isinstance(tensor, PretendTensor) for tensor in operands)
    if packet in _COPIES:
        source = args[1] if packet is aten.copy_ else args[0]
        comes_from_device = isinstance(source, PretendTensor)
        is_async = kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2])
        if comes_from_device and not on_device:
            counts.syncs[_line()] += 1
        elif not comes_from_device and on_device and not is_async:
            counts.uploads[_line()] += 1
        counts.launches[_line()] += 1
        return
    if packet in _NO_KERNELS or func.is_view or packet is aten.detach:
        num_kernels = 0
    else:
        num_kernels = 1
    num_waits = int(packet in _WAITS)
    if packet is aten.isin and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
        # Many test values are made unique first.
        num_waits += args[1].numel() >= 10 * args[0].numel() ** 0.145
    if packet is aten.repeat_interleave:
        num_waits += kwargs.get("output_size") is None
    if packet in _INDEXED:
        indices = [index for index in args[1] if index is not None]
        # A mask becomes a list of places, whose number the host has to know.
        masks = sum(index.dtype in (torch.bool, torch.uint8) for index in indices)
        num_waits, num_kernels = num_waits + masks, num_kernels + masks
        moved = sum(not isinstance(index, PretendTensor) for index in indices)
        if moved:
            counts.uploads[_line()] += moved
    if num_waits:
        counts.syncs[_line()] += num_waits
    if num_kernels:
        counts.launches[_line()] += num_kernels


def _line() -> str:
    """Return the line to blame: the package's innermost, or else the innermost outside of torch and this file."""
    frame, outside = sys._getframe(1), None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name[len(PACKAGE) :]}:{frame.f_lineno}"
        if outside is None and name != __file__ and f"{os.sep}torch{os.sep}" not in name:
            outside = f"{os.sep.join(name.split(os.sep)[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return outside or "backward pass"


@contextmanager
def _whole_attention(counts: Counts) -> Iterator[None]:
    """Have attention without gradient run as the one kernel that it is on a card, and not in its parts."""
    in_parts = F.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        operands = [each for each in (query, *args, *kwargs.values()) if isinstance(each, Tensor)]
        has_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands)
        if has_grad or not isinstance(query, PretendTensor):
            return in_parts(query, *args, **kwargs)
        if torch.is_autocast_enabled(NAME):
            dtype = torch.get_autocast_dtype(NAME)
            query, args, kwargs = _map(Tensor, partial(_cast, dtype=dtype), (query, args, kwargs))
        return _run(aten.scaled_dot_product_attention.default, (query, *args), kwargs, counts)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = in_parts


# -- registration -----------------------------------------------------------------------------------------------------

# CUDA's lists, as far as models use them.
_LOW_PRECISION = """
    matmul mm bmm mv addmm addmv addr addbmm baddbmm linear conv1d conv2d prelu chain_matmul linalg_vecdot
    scaled_dot_product_attention
""".split()
_FLOAT32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm group_norm
    frobenius_norm nuclear_norm cosine_similarity poisson_nll_loss nll_loss nll_loss2d hinge_embedding_loss kl_div
    l1_loss smooth_l1_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
    multi_margin_loss cross_entropy_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp
    softmax log_softmax cumprod cumsum sum prod norm
""".split()


@cache
def _register() -> tuple[Any, ...]:
    """Make the device known to torch; return what has to live as long as the process."""
    from torch.optim.optimizer import _foreach_supported_types
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_DeviceModule())
    _foreach_supported_types.append(PretendTensor)
    # What is in neither list runs as it is.
    others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    others.fallback(torch.library.fallthrough_kernel)
    autocast = torch.library.Library("aten", "IMPL")
    for names, run in ((_LOW_PRECISION, _run_low), (_FLOAT32, _run_float32)):
        for name in names:
            packet = getattr(aten, name)
            for overload in packet.overloads():
                op = getattr(packet, overload)
                if "out" not in {argument.name for argument in op._schema.arguments} and overload != "dimname":
                    key = name if overload == "default" else f"{name}.{overload}"
                    autocast.impl(key, partial(run, op), "AutocastPrivateUse1")
    # `torch.tensor(..., device=...)` makes its tensor on the CPU and moves it where modes see it.
    torch._C._set_only_lift_cpu_tensors(True)
    # `autocast` clears the cache of weights when its outermost region ends.
    clear = torch.clear_autocast_cache
    torch.clear_autocast_cache = lambda: (_casts.clear(), clear())[1]
    return others, autocast


class _DeviceModule:
    """`torch.pretend`, what torch, transformers and accelerate ask of a device's module."""

    is_initialized = is_available = is_bf16_supported = staticmethod(lambda *args, **kwargs: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed = manual_seed_all = set_device = synchronize = empty_cache = staticmethod(lambda *args, **kwargs: None)
    reset_peak_memory_stats = staticmethod(lambda *args, **kwargs: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    device = staticmethod(lambda *args, **kwargs: nullcontext())
    get_rng_state = staticmethod(lambda *args, **kwargs: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *args, **kwargs: torch.set_rng_state(state))


_casts: dict[int, tuple[Tensor, Tensor]] = {}


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    """Cast an operand as autocast does: weights once for as long as its region lasts."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
        return tensor
    if not (tensor.requires_grad and tensor.is_leaf and dtype is not torch.float32):
        return tensor.to(dtype)
    if not torch.is_autocast_cache_enabled():
        return tensor.to(dtype)
    if id(tensor) not in _casts:
        with torch.enable_grad():
            _casts[id(tensor)] = (tensor, tensor.to(dtype))
    return _casts[id(tensor)][1]


def _run_low(op: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(NAME)
    return _run_cast(op, dtype, args, kwargs)


def _run_float32(op: Any, *args: Any, **kwargs: Any) -> Any:
    return _run_cast(op, torch.float32, args, kwargs)


def _run_cast(op: Any, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # pyright: ignore[reportAttributeAccessIssue]
    with torch._C._ExcludeDispatchKeyGuard(keys):
        args, kwargs = _map(Tensor, lambda tensor: _cast(tensor, dtype), (args, kwargs))
        return op(*args, **kwargs)
