"""What ``torch.save`` writes, without going through it: single tensors byte for byte, and whole files as an index.

``torch.distributed.checkpoint`` stores each tensor as one such archive. Knowing it byte for byte lets us write a
tensor's memory straight into a file, and read any part of one straight out of it, with nothing unpickled.

Files of others are read as an index: plain values, and for each tensor where its bytes are. Runs nothing. The pickle
inside is read with a closed list of names, none of which is the real thing: tensors become :class:`Stored`, dicts of
all kinds become dicts, and a few classes that training states contain become empty stand-ins.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from shardwise.checkpoint.stored_tensor import Segment, Stored, row_major
from shardwise.errors import CheckpointError

STORAGES = {
    torch.float32: "FloatStorage", torch.float64: "DoubleStorage", torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage", torch.uint8: "ByteStorage", torch.int8: "CharStorage",
    torch.int16: "ShortStorage", torch.int32: "IntStorage", torch.int64: "LongStorage", torch.bool: "BoolStorage",
}  # fmt: skip
ALIGN = 64
_BIG = 0xFFFFFFFF  # what does not fit into a field of four bytes, and the mark that it is elsewhere
_MANY = 0xFFFF  # the same of two
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
            return "storage", getattr(torch, STORAGES[obj.dtype]), "0", "cpu", obj.numel
        return None


def archivable(dtype: torch.dtype) -> bool:
    """Can tensors of this dtype be written and read in this way? Others go through ``torch.save``."""
    return dtype in STORAGES and sys.byteorder == "little"


@lru_cache(maxsize=4096)
def archive_around(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The archive of a contiguous tensor: all bytes before its memory, and all after it.

    Args:
        dtype: a :func:`archivable` one.
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
        local, central = archive_entry(name, len(content), zlib.crc32(content), len(head), 0)
        head, directory = head + local + content, directory + central
    plain, _ = archive_entry("archive/data/0", nbytes, 0, len(head), 0)
    local, central = archive_entry("archive/data/0", nbytes, 0, len(head), -(len(head) + len(plain)) % ALIGN)
    head, directory = head + local, directory + central
    return head, directory + archive_end(len(small) + 1, len(directory), len(head) + nbytes)


def archive_entry(name: str, size: int, crc: int, offset: int, padding: int) -> tuple[bytes, bytes]:
    """A file's headers in a zip archive: the one before it, and the one in the directory at the end."""
    big = size >= _BIG
    version, said = (_ZIP64, _BIG) if big else (_OLD, size)
    sizes = struct.pack("<HHQQ", 1, 16, size, size) if big else b""
    far = offset >= _BIG
    wide = struct.pack("<HH", 1, 16 * big + 8 * far) + sizes[4:] + struct.pack("<Q", offset) * far if far else sizes
    if 0 < padding < 4:
        padding += ALIGN
    # A field with a tag that nobody knows makes up the padding; it needs at least four bytes.
    filler = struct.pack("<HH", 0x4246, padding - 4).ljust(padding, b"Z") if padding else b""
    extra = sizes + filler
    raw = name.encode()
    common = struct.pack("<HHHHHIIIH", version, 0, 0, 0, 0x21, crc, said, said, len(raw))
    local = b"PK\x03\x04" + common + struct.pack("<H", len(extra)) + raw + extra
    central = b"PK\x01\x02" + struct.pack("<H", version) + common
    central += struct.pack("<HHHHII", len(wide), 0, 0, 0, 0, min(offset, _BIG)) + raw + wide
    return local, central


def archive_end(count: int, length: int, start: int) -> bytes:
    big = start >= _BIG or count >= _MANY
    out = b""
    if big:
        out += b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, _ZIP64, _ZIP64, 0, 0, count, count, length, start)
        out += b"PK\x06\x07" + struct.pack("<IQI", 0, start + length, 1)
    return (
        out
        + b"PK\x05\x06"
        + struct.pack("<HHHHIIH", 0, 0, min(count, _MANY), min(count, _MANY), length, min(start, _BIG), 0)
    )


