"""Tensors on disk, whatever wrote them: what there is, and in which bytes of which files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from shardwise.errors import CheckpointError
from shardwise.layout import row_strides

Section = tuple[str, ...]
"""The keys of the dicts around a state dict: ``("model",)`` for ``{"model": {...}}``, ``()`` for the outermost one."""

KINDS = {
    "shardwise": "a checkpoint of Shardwise",
    "dcp": "a checkpoint of torch.distributed.checkpoint",
    "safetensors": "safetensors files",
    "torch": "files of torch.save",
    "deepspeed": "a checkpoint of DeepSpeed",
}
SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
"""The names of dtypes in safetensors files."""
_WEIGHTS = ("model", "module", "state_dict", "model_state_dict", "")  # where weights are as a rule

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes and strides, in elements, of bytes that are not in row-major order."""


@dataclass(frozen=True)
class Segment:
    """``count`` runs of ``length`` elements of the flattened tensor, the i-th from element ``start + i * step``.

    Their bytes stand one behind the other in ``file``.

    Args:
        at: the byte that ``skip`` elements are counted from.
        record: length in bytes of what ``torch.save`` wrote to ``at``, which holds one tensor, from whose first
            element ``skip`` counts; 0: from ``at`` itself.
        layout: of all elements from ``at`` on, if they are not in row-major order. They are then read whole.
    """

    file: Path
    at: int
    start: int
    length: int
    count: int = 1
    step: int = 0
    skip: int = 0
    record: int = 0
    layout: Layout | None = None


@dataclass(frozen=True)
class Stored:
    """One tensor in files. Names that share a tensor share the object.

    Args:
        segments: they cover every element once.
        values: where the format cannot be read in parts: all of it, on the CPU.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    values: torch.Tensor | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def complete(self) -> bool:
        """Whether the parts have every element, and nothing beyond."""
        if self.values is not None:
            return True
        at, single = 0, all(segment.count == 1 for segment in self.segments)
        for segment in sorted(self.segments, key=lambda segment: segment.start):
            end = segment.start + (segment.count - 1) * segment.step + segment.length
            if min(segment.start, segment.length, segment.count) < 0 or end > self.numel:
                return False
            if single and segment.start != at:
                return False
            at = end
        return sum(segment.length * segment.count for segment in self.segments) == self.numel


@dataclass
class Source:
    """Tensors in a file or folder.

    Args:
        path: what was opened.
        kind: a key of :data:`KINDS`.
        sections: state dicts by the keys around them. Names of one tensor share the object.
        facts: small values for people: step, version, ...
        files: all files of it, with their sizes in bytes.
    """

    path: Path
    kind: str
    sections: dict[Section, dict[str, Stored]]
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[Path, int] = field(default_factory=dict)

    def section(self, named: str | None = None) -> Section:
        """The section called ``named`` (keys joined with dots), or the one that holds the weights.

        Raises:
            CheckpointError: there is no such section, or no telling which one.
        """
        known = {".".join(section): section for section in self.sections}
        if named is not None:
            if named not in known:
                raise CheckpointError(f"there is no part '{named}'", where=str(self.path), fix=_parts(known))
            return known[named]
        for name in _WEIGHTS:
            if name in known:
                return known[name]
        if len(known) == 1:
            return next(iter(known.values()))
        raise CheckpointError("no telling which part holds the weights", where=str(self.path), fix=_parts(known))

    def everything(self) -> dict[str, Stored]:
        """All tensors under their full names."""
        return {".".join((*s, name)): t for s, tensors in self.sections.items() for name, t in tensors.items()}


def _parts(known: Iterable[str]) -> str:
    top = sorted({name.split(".")[0] for name in known if name})
    return f"say part='...': there are {', '.join(top[:10])}" if top else "there are no tensors"


def row_major(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements of these sizes and strides lie in row-major order without gaps."""
    expected, some = 1, 0 not in sizes
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if some and size != 1 and stride != expected:
            return False
        expected *= size
    return True


def box_segments(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], file: Path, at: int, record: int = 0
) -> list[Segment]:
    """The box of ``sizes`` at ``offsets`` of a tensor of ``shape``, whose own bytes are row-major in a file."""
    if not prod(sizes):
        return []
    cut = len(shape)  # behind it the box has all there is
    while cut > 1 and sizes[cut - 1] == shape[cut - 1]:
        cut -= 1
    cut = max(cut - 1, 0)  # a run goes along this dim
    steps = row_strides(shape)
    start = sum(o * s for o, s in zip(offsets, steps, strict=True))
    length = prod(sizes[cut:])
    if not cut:
        return [Segment(file, at, start, length, record=record)]
    out: list[Segment] = []
    count, step = sizes[cut - 1], steps[cut - 1]
    for number, index in enumerate(itertools.product(*(range(n) for n in sizes[: cut - 1]))):
        first = start + sum(i * s for i, s in zip(index, steps, strict=False))
        out.append(Segment(file, at, first, length, count, step, number * count * length, record))
    return out
