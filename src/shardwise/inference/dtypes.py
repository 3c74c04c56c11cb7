"""How many bytes an element takes, also of dtypes that torch packs or does not have."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

import torch

from shardwise.errors import ConfigError


class CustomDtype(Enum):
    """Dtypes that a quantiser makes of a model later: ``FP8``, ``INT4``, ``INT2``; device maps count with them."""

    FP8 = "fp8"
    INT4 = "int4"
    INT2 = "int2"


_CUSTOM = {"fp8": 1.0, "int4": 1 / 2, "int2": 1 / 4}
_PACKED = {"quint4x2": 1 / 2, "quint2x4": 1 / 4}
"""Several values share a byte, and each is an element. In ``bits2x4`` and the like an element is a whole byte."""


def dtype_byte_size(dtype: Any) -> float:
    """Bytes that one element needs when it is stored tightly: ``1/8`` for ``torch.bool``, ``1/2`` for ``torch.int4``.

    An ``int`` where it is a whole number.

    Args:
        dtype: of torch, its name, or a :class:`CustomDtype`.

    Raises:
        ConfigError: it is no dtype.
    """
    if isinstance(dtype, Enum) and dtype.value in _CUSTOM:  # the enum of another library says the same words
        return _tidy(_CUSTOM[dtype.value])
    found = as_dtype(dtype)
    if found == torch.bool:
        return 1 / 8
    name = str(found).removeprefix("torch.")
    if name in _PACKED:
        return _PACKED[name]
    narrow = re.fullmatch(r"u?int([1-7])", name)
    return _tidy(int(narrow[1]) / 8 if narrow else found.itemsize)


def as_dtype(dtype: Any) -> torch.dtype:
    """A dtype, or its name with or without ``torch.``, as a dtype.

    Raises:
        ConfigError: it is none.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"{dtype!r} is not a dtype", fix="for example torch.float32 or 'float32'")
    return found


def is_number_with_fraction(dtype: torch.dtype) -> bool:
    """Does loading convert it to another dtype that was asked for? Integers and ``bool`` keep theirs."""
    return dtype.is_floating_point or dtype.is_complex


def tensor_bytes(tensor: torch.Tensor, dtype: Any = None) -> float:
    """Bytes that a tensor takes, or would take in another dtype.

    What its elements take as they are: one byte for ``bool``. A subclass that is made of other tensors, as quantised
    ones are, takes what these do. Works on ``meta``.

    Args:
        dtype: count with this one, whatever the tensor has.
    """
    if dtype is not None:
        return _tidy(tensor.numel() * dtype_byte_size(dtype))
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        return sum(tensor_bytes(getattr(tensor, name)) for name in flatten()[0])
    packed = _PACKED.get(str(tensor.dtype).removeprefix("torch."))
    return _tidy(tensor.numel() * (tensor.element_size() if packed is None else packed))


def _tidy(size: float) -> float:
    return int(size) if size == int(size) else size
