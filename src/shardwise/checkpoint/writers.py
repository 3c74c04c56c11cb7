"""Files of whole tensors as transformers and safetensors read them, filled tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from shardwise.checkpoint.files import sync_directory
from shardwise.errors import CheckpointError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""The names of dtypes in safetensors files."""


@dataclass
class Shard:
    """The tensors of one file: name, dtype and shape of each."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    size: int = 0


def shards_of(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> list[Shard]:
    """Which file each tensor goes into: in their order, so that files fill one by one, ``limit`` bytes at most each.

    One tensor is never cut, however large.
    """
    shards = [Shard()]
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1].tensors and shards[-1].size + size > limit:
            shards.append(Shard())
        shards[-1].tensors[name] = (dtype, shape)
        shards[-1].size += size
    return shards


def bytes_of(text: int | str) -> int:
    """``500MB`` or ``10GiB`` in bytes.

    Raises:
        CheckpointError: not a size.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in units or float(match[1]) <= 0:
        raise CheckpointError(f"max_shard_size={text!r} is not a size", fix="write it like '500MB' or '10GB'")
    return int(float(match[1]) * units[match[2].upper()])


class Writer:
    """One process's side: takes tensors one by one, and puts the finished files in place of older ones.

    Args:
        root: an existing folder.
        shards: what goes into which file.
        aliases: the other names of tied tensors, and the name of each in ``shards``.
        extra: owners of extra state by name; for ``BinWriter``.
    """

    stem, ending = "", ""

    def __init__(
        self,
        root: Path,
        shards: list[Shard],
        aliases: Mapping[str, str],
        extra: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.root, self.shards, self.all_aliases, self.extra = root, shards, aliases, dict(extra or {})
        self.mark = uuid.uuid4().hex[:8]
        count = len(shards)
        self.names = [
            f"{self.stem}{self.ending}" if count == 1 else f"{self.stem}-{i + 1:05d}-of-{count:05d}{self.ending}"
            for i in range(count)
        ]
        self.shard_of = {name: i for i, shard in enumerate(shards) for name in shard.tensors}

    def temporary(self, name: str) -> Path:
        return self.root / f".{name}.tmp-{self.mark}"

    def write(self, name: str, fill: Callable[[BinaryIO], None]) -> None:
        with self.temporary(name).open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())

    def aliases(self, shard: Shard) -> dict[str, str]:
        return {alias: name for alias, name in self.all_aliases.items() if name in shard.tensors}

    def add(self, name: str, value: torch.Tensor, start: int = 0) -> None:
        raise NotImplementedError

    def weight_map(self) -> dict[str, str]:
        return {name: self.names[i] for name, i in sorted(self.shard_of.items())}

    def finish(self) -> None:
        names = list(self.names)
        if len(names) > 1:
            total = sum(shard.size for shard in self.shards)
            index = {"metadata": {"total_size": total}, "weight_map": self.weight_map()}
            names.append(f"{self.stem}{self.ending}.index.json")
            self.write(names[-1], lambda file: _write_all(file, json.dumps(index, indent=2).encode() + b"\n"))
        for name in names:
            self.temporary(name).replace(self.root / name)
        pattern = rf"{self.stem}(-\d{{5}}-of-\d{{5}})?{re.escape(self.ending)}(\.index\.json)?"
        for path in self.root.iterdir():
            if re.fullmatch(pattern, path.name) and path.name not in names:
                path.unlink()
        sync_directory(self.root)

    def clean(self) -> None:
        """Leave no half-written file behind."""
        for path in self.root.glob(f".*.tmp-{self.mark}"):
            path.unlink()


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)


class SafeWriter(Writer):
    """Writes each tensor to its place as it comes: the header is known beforehand."""

    stem, ending = "model", ".safetensors"

    def __init__(
        self,
        root: Path,
        shards: list[Shard],
        aliases: Mapping[str, str],
        extra: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(root, shards, aliases, extra)
        self.left = [shard.size for shard in shards]  # bytes
        self.places: dict[str, int] = {}
        self.files: dict[int, BinaryIO] = {}

    def _open(self, i: int) -> BinaryIO:
        shard = self.shards[i]
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **self.aliases(shard)}}
        at = 0
        # Wide elements first, as the safetensors library does, so that every tensor is aligned.
        for name, (dtype, shape) in sorted(shard.tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            stop = at + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
            self.places[name], at = at, stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = self.files[i] = self.temporary(self.names[i]).open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shard.tensors:
            self.places[name] += 8 + len(text)
        return file

    def add(self, name: str, value: torch.Tensor, start: int = 0) -> None:
        """Write a tensor, or elements of the flattened tensor from ``start`` on. Each element once."""
        i = self.shard_of[name]
        if not value.numel():
            return
        file = self.files.get(i) or self._open(i)
        file.seek(self.places[name] + start * value.element_size())
        file.write(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.left[i] -= value.nbytes
        if not self.left[i]:
            file.flush()
            os.fsync(file.fileno())
            self.files.pop(i).close()

    def finish(self) -> None:
        for i, shard in enumerate(self.shards):
            if not shard.size:  # nothing, or empty tensors
                self._open(i)
        self._close()
        super().finish()

    def _close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def clean(self) -> None:
        self._close()
        super().clean()


class BinWriter(Writer):
    """Keeps the tensors of a file until it is complete."""

    stem, ending = "pytorch_model", ".bin"

    def __init__(
        self,
        root: Path,
        shards: list[Shard],
        aliases: Mapping[str, str],
        extra: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(root, shards, aliases, extra)
        self.left = [len(shard.tensors) for shard in shards]
        self.kept: dict[int, dict[str, Any]] = {i: {} for i in range(len(shards))}

    def add(self, name: str, value: torch.Tensor, start: int = 0) -> None:
        i = self.shard_of[name]
        self.kept[i][name] = value.to("cpu", copy=True)
        self.left[i] -= 1
        if not self.left[i] and i < len(self.shards) - 1:
            self._save(i)

    def _save(self, i: int) -> None:
        kept = self.kept.pop(i)
        aliases = {alias: kept[name] for alias, name in self.aliases(self.shards[i]).items()}
        extra: Mapping[str, Any] = {}
        if i == len(self.shards) - 1:
            extra = {name: owner.get_extra_state() for name, owner in self.extra.items()}
        self.write(self.names[i], lambda file: torch.save({**kept, **aliases, **extra}, file))

    def weight_map(self) -> dict[str, str]:
        tied = {alias: self.names[self.shard_of[name]] for alias, name in self.all_aliases.items()}
        return dict(sorted({**super().weight_map(), **tied}.items()))

    def finish(self) -> None:
        self._save(len(self.shards) - 1)
        super().finish()
