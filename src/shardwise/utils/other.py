"""Saving, unwrapping, and small things that scripts import."""

from __future__ import annotations

import codecs
import contextlib
import functools
import logging
import os
import socket
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shardwise import operations
from shardwise.errors import TensorError
from shardwise.utils.environment import current_local_rank, current_rank

logger = logging.getLogger(__name__)


def wait_for_everyone() -> None:
    """Return when every rank is here. A collective."""
    operations.barrier()


# --- files -----------------------------------------------------------------------------------
def save(obj: Any, f: Any, save_on_each_node: bool = False, safe_serialization: bool = False) -> None:
    """Write an object to a file, on one rank only. Call it on all ranks.

    A file that was there is replaced once the new one is complete.

    Args:
        obj: anything ``torch.save`` takes; a dict of tensors for ``safe_serialization``.
        f: a path, or an open file.
        save_on_each_node: the first rank of every host writes, instead of rank 0 alone.
        safe_serialization: write safetensors instead of a pickle; tensors that are one are written once.

    Raises:
        TensorError: ``safe_serialization`` of something else.
    """
    if (current_local_rank() if save_on_each_node else current_rank()) != 0:
        return
    write: Callable[[Any], None] = functools.partial(torch.save, obj)
    if safe_serialization:
        if not isinstance(obj, Mapping) or not all(isinstance(v, torch.Tensor) for v in obj.values()):
            raise TensorError(
                "safetensors hold a dict of tensors and nothing else", where="save", fix="safe_serialization=False"
            )
        tensors = clean_state_dict_for_safetensors(obj)

        def write(target: Any) -> None:
            from safetensors.torch import save as to_bytes
            from safetensors.torch import save_file

            if hasattr(target, "write"):
                target.write(to_bytes(tensors, metadata={"format": "pt"}))
            else:
                save_file(tensors, target, metadata={"format": "pt"})

    if not isinstance(f, (str, os.PathLike)):
        write(f)
        return
    path = Path(f)
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(beside)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(beside, 0o666 & ~mask)  # mkstemp's files are private
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


