"""Bytes whose number only their rank knows, exchanged between ranks: the one way in which objects travel in
collectives. How an object becomes bytes is the caller's affair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shardwise.comm.group import Group, Op

_SHORT = 504  # bytes that travel with their length

Gather = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""Exchanges ``(n,)`` bytes of uint8, equally many on every rank; returns one row per rank, in rank order."""


def exchange(data: bytes | torch.Tensor, gather: Gather) -> list[torch.Tensor]:
    """Every rank's bytes, in the order of ``gather``'s rows: ``(n,)`` of uint8 on the CPU, each with its own ``n``.

    Args:
        data: this rank's; a tensor is ``(n,)`` of uint8 on the CPU.
        gather: :func:`over`, :func:`among`, or something alike.

    Cost: a collective of half a KiB, and a second one if a rank has more: each rank then sends the rest, padded to the
    longest, to every other rank.
    """
    if isinstance(data, bytes):
        data = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    head = torch.zeros(8 + _SHORT, dtype=torch.uint8)
    head[:8].view(torch.int64)[0] = data.numel()
    beginning = data[:_SHORT]
    head[8 : 8 + beginning.numel()] = beginning
    rows = gather(head)
    sizes = [int(row[:8].clone().view(torch.int64)) for row in rows]
    whole = [row[8:].clone() for row in rows]  # in memory of their own: views of another dtype need an aligned start
    if (rest := max(sizes) - _SHORT) > 0:
        tail = torch.zeros(rest, dtype=torch.uint8)
        tail[: max(data.numel() - _SHORT, 0)] = data[_SHORT:]
        whole = [torch.cat([a, b]) for a, b in zip(whole, gather(tail), strict=True)]
    return [row[:size] for row, size in zip(whole, sizes, strict=True)]


def in_place(rank: int, size: int, fill: Callable[[torch.Tensor], object]) -> Gather:
    """Through a collective that fills ``(size * n,)`` in place, in which chunk ``rank`` lies already."""

    def gather(mine: torch.Tensor) -> Sequence[torch.Tensor]:
        flat = torch.zeros(size * mine.numel(), dtype=torch.uint8)
        rows = flat.view(size, -1)
        rows[rank] = mine
        fill(flat)
        return list(rows)

    return gather


def over(group: Group, op: Op) -> Gather:
    """Through all ranks of a group, as one collective."""
    return in_place(group.rank, group.size, lambda flat: group.all_gather(flat, op).wait())


def among(group: Group, ranks: Sequence[int], op: Op) -> Gather:
    """Through some ranks of a group, in the order given; only they take part."""
    others = [r for r in ranks if r != group.rank]

    def gather(mine: torch.Tensor) -> Sequence[torch.Tensor]:
        rows = {r: torch.empty_like(mine) for r in others}
        if others and mine.numel():
            group.wait(group.exchange([(mine, r) for r in others], [(rows[r], r) for r in others], op), op)
        rows[group.rank] = mine
        return [rows[r] for r in ranks]

    return gather


def to_bytes(row: torch.Tensor) -> bytes:
    """What a row holds, as Python's bytes."""
    return row.numpy().tobytes()
