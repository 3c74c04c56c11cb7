"""Tensors of files seen through operations that only move their numbers: parts, stacks, transposed and permuted ones.

The operations are somebody else's, and run on tensors of the meta device, which have shapes and strides and no memory.
What they do is written down, and in the end each result is again bytes of files: in a row where they are, or read in
blocks and put in order by the thread that converts.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.checkpoint.stored_tensor import Segment, Stored, row_major
from shardwise.errors import CheckpointError

_SHORT = 64 << 10  # bytes; of shorter rows, all that lies between them is read and taken apart
_PIECES = 1 << 17
_aten = torch.ops.aten
_COPIES = (_aten.clone.default, _aten.contiguous.default)


class Rearranging(TorchDispatchMode):
    """A block in which operations on tensors of :meth:`tensor` are followed.

    Raises:
        CheckpointError: in the block: an operation that does not only move numbers, or puts dtypes together.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[torch.Tensor, Stored]] = {}  # by storage, which the tensor keeps

    def tensor(self, stored: Stored) -> torch.Tensor:
        """A tensor without memory that stands for one of files. Outside of the block."""
        return self._stands(torch.empty(stored.shape, dtype=stored.dtype, device="meta"), stored)

    def stored(self, tensor: torch.Tensor) -> Stored:
        """What a tensor of the block stands for."""
        _, base = self._known[tensor.untyped_storage()._cdata]
        return _seen(base, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _COPIES and out.is_contiguous():
            return self._stands(out, self.stored(args[0]))
        if func in (_aten.cat.default, _aten.stack.default):
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
            parts = [self.stored(t) for t in args[0]]
            if func is _aten.stack.default:
                dim %= out.ndim
                parts = [replace(p, shape=(*p.shape[:dim], 1, *p.shape[dim:])) for p in parts]
            return self._stands(out, concatenated(parts, dim))
        for t in out if isinstance(out, list | tuple) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self._known:
                raise CheckpointError(f"{func} makes new numbers, and cannot be done to tensors in their files")
        return out

    def _stands(self, tensor: torch.Tensor, stored: Stored) -> torch.Tensor:
        self._known[tensor.untyped_storage()._cdata] = tensor, stored
        return tensor


def _seen(base: Stored, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Stored:
    """A view of a tensor: its element ``i, j, ...`` is the base's ``offset + i * strides[0] + ...``."""
    numel = prod(sizes)
    if base.values is not None:
        values = base.values.reshape(-1).as_strided(sizes, strides, offset).contiguous()
        return Stored(base.dtype, sizes, values=values)
    if row_major(sizes, strides):
        return replace(base, shape=sizes) if numel == base.numel else Stored(
            base.dtype, sizes, tuple(_cut(base, [(offset, numel)]))
        )  # fmt: skip
    inner = len(sizes)  # behind it, elements lie in a row
    while inner > 1 and row_major(sizes[inner - 1 :], strides[inner - 1 :]):
        inner -= 1
    length = prod(sizes[inner:])
    if length * base.dtype.itemsize < _SHORT and (blocks := _blocks(base, sizes, strides, offset)) is not None:
        return Stored(base.dtype, sizes, tuple(blocks))
    starts = _starts(sizes, strides, inner, offset)
    if len(starts) > _PIECES:
        raise CheckpointError("tensors of several pieces are to be transposed")
    return Stored(base.dtype, sizes, tuple(_cut(base, [(at, length) for at in starts])))


def _blocks(base: Stored, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> list[Segment] | None:
    """A view as blocks that are read whole and put in order then; ``None``: one of them is not in one piece."""
    dense = (k for k in range(len(sizes)) if _span(sizes[k:], strides[k:]) == prod(sizes[k:]))
    block = max((k for k in dense if not row_major(sizes[k:], strides[k:])), default=0)
    layout, length = (sizes[block:], strides[block:]), prod(sizes[block:])
    out = []
    for k, at in enumerate(_starts(sizes, strides, block, offset)):
        found = _cut(base, [(at, _span(*layout))])
        if len(found) != 1 or found[0].record or found[0].layout is not None:
            return None
        byte = found[0].at + found[0].skip * base.dtype.itemsize
        out.append(Segment(found[0].file, byte, k * length, length, layout=layout))
    return out


def _starts(sizes: Sequence[int], strides: Sequence[int], dims: int, offset: int) -> list[int]:
    """Where the elements begin that have the index 0 in all but the first dims, in row-major order."""
    steps = [range(0, n * s, s) if s else [0] * n for n, s in zip(sizes[:dims], strides[:dims], strict=True)]
    return [offset + sum(index) for index in itertools.product(*steps)]


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))


def _cut(base: Stored, runs: Sequence[tuple[int, int]]) -> list[Segment]:
    """Runs of elements of a tensor, ``(start, length)`` each, one behind the other."""
    rows = sorted(
        (replace(s, start=s.start + i * s.step, skip=s.skip + i * s.length, count=1, step=0)
         for s in base.segments for i in range(s.count)), key=lambda s: s.start,
    )  # fmt: skip
    starts = [s.start for s in rows]
    out, done = list[Segment](), 0
    for start, length in runs:
        at = start
        while at < start + length:
            row = rows[bisect_right(starts, at) - 1]
            taken = min(row.start + row.length, start + length) - at
            out.append(replace(row, start=done, skip=row.skip + at - row.start, length=taken))
            at, done = at + taken, done + taken
    return out


def concatenated(tensors: Sequence[Stored], dim: int) -> Stored:
    """``torch.cat``: the same bytes of the same files at other places.

    Raises:
        CheckpointError: dtypes differ, or a format that is read whole.
    """
    first = tensors[0]
    dim %= len(first.shape)
    if any(t.dtype != first.dtype or t.values is not None for t in tensors):
        raise CheckpointError("tensors that are to be one have several dtypes, or a format that is read whole")
    inner = [prod(t.shape[dim:]) for t in tensors]  # elements in a row
    row, offset, segments = sum(inner), 0, list[Segment]()
    for tensor, length in zip(tensors, inner, strict=True):
        for segment in tensor.segments:
            segments += _moved(segment, length, row, offset)
        offset += length
    shape = (*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :])
    return Stored(first.dtype, shape, tuple(segments))


def _moved(segment: Segment, length: int, row: int, offset: int) -> list[Segment]:
    """A segment of a tensor whose rows of ``length`` elements come to be in rows of ``row``, ``offset`` into them."""
    out = []
    for i in range(segment.count):
        start, skip, left = segment.start + i * segment.step, segment.skip + i * segment.length, segment.length
        while left:
            begin = start % length
            if begin == 0 and left >= length:  # whole rows
                count = left // length
                step = row if count > 1 else 0
                new = replace(segment, start=start // length * row + offset, length=length, count=count, step=step)
                taken = count * length
            else:
                taken = min(left, length - begin)
                new = replace(segment, start=start // length * row + offset + begin, length=taken, count=1, step=0)
            out.append(replace(new, skip=skip))
            start, skip, left = start + taken, skip + taken, left - taken
    return out
