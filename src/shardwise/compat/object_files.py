"""Objects in files: written by one rank, read without running what is in them."""

from __future__ import annotations

import codecs
import contextlib
import functools
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardwise.compat.environment import current_local_rank
from shardwise.errors import TensorError
from shardwise.operations import rank_and_size

logger = logging.getLogger(__name__)

__all__ = ["clean_state_dict_for_safetensors", "load", "save"]


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
    if (current_local_rank() if save_on_each_node else rank_and_size()[0]) != 0:
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
