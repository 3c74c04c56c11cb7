"""Files of ``torch.save`` written tensor by tensor, in blocks, with objects of classes that are not here."""

from __future__ import annotations

import io
import os
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from shardwise.checkpoint.manifest import BLOCK
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import Stored
from shardwise.checkpoint.torch_format import ALIGN, STORAGES, archive_end, archive_entry
from shardwise.layout import row_strides

Part = tuple[Stored | None, int, int]
"""Elements ``start:start + length`` of a stored tensor, or ``length`` zeros."""


@dataclass(eq=False)
class Joined:
    """A tensor to be written: parts of stored ones, end to end. One object written twice is one tensor with two names.

    Args:
        dtype: to write; parts are converted.
        shape: of all parts together.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def __reduce__(self) -> Any:
        shape = tuple(self.shape)
        strides = tuple(row_strides([max(n, 1) for n in shape]))
        return torch._utils._rebuild_tensor_v2, (_Memory(self), 0, shape, strides, False, OrderedDict())

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def blocks(self, reader: StorageReader) -> Iterator[torch.Tensor]:
        """The values in order, some at a time."""
        each = BLOCK // self.dtype.itemsize
        for stored, start, length in self.parts:
            for lo in range(0, length, each):
                n = min(each, length - lo)
                if stored is None:
                    yield torch.zeros(n, dtype=self.dtype)
                else:
                    block = torch.empty(n, dtype=self.dtype)
                    reader.read_tensor(stored, start + lo, start + lo + n, block)
                    yield block


class _Memory:
    """Stands for a tensor's memory."""

    def __init__(self, tensor: Joined) -> None:
        self.tensor = tensor


class _Global:
    """Is pickled as the name of something in a module that need not be here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Pickle asks whether it could be called."""


class Foreign:
    """Is pickled as an object of a class that need not be here.

    Args:
        module, name: of the class.
        arguments: what it is made with.
        state: its attributes, if they are more than that makes.
    """

    def __init__(self, module: str, name: str, *arguments: Any, state: dict[str, Any] | None = None) -> None:
        self._reduced = (_Global(module, name), arguments, *([] if state is None else [state]))

    def __reduce__(self) -> Any:
        return self._reduced


class _Pickler(pickle._Pickler):
    """Python's own: C's has no say in how a name is written."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[Joined] = []
        self._keys: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Memory):
            return None
        tensor = obj.tensor
        if id(tensor) not in self._keys:
            self._keys[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        key = str(self._keys[id(tensor)])
        return "storage", getattr(torch, STORAGES[tensor.dtype]), key, "cpu", tensor.numel

    def _name(self: Any, obj: _Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    dispatch: ClassVar[Any] = {**pickle._Pickler.dispatch, _Global: _name}


def write_archive(path: Path, nest: Any, reader: StorageReader, seen: Callable[[int], None]) -> None:
    """Write a nest of plain values, tensors, :class:`Joined` and :class:`Foreign` as ``torch.save`` does.

    Args:
        path: of the file, which is made or replaced.
        reader: reads what tensors are joined of.
        seen: told the number of bytes after each block.

    Raises:
        CheckpointError: a part cannot be read.
        OSError: the file cannot be written.

    Cost: host memory for one block of 8 MiB.
    """
    data = io.BytesIO()
    pickler = _Pickler(data)
    pickler.dump(_placed(nest))
    directory = b""
    small = {"archive/data.pkl": data.getvalue(), "archive/byteorder": b"little", "archive/version": b"3\n"}
    with path.open("wb") as file:
        for name, content in small.items():
            local, central = archive_entry(name, len(content), zlib.crc32(content), file.tell(), 0)
            file.write(local + content)
            directory += central
        for key, tensor in enumerate(pickler.tensors):
            directory += _write_tensor(file, f"archive/data/{key}", tensor, reader, seen)
        start = file.tell()
        file.write(directory + archive_end(len(small) + len(pickler.tensors), len(directory), start))
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(
    file: BinaryIO, name: str, tensor: Joined, reader: StorageReader, seen: Callable[[int], None]
) -> bytes:
    """One record; its checksum is known when it is written. Returns its line in the archive's directory."""
    at, nbytes = file.tell(), tensor.numel * tensor.dtype.itemsize
    padding = -(at + len(archive_entry(name, nbytes, 0, at, 0)[0])) % ALIGN
    file.write(archive_entry(name, nbytes, 0, at, padding)[0])
    crc = 0
    for block in tensor.blocks(reader):
        raw = block.view(torch.uint8).numpy().data
        crc = zlib.crc32(raw, crc)
        file.write(raw)
        seen(len(raw))
    end = file.tell()
    local, central = archive_entry(name, nbytes, crc, at, padding)
    file.seek(at)
    file.write(local)
    file.seek(end)
    return central


def _placed(value: Any) -> Any:
    """Tensors in a nest as :class:`Joined` ones."""
    if isinstance(value, torch.Tensor):
        whole = Stored(value.dtype, tuple(value.shape), values=value.detach().cpu().contiguous())
        return Joined(value.dtype, whole.shape, ((whole, 0, whole.numel),))
    if type(value) is dict:
        return {k: _placed(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_placed(v) for v in value)
    return value
