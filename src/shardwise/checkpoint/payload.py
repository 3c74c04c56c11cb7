"""A tensor as ``torch.save`` writes it, without going through it: what comes before its bytes, and what after.

``torch.distributed.checkpoint`` stores each tensor as one such archive. Knowing it byte for byte lets us write a
tensor's memory straight into a file, and read any part of one straight out of it, with nothing unpickled.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch

_STORAGES = {
    torch.float32: "FloatStorage", torch.float64: "DoubleStorage", torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage", torch.uint8: "ByteStorage", torch.int8: "CharStorage",
    torch.int16: "ShortStorage", torch.int32: "IntStorage", torch.int64: "LongStorage", torch.bool: "BoolStorage",
}  # fmt: skip
ALIGN = 64
_BIG = 0xFFFFFFFF  # what does not fit into a field of four bytes, and the mark that it is elsewhere
_OLD, _ZIP64 = 20, 45  # versions a reader needs


class _Bytes:
    """Stands for a tensor's memory."""

    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        self.dtype, self.numel = dtype, numel


class _Archived:
    """Is pickled as torch pickles a contiguous tensor."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int]) -> None:
        strides = [prod([max(n, 1) for n in shape[i + 1 :]]) for i in range(len(shape))]
        numel = prod(shape)
        self.reduced: tuple[Any, ...] = (_Bytes(dtype, numel), 0, tuple(shape), tuple(strides), False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.reduced


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Bytes):
            return "storage", getattr(torch, _STORAGES[obj.dtype]), "0", "cpu", obj.numel
        return None


def known(dtype: torch.dtype) -> bool:
    """Can tensors of this dtype be written and read in this way? Others go through ``torch.save``."""
    return dtype in _STORAGES and sys.byteorder == "little"


@lru_cache(maxsize=4096)
def around(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The archive of a contiguous tensor: all bytes before its memory, and all after it.

    Args:
        dtype: a :func:`known` one.
        shape: of the tensor.

    The archive's own checksum of the memory is left 0, as torch does when told not to compute it: torch does not
    look at it, and the file has checksums of its own.
    """
    data = io.BytesIO()
    _Pickler(data, protocol=2).dump(_Archived(dtype, shape))
    small = {"archive/data.pkl": data.getvalue(), "archive/byteorder": b"little", "archive/version": b"3\n"}
    nbytes = prod(shape) * dtype.itemsize
    head, directory = b"", b""
    for name, content in small.items():
        local, central = _entry(name, len(content), zlib.crc32(content), len(head), 0)
        head, directory = head + local + content, directory + central
    plain, _ = _entry("archive/data/0", nbytes, 0, len(head), 0)
    local, central = _entry("archive/data/0", nbytes, 0, len(head), -(len(head) + len(plain)) % ALIGN)
    head, directory = head + local, directory + central
    return head, directory + _end(len(small) + 1, len(directory), len(head) + nbytes)


def _entry(name: str, size: int, crc: int, offset: int, padding: int) -> tuple[bytes, bytes]:
    """A file's headers in a zip archive: the one before it, and the one in the directory at the end."""
    big = size >= _BIG
    version, said = (_ZIP64, _BIG) if big else (_OLD, size)
    sizes = struct.pack("<HHQQ", 1, 16, size, size) if big else b""
    if 0 < padding < 4:
        padding += ALIGN
    # A field with a tag that nobody knows makes up the padding; it needs at least four bytes.
    filler = struct.pack("<HH", 0x4246, padding - 4).ljust(padding, b"Z") if padding else b""
    extra = sizes + filler
    raw = name.encode()
    common = struct.pack("<HHHHHIIIH", version, 0, 0, 0, 0x21, crc, said, said, len(raw))
    local = b"PK\x03\x04" + common + struct.pack("<H", len(extra)) + raw + extra
    central = b"PK\x01\x02" + struct.pack("<H", version) + common
    central += struct.pack("<HHHHII", len(sizes), 0, 0, 0, 0, offset) + raw + sizes
    return local, central


def _end(count: int, length: int, start: int) -> bytes:
    big = start >= _BIG
    out = b""
    if big:
        out += b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, _ZIP64, _ZIP64, 0, 0, count, count, length, start)
        out += b"PK\x06\x07" + struct.pack("<IQI", 0, start + length, 1)
    return out + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, length, min(start, _BIG), 0)
