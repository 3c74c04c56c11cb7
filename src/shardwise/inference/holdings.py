"""Where the values of a model's parameters are when it is to be dispatched: in memory, or in a folder already."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import Segment, Source, Stored
from shardwise.engine.stored import StoredTensor
from shardwise.errors import OffloadError, UnitError
from shardwise.inference.dtypes import as_dtype
from shardwise.inference.loading import stored_tensor
from shardwise.naming import clean_name

Values = Mapping[str, torch.Tensor] | None
Folder = str | os.PathLike[str] | None
Index = Mapping[str, Mapping[str, Any]] | None


class Holdings:
    """The values of a model's parameters.

    Attributes:
        tensors: by each name of each parameter.
        in_files: names of those that are in files; they need not be written to be on the disk.

    Args:
        values: for parameters on the meta device.
        folder: of :func:`~shardwise.inference.offloaded.offload_state_dict`, for others on the meta device.
        index: what is in which file, as for :class:`~shardwise.inference.offloaded.OffloadedWeightsLoader`; ``None``:
            the folder's.

    Raises:
        UnitError: a parameter is on the meta device, and its values are nowhere, or have another shape.
        OffloadError: a file of the index is missing or too short.
    """

    def __init__(self, model: nn.Module, values: Values, folder: Folder, index: Index) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.in_files: set[str] = set()
        self._folder, self._index, self._values = folder, index, values or {}
        self._reader = StorageReader()
        self._opened: dict[Path, Source] = {}
        named: dict[int, tuple[nn.Parameter, list[str]]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            named.setdefault(id(p), (p, []))[1].append(name)
        for p, names in named.values():
            self.tensors |= dict.fromkeys(names, _of_memory(p) if not p.is_meta else self._elsewhere(p, names))

    def _elsewhere(self, p: nn.Parameter, names: list[str]) -> StoredTensor:
        found = next((self._values[n] for n in names if n in self._values), None)
        if found is not None and not found.is_meta:
            tensor = _of_memory(found)
        else:
            index = self._known()
            name = next((n for n in names if n in index), None)
            if name is None:
                raise UnitError(
                    f"'{names[0]}' is on the meta device and has no values",
                    fix="give state_dict= or offload_index=, or load a checkpoint",
                )
            tensor = self._in_file(name, index[name])
            self.in_files |= set(names)
        if tensor.shape != tuple(p.shape):
            raise UnitError(
                f"'{names[0]}' has shape {tuple(p.shape)}, and the values for it {tensor.shape}",
                fix="check that they are this model's",
            )
        return tensor

    def _known(self) -> Mapping[str, Mapping[str, Any]]:
        if self._index is None:
            file = None if self._folder is None else Path(self._folder) / "index.json"
            self._index = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
        return self._index or {}

    def _in_file(self, name: str, info: Mapping[str, Any]) -> StoredTensor:
        """What an entry of the index names."""
        dtype = as_dtype(info["dtype"]) if "dtype" in info else None
        if "safetensors_file" not in info:
            shape = tuple(info["shape"])
            file = Path(self._folder or "") / f"{name}.dat"
            _require(file, name, prod(shape) * (dtype or torch.float32).itemsize)
            stored = Stored(dtype or torch.float32, shape, (Segment(file, 0, 0, prod(shape)),))
            return stored_tensor(stored, None, self._reader)
        file = Path(info["safetensors_file"])
        if file not in self._opened:
            _require(file, name)
            self._opened[file] = open_source(file)
        (section,) = self._opened[file].sections.values()
        there = info.get("weight_name", name)
        found = section.get(there, section.get(clean_name(there)))
        if found is None:
            raise OffloadError(f"'{there}' is not in it", where=str(file), fix="use the index that was made for it")
        return stored_tensor(found, dtype, self._reader)


def _require(file: Path, name: str, nbytes: int | None = None) -> None:
    if not file.is_file():
        raise OffloadError(f"the values of '{name}' are not there", where=str(file), fix="write the folder again")
    size = file.stat().st_size
    if nbytes is not None and size != nbytes:
        raise OffloadError(f"{size} bytes, where '{name}' has {nbytes}", where=str(file), fix="write the folder again")


def _of_memory(values: torch.Tensor) -> StoredTensor:
    """Values that are in memory, until they are taken over."""
    values = values.detach()
    return StoredTensor(values.dtype, tuple(values.shape), (), partial(_copy, values))


def _copy(values: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
    out.copy_(values.reshape(-1)[start:stop])
