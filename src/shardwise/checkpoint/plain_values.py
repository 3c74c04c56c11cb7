"""Plain values from what stands for them in the index of a file: tensors, sets, NumPy arrays. Nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch

from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import Stored
from shardwise.checkpoint.torch_format import StandIn


class Unknown(Exception):
    """Names a class whose objects are not made."""


def plain(value: Any, reader: StorageReader) -> Any:
    """A nest in which tensors are read, and stand-ins of plain kinds are what they stand for.

    Raises:
        Unknown: one of another kind.
        CheckpointError: a tensor cannot be read.
    """
    if isinstance(value, Stored):
        return reader.values(value).view(value.shape)
    if isinstance(value, Mapping):
        return {k: plain(v, reader) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([plain(v, reader) for v in value])
    if isinstance(value, StandIn):
        return _made(value, reader)
    if isinstance(value, type):
        raise Unknown(f"class {value.__name__}")
    return value


def _made(value: StandIn, reader: StorageReader) -> Any:
    name, arguments = type(value).__name__, value.arguments
    try:
        if name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name](plain(list(*arguments), reader))
        if name == "complex":
            return complex(*arguments)
        if name == "device":
            return torch.device(*arguments)
        if name in ("Namespace", "SimpleNamespace", "Counter"):
            return plain(dict(arguments[-1]) if arguments else {}, reader)
        if name in ("PosixPath",):
            return "/".join(arguments).replace("//", "/")
        if name == "scalar":
            return np.frombuffer(_bytes(arguments[1]), _dtype(arguments[0]))[0]
        if name == "_reconstruct":
            _version, shape, dtype, fortran, data = arguments[-1]
            array = np.frombuffer(_bytes(data), _dtype(dtype), prod(shape))
            return array.reshape(shape, order="F" if fortran else "C").copy()
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise Unknown(f"{name} that cannot be read") from error
    raise Unknown(name)


def _dtype(value: Any) -> np.dtype[Any]:
    if not isinstance(value, StandIn) or not isinstance(value.arguments[0], str):
        raise ValueError("not a dtype")
    dtype = np.dtype(value.arguments[0])
    if dtype.hasobject:
        raise ValueError("a dtype of objects")
    return dtype


def _bytes(value: Any) -> bytes:
    """Bytes, which old protocols write as text in another encoding."""
    if isinstance(value, StandIn) and type(value).__name__ == "encode":
        text, encoding = value.arguments
        if encoding != "latin1":
            raise ValueError(encoding)
        return str(text).encode("latin1")
    if not isinstance(value, bytes):
        raise ValueError("not bytes")
    return value
