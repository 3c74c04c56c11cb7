"""Writing a model's files once more, with its linear layers in int8, so that they can be read in place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from shardwise.checkpoint.coordination import Progress
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.manifest import BLOCK as READ
from shardwise.checkpoint.model_saving import SafeWriter, shard_limit, shards_of, writable
from shardwise.checkpoint.model_state import model_states
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import SAFETENSORS_DTYPES, Stored
from shardwise.errors import CheckpointError
from shardwise.inference.loading import fitted, module_and_files
from shardwise.inference.quantizing import METHOD, QuantizedAsRead, quantize_like
from shardwise.quantization.int8 import require_block
from shardwise.quantization.linear import QuantizedLinear
from shardwise.quantization.replacing import linears_of, nothing_to_quantize

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".ckpt", ".gguf", ".onnx", ".index.json")
_CONFIG = "config.json"


@torch.no_grad()
def write_in_int8(
    model: str | os.PathLike[str] | nn.Module,
    out: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None,
    block: int,
    skip: Collection[str] | None,
    max_shard_size: int | str,
    progress: bool,
) -> Path:
    """:func:`shardwise.quantize_checkpoint`."""
    require_block(block)
    module, folder = module_and_files(model, checkpoint, None)
    source, limit, root = open_source(folder), shard_limit(max_shard_size), Path(os.path.realpath(out))
    quantize_like(module, source)
    if any(isinstance(m, QuantizedLinear) for m in module.modules()):
        raise CheckpointError("its weights are quantised already", where=str(source.path), fix="load it as it is")
    (state,) = model_states([module], placeholders=True)
    tensors, reader = fitted(state, source, surplus=False).tensors, StorageReader()
    halves = {
        name: QuantizedAsRead(name, tensors[name], block, reader)
        for name in (f"{layer}.weight" for layer in linears_of(module, skip) if layer)
    }
    if not halves:
        raise nothing_to_quantize(module)
    table = _table(tensors, halves)
    with writable(root):
        if any(root.iterdir()):
            raise CheckpointError("the folder is not empty", where=str(root), fix="choose a new one")
        with SafeWriter(root, shards_of(table, limit), state.aliases) as writer:
            total = sum(stored.nbytes for stored in tensors.values())
            with Progress("quantising", total, progress) as bar, reader:
                reader.seen = bar.add
                for name, stored in tensors.items():
                    _write(writer, name, stored, halves.get(name), reader)
        if module is not model:
            _copy_others(source.path, root)
    return root


def _table(
    tensors: Mapping[str, Stored], halves: Mapping[str, QuantizedAsRead]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What is written: dtype and shape by name."""
    table: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, stored in tensors.items():
        if name in halves:
            for key, tensor in zip((name, _scales(name)), halves[name].tensors(), strict=True):
                table[key] = tensor.dtype, tensor.shape
        elif stored.dtype in SAFETENSORS_DTYPES:
            table[name] = stored.dtype, tuple(stored.shape)
        else:
            raise CheckpointError(f"'{name}' has dtype {stored.dtype}, which safetensors lacks", fix="convert it first")
    return table


def _scales(weight: str) -> str:
    return f"{weight.removesuffix('weight')}scales"


def _write(
    writer: SafeWriter, name: str, stored: Stored, quantized: QuantizedAsRead | None, reader: StorageReader
) -> None:
    if quantized is None:
        for lo, hi in _blocks(stored.numel, stored.dtype.itemsize):
            writer.add(name, reader.values(stored, lo, hi), lo)
        return
    for row, values, scales in quantized.parts():
        writer.add(name, values, row * values.shape[1])
        writer.add(_scales(name), scales, row * scales.shape[1])


def _blocks(numel: int, itemsize: int) -> Iterator[tuple[int, int]]:
    each = READ // itemsize
    return ((lo, min(numel, lo + each)) for lo in range(0, numel, each))


def _copy_others(folder: Path, root: Path) -> None:
    """What is no weights, and last the configuration, which says what the weights are."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != _CONFIG and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, root / file.name)
    config = json.loads((folder / _CONFIG).read_bytes())
    text = json.dumps(config | {"quantization_config": {"quant_method": METHOD}}, indent=2) + "\n"
    unfinished = root / f".{_CONFIG}.tmp"
    unfinished.write_text(text)
    unfinished.replace(root / _CONFIG)
