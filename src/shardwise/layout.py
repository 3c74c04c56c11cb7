"""Which element of which parameter is where: pure arithmetic, the one source of truth.

A unit's parameters of one dtype are laid end to end in a *flat buffer*, which is cut into ``parts``
equal *shards*, one per rank of the world. The cut depends on the world size alone, never on the
strategy: a strategy only says which shards a rank *holds* (its own, a group's, or all of them).
Every optimizer update and every norm runs over the same pieces under every strategy, so their
floating-point results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

ALIGN = 32
"""Elements. Parameters and shards start at multiples of this: 128 bytes in fp32, 64 in bf16, which
is what vectorised CPU kernels and tensor-core matrix products want."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat buffer (elements)."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class Piece:
    """The part of parameter ``slot`` that lies in shard ``shard``: elements ``start:stop`` of the
    flattened parameter, ``offset`` elements into the flat buffer."""

    slot: int
    shard: int
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """A flat buffer of ``parts * shard_numel`` elements and the slots in it."""

    slots: tuple[Slot, ...]
    parts: int
    shard_numel: int

    @property
    def numel(self) -> int:
        """Elements of the whole flat buffer, padding included."""
        return self.parts * self.shard_numel

    @property
    def used(self) -> int:
        """Elements that belong to parameters, padding left out."""
        return sum(slot.numel for slot in self.slots)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Every (parameter, shard) overlap, ordered by flat offset."""
        out = []
        for i, slot in enumerate(self.slots):
            at = slot.offset
            while at < slot.stop:
                shard = at // self.shard_numel
                end = min(slot.stop, (shard + 1) * self.shard_numel)
                out.append(Piece(i, shard, at - slot.offset, end - slot.offset, at))
                at = end
        return tuple(sorted(out, key=lambda p: p.offset))

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Flat ranges that no parameter uses."""
        out, at = [], 0
        for slot in sorted(self.slots, key=lambda s: (s.offset, s.stop)):
            if slot.offset > at:
                out.append((at, slot.offset))
            at = max(at, slot.stop)
        if at < self.numel:
            out.append((at, self.numel))
        return tuple(out)

    @classmethod
    def plan(
        cls, params: Sequence[tuple[str, tuple[int, ...]]], parts: int, granularity: str = "element", align: int = ALIGN
    ) -> Layout:
        """Lay out ``params`` (name, shape) over ``parts`` shards.

        ``element`` keeps the given order and cuts anywhere: shards differ by padding only.
        ``tensor`` never cuts: the largest parameter first, each to the emptiest shard (longest
        processing time first), so that a shard holds whole tensors; shards are padded to the fullest.
        """
        if parts < 1:
            raise ValueError(f"parts must be at least 1, not {parts}")
        if granularity == "element":
            slots, at = [], 0
            for name, shape in params:
                slots.append(Slot(name, tuple(shape), at))
                at = _up(at + prod(shape), align)
            return cls(tuple(slots), parts, max(_up(-(-at // parts), align), align))
        if granularity != "tensor":
            raise ValueError(f"granularity is 'element' or 'tensor', not {granularity!r}")
        fill = [0] * parts
        place: dict[int, tuple[int, int]] = {}
        for i in sorted(range(len(params)), key=lambda i: (-prod(params[i][1]), i)):
            shard = min(range(parts), key=lambda s: (fill[s], s))
            place[i] = (shard, fill[shard])
            fill[shard] += _up(prod(params[i][1]), align)
        width = max(max(fill), align)
        return cls(
            tuple(
                Slot(name, tuple(shape), place[i][0] * width + place[i][1]) for i, (name, shape) in enumerate(params)
            ),
            parts,
            width,
        )


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _up(n: int, align: int) -> int:
    return -(-n // align) * align