_REBUILD = {"_reconstruct": np.zeros(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
_SAFE: list[Any] = [
    *((f, f"numpy.{core}.multiarray.{name}") for name, f in _REBUILD.items() for core in ("core", "_core")),  # 1, 2
    *(getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"),
    np.ndarray,
    np.dtype,
    codecs.encode,
]


def load(f: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """``torch.load`` with ``weights_only=True`` as the default, which also takes NumPy's arrays.

    Args:
        f, map_location, kwargs: as of ``torch.load``.
    """
    with torch.serialization.safe_globals(_SAFE):
        return torch.load(f, map_location=map_location, **{"weights_only": True, **kwargs})


def clean_state_dict_for_safetensors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict that safetensors can write: every tensor once, whole, in memory of its own.

    Tensors that are one and the same are kept under their first name, and the other names are logged. Tensors that
    only share memory (views of one buffer, as prepared models have) are copied. The given dict stays as it is.
    """
    out: dict[str, Any] = {}
    names: dict[Any, str] = {}
    dropped: list[str] = []
    users: dict[Any, int] = defaultdict(int)
    for value in state_dict.values():
        if isinstance(value, torch.Tensor):
            users[_storage(value)] += 1
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            out[name] = value
            continue
        same = (_storage(value), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() and value.device.type != "meta":
            if same in names:
                dropped.append(f"{name} (is {names[same]})")
                continue
            names[same] = name
        value = value.detach()
        out[name] = value.clone().contiguous() if users[_storage(value)] > 1 else value.contiguous()
    if dropped:
        logger.warning("Written once, under its first name: %s", ", ".join(dropped))
    return out


def _storage(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.untyped_storage().data_ptr()


# --- modules ---------------------------------------------------------------------------------
def is_compiled_module(module: Any) -> bool:
    """Is it what ``torch.compile(module)`` returned?"""
    return isinstance(getattr(module, "_modules", {}).get("_orig_mod"), nn.Module)


def has_compiled_regions(module: nn.Module) -> bool:
    """Was a part of it compiled, by ``torch.compile(part)`` or ``part.compile()``?"""
    return any(is_compiled_module(m) or m._compiled_call_impl is not None for m in module.modules())


def _is_wrapper(module: Any) -> bool:
    """One of the wrappers for training on many ranks, of torch, of DeepSpeed, or of ours."""
    if not isinstance(getattr(module, "module", None), nn.Module):
        return False
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return True
    for kind in type(module).__mro__:
        home = kind.__module__
        if (kind.__name__ == "FullyShardedDataParallel" and home.startswith("torch.distributed.")) or (
            kind.__name__ == "DeepSpeedEngine" and home.startswith("deepspeed.")
        ):
            return True
        if home.startswith("shardwise.fsdp."):
            return True
    return False


def extract_model_from_parallel(
    model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> nn.Module:
    """The caller's own module, without the wrappers around it. Prepared models are that already.

    Args:
        keep_fp32_wrapper: leave a forward that :func:`convert_outputs_to_fp32` wrapped as it is.
        keep_torch_compile: leave ``torch.compile``'s wrapper on.
        recursive: take wrappers off the submodules too.
    """
    compiled = model if is_compiled_module(model) else None
    inner: Any = model._orig_mod if compiled is not None else model
    while _is_wrapper(inner):
        inner = inner.module
    if compiled is None and is_compiled_module(inner):  # compiled first, wrapped later
        compiled, inner = inner, inner._orig_mod
        while _is_wrapper(inner):
            inner = inner.module
    if recursive:
        _unwrap_children(inner)
    if not keep_fp32_wrapper:
        original = vars(inner).pop("_original_forward", None)
        if original is not None:
            inner.forward = original
    if compiled is None or not keep_torch_compile:
        return inner
    if compiled._orig_mod is not inner:
        compiled._orig_mod = inner
    return compiled


def _unwrap_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        inner: Any = child
        while _is_wrapper(inner):
            inner = inner.module
        if inner is not child:
            setattr(module, name, inner)
        _unwrap_children(inner)


def get_module_children_bottom_up(model: nn.Module, return_fqns: bool = False) -> list[Any]:
    """All modules, parts before wholes; the last one is ``model``.

    Args:
        return_fqns: return (name, module) pairs.
    """
    found = list(model.named_modules())[::-1]
    return found if return_fqns else [module for _, module in found]


def model_has_dtensor(model: nn.Module) -> bool:
    """Is one of the parameters a DTensor?"""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters())


# --- small things ----------------------------------------------------------------------------
def get_pretty_name(obj: Any) -> str:
    """The name of a class or function; of anything else, that of its class."""
    if not hasattr(obj, "__qualname__") and not hasattr(obj, "__name__"):
        obj = type(obj)
    return str(getattr(obj, "__qualname__", None) or obj.__name__)


def merge_dicts(source: Mapping[str, Any], destination: dict[str, Any]) -> dict[str, Any]:
    """``destination`` with the values of ``source`` put in, dict by dict."""
    for key, value in source.items():
        if isinstance(value, dict):
            if not isinstance(destination.get(key), dict):
                destination[key] = {}
            merge_dicts(value, destination[key])
        else:
            destination[key] = value
    return destination


def convert_bytes(size: float) -> str:
    """A number of bytes in the largest unit (of 1024) that fits: ``1.5 KB``."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1024.0:
            return f"{round(size, 2)} {unit}"
        size /= 1024.0
    return f"{round(size, 2)} PB"


def recursive_getattr(obj: Any, attr: str) -> Any:
    """``obj.a.b`` for ``attr="a.b"``."""
    return functools.reduce(getattr, attr.split("."), obj)


def is_port_in_use(port: int | None = None) -> bool:
    """Does somebody listen on this port of this host? 29500 by default."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        return s.connect_ex(("localhost", 29500 if port is None else port)) == 0


def get_free_port() -> int:
    """A port of this host that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])
