"""A rank's slices of a parameter, as the row-major boxes that ``torch.distributed.checkpoint`` stores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from shardwise.tiers.swapped_tensor import SwappedTensor, fetch

Box = tuple[tuple[int, ...], tuple[int, ...], int, int]
"""Offsets, sizes, and the range ``start:stop`` of the flattened tensor that the box covers."""


@lru_cache(maxsize=4096)  # a parameter and its optimizer state are cut alike, at every save
def _boxes(shape: tuple[int, ...], start: int, stop: int) -> tuple[Box, ...]:
    return tuple(boxes(shape, start, stop))


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The fewest boxes, in order, whose elements are ``start:stop`` of a row-major tensor of ``shape``.

    Each box is contiguous in the flattened tensor. There are at most ``2 * len(shape) - 1`` of them.
    """
    out: list[Box] = []

    def cut(prefix: tuple[int, ...], shape: tuple[int, ...], lo: int, hi: int, base: int) -> None:
        if lo >= hi:
            return
        ones = (1,) * len(prefix)
        if len(shape) <= 1:
            inner = ((lo,), (hi - lo,)) if shape else ((), ())
            out.append((prefix + inner[0], ones + inner[1], base + lo, base + hi))
            return
        row = prod(shape[1:])
        first, last = -(-lo // row), hi // row  # the whole rows in between
        if first > last:  # all of it lies inside one row
            at = lo // row
            cut((*prefix, at), shape[1:], lo - at * row, hi - at * row, base + at * row)
            return
        if lo < first * row:
            cut((*prefix, first - 1), shape[1:], lo - (first - 1) * row, row, base + (first - 1) * row)
        if first < last:
            offsets = (*prefix, first, *(0,) * (len(shape) - 1))
            out.append((offsets, (*ones, last - first, *shape[1:]), base + first * row, base + last * row))
        if last * row < hi:
            cut((*prefix, last), shape[1:], 0, hi - last * row, base + last * row)

    cut((), tuple(shape), start, stop, 0)
    return out


class Slices(torch.Tensor):
    """Stands for a tensor of ``shape`` of which this rank has some contiguous slices, or none.

    Args:
        shape: of the whole tensor.
        dtype, device: of the slices.
        pieces: ``(start, stop, slice)``; the slice is contiguous and holds ``start:stop`` of the flattened
            tensor. Reading writes into it, so nothing is copied. One whose bytes are on a disk is fetched when its turn
            comes to be saved; to be read into, it must be here by then.
    """

    parts: list[tuple[Box, int, torch.Tensor]]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        pieces: Sequence[tuple[int, int, torch.Tensor]],
    ) -> Slices:
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        pieces: Sequence[tuple[int, int, torch.Tensor]],
    ) -> None:
        self.pieces = list(pieces)
        self.parts = []
        for start, stop, piece in pieces:
            source = piece if isinstance(piece, SwappedTensor) else piece.detach().view(-1)  # the memory it has now
            self.parts += [(box, start, source) for box in _boxes(tuple(shape), start, stop)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            whole = args[0]
            return Slices(whole.shape, whole.dtype, whole.device, whole.pieces)
        raise NotImplementedError(f"{func} on slices of a tensor")

    @property
    def here(self) -> bool:
        """Are all bytes in memory?"""
        return not any(isinstance(piece, SwappedTensor) for _, _, piece in self.pieces)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Slices({tuple(self.shape)}, {[(a, b) for a, b, _ in self.pieces]})"

    # --- what torch.distributed.checkpoint asks of a tensor that is spread over ranks ---------
    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box[0]), torch.Size(box[1])) for box, _, _ in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for box, start, source in self.parts:
            if box[0] == tuple(index.offset or ()):
                return fetch(source).detach().view(-1)[box[2] - start : box[3] - start].view(box[1])
        raise KeyError(index)