# --- files as an index ---------------------------------------------------------------------------
DAMAGED = (
    pickle.PickleError, zipfile.BadZipFile, AttributeError, TypeError, ValueError, RuntimeError, EOFError, KeyError,
    IndexError, NotImplementedError, RecursionError, OverflowError, MemoryError,
)  # fmt: skip
"""What readers of files raise about damaged ones. Lengths are in the files, so memory may run out as well."""
_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
_STAND_INS = frozenset(
    {(b, name) for b in ("builtins", "__builtin__") for name in ("set", "frozenset", "complex", "bytearray")}
    | {("torch", "device"), ("torch.serialization", "_get_layout"), ("_codecs", "encode")}
    | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")}
    | {("numpy", "dtype"), ("numpy", "ndarray"), ("collections", "Counter"), ("collections", "defaultdict")}
)
"""Names that training states contain beside tensors. They become stand-ins: nobody asks for their values."""


class StandIn:
    """Stands for an object of a class that is not imported. ``arguments`` are what its pickle calls it with."""

    arguments: tuple[Any, ...] = ()

    def __new__(cls, *arguments: Any) -> StandIn:
        new = super().__new__(cls)
        new.arguments = arguments
        return new

    def __setstate__(self, state: Any) -> None:
        self.arguments = (*self.arguments, state)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries of a dict, which it may have been."""

    def append(self, value: Any) -> None:
        """Items of a list, which it may have been."""


class PlainDict(dict):
    """A dict of any kind. What such an object has beside its entries is left out."""

    def __setstate__(self, state: Any) -> None:
        """Attributes."""


def read_nest(
    path: Path, at: int = 0, length: int | None = None, also: frozenset[tuple[str, str]] = frozenset()
) -> Any:
    """Read what ``torch.save`` wrote: dicts, lists, numbers, strings, and :class:`Stored` in place of tensors.

    Args:
        path: the file.
        at, length: where in it; all of it by default.
        also: further names, ``(module, name)``, that become stand-ins.

    Raises:
        CheckpointError: it is damaged, or asks for anything else.

    Cost: reads the index only. A file of torch before 1.6 has none: it is read whole, with ``weights_only=True``.
    """
    with path.open("rb") as file:
        window: Any = file if length is None else io.BufferedReader(_Window(file, at, length))
        start = 0 if length is None else at
        if window.read(2) != b"PK":
            if length is None:
                return _old(path)
            raise _damaged(path, "not what torch.save writes")
        try:
            with zipfile.ZipFile(window) as archive:
                return _Unpickler(path, file, start, archive, also).load()
        except DAMAGED as error:
            if isinstance(error, CheckpointError):
                raise
            raise _damaged(path, f"damaged ({type(error).__name__}: {_line(error)})") from error


def walk(nest: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf of a nest of dicts and lists, with the keys that lead to it."""
    if isinstance(nest, Mapping):
        for key, value in nest.items():
            yield from walk(value, (*path, str(key)))
    elif isinstance(nest, (list, tuple)):
        for i, value in enumerate(nest):
            yield from walk(value, (*path, str(i)))
    else:
        yield path, nest


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(path), fix="nothing was loaded; use another copy of the file")


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _old(path: Path) -> Any:
    """A file without an index, through torch's own weights-only reader."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        what = f"not a file of tensors, or one that holds other things ({_line(error)})"
        raise _damaged(path, what) from error
    known: dict[Any, Stored] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            stored = Stored(value.dtype, tuple(value.shape), values=value)
            same = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else id(value)
            return known.setdefault(same, stored)
        if isinstance(value, Mapping):
            return {k: convert(v) for k, v in value.items()}
        return [convert(v) for v in value] if isinstance(value, (list, tuple)) else value

    return convert(found)


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, at: int, length: int) -> None:
        self.file, self.at, self.length, self.place = file, at, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = max(0, offset + (0, self.place, self.length)[whence])
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.at + self.place)
        data = self.file.read(max(0, min(len(buffer), self.length - self.place)))
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


class _Storage:
    """A storage's bytes in the file."""

    def __init__(self, dtype: torch.dtype, at: int, nbytes: int) -> None:
        self.dtype, self.at, self.nbytes = dtype, at, nbytes


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, path: Path, file: BinaryIO, start: int, archive: zipfile.ZipFile, also: frozenset[tuple[str, str]]
    ) -> None:
        names = archive.namelist()
        found = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1:
            raise _damaged(path, "a zip file, but not one that torch.save wrote")
        self.path, self.file, self.start, self.archive, self.also = path, file, start, archive, also
        self.root = found[0].removesuffix("data.pkl")
        if f"{self.root}byteorder" in names and archive.read(f"{self.root}byteorder") != b"little":
            raise _damaged(path, "written on a machine with another byte order")
        self.storages: dict[str, _Storage] = {}
        self.tensors: dict[Any, Stored] = {}
        self.stand_ins: dict[tuple[str, str], type] = {}
        super().__init__(io.BytesIO(archive.read(found[0])), encoding="utf-8")

    # --- names -----------------------------------------------------------------------------------
    def find_class(self, module: str, name: str) -> Any:
        known = self._known(module, name)
        if known is not None:
            return known
        if (module, name) not in _STAND_INS and (module, name) not in self.also:
            self._refuse(f"{module}.{name}")
        return self.stand_ins.setdefault((module, name), type(name, (StandIn,), {}))

    def _known(self, module: str, name: str) -> Any:
        functions: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): _first,
            ("torch._utils", "_rebuild_parameter_with_state"): _first,
            ("torch._tensor", "_rebuild_from_type_v2"): self._from_type,
            ("collections", "OrderedDict"): PlainDict,
            ("torch", "Size"): tuple,
            ("torch", "Tensor"): torch.Tensor,
            ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
        }
        if (module, name) in functions:
            return functions[module, name]
        if module in ("torch", "torch.storage", "torch.cuda") and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        return None

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"refused: it asks for {what}, which tensors and plain values never need",
            where=str(self.path),
            fix="nothing was loaded or run; save state_dict() alone, with torch.save or as safetensors",
        )

    # --- tensors ---------------------------------------------------------------------------------
    def persistent_load(self, found: Any) -> _Storage:
        kind, dtype, key, _location, numel = found
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("an unknown kind of record")
        if key not in self.storages:
            info = self.archive.getinfo(f"{self.root}data/{key}")
            nbytes = int(numel) * dtype.itemsize
            if info.compress_type != zipfile.ZIP_STORED or info.file_size < nbytes:
                raise pickle.UnpicklingError(f"record {key} has {info.file_size} bytes instead of {nbytes}")
            self.file.seek(self.start + info.header_offset + 26)
            lengths = self.file.read(4)  # of the name and the extra field, which end the record's own header
            header = 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            self.storages[key] = _Storage(dtype, self.start + info.header_offset + header, nbytes)
        return self.storages[key]

    def _tensor(self, storage: Any, offset: Any, sizes: Any, strides: Any, *_: Any) -> Stored:
        return self._made(storage, storage.dtype, offset, sizes, strides)

    def _tensor_v3(
        self, storage: Any, offset: Any, sizes: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
    ) -> Stored:
        return self._made(storage, dtype, offset, sizes, strides)

    def _made(self, storage: Any, dtype: Any, offset: Any, sizes: Any, strides: Any) -> Stored:
        if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a tensor without a storage")
        sizes, strides = tuple(map(int, sizes)), tuple(map(int, strides))
        if len(sizes) != len(strides) or min((*sizes, *strides, offset), default=0) < 0:
            raise pickle.UnpicklingError("a tensor with impossible sizes")
        key = (storage.at, dtype, offset, sizes, strides)
        if key not in self.tensors:
            item = dtype.itemsize
            numel = 1
            for n in sizes:
                numel *= n
            last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
            if numel and (last + 1) * item > storage.nbytes:
                raise pickle.UnpicklingError("a tensor that goes beyond its storage")
            layout = None if row_major(sizes, strides) else (sizes, strides)
            part = Segment(self.path, storage.at + offset * item, 0, numel, layout=layout)
            self.tensors[key] = Stored(dtype, sizes, (part,))
        return self.tensors[key]

    def _from_type(self, function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
        """A tensor with attributes of its own. Those are left out."""
        if kind not in (torch.Tensor, torch.nn.Parameter) or function not in (self._tensor, self._tensor_v3, _first):
            self._refuse(f"a tensor of class {getattr(kind, '__name__', kind)}")
        return function(*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value
