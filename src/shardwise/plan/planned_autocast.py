"""``torch.autocast`` on the planned device: the casts that a device with kernels would do.

Which operators have a rule is asked of torch, as it has registered them for CUDA; which of the four rules an operator
has is in the lists below, after torch's reference of autocast operators. What is in none of them runs in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from shardwise import device as devices
from shardwise.device import HALF_PRECISION

_KEY = "AutocastPrivateUse1"
_LOW = frozenset({
    "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "convolution", "cudnn_convolution", "cudnn_convolution_transpose", "prelu", "addmm", "addmv",
    "addr", "matmul", "einsum", "mm", "mv", "linalg_vecdot", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul",
    "linalg_multi_dot", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "_scaled_dot_product_flash_attention", "scaled_dot_product_attention",
})  # fmt: skip
_WIDEST = frozenset({
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add",
})  # fmt: skip
_RESULT = frozenset(
    ["prod", "softmax", "log_softmax", "cumprod", "cumsum", "linalg_vector_norm", "linalg_matrix_norm", "sum"]
)  # what they add up in, and return, is fp32 unless the call says otherwise


@functools.cache
def use_autocast(name: str) -> None:
    """Register the rules for the device type ``name``, for good: it is the one that torch has room for."""
    library = torch.library.Library("aten", "IMPL", _KEY)
    _kept.append(library)
    everything = torch.library.Library("_", "IMPL", _KEY)
    everything.fallback(torch.library.fallthrough_kernel)
    _kept.append(everything)
    for full in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA"):
        operator, _, overload = full.removeprefix("aten::").partition(".")
        packet = getattr(torch.ops.aten, operator, None)
        found = getattr(packet, overload or "default", None)
        if full.startswith("aten::") and found is not None:
            library.impl(full.removeprefix("aten::"), _kernel(found, operator, name))


_kept: list[torch.library.Library] = []  # a registration lasts as long as its library
_casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
"""Parameters in the low dtype, by the id of the parameter: torch keeps them until the outermost block ends."""


def _kernel(operator: Any, packet: str, name: str) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = arguments(packet, name, args, kwargs)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*args, **kwargs)

    return run


def arguments(packet: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments of an operator as autocast gives them to it, on the device type ``name``; as they are outside of it."""
    if not torch.is_autocast_enabled(name):
        return args, kwargs
    given = tree_flatten((args, kwargs))[0]
    dtypes = [value.dtype for value in given if isinstance(value, torch.Tensor) and _may(value, name)]
    if packet in _RESULT:
        said = kwargs.get("dtype") is not None or any(isinstance(value, torch.dtype) for value in args)
        wide = {} if said or not dtypes or dtypes[0] not in HALF_PRECISION else {"dtype": torch.float32}
        return args, {**kwargs, **wide}
    low = torch.get_autocast_dtype(name)
    dtype = low if packet in _LOW or (packet in _WIDEST and torch.float32 not in dtypes) else torch.float32
    return tree_map(lambda value: _cast(value, dtype, name), (args, kwargs))


def _cast(value: Any, dtype: torch.dtype, name: str) -> Any:
    if not isinstance(value, torch.Tensor) or not _may(value, name) or value.dtype == dtype:
        return value
    leaf = value.is_leaf and value.requires_grad and value.dtype == torch.float32 and dtype in HALF_PRECISION
    if not (leaf and torch.is_autocast_cache_enabled()):
        return value.to(dtype)
    if id(value) not in _casts:
        _casts[id(value)] = value, value.to(dtype)
    return _casts[id(value)][1]


def _may(tensor: torch.Tensor, name: str) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == name


@contextmanager
def autocast_as_on(device: torch.device) -> Iterator[None]:
    """A block in which ``torch.autocast`` for an accelerator that is not there means the planned one.

    What torch keeps of casts, until the outermost block of autocast ends, is kept as long here.
    """
    clear, made = torch.clear_autocast_cache, torch.autocast.__init__

    def forget() -> None:
        _casts.clear()
        clear()

    def make(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        made(self, device.type if device_type in devices.KINDS else device_type, *args, **kwargs)

    torch.clear_autocast_cache = forget
    torch.autocast.__init__ = make  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.clear_autocast_cache = clear
        torch.autocast.__init__ = made  # type: ignore[method-assign]
        _casts.clear()
