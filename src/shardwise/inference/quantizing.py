"""Weights that become int8 on their way from full-precision files, and models whose files have them in int8."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from shardwise.checkpoint.manifest import BLOCK as READ
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.checkpoint.stored_tensor import Source, Stored
from shardwise.engine.build import members_of
from shardwise.engine.stored import StoredTensor
from shardwise.errors import OffloadError, UnitError
from shardwise.inference.plan import DISK
from shardwise.quantization.int8 import BLOCK, blocks_of, quantized
from shardwise.quantization.linear import QuantizedLinear
from shardwise.quantization.replacing import linears_of, nothing_to_quantize, quantized_linear, with_layers

INT8 = "int8"
METHOD = "shardwise_int8"
"""What ``quant_method`` is in the configuration of a folder with weights of ours."""


def require_known(quantization: str | None) -> None:
    """Raise for a word that says nothing.

    Raises:
        UnitError: it does.
    """
    if quantization not in (None, INT8):
        raise UnitError(f"quantization={quantization!r}", fix="'int8', or None for what the files have")


class QuantizedAsRead:
    """One matrix of full-precision files, as int8 and scales. Some rows are in memory at a time.

    Args:
        name: for errors.
        stored: the matrix.
        block: elements that share a scale.
        reader: reads it.
    """

    def __init__(self, name: str, stored: Stored, block: int, reader: StorageReader) -> None:
        self.name, self.stored, self.block, self.reader = name, stored, block, reader
        self.rows, self.columns = stored.shape
        self.blocks = blocks_of(self.columns, block)
        self._known: list[
            tuple[int, torch.Tensor]
        ] = []  # scales of rows that were read for their weights, until needed

    def tensors(self) -> tuple[StoredTensor, StoredTensor]:
        """The weight and its scales."""
        weight = StoredTensor(torch.int8, (self.rows, self.columns), (), self.weight)
        return weight, StoredTensor(torch.float32, (self.rows, self.blocks), (), self.scales)

    def weight(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill ``out`` with elements ``start:stop`` of the flattened int8 weight."""
        for row, values, scales in self.parts(start // self.columns, -(-stop // self.columns)):
            at = row * self.columns
            lo, hi = max(start, at), min(stop, at + values.numel())
            out[lo - start : hi - start].copy_(values.view(-1)[lo - at : hi - at])
            self._known.append((row, scales))

    def scales(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill ``out`` with elements ``start:stop`` of the flattened scales."""
        first, last = start // self.blocks, -(-stop // self.blocks)
        wanted = torch.full((last - first, self.blocks), torch.nan)
        known, self._known = self._known, []
        for row, scales in known:
            lo, hi = max(row, first), min(row + len(scales), last)
            if lo < hi:
                wanted[lo - first : hi - first] = scales[lo - row : hi - row]
        left = wanted.isnan().any(1).nonzero().flatten()  # of a split model another rank may have the weights
        if len(left):
            begin, end = first + int(left[0]), first + int(left[-1]) + 1
            for row, _, scales in self.parts(begin, end):
                wanted[row - first : row - first + len(scales)] = scales
        out.copy_(wanted.view(-1)[start - first * self.blocks : stop - first * self.blocks])

    def parts(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Rows ``first:last``, some at a time: the first one's number, values and scales."""
        each = max(1, READ // max(1, self.columns * self.stored.dtype.itemsize))
        last = self.rows if last is None else last
        for row in range(first, last, each):
            end = min(row + each, last)
            read = self.reader.values(self.stored, row * self.columns, end * self.columns)
            yield row, *quantized(read.view(end - row, self.columns), self.block, self.name)


def quantize_as_read(
    model: nn.Module, tensors: dict[str, StoredTensor], stored: Mapping[str, Stored], reader: StorageReader
) -> set[str]:
    """Replace the linear layers of a model without values, and let their weights be quantised as they are read.

    Args:
        tensors: where the values of each parameter are; those of these layers' weights are replaced.
        stored: the same in the files.

    Returns:
        Names of the weights.

    Raises:
        UnitError: there is no such layer.
    """
    names = [name for name in linears_of(model) if name]
    if not names and not any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise nothing_to_quantize(model)
    layers = {}
    for name in names:
        layers[name] = quantized_linear(_empty(model.get_submodule(name)), BLOCK)
        key = f"{name}.weight"
        both = QuantizedAsRead(key, stored[key], BLOCK, reader).tensors()
        tensors[key], tensors[f"{name}.scales"] = both
    with_layers(model, layers)
    note_in_config(model)
    return {f"{name}.weight" for name in names}


def _empty(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter(layer.weight.detach().to("meta"), requires_grad=False)
    return layer


def quantize_like(model: nn.Module, source: Source) -> None:
    """Replace the linear layers of a model without values whose weights files have in int8, by the names there."""
    stored = {name: t for tensors in source.sections.values() for name, t in tensors.items()}
    layers = {}
    for name, layer in model.named_modules():
        weight, scales = stored.get(f"{name}.weight"), stored.get(f"{name}.scales")
        if not name or type(layer) is not nn.Linear or weight is None or scales is None or weight.dtype != torch.int8:
            continue
        block = _block(layer.in_features, scales.shape)
        if block is None:
            raise UnitError(
                f"scales of shape {scales.shape} for {layer.in_features} inputs",
                where=f"'{name}' in {source.path}",
                fix="quantise the weights again, with shardwise.quantize_checkpoint",
            )
        layers[name] = quantized_linear(_empty(layer), block)
    if layers:
        with_layers(model, layers)
        note_in_config(model)


def _block(columns: int, shape: tuple[int, ...]) -> int | None:
    """The power of two that gives so many scales a row."""
    return next((b for b in (BLOCK, *(1 << i for i in range(24))) if shape[-1] == blocks_of(columns, b)), None)


def note_in_config(model: nn.Module) -> None:
    """Have ``save_pretrained`` of transformers write what the weights are, for whoever reads them."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        config.quantization_config = {"quant_method": METHOD}


def scales_in(model: nn.Module) -> set[str]:
    """Names of scales, which keep their dtype."""
    return {f"{name}.scales" for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def refuse_disk(model: nn.Module, homes: Mapping[str, str], arriving: Collection[str]) -> None:
    """Raise where weights would be read from a disk and quantised each time they are used.

    Args:
        homes: by unit.
        arriving: names of weights that are quantised as they are read.

    Raises:
        OffloadError: says what to do.
    """
    members = members_of(model.named_parameters(remove_duplicate=False), homes)
    away = [u for u, its in members.items() if homes[u] == DISK and any(set(n) & set(arriving) for _, n in its)]
    if away:
        raise OffloadError(
            f"{len(away)} units (as '{away[0]}') would be read from the disk for each use, where their weights are in "
            "full precision",
            fix="write them in int8 once, with shardwise.quantize_checkpoint(folder, out), and load that; or allow "
            "more memory",
        )
