"""Finding out what is at a path: whose checkpoint, and which tensors are in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from shardwise.checkpoint import deepspeed, distributed
from shardwise.checkpoint.files import MANIFEST, resolve
from shardwise.checkpoint.stored import Part, Section, Source, Stored
from shardwise.checkpoint.torchfile import read_nest, walk
from shardwise.checkpoint.writers import DTYPES
from shardwise.errors import CheckpointError

_HEADER = 100_000_000  # bytes; the library's own limit
_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def open_source(path: str | os.PathLike[str]) -> Source:
    """Find out what is at a path, and read its index. Any rank may call it alone.

    A path may be a checkpoint of Shardwise, a folder of ``torch.distributed.checkpoint`` (FSDP1 and FSDP2), a Hugging
    Face folder (``model.safetensors`` or ``pytorch_model.bin``, with an index or without), a folder of DeepSpeed
    (the one with ``latest`` in it, or one step's), or one ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file.

    Raises:
        CheckpointError: nothing there, nothing that is known, damaged or cut off, or it holds more than tensors and
            plain values. Nothing is run, whatever the file holds.
    """
    path = Path(os.path.realpath(path))
    if path.is_file():
        source = _open_file(path)
    elif path.is_dir():
        source = _open_folder(path)
    else:
        source = distributed.open_shardwise(resolve(path))  # what a killed save left, or an error that says so
    for tensors in source.sections.values():
        for name, stored in tensors.items():
            if not stored.complete:
                raise CheckpointError(
                    f"parts of '{name}' are missing", where=str(source.path), fix="use a complete copy"
                )
    source.sections = {section: tensors for section, tensors in source.sections.items() if tensors}
    if not source.sections:
        raise CheckpointError("there are no tensors in it", where=str(source.path), fix="check the path")
    used = {p.file for t in source.everything().values() for p in t.parts}
    source.files |= {file: file.stat().st_size for file in used | set(source.files)}
    return source


def _open_file(path: Path) -> Source:
    if path.suffix == ".safetensors":
        return Source(path, "safetensors", {(): _safetensors(path)})
    if path.name.endswith(".json"):
        return _indexed(path)
    sections, facts = _torch(path)
    return Source(path, "torch", sections, facts, {path: 0})


def _open_folder(path: Path) -> Source:
    names = {p.name for p in path.iterdir()}
    if MANIFEST in names or not names:
        return distributed.open_shardwise(resolve(path))
    if ".metadata" in names:
        return distributed.open_plain(path)
    if deepspeed.is_one(path, names):
        return deepspeed.open_folder(path)
    for usual in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        if usual in names:
            return _with_config(_open_file(path / usual), path)
    for pattern in (r".*\.safetensors\.index\.json", r".*\.bin\.index\.json", r".*\.safetensors", r".*\.(bin|pt|pth)"):
        found = sorted(name for name in names if re.fullmatch(pattern, name) and not name.startswith("."))
        if len(found) == 1:
            return _with_config(_open_file(path / found[0]), path)
        if found:
            listed = ", ".join(found[:5])
            raise CheckpointError(
                f"holds several files of tensors and no index: {listed}", where=str(path), fix="give one of the files"
            )
    return distributed.open_shardwise(resolve(path))  # an error that says what is missing


def _with_config(source: Source, folder: Path) -> Source:
    source.path = folder
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return source
    if isinstance(config, dict):
        source.facts |= {k: config[k] for k in ("architectures", "model_type") if k in config}
    return source


# --- safetensors -----------------------------------------------------------------------------------
def _safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one file, by their names and by those that its metadata says they are tied to."""
    size = path.stat().st_size

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(what, where=str(path), fix="use another copy of the file")

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_HEADER, size - 8):
            raise damaged("not a safetensors file, or cut off")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        out = {name: _entry(path, name, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"its header is damaged ({type(error).__name__}: {error})") from error
    end = max((t.parts[0].at + t.nbytes for t in out.values()), default=0)
    if end > size:
        raise damaged(f"the file has {size} bytes, and its tensors go to byte {end}: it is cut off")
    for alias, name in metadata.items():
        if name in out and alias not in out:
            out[alias] = out[name]
    return out


def _entry(path: Path, name: str, base: int, entry: Mapping[str, Any]) -> Stored:
    shape, (start, stop) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
    dtype = _TORCH_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(
            f"'{name}' has dtype {entry['dtype']}, which is not supported", where=str(path), fix="convert it first"
        )
    if min((*shape, start), default=0) < 0 or stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"'{name}' has {stop - start} bytes for shape {shape} of {entry['dtype']}")
    return Stored(dtype, shape, (Part(path, base + start, 0, prod(shape)),))


# --- several files -----------------------------------------------------------------------------------
def _indexed(path: Path) -> Source:
    """A folder's files through its index."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        wanted = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the index is damaged ({type(error).__name__})", where=str(path), fix="use another copy of it"
        ) from error
    safe = ".safetensors" in path.name
    read: Callable[[Path], dict[str, Stored]] = _safetensors if safe else _flat
    tensors: dict[str, Stored] = {}
    files: dict[Path, int] = {}
    for name in dict.fromkeys(wanted.values()):
        file = path.parent / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError("the index names a file that is not there", where=str(file), fix="fetch it too")
        files[file] = 0
        found = read(file)
        missing = [n for n, f in wanted.items() if f == name and n not in found]
        if missing:
            raise CheckpointError(
                f"the index says that '{missing[0]}' is in it, and it is not", where=str(file), fix="fetch it again"
            )
        tensors.update(found)
    return Source(path, "safetensors" if safe else "torch", {(): tensors}, files=files)


def _flat(path: Path) -> dict[str, Stored]:
    return _torch(path)[0].get((), {})


def _torch(path: Path) -> tuple[dict[Section, dict[str, Stored]], dict[str, Any]]:
    nest = read_nest(path)
    sections: dict[Section, dict[str, Stored]] = {}
    for keys, leaf in walk(nest):
        if isinstance(leaf, Stored):
            sections.setdefault(keys[:-1], {})[keys[-1] if keys else "tensor"] = leaf
    facts = {}
    if isinstance(nest, Mapping):
        facts = {str(k): v for k, v in nest.items() if isinstance(v, (int, float, str))}
    return sections, facts
